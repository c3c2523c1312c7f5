"""One example more moves the noise-free sum of a private step by no more than C, whatever a user switches on.

Everything random is on: dropout of the base, of its attention and of the adapter, stochastic depth where the family has
it. An example has the same masks in every company, by streams that the tests give; production takes fresh ones.
The example is put first, so that masks by place in the batch would move everybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from random_models import loaded
from support.errors import raises
from torch import Tensor
from torch.nn import Module

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators import Aggregator, ClientSpec, GlobalState
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.fedsb import FedSb
from fedlora.aggregators.ravan import Ravan
from fedlora.config import TrainConfig
from fedlora.errors import PrivacyError
from fedlora.model import Base
from fedlora.privacy.calibrate import Schedule
from fedlora.privacy.dpsgd import clipping_norm
from fedlora.speedups.attention import choose_attention
from fedlora.tasks import Examples, Task
from fedlora.training import TrainJob, TrainResult
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.dropout_masks import Keys, Masks, RowDropout, secret_keys
from fedlora.training.opacus_loop import train_by_opacus
from fedlora.training.step import Client

C = 0.01
OTHERS = 8
ADDED = 200
FEDAVG = FedAvg()


def moved(base: Base, rule: Aggregator = FEDAVG) -> AdapterState:
    """A rule's adapter that has come a way from its start, where A's gradients are zero."""
    state = rule.init(base.initial_adapter(0)).adapter
    generator = torch.Generator().manual_seed(1)
    return state.with_tensors(
        {
            name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype)
            for name, value in state.tensors().items()
        }
    )


def own_masks(indices: np.ndarray) -> Keys:
    return np.asarray(indices + 1000, dtype=np.uint64)


def noise_free_sums(
    base: Base,
    task: Task,
    examples: Examples,
    batches: Sequence[np.ndarray],
    path: str,
    masks: Masks | None = own_masks,
    expected: float = 1.0,
    rule: Aggregator = FEDAVG,
) -> list[Tensor]:
    """What a private step adds up for each batch before its noise; on the Opacus path the step is taken back."""
    start = moved(base, rule)
    trains = rule.plan(GlobalState(start), ClientSpec(0, start.layout)).trains
    config = TrainConfig(optimizer="sgd", lr=1.0)
    how = PrivateSettings(Schedule(1.0, 1, 1, expected), 1e-13 if path == "opacus" else 1.0, C)
    jobs = [TrainJob(start, trains, batch, 7) for batch in batches]
    if path == "opacus":
        found = [train_by_opacus(base, task, examples, job, config, how, masks=masks) for job in jobs]
        before = start.tensors()
        changes = [
            {name: expected * (before[name] - value) for name, value in one.adapter.tensors().items()} for one in found
        ]
        return [torch.cat([change[name].double().flatten() for name in sorted(change)]) for change in changes]
    sums: list[tuple[int, Tensor]] = []
    groups = [jobs] if path == "cohort" else [[job] for job in jobs]
    with pytest.MonkeyPatch.context() as patch:
        real = PrivateTrainingLoop._step_with_noise

        def noted(self: PrivateTrainingLoop, client: Client) -> None:
            sums.append((client.row, self._sums[id(client)].double().clone()))
            real(self, client)

        patch.setattr(PrivateTrainingLoop, "_step_with_noise", noted)
        for group in groups:
            work = [(job, config) for job in group]
            outcomes = PrivateTrainingLoop(base, task, examples, work, [how] * len(group), masks=masks).run()
            assert all(isinstance(outcome, TrainResult) for outcome in outcomes), outcomes
    order = np.argsort([row for row, _ in sums], kind="stable")
    return [sums[number][1] for number in order]


def largest_movement(
    base: Base,
    task: Task,
    examples: Examples,
    path: str,
    added: int = ADDED,
    others: int = OTHERS,
    masks: Masks = own_masks,
    expected: float = 1.0,
    rule: Aggregator = FEDAVG,
) -> float:
    """max over x of |S(D + x) - S(D)| / C."""
    D = np.arange(others)
    batches = [np.concatenate([[others + number], D]) for number in range(added)]
    without, *with_one = noise_free_sums(base, task, examples, [D, *batches], path, masks, expected, rule)
    return max(float((found - without).norm()) for found in with_one) / C


def checked(base: Base, task: Task, examples: Examples) -> None:
    choose_attention(base.model)  # as in a run
    check_model(base, task, examples, TrainJob(moved(base), ALL_PARTS, np.empty(0, np.int64), 0))


TEXT = ("DistilBert", "Roberta", "Camembert", "Electra", "Albert", "Deberta", "DebertaV2", "GPT2", "Llama", "Qwen2")
PICTURES = ("ViT", "Beit", "Dinov2")
OTHER_TASKS = (
    ("Bert", "Regression"),  # of pairs of texts
    ("Bert", "MultiLabel"),
    ("Bert", "TokenClassification"),
    ("T5", "Seq2Seq"),
    ("Bart", "Seq2Seq"),
    ("Llama", "Preference"),
)
REFERRING = ("Preference",)
"""Tasks with a reference model, which Opacus's hooks do not have."""
REFUSED = {
    "FNet": "examples-coupled",
    "Nystromformer": "examples-coupled",
    "Yoso": "examples-coupled",
    "MobileBert": "examples-coupled",
    "ConvBert": "examples-coupled",
    "XLNet": "dropout-not-per-example",
    "Funnel": "dropout-not-per-example",
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Task, Examples]:
    """With dropout of its states, its attention and its adapter."""
    return loaded(tmp_path_factory.mktemp("bert"), "Bert", num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "added", "others"),
    [("cohort", 200, 3), pytest.param("alone", 20, 8, marks=pytest.mark.nightly), ("opacus", 20, 8)],
)
def test_one_example_more_moves_berts_sum_by_c(
    bert: tuple[Base, Task, Examples], path: str, added: int, others: int
) -> None:
    checked(*bert)
    assert 0.99 < largest_movement(*bert, path, added, others) <= 1.001


