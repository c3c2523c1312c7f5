"""The Hironsan corpus: 500 Japanese sentences with named entities in IOB2."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from fedlora.assets._archives import tar_member
from fedlora.assets._rows import write_rows

SENTENCES = "hironsancorpus-0.1.2/hironsan/corpus/iob_sents.txt"


def unpack_hironsan(file: Path, folder: Path) -> None:
    """Write hironsan.jsonl from the source archive of hironsancorpus."""
    with tarfile.open(file, "r:gz") as archive:
        text = tar_member(archive, SENTENCES).read().decode("utf-8")
    write_rows(hironsan_rows(text), folder / "hironsan.jsonl")


def hironsan_rows(text: str) -> Iterator[dict[str, list[str]]]:
    """The sentences: lines of a word, its morphology and its tag, with tabs between them; a blank line ends a sentence.

    Two words that are blanks are left out, and two entities that begin with I- get their B-.

    Returns:
        For each sentence "tokens", its words, and "tags".
    """
    for block in text.split("\n\n"):
        tokens: list[str] = []
        tags: list[str] = []
        for line in filter(str.strip, block.split("\n")):
            word, *_, tag = line.split("\t")
            if not word.strip():
                continue
            begins = tag.startswith("I-") and (not tags or tags[-1][2:] != tag[2:])
            tokens.append(word)
            tags.append(f"B-{tag[2:]}" if begins else tag)
        if tokens:
            yield {"tokens": tokens, "tags": tags}
