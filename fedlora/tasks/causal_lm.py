"""The task "causal-lm": continue a text; conversations train the answers alone.

Shapes: b = examples in a batch, t = tokens of the longest row, w = rows of a packed batch, k = tokens whose logits are
looked at, v = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedlora.assets import Checkpoint
from fedlora.errors import ConfigError
from fedlora.hashing import digest_of
from fedlora.tasks._base import Batch, Examples, Table, tasks
from fedlora.tasks._chat import PLAIN_TEMPLATE, TrainOn, encode_rows, learnt
from fedlora.tasks._chat_formats import FORMATS, OPTIONAL, Conversation, FormatName, read_rows, roles_of
from fedlora.tasks._decoder import Decoder, chosen_logits, longest_of
from fedlora.tasks._text import LONGEST, digest_tokenizer, load_tokenizer, most_tokens, tokens_of
from fedlora.tasks._token_loss import (
    IGNORED,
    mean_losses,
    measured_tokens,
    perplexity_figures,
    perplexity_sums,
    require_tokens,
)
from fedlora.tasks._trials import refuse_leaks


@tasks.register("causal-lm")
@dataclass(frozen=True)
class CausalLM(Decoder):
    """Language modelling on conversations or plain text.

    The loss of an example is the mean over its own counted tokens, in nats. Losses are averaged over examples, so a
    short answer weighs as much as a long one, whoever else is in the batch.

    Packing puts several short examples into one row of at most `max_length` tokens, to save padding. It changes the
    shape of the computation and nothing else: an example is still one row of the data, has its own loss, sees only its
    own tokens, and its positions begin at 0. A model for which that does not hold is refused at the start. But a row of
    the batch is no example any more (see `rows_are_examples`), so that nothing that takes gradients row by row,
    differential privacy above all, may be used with it.

    Args:
        format: what an example is; None: recognised by the columns. "messages": a column of lists of {"role",
            "content"} that end with the assistant's; "prompt-completion": a prompt and its completion, each a text
            (joined as they are, without chat template) or a list of messages; "alpaca": columns instruction, output
            and, where there is one, input; "sharegpt": a column "conversations" of {"from", "value"}; "text": a column
            of plain text.
        max_length: longer examples are cut to so many tokens: first the oldest of the prompt, until it has half of
            them, then the last of the answer. None: as many as the model takes, 1,024 at most.
        train_on: tokens that count: the last "answer" or the completion, all the assistant's "answers", or "all".
        system: a system message for conversations that have none; None leaves it to the model's chat template.
        packing: whether several short examples share a row, to save padding; see above.
        label_smoothing: share of the training target that is spread evenly over all tokens (Szegedy et al. 2016, arXiv
            1512.00567, section 7); evaluation has none.
    """

    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    kept_on_cpu: ClassVar[tuple[str, ...]] = ("labels", "segments")

    optional_roles: ClassVar[tuple[str, ...]] = OPTIONAL

    format: FormatName | None = None
    max_length: Annotated[int, Field(ge=8)] | None = None
    train_on: TrainOn = "answer"
    system: str | None = None
    packing: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        """Refuse fields of conversations where there are none."""
        if self.format == "text":
            self._require_conversations()

    def _require_conversations(self) -> None:
        if self.train_on != "answer" or self.system is not None:
            what = "train_on" if self.train_on != "answer" else "system"
            raise ConfigError(
                f"task.{what} applies to conversations, and these are plain texts: remove it", code="key-without-effect"
            )

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        """The columns' roles, of `format` or of all formats."""
        formats = FORMATS.values() if self.format is None else [FORMATS[self.format]]
        return tuple(dict.fromkeys(role for one in formats for role in (*one.roles, *one.optional)))

    def roles_of(self, found: Collection[str] | None, named: Mapping[str, str]) -> tuple[str, ...]:
        """See `fedlora.tasks._chat_formats.roles_of`."""
        return roles_of(self.format, found, named)

    @property
    def rows_are_examples(self) -> bool:
        """See `Task.rows_are_examples`: not so when packing."""
        return not self.packing

    def reads(self, model: str | Path | Checkpoint) -> dict[str, str]:
        """The hashes of the tokeniser and, for conversations, of their template."""
        found = {"tokenizer": digest_tokenizer(model)}
        if self.format != "text":
            found["chat_template"] = digest_of(load_tokenizer(model).chat_template or PLAIN_TEMPLATE)
        return found

    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise a table with the model's chat template, or with a plain one if it has none.

        Raises:
            DataError: a value is missing or of the wrong kind; the message names the row (from 0) and the column.
            ModelError: the model's chat template cannot tell where an answer begins.
        """
        tokenizer, most = load_tokenizer(model_path), self.max_length or most_tokens(model_path)
        if "text" in columns:
            self._require_conversations()
        values = {role: table.columns[column] for role, column in columns.items()}
        rows = list(read_rows(values, columns, self.system))
        encoded = encode_rows(tokenizer, rows, self.train_on, most)
        joined, labels, cut = learnt(encoded, list(columns.values())[-1], int(tokenizer.pad_token_id))
        texts = sum(not isinstance(row, Conversation) for row in rows)
        notes = [f"examples are read as {_format(columns)} ({', '.join(columns.values())})"]
        if texts and "text" not in columns:
            notes.append(
                f"{texts} of {len(rows)} prompts are texts, which their completions continue without chat template"
            )
        if cut.any():
            notes.append(
                f"{cut.sum()} of {len(rows)} examples are longer than {most} tokens and are cut (task.max_length)"
            )
        return Examples(
            inputs={"input_ids": joined, "labels": labels},
            labels=None,
            lengths=joined.lengths,
            columns={name: np.asarray(table.columns[name]) for name in keep},
            notes=tuple(notes),
        )

    def check(self, model: nn.Module, sets: Sequence[Examples]) -> None:
        """Refuse a model that sees what it is to predict, or one that packing changes; see `fedlora.tasks._trials`."""
        super().check(model, sets)
        if self.packing and (longest := longest_of(sets)) is not None:
            refuse_leaks(model, longest[: self.max_length or LONGEST], chosen_logits)

    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """A padded batch, or a packed one.

        Padded: "input_ids", "attention_mask", "labels" [b, t]; labels that do not count are -100. Packed: "input_ids",
        "labels", "position_ids", "segments" [w, t]; a token's segment is its example's place in `indices`, or -1.
        """
        ids, labels = tokens_of(examples), tokens_of(examples, "labels")
        if self.packing:
            return _packed([(ids[int(i)], labels[int(i)]) for i in indices], ids.pad_id, self.max_length or LONGEST)
        padded, mask = ids.pad(indices)
        return {"input_ids": padded, "attention_mask": mask, "labels": labels.pad(indices)[0]}

    def padding(self, examples: Examples) -> Mapping[str, int]:
        """Labels that do not count, and positions and segments of nobody."""
        pad = tokens_of(examples).pad_id
        return {"input_ids": pad, "attention_mask": 0, "labels": IGNORED, "position_ids": 0, "segments": -1}

    def join(self, examples: Examples, batches: Sequence[Batch]) -> Batch:
        """As for every task; packed examples are numbered on from batch to batch."""
        if "segments" in batches[0]:
            numbered, count = [], 0
            for batch in batches:
                segments = batch["segments"]
                numbered.append({**batch, "segments": torch.where(segments < 0, segments, segments + count)})
                count += int(segments.max()) + 1
            batches = numbered
        return super().join(examples, batches)

    def row_lengths(self, batch: Batch) -> np.ndarray:
        """Tokens of each packed row, without padding."""
        return (batch["segments"] >= 0).sum(dim=1).numpy()

    def take_rows(self, batch: Batch, rows: np.ndarray) -> tuple[Batch, np.ndarray]:
        """Some packed rows, no longer than their longest, with their examples numbered from 0 in the batch's order."""
        width = int(self.row_lengths(batch)[rows].max())
        taken = {name: value[torch.from_numpy(rows), :width] for name, value in batch.items()}
        numbers = torch.unique(taken["segments"])
        numbers = numbers[numbers >= 0]
        taken["segments"] = torch.where(taken["segments"] < 0, -1, torch.searchsorted(numbers, taken["segments"]))
        return taken, numbers.numpy()

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """Mean cross entropy of each example's counted tokens, in nats, with the labels smoothed."""
        return mean_losses(model, batch, self.label_smoothing)[0]

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """For each example: "loss" as in `losses`, how many "tokens" count, and whether it is "exact" (1 or 0): each of
        them is the likeliest after those before it, so that the model says just that when it decodes greedily."""
        loss, tokens, missed = measured_tokens(model, batch)
        return {"loss": loss, "tokens": tokens, "exact": missed == 0}

    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `perplexity_sums`."""
        return perplexity_sums(measures)

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """See `perplexity_figures`."""
        return perplexity_figures(sums)

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """An example has one token that counts at least, and at most `max_length`."""
        require_tokens(sums, self.max_length or math.inf)


def _format(roles: Collection[str]) -> str:
    return next(name for name, one in FORMATS.items() if set(one.roles) <= set(roles))


def _packed(rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int, length: int) -> Batch:
    """Examples in as few rows of `length` tokens as first fit, longest first, finds."""
    room: list[int] = []
    held: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):
        size = len(rows[number][0])
        place = next((w for w, free in enumerate(room) if free >= size), len(room))
        if place == len(room):
            room.append(length)
            held.append([])
        room[place] -= size
        held[place].append(number)
    shape = (len(held), max((length - free for free in room), default=0))
    fill = {"input_ids": pad_id, "labels": IGNORED, "position_ids": 0, "segments": -1}
    batch = {name: np.full(shape, value, dtype=np.int64) for name, value in fill.items()}
    for place, numbers in enumerate(held):
        start = 0
        for number in numbers:
            ids, labels = rows[number]
            part = (place, slice(start, start + len(ids)))
            batch["input_ids"][part], batch["labels"][part] = ids, labels
            batch["position_ids"][part], batch["segments"][part] = np.arange(len(ids)), number
            start += len(ids)
    return {name: torch.from_numpy(values) for name, values in batch.items()}