@pytest.mark.slow
@pytest.mark.parametrize("path", ["cohort", "alone"])
@pytest.mark.parametrize("rule", [FedSb(), Ravan(2)], ids=repr)
def test_one_example_more_moves_the_sum_of_cores_by_c(
    bert: tuple[Base, Task, Examples], rule: Aggregator, path: str
) -> None:
    """With the factors of a core's blocks, which are in the sum as the blocks are."""
    checked(*bert)
    assert 0.99 < largest_movement(*bert, path, 20, 3, rule=rule) <= 1.001


@pytest.mark.parametrize("path", ["alone", "opacus"])
def test_masks_by_place_in_the_batch_move_everybody(bert: tuple[Base, Task, Examples], path: str) -> None:
    def by_place(indices: np.ndarray) -> Keys:
        return np.arange(len(indices), dtype=np.uint64)

    assert largest_movement(*bert, path, 3, masks=by_place) > 1.2, "the law sees it"


def test_production_draws_each_examples_masks_from_the_operating_system() -> None:
    dropout, drawn = RowDropout(), []
    for _ in range(2):
        dropout.begin(secret_keys(np.arange(40)))
        drawn.append(dropout.noise(torch.Size([40, 64]), 0.5, torch.empty(0)))
    bits = torch.cat(drawn) > 0
    assert len({tuple(row.tolist()) for row in bits}) == 80, "no two are the same, of another step neither"
    agree = (bits[:, None] == bits[None]).float().mean(2)[~torch.eye(80, dtype=torch.bool)]
    assert 0.49 < float(agree.mean()) < 0.51
    assert float(agree.max()) < 0.9


@pytest.mark.parametrize("path", ["alone", "opacus"])
def test_no_two_private_steps_have_the_same_masks(bert: tuple[Base, Task, Examples], path: str) -> None:
    """The run's seed is public and the same in both; noise is next to none."""
    batches = [np.arange(12)] * 2
    secret, again = noise_free_sums(*bert, batches, path, secret_keys)
    assert float((secret - again).norm()) > 0.1 * C
    given, same = noise_free_sums(*bert, batches, path, own_masks)
    assert float((given - same).norm()) < 1e-6 * C
    production = noise_free_sums(*bert, batches, path, None)
    assert float((production[0] - production[1]).norm()) > 0.1 * C


def tiers(cases: Iterable[tuple[object, ...]], *slow: tuple[object, ...]) -> list[Any]:
    """A few cases in the slow tier, all others, each of which may take a minute, in the nightly one."""
    return [pytest.param(*case, marks=pytest.mark.slow if case in slow else pytest.mark.nightly) for case in cases]


@pytest.mark.parametrize(
    ("kind", "path"),
    tiers(product([*TEXT, *PICTURES], ["cohort", "opacus"]), ("Llama", "cohort")),
)
def test_one_example_more_moves_the_sum_of_any_family_by_c(kind: str, path: str, tmp_path: Path) -> None:
    what = "ImageClassification" if kind in PICTURES else "SequenceClassification"
    base, task, examples = loaded(tmp_path, kind, what, depth=0.2 if kind in PICTURES else 0.0)
    checked(base, task, examples)
    assert 0.99 < largest_movement(base, task, examples, path, others=3) <= 1.001


@pytest.mark.parametrize(("kind", "path"), tiers(product(["GPT2", "Llama", "Qwen2"], ["cohort", "opacus"])))
def test_one_continuation_more_moves_the_sum_by_c(kind: str, path: str, tmp_path: Path) -> None:
    base, task, examples = loaded(tmp_path, kind, "CausalLM")
    checked(base, task, examples)
    assert 0.99 < largest_movement(base, task, examples, path, others=3) <= 1.001


@pytest.mark.parametrize(
    ("kind", "what", "path"),
    tiers(((*each, path) for each, path in product(OTHER_TASKS, ["cohort", "opacus"]))),
)
def test_one_example_more_moves_the_sum_of_any_task_by_c(kind: str, what: str, path: str, tmp_path: Path) -> None:
    base, task, examples = loaded(tmp_path, kind, what)
    checked(base, task, examples)
    if what in REFERRING and path == "opacus":
        with raises(PrivacyError, "reference-with-hooks", "adapter.method = 'lora'"):
            largest_movement(base, task, examples, path, added=1, others=3)
        return
    assert 0.99 < largest_movement(base, task, examples, path, others=3) <= 1.001


