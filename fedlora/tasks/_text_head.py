"""What tasks with a head on a text, or on a pair of texts, share: how texts become inputs and inputs become scores.

Shapes: n = examples, b = examples in a batch, t = tokens, c = outputs of the head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedlora.assets import Checkpoint
from fedlora.tasks._base import Batch, Examples, Table, without_cache
from fedlora.tasks._text import TextTask, encode, load_tokenizer, tokens_of

TARGETS = "targets"
"""Name among an example's inputs of what is learnt of it where that is no class."""


@dataclass(frozen=True)
class TextHead(TextTask):
    """A head on the base model.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included.
    """

    max_length: Annotated[int, Field(ge=4)] = 64

    @property
    def head(self) -> tuple[str, ...]:
        """Names that transformers gives to the head (BERT's, DistilBERT's, Llama's)."""
        return ("classifier", "pre_classifier", "score")

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The padding token, which some models look for."""
        return {"pad_token_id": tokens_of(examples).pad_id}

    @abstractmethod
    def wanted(self, examples: Examples, indices: np.ndarray) -> Tensor:
        """What is learnt of some examples [b, ...]."""

    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """Padded to the longest text of the batch: "input_ids" and "attention_mask" [b, t], "labels" [b, ...].

        "token_type_ids" [b, t] too where the tokeniser gives any but 0.
        """
        ids, mask = tokens_of(examples).pad(indices)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": self.wanted(examples, np.asarray(indices, np.int64)),
        }
        if "token_type_ids" in examples.inputs:
            batch["token_type_ids"] = tokens_of(examples, "token_type_ids").pad(indices)[0]
        return batch

    def padding(self, examples: Examples) -> Mapping[str, int]:
        """The tokeniser's own padding, which is not looked at."""
        names = {"input_ids", "token_type_ids"} & examples.inputs.keys()
        return {"attention_mask": 0, **{name: tokens_of(examples, name).pad_id for name in names}}

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b c"]:
        """The head's scores."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        scores: Tensor = model(**inputs, **without_cache(model)).logits
        return scores


@dataclass(frozen=True)
class WholeTextHead(TextHead):
    """A head that says one thing of a text, or of two: `data.columns.text_pair` names the column of the second."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")

    def roles_of(self, found: Collection[str] | None, named: Mapping[str, str]) -> tuple[str, ...]:
        """All, but for a second text where no column of it is named."""
        return tuple(role for role in self.roles if role != "text_pair" or role in named)

    @abstractmethod
    def targets(
        self, table: Table, column: str, model_path: str | Path | Checkpoint
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """What is learnt of each example [n, ...]: classes where it is int64 [n]; and the names of the classes.

        Raises:
            DataError: a cell is not usable; the message names the row (from 0) and the column.
        """

    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise a table with the columns of "text" and "label", and of "text_pair" where `columns` has it.

        Raises:
            DataError: a text or label is missing; the message names the row (from 0) and the column.
        """
        targets, names = self.targets(table, columns["label"], model_path)
        texts = [(columns[role], table.columns[columns[role]]) for role in ("text", "text_pair") if role in columns]
        tokens, segments = encode(model_path, texts, self.max_length)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if segments is not None:
            inputs["token_type_ids"] = segments
        classes = targets.dtype == np.int64
        if not classes:
            inputs[TARGETS] = targets
        return Examples(
            inputs=inputs,
            labels=targets if classes else None,
            lengths=tokens.lengths,
            columns={name: np.asarray(table.columns[name]) for name in keep},
            label_names=names,
        )

    def wanted(self, examples: Examples, indices: np.ndarray) -> Tensor:
        """The class of each example, or the rest of what `targets` gave."""
        targets = examples.inputs[TARGETS] if examples.labels is None else examples.labels
        return torch.from_numpy(np.asarray(targets)[indices])

    @abstractmethod
    def shown(self, examples: Examples, index: int) -> str:
        """What is learnt of an example, in words."""

    def spans(
        self, examples: Examples, index: int, model_path: str | Path | Checkpoint
    ) -> tuple[tuple[str, bool], ...]:
        """The text with its special tokens, and what alone is learnt of it."""
        text = load_tokenizer(model_path).decode(tokens_of(examples)[index].tolist())
        return (f"{text} → ", False), (self.shown(examples, index), True)
