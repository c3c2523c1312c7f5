"""Token classification: a tag for each word, as in named entity recognition.

Shapes: n = examples, b = examples in a batch, t = tokens, k = tokens that are tagged, c = tags, e = types of entities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.assets import Checkpoint
from fedlora.errors import ConfigError, DataError, nearest
from fedlora.model.classes import in_trained_order, trained_classes
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Table, require_possible, sums_of, tasks, wide
from fedlora.tasks._class_figures import figures_by_class
from fedlora.tasks._classification import class_kwargs
from fedlora.tasks._text import Tokens, encode, load_tokenizer, owners_of_tokens, require_text, tokens_of
from fedlora.tasks._text_head import TARGETS, TextHead
from fedlora.tasks._token_loss import IGNORED

OUTSIDE = "O"


@tasks.register("token-classification")
@dataclass(frozen=True)
class TokenClassification(TextHead):
    """Entities in texts, by a tag for each word in IOB2: B-PER begins an entity of the type PER, I-PER goes on with it,
    O is outside of all.

    Words and tags are lists of one length, or texts with blanks between them. A word's first token has its tag; other
    tokens do not count. The loss of an example is the mean cross entropy of its counted tokens, in nats.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included; their number is said.
        labels: the tags in the order of their numbers. Empty: O, and B- and I- of each type that is found, sorted. A
            node that reads its own file needs them, since it may lack a type, and so do tags that are numbers. A
            checkpoint whose head was trained for these very tags keeps its own order of them.
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    has_classes: ClassVar[bool] = True
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    roles: ClassVar[tuple[str, ...]] = ("tokens", "tags")

    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse tags that are no IOB2."""
        if self.labels:
            types = {name[2:] for name in self.labels if name != OUTSIDE}
            wanted = _tags(types)
            if set(self.labels) != set(wanted) or len(self.labels) != len(wanted) or not types or "" in types:
                raise ConfigError(
                    f"task.labels are no tags of IOB2: name O, and B- and I- of each type, as in {', '.join(_EXAMPLE)}",
                    code="not-iob2",
                )

    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise a table of words and tags.

        Raises:
            DataError: words and tags do not fit each other, or the tags are no IOB2; the message names the row.
            ModelError: the tokeniser does not say which word a token is of.
        """
        words = [_cell(cell, row, columns["tokens"], str) for row, cell in enumerate(table.columns[columns["tokens"]])]
        for row, some in enumerate(words):
            for word in some:
                require_text(word, row, columns["tokens"])
        given = [_cell(cell, row, columns["tags"], str, int) for row, cell in enumerate(table.columns[columns["tags"]])]
        names = self.labels or table.label_names or _found(given, columns["tags"])
        names = in_trained_order(names, trained_classes(model_path)) or names
        places = {name: place for place, name in enumerate(names)}
        tags = []
        for row, (some, own) in enumerate(zip(words, given, strict=True)):
            if len(some) != len(own):
                raise DataError(
                    f"row {row}: {len(some)} words (column {columns['tokens']!r}) have {len(own)} tags (column "
                    f"{columns['tags']!r}): give each word one, or remove the row",
                    code="words-without-tags",
                )
            tags.append(_require_iob2(own, self.labels or table.label_names, places, row, columns["tags"]))
        texts = [" ".join(some) for some in words]
        tokens, segments = encode(model_path, [(columns["tokens"], texts)], self.max_length)
        owners = owners_of_tokens(model_path, words, self.max_length)
        targets, cut = [], 0
        for row, (owner, own) in enumerate(zip(owners, tags, strict=True)):
            first = owner > np.maximum.accumulate(np.append(-1, owner[:-1]))
            if not first.any():
                raise DataError(
                    f"row {row}, column {columns['tokens']!r}: the model's tokenizer sees none of its words: remove it",
                    code="no-word-left",
                )
            cut += int(owner.max()) + 1 < len(own)
            targets.append(np.where(first, np.asarray(own)[owner], IGNORED))
        notes = [
            f"{cut} of {len(words)} examples are longer than {self.max_length} tokens and are cut (task.max_length)"
        ]
        inputs = {"input_ids": tokens, TARGETS: Tokens.join(targets, IGNORED)}
        return Examples(
            inputs=inputs if segments is None else {**inputs, "token_type_ids": segments},
            labels=None,
            lengths=tokens.lengths,
            columns={name: np.asarray(table.columns[name]) for name in keep},
            label_names=names,
            notes=tuple(notes if cut else ()),
        )

    def invented(self, role: str) -> Sequence[Any] | None:
        """Texts of which every other word is an entity of the first type."""
        sizes = (1, 3, 6, 9)
        if role == "tags":
            begin = next((name for name in self.labels if name.startswith("B-")), OUTSIDE)
            return [[(begin, OUTSIDE)[place % 2] for place in range(size)] for size in sizes]
        return [["one", "two", "three", "it", "is", "as", "good", "as", "new"][:size] for size in sizes]

    def model_kwargs(self, examples: Examples) -> dict[str, Any]:
        """The number and the names of the tags, and the padding token that some models look for."""
        return {**super().model_kwargs(examples), **class_kwargs(examples.label_names)}

    def wanted(self, examples: Examples, indices: np.ndarray) -> Int[Tensor, "b t"]:
        """The tag of each word's first token; -100 for others."""
        return tokens_of(examples, TARGETS).pad(indices)[0]

    def padding(self, examples: Examples) -> Mapping[str, int]:
        """The tokeniser's own padding, and tags that do not count."""
        return {**super().padding(examples), "labels": IGNORED}

    def spans(
        self, examples: Examples, index: int, model_path: str | Path | Checkpoint
    ) -> tuple[tuple[str, bool], ...]:
        """The text token by token, those that count with their tags."""
        tokenizer, found = load_tokenizer(model_path), []
        for token, tag in zip(tokens_of(examples)[index], tokens_of(examples, TARGETS)[index], strict=True):
            text = tokenizer.decode([int(token)]).strip()
            found += [(f" {text}/{examples.label_names[tag]}", True) if tag != IGNORED else (f" {text}", False)]
        return tuple(found)

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """Mean cross entropy of each example's counted tokens, in nats."""
        return self._losses(wide(self.logits(model, batch)), batch["labels"])

    def _losses(self, logits: Float[Tensor, "b t c"], labels: Int[Tensor, "b t"]) -> Float[Tensor, "b"]:
        each = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return each.sum(dim=1) / (labels != IGNORED).sum(dim=1)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b ..."]]:
        """For each example "loss" in nats; "tags" [b, c, 2], its counted tokens by their tag, and those that are right;
        and "entities" [b, e, 3], by type those of the labels, those of the predictions, and those of both."""
        logits, labels = wide(self.logits(model, batch)), batch["labels"]
        names = _names(model)
        rows, columns = (labels.cpu() != IGNORED).nonzero(as_tuple=True)
        own, guessed = labels.cpu()[rows, columns].numpy(), logits.argmax(dim=-1).cpu()[rows, columns].numpy()
        size, place = len(names), rows.numpy() * len(names) + own
        counts = [np.bincount(place[chosen], minlength=len(labels) * size) for chosen in (own >= 0, own == guessed)]
        tags = np.stack(counts, axis=1).reshape(len(labels), size, 2).astype(np.float64)
        found = {"tags": tags, "entities": count_entities(own, guessed, rows.numpy(), names, len(labels))}
        return {"loss": self._losses(logits, labels), **{k: torch.from_numpy(v).to(logits) for k, v in found.items()}}

    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The number of "examples", and "loss", "tags" [c, 2] and "entities" [e, 3] added up over them."""
        return sums_of(measures, ("loss", "tags", "entities"))

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures of the examples that were added up; an entity counts where its type and both its ends are right.

        Returns:
            "f1", "precision" and "recall" of all entities; "macro_f1", the mean F1 over the types that occur as label
            or as prediction; "token_accuracy", the share of words with the right tag; "majority_token_share", that of
            always answering with the most frequent tag; "loss", the mean over the examples. As in seqeval, what would
            be divided by 0 is 0.
        """
        own, guessed, both = sums["entities"].T
        size = own + guessed
        count, right = sums["tags"].T
        there = size > 0
        return {
            "f1": float(2 * both.sum() / max(size.sum(), 1)),
            "precision": float(both.sum() / max(guessed.sum(), 1)),
            "recall": float(both.sum() / max(own.sum(), 1)),
            "macro_f1": float(np.mean(2 * both[there] / size[there])) if there.any() else 0.0,
            "token_accuracy": float(right.sum() / count.sum()),
            "majority_token_share": float(count.max() / count.sum()),
            "loss": float(sums["loss"] / sums["examples"]),
        }

    def by_class(self, sums: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, dict[str, float]]:
        """See `figures_by_class`, by type of entities."""
        return figures_by_class(_types(names), sums["entities"])

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """No tag and no type has more that are right than there are, and no text more words than `max_length`."""
        (own, guessed, both), (count, right) = sums["entities"].T, sums["tags"].T
        examples, words = float(sums["examples"]), float(count.sum())
        require_possible(
            examples <= words <= examples * self.max_length,
            f"{examples:g} examples of at most {self.max_length} tokens do not have {words:g} words",
        )
        require_possible((right <= count).all(), "of a tag more are right than there are")
        require_possible((both <= np.minimum(own, guessed)).all(), "of a type more entities are right than there are")
        require_possible(max(own.sum(), guessed.sum()) <= words, "there are more entities than words")


