"""What saves memory leaves what is computed: smaller passes, recomputed activations, and steps that are taken again."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import client, load, random_base, random_examples, texts, together
from support.states import gap
from torch import Tensor

from fedlora.adapter import ALL_PARTS
from fedlora.config import OpenTable, TrainConfig
from fedlora.errors import ModelError
from fedlora.model import Base
from fedlora.privacy.calibrate import Schedule
from fedlora.tasks import Examples, Task, load_task
from fedlora.training import TrainJob, TrainResult
from fedlora.training.checkpointing import checkpointed
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.dropout_masks import RowDropout, row_keys
from fedlora.training.out_of_memory import OUT_OF_MEMORY
from fedlora.training.row_groups import ENTRIES, pass_cost, pass_tokens

FAMILIES = ["bert", "gpt2", "llama", "vit"]


def a_base(name: str, folder: Path, *, packing: bool = False) -> tuple[Base, Task, Examples]:
    """A tiny random model that drops out wherever it can."""
    causal = name in ("gpt2", "llama")
    targets = ("q_proj", "v_proj") if name == "vit" else ()
    base = random_base(name, folder, causal, dropout=0.1, targets=targets)
    kind = "causal-lm" if causal else "image-classification" if name == "vit" else "text-classification"
    more = {"packing": True, "max_length": 40} if packing else {}
    return base, load_task(OpenTable(name=kind, **more)), random_examples(causal, name == "vit")  # type: ignore[arg-type]


def trained(base: Base, task: Task, examples: Examples, **changes: Any) -> list[Any]:
    """Three clients that differ in ranks, batches and rates."""
    clients = [client(base, k, rank=(4, 2, 6)[k], batch_size=(8, 3, 11)[k], **changes) for k in range(3)]
    found = together(base, task, examples, clients)
    for outcome, (job, _) in zip(found, clients, strict=True):
        assert isinstance(outcome, TrainResult), outcome
        assert gap(outcome.adapter, job.adapter) > 1e-4, "it did train"
    return found


def privately(base: Base, task: Task, examples: Examples, **changes: Any) -> list[Any]:
    """Two clients with DP-SGD, whose samples, noise and masks are the same each time."""
    samples = [[np.arange(9), np.arange(3, 17)], [np.arange(5), np.empty(0, np.int64)]]
    work, settings = [], []
    for k in range(2):
        job, config = client(base, k, rank=(4, 2)[k], **changes)
        work.append((job, config))
        settings.append(PrivateSettings(Schedule(0.3, 2, 1, 8.0), 0.5, 0.05))
    return PrivateTrainingLoop(
        base,
        task,
        examples,
        work,
        settings,
        samples=[iter(rows) for rows in samples],
        generators=[torch.Generator().manual_seed(k) for k in range(2)],
        masks=lambda rows: rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
    ).run()


def alike(ones: list[Any], others: list[Any]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert isinstance(one, TrainResult), one
        assert isinstance(other, TrainResult), other
        assert gap(one.adapter, other.adapter) < 1e-10


SAVINGS = [{"micro_batch_size": 1}, {"micro_batch_size": 5}, {"gradient_checkpointing": True}]
SAVINGS.append(SAVINGS[1] | SAVINGS[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_memory_changes_no_gradient(name: str, tmp_path: Path) -> None:
    base, task, examples = a_base(name, tmp_path)
    wanted, private = trained(base, task, examples), privately(base, task, examples)
    for saving in SAVINGS:
        alike(trained(base, task, examples, **saving), wanted)
        alike(privately(base, task, examples, **saving), private)


@pytest.mark.parametrize("saving", SAVINGS, ids=str)
@pytest.mark.slow
def test_packed_rows_are_not_packed_anew(saving: dict[str, Any], tmp_path: Path) -> None:
    base, task, examples = a_base("llama", tmp_path, packing=True)
    alike(trained(base, task, examples, **saving), trained(base, task, examples))


def rows_of_passes(
    base: Base, task: Task, examples: Examples, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> list[int]:
    rows, real = [], type(task).losses

    def noted(self: Task, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        rows.append(len(batch["input_ids"]))
        return real(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(type(task), "losses", noted)
        trained(base, task, examples, **changes)
    return rows


@pytest.mark.parametrize("packing", [False, True])
def test_no_pass_has_more_rows_than_asked(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, task, examples = a_base("llama", tmp_path, packing=packing)
    assert max(rows_of_passes(base, task, examples, monkeypatch)) > 3
    assert max(rows_of_passes(base, task, examples, monkeypatch, micro_batch_size=3)) == 3


def kept(base: Base, task: Task, examples: Examples, *, save: bool) -> int:
    """Bytes of different storages that a loss keeps for its backward pass, but for the weights."""
    from torch.autograd.graph import saved_tensors_hooks

    weights = {value.untyped_storage().data_ptr() for value in (*base.model.parameters(), *base.model.buffers())}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    base.write(base.initial_adapter(0))
    base.train_mode(True)
    batch = task.collate(examples, np.arange(16))
    with saved_tensors_hooks(pack, lambda value: value):
        if save:
            with checkpointed(base.model, None):
                losses = task.losses(base.model, batch)
        else:
            losses = task.losses(base.model, batch)
    del losses
    return sum(found.values())


def test_checkpoints_keep_less(tmp_path: Path) -> None:
    base, task, examples = a_base("llama", tmp_path)
    assert kept(base, task, examples, save=True) < 0.6 * kept(base, task, examples, save=False)


def test_masks_are_drawn_again_in_any_thread(tmp_path: Path) -> None:
    base, task, examples = a_base("bert", tmp_path)
    parameters = base.write(client(base, 0)[0].adapter)
    base.train_mode(True)
    batch, keys = task.collate(examples, np.arange(8)), row_keys(0, 0, np.arange(8))

    def gradients(*, save: bool) -> list[Tensor]:
        """By a thread of its own, as autograd's is on a GPU: what is entered here is not entered there."""
        dropout = RowDropout()
        dropout.begin(keys)
        with dropout, checkpointed(base.model, dropout) if save else nullcontext():
            loss = task.losses(base.model, batch).sum()
            with ThreadPoolExecutor(1) as pool:
                return list(pool.submit(torch.autograd.grad, loss, parameters).result())

    for one, other in zip(gradients(save=True), gradients(save=False), strict=True):
        assert float((one - other).abs().max()) < 1e-12


