"""What a run stands on, by hashes: base weights, tokenizer, chat template, image processor, class names, data, and the
adapter that it began with.

The run writes them (`provenance.json`); every command that reads the run compares what it finds, and server and nodes
compare theirs in the hello. So a base, a tokenizer or a file that was changed in its place is noticed, and one that was
only moved is not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, final

from fedlora.hashing import digest_of

WORDS = {
    "base": "the base model",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "processor": "the image processor",
    "class_names": "the class names",
    "train_data": "the training data",
    "test_data": "the test data",
    "start": "the starting adapter",
}
"""What each part is called."""

MODEL = ("base", "tokenizer", "chat_template", "processor", "class_names")
"""The parts that an adapter belongs to, whatever it is tried on."""
DATA = ("train_data", "test_data")

VOLATILE = ("name_or_path", "transformers_version", "torch_dtype", "dtype", "processor_class", "backend", "device")
"""Keys of a model's or a processor's own config that say nothing of what it computes."""


def said_of_adapter(folder: Path) -> dict[str, Any]:
    """What a run wrote beside its adapter; nothing, of another program's."""
    try:
        facts = json.loads((folder / "fedlora.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@final
@dataclass(frozen=True)
class Provenance:
    """Hashes; None where a part does not apply, is not known here, or may not be told.

    Args:
        base: of the base model's weights and architecture.
        tokenizer: of what it makes of a text: vocabulary, merges, normaliser, special tokens.
        chat_template: that conversations are rendered by.
        processor: of what it makes of a picture: sizes, mean, standard deviation.
        class_names: in the order of their numbers.
        train_data: of the rows of `data.source`, in their order, before any seed chose among them.
        test_data: of the test examples in their order, by what the task reads of each.
        start: of the tensors and scales of the adapter that the run began with (`adapter.start`).
    """

    base: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    processor: str | None = None
    class_names: str | None = None
    train_data: str | None = None
    test_data: str | None = None
    start: str | None = None

    @classmethod
    def read(cls, tree: Any) -> Provenance:
        """From what `known` gave; whatever else is in it is left out, since it may be another's."""
        known = tree if isinstance(tree, Mapping) else {}
        names = [part.name for part in fields(cls)]
        return cls(**{name: known[name] for name in names if isinstance(known.get(name), str)})

    @classmethod
    def of_adapter(cls, folder: Path) -> Provenance:
        """What an adapter that a run left says of its base and tokenizer; nothing, of another program's."""
        return cls.read(said_of_adapter(folder).get("provenance"))

    @property
    def known(self) -> dict[str, str]:
        """The parts that are known, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def only(self, parts: Collection[str]) -> Provenance:
        """These parts alone."""
        return replace(self, **{name: None for name in asdict(self) if name not in parts})

    def changed(self, found: Provenance) -> tuple[str, ...]:
        """The parts that both know and that differ, in the order of the fields."""
        mine, others = self.known, found.known
        return tuple(name for name in mine if name in others and mine[name] != others[name])


def in_words(parts: Collection[str]) -> str:
    """Parts as a list in a sentence: "the tokenizer, the training data and the test data"."""
    words = [WORDS[part] for part in parts]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---------------------------------------------------------------------------------------------- hashes of parts


def class_names_digest(names: Collection[str]) -> str | None:
    """Of class names in their order; None where there are none."""
    return digest_of(list(names)) if names else None


def tokenizer_digest(tokenizer: Any) -> str:
    """Of a tokenizer of transformers: the same for one that was loaded from the hub or from any folder."""
    import json

    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core: Any = json.loads(backend.to_str())
        for call in ("truncation", "padding"):  # how it was called last
            core.pop(call, None)
    else:  # in Python alone: its vocabulary, and what it does
        core = [type(tokenizer).__name__, tokenizer.get_vocab(), [tokenizer(text)["input_ids"] for text in PROBES]]
    return digest_of([special, core])


PROBES = ("The cat's  naïve, 12.5% OK?\n\tx=1", "ÅÉ 中文 العربية 🙂 ﬁ ½", " leading and trailing ")
"""Texts that show how a tokenizer normalises and splits."""


def config_digest(config: Mapping[str, Any]) -> str:
    """Of a model's or an image processor's own config, without what says nothing of what it computes."""
    return digest_of({key: value for key, value in config.items() if key.lstrip("_") not in VOLATILE})