_EXAMPLE = ("O", "B-PER", "I-PER")


def count_entities(
    own: Int[np.ndarray, "k"], guessed: Int[np.ndarray, "k"], rows: Int[np.ndarray, "k"], names: Sequence[str], n: int
) -> Float[np.ndarray, "n e 3"]:
    """Entities by example and type: of the labels, of the predictions, and of both.

    Args:
        own: numbers of the tags of some words, in their order.
        guessed: numbers of those predicted.
        rows: the example of each word, ascending.
        names: of the tags.
        n: examples.
    """
    types = _types(names)
    counts = np.zeros((n, len(types), 3))
    kinds = np.asarray([types.index(name[2:]) if name != OUTSIDE else -1 for name in names])
    begins = np.asarray([name.startswith("B-") for name in names])
    (starts, of, ends), (others, other_of, other_ends) = (_spans(tags, rows, kinds, begins) for tags in (own, guessed))
    both = starts & others & (of == other_of) & (ends == other_ends)
    for place, (chosen, kind) in enumerate(((starts, of), (others, other_of), (both, of))):
        np.add.at(counts, (rows[chosen], kind[chosen], place), 1)
    return counts


def _spans(
    tags: Int[np.ndarray, "k"], rows: Int[np.ndarray, "k"], kinds: np.ndarray, begins: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether an entity begins with each word, its type, and the word after its end, [k] each.

    As in seqeval, a prediction's I- after another type or none begins an entity too.
    """
    size, kind = len(tags), kinds[tags]
    before = np.where(np.diff(rows, prepend=-1) != 0, -1, np.concatenate([[-1], kind[:-1]]))
    starts = (kind >= 0) & (begins[tags] | (before != kind))
    stops = np.where((kind >= 0) & ~starts, size, np.arange(size))
    after = np.minimum.accumulate(np.append(stops, size)[::-1])[::-1][1:]
    return starts, kind, after


def _names(model: nn.Module) -> list[str]:
    """The tags by number, as `model_kwargs` wrote them into the model's config."""
    config: Any = model.config
    return [str(config.id2label[number]) for number in range(len(config.id2label))]


def _types(names: Sequence[str]) -> list[str]:
    return sorted({name[2:] for name in names if name != OUTSIDE})


def _tags(types: set[str]) -> tuple[str, ...]:
    return (OUTSIDE, *(f"{mark}-{name}" for name in sorted(types) for mark in "BI"))


def _found(rows: Sequence[Sequence[Any]], column: str) -> tuple[str, ...]:
    """The tags of all types that are found."""
    types = {str(tag)[2:] for tags in rows for tag in tags if str(tag)[:2] in ("B-", "I-")} - {""}
    if not types:
        raise DataError(
            f"column {column!r} has no tag of an entity: write O, and B- and I- with its type, as in "
            f"{', '.join(_EXAMPLE)}; or name the tags in task.labels",
            code="no-entities",
        )
    return _tags(types)


def _cell(value: Any, row: int, column: str, *kinds: type) -> list[Any]:
    """A cell's words or tags."""
    found = value.split() if isinstance(value, str) else value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(found, list | tuple) and found and all(type(one) in kinds for one in found):
        return list(found)
    raise DataError(
        f"row {row}, column {column!r}: {clean_text(repr(value), 80)} is neither a list of "
        f"{' or '.join({str: 'texts', int: 'numbers'}[kind] for kind in kinds)} nor a text with blanks between them: "
        "correct or remove the row",
        code="not-a-list-of-words",
    )


def _require_iob2(
    tags: Sequence[Any], known: Sequence[str], places: Mapping[str, int], row: int, column: str
) -> list[int]:
    """The numbers of a row's tags, which may be places in the names that are known."""
    where, before, found = f"row {row}, column {column!r}", OUTSIDE, []
    for place, given in enumerate(tags):
        tag = known[given] if type(given) is int and 0 <= given < len(known) else given
        if tag not in places:
            cure = nearest(str(tag), places) if type(given) is str else "name the tags in task.labels"
            raise DataError(
                f"{where}: tag {place} (from 0), {clean_text(repr(tag), 40)}, is not known; {cure}", code="unknown-tag"
            )
        if tag.startswith("I-") and before[2:] != tag[2:]:
            raise DataError(
                f"{where}: tag {place} (from 0) is {tag} after {before}, and in IOB2 an entity begins with B-: correct "
                "or remove the row",
                code="not-iob2",
            )
        before = tag
        found.append(places[tag])
    return found
