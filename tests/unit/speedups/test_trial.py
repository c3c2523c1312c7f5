"""What is tried out when a base is opened: what changes a model's results is switched off, or refused if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises
from support.states import gap

import fedlora.speedups.attention
from fedlora.adapter import ALL_PARTS
from fedlora.config import TrainConfig, parse_config
from fedlora.errors import FedloraError, ModelError
from fedlora.simulation.capacity import cohort_size
from fedlora.speedups.attention import TOKENS
from fedlora.training import TrainJob, evaluate, open_workspace, train
from fedlora.training.cohort import train_cohort, why_alone
from fedlora.training.row_groups import leaves_padding_out
from fedlora.training.workspace import Workspace, close_workspace

pytestmark = pytest.mark.usefixtures("no_workspace")


def bench_of(model: Path, data: Path, *overrides: str) -> Workspace:
    given = [
        f"model.name='{model}'",
        "model.dtype=float64",
        f"data.source='{data}'",
        "adapter.rank=2",
        "runtime.threads=1",
        "runtime.kernels=off",
        "runtime.device=cpu",
        *overrides,
    ]
    if not any(override.startswith("adapter.targets") for override in overrides):
        given.append("adapter.targets=['query','value']")
    return open_workspace(parse_config("", given))


def encoder(kind: str, tokenizer: Path, folder: Path, **fields: Any) -> Path:
    """A random classifier with `tiny_bert`'s tokeniser."""
    import transformers

    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(loaded), pad_token_id=loaded.pad_token_id, num_labels=2, initializer_range=0.3,
        **size, **still, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder


COUPLED: dict[str, dict[str, Any]] = {
    "FNet": {},
    "Nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4},
    "MobileBert": {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
    "ConvBert": {"embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3},
}


@pytest.mark.parametrize("kind", ["FNet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(COUPLED)[1:])])
def test_where_padding_shows_clients_go_alone_and_nothing_is_kept(
    kind: str, tiny_bert: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    """Whoever is in a client's company, and in whatever batch a text is evaluated, the result is the same."""
    folder = encoder(kind, tiny_bert, tmp_path, **COUPLED[kind])
    workspace = bench_of(
        folder, tiny_csv, "adapter.targets=all-linear", "adapter.modules_to_save=['classifier']", "data.limit=48"
    )  # fmt: skip
    base, data = workspace.base, workspace.data.train
    assert "padded" in (base.coupled or "")
    assert why_alone(base) == base.coupled
    choice = cohort_size(workspace, 8)
    assert choice.clients == 1
    assert base.coupled in choice.reason
    order = np.argsort(data.lengths)
    state, how = base.initial_adapter(0), TrainConfig(steps=2, batch_size=4, lr=0.1, optimizer="sgd")
    jobs = [TrainJob(state, ALL_PARTS, rows, 0) for rows in (order[:4], order[-4:])]
    alone = train(base, workspace.task, data, jobs[0], how).adapter
    company = train_cohort(base, workspace.task, data, jobs, [how, how])[0].adapter  # type: ignore[union-attr]
    assert gap(alone, company) == 0
    base.write(alone)
    whole = evaluate(base, workspace.task, data).measures["loss"]
    few = evaluate(base, workspace.task, data, indices=order[:3]).measures["loss"]
    np.testing.assert_array_equal(whole[order[:3]], few)
    close_workspace()
    with raises(ModelError, "prefix-cache-not-supported", "runtime.prefix_cache"):
        bench_of(
            folder, tiny_csv, "adapter.targets=all-linear", "adapter.layers=top:1", "runtime.prefix_cache=on",
            "adapter.modules_to_save=['classifier']",
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_does_not_look_at_padding_trains_in_company(dtype: str, tiny_bert: Path, tiny_csv: Path) -> None:
    workspace = bench_of(tiny_bert, tiny_csv, f"model.dtype={dtype}")
    assert workspace.base.coupled is None
    assert why_alone(workspace.base) is None
    assert workspace.speedups.attention.mode == "auto"


def test_layers_that_do_not_see_rows_first_are_found_at_the_start(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    """DeBERTa projects relative positions too: clients cannot be told apart there."""
    folder = encoder(
        "DebertaV2", tiny_bert, tmp_path, relative_attention=True, pos_att_type=["p2c"], position_buckets=8,
        share_att_key=True, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    workspace = bench_of(folder, tiny_csv, "adapter.targets=['query_proj','key_proj']")
    assert "rows" in (why_alone(workspace.base) or "")
    workspace.base.alone = None
    assert why_alone(workspace.base) is None


def test_an_attention_that_changes_the_model_is_taken_back(
    tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = bench_of(tiny_bert, tiny_csv, "runtime.attention=sdpa")
    wanted.base.write(wanted.base.initial_adapter(0))
    figures = evaluate(wanted.base, wanted.task, wanted.data.test).overall
    close_workspace()
    own = fedlora.speedups.attention.attend

    def other(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "scaling": 0.9 * (kwargs.get("scaling") or 0.25)})

    monkeypatch.setattr(fedlora.speedups.attention, "attend", other)
    workspace = bench_of(tiny_bert, tiny_csv)
    assert workspace.speedups.attention.mode == "sdpa"
    assert "changes what" in workspace.speedups.choices["attention_why"]
    workspace.base.write(workspace.base.initial_adapter(0))
    assert evaluate(workspace.base, workspace.task, workspace.data.test).overall == figures


def test_a_model_whose_other_rows_are_read_keeps_them(
    tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a later version of transformers pooled the mean of all tokens."""
    from transformers.models.bert.modeling_bert import BertPooler

    own = BertPooler.forward

    def pooled(self: Any, states: torch.Tensor) -> torch.Tensor:
        return own(self, states.mean(1, keepdim=True))  # type: ignore[no-any-return]

    monkeypatch.setattr(BertPooler, "forward", pooled)
    workspace = bench_of(tiny_bert, tiny_csv)
    layers: Any = workspace.base.model.get_submodule("bert.encoder.layer")
    assert not any(module._forward_pre_hooks for module in layers[-1].modules())
    assert workspace.speedups.attention.mode == "auto"
    assert "padded" in (workspace.base.coupled or "")


def test_a_model_that_does_not_say_which_tokens_there_are_keeps_its_padding(
    tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a later version of transformers handed keyword arguments on no more."""
    from transformers.models.bert.modeling_bert import BertAttention

    workspace = bench_of(tiny_bert, tiny_csv)
    assert workspace.base.needs_padding is None
    assert leaves_padding_out(workspace.base)
    close_workspace()
    assert not leaves_padding_out(bench_of(tiny_bert, tiny_csv, "adapter.method=dora").base), "rows cannot be tokens"
    close_workspace()
    own = BertAttention.forward

    def silent(self: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(self, states, *args, **{name: value for name, value in kwargs.items() if name != TOKENS})

    monkeypatch.setattr(BertAttention, "forward", silent)
    workspace = bench_of(tiny_bert, tiny_csv)
    assert "without padding" in (workspace.base.needs_padding or "")
    assert not leaves_padding_out(workspace.base)
    assert workspace.speedups.attention.mode == "auto"


def test_a_model_that_fails_on_all_examples_is_refused(
    tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertEmbeddings

    def fails(*_: Any, **__: Any) -> Any:
        raise IndexError("no such position")

    monkeypatch.setattr(BertEmbeddings, "forward", fails)
    with raises(FedloraError, "examples-not-computable", "no such position"):
        bench_of(tiny_bert, tiny_csv)