@pytest.mark.parametrize(
    ("dtype", "others"),
    tiers(product(["float32", "float16", "bfloat16"], [1, 8, 16, 31, 63, 200])),
)
def test_room_is_left_for_what_rounding_adds(dtype: str, others: int, tmp_path: Path) -> None:
    base, task, examples = loaded(tmp_path, "Bert", dtype=dtype)
    checked(base, task, examples)
    assert 0.4 < largest_movement(base, task, examples, "alone", 4, others, expected=others) <= 1.0


@pytest.mark.parametrize(
    ("kind", "what", "path"),
    tiers(
        [
            *product(["Bert", "Llama", "GPT2"], ["SequenceClassification"], ["alone", "cohort", "opacus"]),
            *product(["Llama", "GPT2"], ["CausalLM"], ["cohort", "opacus"]),
            ("ViT", "ImageClassification", "cohort"),
            *product(["Bert"], ["Regression", "MultiLabel", "TokenClassification"], ["cohort", "opacus"]),
            *product(["T5", "Bart"], ["Seq2Seq"], ["cohort", "opacus"]),
            ("Llama", "Preference", "cohort"),
        ],
        ("Llama", "CausalLM", "cohort"),
    ),
)
def test_one_example_more_moves_the_sum_over_a_base_in_4_bits_by_no_more_than_c(
    kind: str, what: str, path: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base, task, examples = loaded(tmp_path, kind, what, dtype="float32", quantize="nf4")
    checked(base, task, examples)
    # Opacus's step is taken back through float32 parameters, which round.
    most = 1.01 if path == "opacus" else 1.0
    assert 0.4 < largest_movement(base, task, examples, path, added=20, others=3) <= most


@pytest.mark.parametrize(("kind", "width"), tiers([("T5", 512), ("Bart", 1024)], ("T5", 512)))
def test_a_wide_base_in_4_bits_is_refused_for_coupling_and_not_for_rounding(
    kind: str, width: int, tmp_path: Path
) -> None:
    """Attention over wide random layers makes of bitsandbytes' rounding some thousandths of a gradient."""
    pytest.importorskip("bitsandbytes")
    base, task, examples = loaded(tmp_path, kind, "Seq2Seq", dtype="float32", quantize="nf4", d_model=width)
    checked(base, task, examples)
    assert 0.4 < largest_movement(base, task, examples, "cohort", added=4, others=3, expected=3) <= 1.0
    base.checked.clear()
    encoder = base.model.get_encoder()  # type: ignore[operator]

    def mix(module: Module, given: object, states: Tensor) -> Tensor:
        return states - 1e-4 * states[:, :1].mean(0)

    (encoder.final_layer_norm if kind == "T5" else encoder.layernorm_embedding).register_forward_hook(mix)
    with raises(PrivacyError, "examples-coupled"):
        checked(base, task, examples)


def test_a_bfloat16_base_clips_lower_and_float64_does_not() -> None:
    limits = {dtype: clipping_norm(2.0, dtype, 32.0) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    assert limits[torch.float64] == 2.0
    assert limits[torch.float32] == pytest.approx(2.0 / np.sqrt(1 + 64 * 4e-6), rel=1e-12)
    assert limits[torch.bfloat16] == pytest.approx(2.0 / np.sqrt(1.64), rel=1e-12)
    assert clipping_norm(2.0, torch.int8, 32.0) == limits[torch.bfloat16], "an unknown one is taken as the coarsest"


@pytest.mark.parametrize("kind", ["MobileBert", "FNet"])
def test_a_family_that_couples_examples_is_refused(kind: str, tmp_path: Path) -> None:
    base, task, examples = loaded(tmp_path, kind)
    with raises(PrivacyError, REFUSED[kind]):
        checked(base, task, examples)


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "code"), REFUSED.items())
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_family_that_couples_examples_is_refused_in_any_dtype(
    kind: str, code: str, dtype: str, tmp_path: Path
) -> None:
    base, task, examples = loaded(tmp_path, kind, dtype=dtype)
    if (kind, dtype) == ("FNet", "bfloat16"):
        code = "no-per-sample-gradients"  # torch has no Fourier transform of it
    with raises(PrivacyError, code):
        checked(base, task, examples)


def test_texts_of_one_length_show_what_padding_does(tmp_path: Path) -> None:
    base, task, examples = loaded(tmp_path, "FNet")
    same = examples.take(np.flatnonzero(examples.lengths == 12))
    with raises(PrivacyError, "examples-coupled"):
        checked(base, task, same)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "code"),
    [(1.0, "randomness-not-per-example"), (1e-9, "dropout-not-per-example")],  # of a layer that stays, masks come first
)
def test_layers_left_out_for_a_whole_batch_are_refused(tmp_path: Path, share: float, code: str) -> None:
    base, task, examples = loaded(tmp_path, "OPT", layerdrop=share)
    with raises(PrivacyError, code, "model.dropout = 0"):
        checked(base, task, examples)
