"""Text classification: one label for each text, by a classification head on the base model.

Shapes: b = examples in a batch, t = tokens, c = classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedlora.assets import Checkpoint
from fedlora.tasks._base import Batch, Examples, Table, tasks, without_cache
from fedlora.tasks._classification import Classification, classes_of
from fedlora.tasks._text import digest_tokenizer, encode, load_tokenizer, tokens_of


@tasks.register("text-classification")
@dataclass(frozen=True)
class TextClassification(Classification):
    """One label for each text.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included.
        labels: names of the classes in the order of their numbers. Empty: the source's own names where it has them,
            else the labels found, sorted. A node that reads its own file needs them, since it may lack a class. A
            checkpoint whose head was trained for these very classes keeps its own order of them.
        label_smoothing: share of the training target that is spread evenly over all classes (Szegedy et al. 2016, arXiv
            1512.00567, section 7); evaluation has none.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    max_length: Annotated[int, Field(ge=4)] = 64
    labels: tuple[str, ...] = ()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def head(self) -> tuple[str, ...]:
        """Names that transformers gives to the classification head (BERT's, DistilBERT's, Llama's)."""
        return ("classifier", "pre_classifier", "score")

    def reads(self, model: str | Path | Checkpoint) -> dict[str, str]:
        """The tokeniser's hash."""
        return {"tokenizer": digest_tokenizer(model)}

    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise a table with columns "text" and "label" (strings, whole numbers or booleans).

        Raises:
            DataError: a text or label is missing; the message names the row (from 0) and the column.
        """
        known = self.labels or table.label_names
        names, labels = classes_of(table.columns[columns["label"]], columns["label"], known, model_path)
        tokens, segments = encode(model_path, table.columns[columns["text"]], columns["text"], self.max_length)
        return Examples(
            inputs={"input_ids": tokens} | ({} if segments is None else {"token_type_ids": segments}),
            labels=labels,
            lengths=tokens.lengths,
            columns={name: np.asarray(table.columns[name]) for name in keep},
            label_names=names,
        )

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The number and the names of the classes, and the padding token that some models look for."""
        return {**super().model_kwargs(examples), "pad_token_id": tokens_of(examples).pad_id}

    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """Padded to the longest text of the batch: "input_ids" and "attention_mask" [b, t], "labels" [b].

        "token_type_ids" [b, t] too where the tokeniser gives any but 0.
        """
        ids, mask = tokens_of(examples).pad(indices)
        assert examples.labels is not None
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.from_numpy(examples.labels[np.asarray(indices, dtype=np.int64)]),
        }
        if "token_type_ids" in examples.inputs:
            batch["token_type_ids"] = examples.inputs["token_type_ids"].pad(indices)[0]  # type: ignore[attr-defined]
        return batch

    def spans(
        self, examples: Examples, index: int, model_path: str | Path | Checkpoint
    ) -> tuple[tuple[str, bool], ...]:
        """The text with its special tokens, and the class, which alone is learnt."""
        assert examples.labels is not None
        text = load_tokenizer(model_path).decode(tokens_of(examples)[index].tolist())
        return (f"{text} → ", False), (examples.label_names[int(examples.labels[index])], True)

    def padding(self, examples: Examples) -> Mapping[str, int]:
        """The tokeniser's own padding, which is not looked at."""
        fill = {"input_ids": tokens_of(examples).pad_id, "attention_mask": 0}
        if "token_type_ids" in examples.inputs:
            fill["token_type_ids"] = examples.inputs["token_type_ids"].pad_id  # type: ignore[attr-defined]
        return fill

    def pads_left(self, examples: Examples) -> bool:
        """As the tokeniser says."""
        return tokens_of(examples).left

    def corrupt(self, examples: Examples, rows: np.ndarray, rate: float, seed: int) -> Examples:
        """Noise in the texts: `rate` is the share of words that are exchanged for words of other texts."""
        tokens = tokens_of(examples).corrupt(rows, rate, seed)
        return replace(examples, inputs={**examples.inputs, "input_ids": tokens})

    def logits(self, model: torch.nn.Module, batch: Batch) -> Float[Tensor, "b c"]:
        """The classification head's scores."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        scores: Tensor = model(**inputs, **without_cache(model)).logits
        return scores
