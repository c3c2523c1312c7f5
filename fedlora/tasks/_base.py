"""What a task is: which model class, how text or pictures become tensors, the loss of each example, and the metric.

A task is a frozen dataclass; its fields are the keys of the config's `[task]` table.
Shapes: b = examples in a batch, t = tokens.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.assets import Checkpoint
from fedlora.errors import ConfigError, ReplyError
from fedlora.registry import Registry

Batch = dict[str, Tensor]
REFERENCE = "reference"
"""Name in a batch of what `Task.reference` gives."""
NEW_TOKENS = 32
"""Most tokens of what a `Sample` generated."""


@dataclass(frozen=True)
class Table:
    """Raw examples by column, all of one length, before the task has looked at them.

    Args:
        columns: column name -> values (a list of str, numbers, arrays or messages).
        label_names: names of the classes where the source knows them.
    """

    columns: Mapping[str, Sequence[Any]]
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


@dataclass(frozen=True)
class Examples:
    """Examples ready to be batched.

    Args:
        inputs: model inputs by name, one entry an example (token ids as int32 arrays of unequal length, pixels).
        labels: class of each example [n] as int64, or None where a task has no classes.
        lengths: cost of each example in tokens [n]; batches for evaluation are sorted by it.
        columns: the raw columns that the config names (domain, user, ...), [n] each, for partitions and figures.
        label_names: names of the classes.
        notes: what the task says of the table that they are from: how it was read, how many were cut.
        raw: the raw columns that the task read, [n] each, where `train.loop` wants them.
    """

    inputs: Mapping[str, Sequence[Any]]
    labels: np.ndarray | None
    lengths: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    raw: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def with_raw(self, table: Table) -> Examples:
        """These examples of a table with its columns as they are."""
        raw = {name: np.empty(len(self), dtype=object) for name in table.columns}
        for name, values in table.columns.items():
            raw[name][:] = list(values)
        return replace(self, raw=raw)

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """The examples at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return Examples(
            inputs={name: _take(values, rows) for name, values in self.inputs.items()},
            labels=None if self.labels is None else self.labels[rows],
            lengths=self.lengths[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            label_names=self.label_names,
            notes=self.notes,
            raw={name: values[rows] for name, values in self.raw.items()},
        )


def _take(values: Any, rows: np.ndarray) -> Any:
    if hasattr(values, "take"):  # an array, or a sequence that can do it faster than item by item
        return values[rows] if isinstance(values, np.ndarray) else values.take(rows)
    return [values[row] for row in rows]


@dataclass(frozen=True)
class Sample:
    """What a model says to a held-out prompt.

    Args:
        prompt: as text, with its special tokens.
        reference: how the example goes on.
        generated: how the model goes on, greedily.
    """

    prompt: str
    reference: str
    generated: str


class Measurable(Protocol):
    """What can be evaluated: a `Base` with the adapter that was written to it last, or a model with a fixed one."""

    @property
    def model(self) -> torch.nn.Module:
        """The model with its adapter."""

    @property
    def coupled(self) -> str | None:
        """Why an example's result depends on the examples beside it, if it does."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def train_mode(self, training: bool) -> None:
        """Dropout on or off."""

    def uncached(self) -> AbstractContextManager[None]:
        """While it lasts, the model computes everything anew."""


class Task(ABC):
    """One kind of learning problem."""

    auto_class: ClassVar[str]
    """Name of the transformers class that loads the model, such as "AutoModelForSequenceClassification"."""
    metric: ClassVar[str]
    """Name of the main one of `figures`."""
    higher_is_better: ClassVar[bool] = True
    has_classes: ClassVar[bool] = False
    """Whether examples have classes, whose names every machine must know (`task.labels`)."""
    signed_sums: ClassVar[tuple[str, ...]] = ()
    """Those of `sums` that may be negative."""
    peft_task_type: ClassVar[str | None] = None
    """PEFT's TaskType name, written into the adapter's config."""
    kept_on_cpu: ClassVar[tuple[str, ...]] = ()
    """Tensors of a batch that `losses` and `measure` want on the CPU, wherever the model is."""
    roles: ClassVar[tuple[str, ...]] = ("text", "label")
    """What the task needs of an example; the config's `[data]` table names the column of each."""
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Those of them whose cells may be empty."""
    texts_of_an_example: ClassVar[int] = 1
    """How many texts of up to `max_length` tokens an example has, each a row of its own for the model."""

    def roles_of(self, found: Collection[str] | None, named: Mapping[str, str]) -> tuple[str, ...]:
        """The roles of the columns that are read: all, unless the task knows several kinds of files.

        Args:
            found: names of a file's columns; None before any file may be looked at.
            named: role -> column, as the config has it.
        """
        return self.roles

    @property
    def refers(self) -> bool:
        """Whether the loss compares with a reference: the model that a client's round starts from.

        Then a batch that is trained on has `reference` of its examples under the name `REFERENCE`.
        """
        return False

    def reference(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b ..."]:
        """What the reference says of each example; in evaluation mode and without gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no reference")

    @property
    def rows_are_examples(self) -> bool:
        """Whether row i of every tensor of a batch belongs to example i; gradients taken example by example need it."""
        return True

    def pads_left(self, examples: Examples) -> bool:
        """Whether the model's tokeniser pads on the left; batches are padded on the right all the same."""
        return False

    @property
    def head(self) -> tuple[str, ...]:
        """Names of modules that are trained in full because the base has no trained ones (candidates; those that the
        model has are taken)."""
        return ()

    @abstractmethod
    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise or otherwise ready a table.

        Args:
            table: raw examples.
            model_path: where the model's tokeniser or image processor is: a folder, a hub name, or a checkpoint.
            columns: role -> column name, for each of `roles`: `{"text": ..., "label": ...}`.
            keep: raw columns to carry along in `Examples.columns`.
        """

    def reads(self, model: str | Path | Checkpoint) -> dict[str, str]:
        """Hashes of what the task reads of a checkpoint beside its weights, by the names of `Provenance`'s fields.

        Args:
            model: a folder, a hub name, or a checkpoint.
        """
        return {}

    def check(self, model: torch.nn.Module, sets: Sequence[Examples]) -> None:  # noqa: B027
        """Try out once, before anything is trained, whether a model can do this task.

        Args:
            model: with its adapter, as it will be called; its mode is left as it is.
            sets: examples that it will see; some may be empty.

        Raises:
            ModelError: it cannot, with the reason and the cure.
        """

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """Keyword arguments for the model's `from_pretrained`, such as `num_labels`; by default none."""
        return {}

    @abstractmethod
    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """One padded batch on the CPU."""

    def plain_inputs(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """Some examples as arguments of the model's own forward, for comparison with the model loaded elsewhere."""
        return {name: value for name, value in self.collate(examples, indices).items() if name != "labels"}

    def padding(self, examples: Examples) -> Mapping[str, int]:
        """The tensors of a batch that are padded, [rows, tokens], with what fills their shorter rows."""
        return {}

    def row_lengths(self, batch: Batch) -> np.ndarray:
        """Tokens of each row of a batch whose rows are no examples [rows]."""
        raise NotImplementedError(f"{type(self).__name__} packs no examples into rows")

    def take_rows(self, batch: Batch, rows: np.ndarray) -> tuple[Batch, np.ndarray]:
        """Some rows of a batch whose rows are no examples, as a batch of examples, and the numbers of these."""
        raise NotImplementedError(f"{type(self).__name__} packs no examples into rows")

    def tokens(self, batch: Batch) -> int | None:
        """Tokens in each row of a batch, padding included; None where all rows of all batches are of one size."""
        ids = batch.get("input_ids")
        return None if ids is None else int(ids.shape[1])

    def join(self, examples: Examples, batches: Sequence[Batch]) -> Batch:
        """Several batches as one, their rows after each other, padded to the longest.

        Args:
            examples: that they were collated from.
            batches: at least one.
        """
        if len(batches) == 1:
            return batches[0]
        fill = self.padding(examples)
        return {name: _joined([batch[name] for batch in batches], fill.get(name)) for name in batches[0]}

    @abstractmethod
    def losses(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """The loss of each example on its own (never a mean over the batch or its tokens)."""

    @abstractmethod
    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """What evaluation needs of each example, for `sums`."""

    def spans(
        self, examples: Examples, index: int, model_path: str | Path | Checkpoint
    ) -> tuple[tuple[str, bool], ...]:
        """An example as the model sees it: its text in pieces, each with whether its tokens count in the loss.

        Raises:
            ConfigError: it is no text.
        """
        raise ConfigError(f"examples of {type(self).__name__} are no texts: leave out --show", code="no-text")

    def invented(self, role: str) -> Sequence[Any] | None:
        """Four values of a role that are nobody's, to try a model on where nothing public is at hand; None: those that
        any task has for a role of this name."""
        return None

    def corrupt(self, examples: Examples, rows: np.ndarray, rate: float, seed: int) -> Examples:
        """The same examples with noise in the inputs of some: `partition.feature_noise` of one client.

        Args:
            examples: never changed.
            rows: the client's examples.
            rate: strength of the noise, from 0 (none) to 1.
            seed: of the draw.

        Raises:
            ConfigError: this kind of task has no such noise.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot add feature noise: remove partition.feature_noise", code="no-feature-noise"
        )

    def samples(
        self,
        model: torch.nn.Module,
        examples: Examples,
        indices: Sequence[int] | np.ndarray,
        model_path: str | Path | Checkpoint,
    ) -> tuple[Sample, ...]:
        """What the model says to the prompts of some examples, in `NEW_TOKENS` at most; () where it says nothing.

        Args:
            model: with its adapter written.
            examples: held out.
            indices: which of them.
            model_path: where the tokeniser is.
        """
        return ()

    @abstractmethod
    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Statistics of some examples that add up: those of two sets together are the sums of each set's.

        A client that evaluates on its own examples sends these and nothing else, so that the figures of a federation
        are those of its examples in one place.

        Args:
            measures: what `measure` gave, [n, ...] by name.

        Returns:
            Arrays of fixed shapes, "examples" (the number n) among them.
        """

    @abstractmethod
    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures of the examples that were added up: at least `metric` and "loss".

        Args:
            sums: of at least one example.
        """

    def by_class(self, sums: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Class -> figures of its examples, from the same sums; empty without classes.

        Args:
            sums: of at least one example.
            names: `Examples.label_names`.
        """
        return {}

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:  # noqa: B027
        """Refuse a client's sums that no examples give, such as more right answers than examples.

        Args:
            sums: of the right names and shapes; finite, and not negative but for `signed_sums`.

        Raises:
            ReplyError: no examples give them.
        """

    def summarise(self, measures: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures over some examples: at least `metric` and "loss"."""
        return self.figures(self.sums(measures))


def sums_of(measures: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The number of "examples", and some of their measures [n, ...] added up over them."""
    sums = {name: np.asarray(np.sum(np.asarray(measures[name], dtype=np.float64), axis=0)) for name in names}
    return {"examples": np.asarray(float(len(measures[names[0]]))), **sums}


def require_possible(holds: bool | np.bool_, what: str) -> None:
    """Raise `ReplyError` unless something holds that holds of all sums of examples.

    Args:
        holds: whether it does.
        what: is wrong where it does not.
    """
    if not holds:
        raise ReplyError(f"no examples give its sums: {what}", code="invalid-sums")


def _joined(tensors: Sequence[Tensor], fill: int | None) -> Tensor:
    if fill is None or len({tensor.shape[1] for tensor in tensors}) == 1:
        return torch.cat(tuple(tensors))
    shape = (sum(len(tensor) for tensor in tensors), max(tensor.shape[1] for tensor in tensors))
    out = tensors[0].new_full(shape, fill)
    row = 0
    for tensor in tensors:
        out[row : row + len(tensor), : tensor.shape[1]] = tensor
        row += len(tensor)
    return out


tasks: Registry[Task] = Registry("task", Task, "fedlora.tasks")


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Positions cut into batches of like length: longest times count at most `batch_tokens`, one example at least."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        # Ascending lengths: the next example would be the longest of the batch.
        if end == len(order) or int(lengths[order[end]]) * (end + 1 - start) > batch_tokens:
            yield order[start:end]
            start = end


def without_cache(model: torch.nn.Module) -> Mapping[str, bool]:
    """What keeps a model from building a cache of keys and values, which only a text that is being generated needs.

    On a GPU it costs two waits a layer, and the memory of all keys and values.
    """
    return {"use_cache": False} if _takes_use_cache(type(model).forward) else {}


@cache
def _takes_use_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def wide(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Scores in the precision of a loss: half precision would lose its last digits; double precision stays as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def to_device(task: Task, batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is, but for what the task wants on the CPU."""
    if device.type == "cpu":
        return batch
    # Apple's MPS may read the memory of a batch that is gone by then (pytorch issue 139550).
    waits_not = device.type == "cuda"
    return {
        name: value if name in task.kept_on_cpu else value.to(device, non_blocking=waits_not)
        for name, value in batch.items()
    }
