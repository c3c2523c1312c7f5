"""What tasks on text share: a tokeniser that is loaded once, and token ids in one flat array.

Shapes: n = examples, b = examples in a batch, t = tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.assets import Checkpoint, cached_per_checkpoint
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.passed_in import is_copy, shown
from fedlora.provenance import tokenizer_digest
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Examples, Task

LONGEST = 1024
"""Most tokens of an example where `task.max_length` says nothing and the model takes more (TRL's default)."""
WHOLE_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "spiece.model")
"""Files that hold a whole tokenizer, whatever its class."""


@dataclass(frozen=True, eq=False)
class Tokens(Sequence[np.ndarray]):
    """Token ids of n examples of unequal length; item i is the int32 array of example i.

    Args:
        flat: ids of all examples one after the other, int32 [sum of lengths].
        starts: where each example begins in `flat`, with the end of the last one, int64 [n + 1].
        pad_id: the id that fills a batch's shorter rows.
        left: whether the tokeniser itself pads on the left; batches are padded on the right all the same.
        kept: ids that `corrupt` leaves alone: what parts the two texts of a pair.
    """

    flat: np.ndarray
    starts: np.ndarray
    pad_id: int
    left: bool = False
    kept: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Tokens: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Tokens:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.flat[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [n]."""
        return np.diff(self.starts)

    def take(self, indices: Sequence[int] | np.ndarray) -> Tokens:
        """The examples at `indices`, in that order."""
        return Tokens.join([self[int(index)] for index in indices], self.pad_id, left=self.left, kept=self.kept)

    def corrupt(self, rows: np.ndarray, rate: float, seed: int) -> Tokens:
        """Some examples with words exchanged: each token but the first and last becomes, with probability `rate`, a
        token drawn from all inner tokens of all examples (so as often as it occurs)."""
        generator = np.random.default_rng(seed)
        inner = np.ones(len(self.flat), dtype=bool)
        inner[self.starts[:-1][self.lengths > 0]] = False
        inner[self.starts[1:][self.lengths > 0] - 1] = False
        if self.kept:
            inner &= ~np.isin(self.flat, self.kept)
        mine = np.zeros(len(self), dtype=bool)
        mine[rows] = True
        places = np.flatnonzero(inner & np.repeat(mine, self.lengths))
        places = places[generator.random(len(places)) < rate]
        flat = self.flat.copy()
        if len(places):
            flat[places] = generator.choice(self.flat[inner], size=len(places))
        return replace(self, flat=flat)

    @classmethod
    def join(
        cls,
        rows: Sequence[Sequence[int] | np.ndarray],
        pad_id: int,
        *,
        left: bool = False,
        kept: tuple[int, ...] = (),
    ) -> Tokens:
        """From one sequence of ids an example."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if rows else np.zeros(0, np.int32)
        return cls(flat, starts, pad_id, left, kept)

    def pad(self, indices: Sequence[int] | np.ndarray) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Ids and attention mask of a batch, padded on the right to its longest example."""
        chosen = np.asarray(indices, dtype=np.int64)
        starts = self.starts[:-1][chosen]
        lengths = self.starts[1:][chosen] - starts
        places = np.arange(lengths.max(initial=0))
        mask = places < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = self.flat[(starts[:, None] + places)[mask]]
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def tokens_of(examples: Examples, name: str = "input_ids") -> Tokens:
    """One of the inputs of examples that are texts."""
    tokens = examples.inputs[name]
    assert isinstance(tokens, Tokens)
    return tokens


class TextTask(Task):
    """A task whose examples have a text that the model reads as it is, "input_ids"."""

    def reads(self, model: str | Path | Checkpoint) -> dict[str, str]:
        """The tokeniser's hash."""
        return {"tokenizer": digest_tokenizer(model)}

    def pads_left(self, examples: Examples) -> bool:
        """As the tokeniser says."""
        return tokens_of(examples).left

    def corrupt(self, examples: Examples, rows: np.ndarray, rate: float, seed: int) -> Examples:
        """Noise in the texts: `rate` is the share of words that are exchanged for words of other texts."""
        tokens: Tokens = tokens_of(examples).corrupt(rows, rate, seed)
        return replace(examples, inputs={**examples.inputs, "input_ids": tokens})


@cached_per_checkpoint
def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokeniser of a checkpoint.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    path = str(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, **checkpoint.options)
    except MemoryError:
        raise
    except Exception as error:  # the reader of tokenizer.json raises a bare Exception
        raise ModelError(
            f"no tokenizer can be loaded from {path!r}: {checkpoint.why_not_loaded(error)}; use a folder with "
            "tokenizer.json",
            code="tokenizer-not-loadable",
        ) from error
    _refuse_invented(tokenizer, checkpoint)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {path!r} has neither a padding nor an end-of-sequence token: add one",
                code="no-padding-token",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def most_tokens(model: str | Path | Checkpoint) -> int:
    """Most tokens of an example where `task.max_length` says nothing: `LONGEST`, or what the model takes if less."""
    checkpoint = Checkpoint.at(model)
    positions = checkpoint.config_value("max_position_embeddings", text=True)
    known = (load_tokenizer(checkpoint).model_max_length, positions)
    return min([LONGEST, *(int(limit) for limit in known if isinstance(limit, int) and limit > 0)])


@cached_per_checkpoint
def digest_tokenizer(checkpoint: Checkpoint) -> str:
    """The tokeniser's hash, by `fedlora.provenance.tokenizer_digest`."""
    return tokenizer_digest(load_tokenizer(checkpoint))


def require_text(value: Any, row: int, column: str) -> str:
    """A cell that holds text, as it is: blanks at its beginning and end are data (the indentation of code).

    Raises:
        DataError: it is no string, holds nothing but blanks, or cannot be encoded; the message names row and column.
    """
    if isinstance(value, str) and value.strip():
        return require_encodable(value, row, column)
    empty = isinstance(value, str)
    shown = "missing" if value is None else "empty" if empty else f"{clean_text(repr(value), 80)}, not a string"
    raise DataError(
        f"row {row}, column {column!r}: the text is {shown}; remove the row or fill it in", code="not-a-text"
    )


def require_encodable(text: str, row: int, column: str) -> str:
    r"""The text, unless half a character stands in it: a lone surrogate, as in the JSON string "\ud83d".

    Raises:
        DataError: so it is; no tokenizer and no file takes such a text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise DataError(
            f"row {row}, column {column!r}: character {error.start} is the lone surrogate {half}, half of a "
            "character such as an emoji that was cut in two: remove or replace it",
            code="lone-surrogate",
        ) from None
    return text


def _refuse_invented(tokenizer: Any, checkpoint: Checkpoint) -> None:
    """transformers makes a tokenizer up where a checkpoint has none: of its class, with nothing but special tokens.

    Raises:
        ModelError: the vocabulary is not the checkpoint's.
    """
    from transformers.utils.hub import cached_file

    def there(name: str) -> bool:
        quiet = dict.fromkeys(
            ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
        )
        return cached_file(checkpoint.source, name, revision=checkpoint.options["revision"], **quiet) is not None

    own = {key: name for key, name in (getattr(tokenizer, "vocab_files_names", None) or {}).items() if name}
    lacks = ""
    if own and not any(map(there, dict.fromkeys((*own.values(), *WHOLE_TOKENIZERS)))):
        lacks = " or ".join(map(repr, sorted(set(own.values()))))
    elif len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        lacks = "a vocabulary beside its special tokens"
    if lacks:
        cure = "save the tokenizer of the model that it was made from into it (tokenizer.save_pretrained)"
        if is_copy(checkpoint.source):
            cure = "pass tokenizer= beside model="
        raise ModelError(
            f"{shown(str(checkpoint))!r} has no tokenizer of its own ({lacks} is missing): {cure}",
            code="no-tokenizer",
        )


def owners_of_tokens(
    model: str | Path | Checkpoint, words: Sequence[Sequence[str]], max_length: int
) -> list[np.ndarray]:
    """The word of each token that `encode` gives for words with blanks between them, -1 for special ones.

    Args:
        model: its folder, hub name or checkpoint.
        words: of each example.
        max_length: as for `encode`.

    Raises:
        ModelError: the tokeniser does not say where a token is from.
    """
    tokenizer = load_tokenizer(model)
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {str(Checkpoint.at(model))!r} does not say which word a token is of: use a model with "
            "tokenizer.json",
            code="no-offsets",
        )
    found = []
    how = {"truncation": True, "max_length": max_length, "return_offsets_mapping": True}
    for some in words:
        ends = np.cumsum([len(word) + 1 for word in some])
        spans = np.asarray(tokenizer(" ".join(some), **how)["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        # By its last character: some tokens begin with the blank before their word.
        found.append(np.where(spans[:, 1] > spans[:, 0], np.searchsorted(ends, spans[:, 1], side="left"), -1))
    return found


def encode(
    model: str | Path | Checkpoint,
    texts: Sequence[tuple[str, Sequence[Any]]],
    max_length: int,
    *,
    target: bool = False,
) -> tuple[Tokens, Tokens | None]:
    """Token ids of texts or of pairs with the model's special tokens, cut to `max_length` tokens, and their segments.

    Of a pair the longer text is cut first. Segments (token_type_ids) are None where all are 0, which is what models
    take for granted; XLNet's and Funnel's tokenisers give the class token one of its own, BERT's the second of two
    texts.

    Args:
        model: its folder, hub name or checkpoint.
        texts: one column, or two of pairs: its name, for messages, and one string an example.
        max_length: in tokens, special tokens included.
        target: whether they are what a decoder is to write, for tokenisers that tell the two apart.

    Raises:
        DataError: a text is missing, empty or no Unicode, or the tokenizer knows none of their words.
        ConfigError: `max_length` leaves no room for words.
    """
    for column, values in texts:
        for row, text in enumerate(values):
            require_text(text, row, column)
    tokenizer, columns = load_tokenizer(model), [list(values) for _, values in texts]
    if max_length <= (marks := tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)) + len(texts) - 1:
        raise ConfigError(
            f"task.max_length = {max_length} leaves no room for words beside the {marks} special tokens: raise it",
            code="max-length-too-small",
        )
    # Without padding and masks the tokeniser's own lists are all that is built; in slices, to bound their memory.
    how = {"truncation": True, "max_length": max_length, "padding": False, "return_attention_mask": False}
    typed = "token_type_ids" in tokenizer.model_input_names and len(columns[0]) > 0
    names = ("text_target",) if target else ("text", "text_pair")[: len(columns)]

    def found_in(start: int, stop: int, typed: bool) -> Any:
        given: dict[str, Any] = {name: values[start:stop] for name, values in zip(names, columns, strict=True)}
        return tokenizer(**given, return_token_type_ids=typed, **how)

    typed = typed and any(found_in(0, 1, True)["token_type_ids"][0])
    rows: list[list[int]] = []
    types: list[list[int]] = []
    for start in range(0, len(columns[0]), 4096):
        found = found_in(start, start + 4096, typed)
        rows += found["input_ids"]
        types += found["token_type_ids"] if typed else []
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    kept = tuple(sorted(special)) if len(texts) > 1 else ()
    tokens = Tokens.join(rows, int(tokenizer.pad_token_id), left=tokenizer.padding_side == "left", kept=kept)
    segments = Tokens.join(types, int(tokenizer.pad_token_type_id)) if typed else None
    words = tokens.flat[~np.isin(tokens.flat, sorted(special))]
    if len(words) and np.all(words == tokenizer.unk_token_id):
        raise DataError(
            f"column {texts[0][0]!r}: the tokenizer of {str(Checkpoint.at(model))!r} knows none of its words: check "
            "data.text, or use a model for the language of the texts",
            code="all-words-unknown",
        )
    return tokens, segments