def test_a_model_is_given_back_without_checkpoints(tmp_path: Path) -> None:
    base, task, examples = a_base("bert", tmp_path)
    before = {name: dict(vars(module)) for name, module in base.model.named_modules()}
    trained(base, task, examples, gradient_checkpointing=True)
    for name, module in base.model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert getattr(module, "gradient_checkpointing", False) is False


def test_a_model_without_a_place_for_checkpoints_is_refused() -> None:
    with (
        pytest.raises(ModelError, match=r"set train.gradient_checkpointing = false") as caught,
        checkpointed(torch.nn.Linear(1, 1), None),
    ):
        pass
    assert caught.value.code == "checkpointing-not-supported"


# ---------------------------------------------------------------------------------------------- memory that runs out


@pytest.fixture(scope="module")
def classes(tiny_bert: Path, tiny_csv: Path) -> tuple[Task, Examples]:
    return texts(tiny_bert, tiny_csv)


class Small:
    """A machine on which a pass of more tokens than `room` fails; it remembers what failed passes held."""

    def __init__(self, task: Task, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failed: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []
        real = type(task).losses

        def losses(of: Task, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
            self.alive.append(sum(held() is not None for held in self.failed))
            found = real(of, model, batch)
            if batch["input_ids"].numel() > room:
                self.failed.append(weakref.ref(found))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return found

        monkeypatch.setattr(type(task), "losses", losses)


@pytest.mark.parametrize("private", [False, True])
def test_a_step_that_does_not_fit_is_taken_again_in_smaller_passes(
    private: bool, tiny_bert: Path, classes: tuple[Task, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, examples = classes
    base = load(tiny_bert, task, examples, dropout=0.1)
    train = privately if private else trained
    wanted = train(base, task, examples)
    machine = Small(task, 100, monkeypatch)
    alike(train(base, task, examples), wanted)
    assert machine.failed, "memory did run out"
    assert not any(machine.alive), "what a failed step held is gone before the next one"
    assert base.pass_tokens is not None
    assert pass_cost(base).most == base.pass_tokens <= 100
    failures = len(machine.failed)
    alike(train(base, task, examples), wanted)
    assert len(machine.failed) == failures, "the base remembers what fits"


def test_a_client_that_does_not_fit_alone_fails_by_itself_and_names_every_cure(
    tiny_bert: Path, classes: tuple[Task, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, examples = classes
    base = load(tiny_bert, task, examples)
    order = np.argsort(examples.lengths)
    jobs = [TrainJob(base.initial_adapter(0), ALL_PARTS, rows, 0) for rows in (order[:8], order[-8:])]
    clients = [(job, TrainConfig(steps=2, batch_size=4)) for job in jobs]
    Small(task, int(examples.lengths[order[7]]), monkeypatch)
    short, long = together(base, task, examples, clients)
    assert isinstance(short, TrainResult)
    assert isinstance(long, Exception)
    assert long.code == OUT_OF_MEMORY  # type: ignore[attr-defined]
    for key in ("batch_size", "max_length", "micro_batch_size", "gradient_checkpointing"):
        assert key in str(long)
    assert "\n" not in str(long)


def test_a_batch_that_cannot_be_cut_and_does_not_fit_fails_at_once(
    tiny_bert: Path, classes: tuple[Task, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, examples = classes
    base = load(tiny_bert, task, examples)
    base.coupled = "an example's result depends on those beside it"
    machine = Small(task, 10, monkeypatch)
    (found,) = together(base, task, examples, [client(base, 0, batch_size=8)])
    assert found.code == OUT_OF_MEMORY  # type: ignore[union-attr]
    assert len(machine.failed) == 1
    assert base.pass_tokens is None, "no size of pass would help"


def test_a_step_whose_move_has_begun_is_not_taken_again(
    tiny_bert: Path, classes: tuple[Task, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.training.row_optimizer import FlatOptimizer

    task, examples = classes
    base = load(tiny_bert, task, examples)
    steps, real = [], FlatOptimizer.step

    def fails(self: FlatOptimizer, *args: Any) -> None:
        steps.append(1)
        real(self, *args)
        raise MemoryError

    monkeypatch.setattr(FlatOptimizer, "step", fails)
    found = together(base, task, examples, [client(base, 0), client(base, 1)])
    assert len(steps) == 1
    assert [getattr(outcome, "code", "") for outcome in found] == [OUT_OF_MEMORY] * 2


def test_a_gpus_pass_goes_by_the_width_of_hidden_states(tmp_path: Path) -> None:
    """And not by that of the widest layer, whose input a model has one at a time."""
    base = random_base("llama", tmp_path, causal=True, targets=("q_proj", "down_proj"))
    hidden, inner = base.model.config.hidden_size, base.model.config.intermediate_size  # type: ignore[union-attr]
    assert hidden < inner
    assert pass_tokens(base, "cuda") == ENTRIES["cuda"] // int(hidden)  # type: ignore[arg-type]
    assert pass_tokens(base, "cpu") == ENTRIES["cpu"] // int(inner)  # type: ignore[arg-type]
