"""Handwritten digits of six domains: MNIST's under five changes of the picture, and the scans that scikit-learn brings.

Everything is integer arithmetic on the downloaded bytes, so that the file has a hash of its own.
"""

from __future__ import annotations

import gzip
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fedlora.assets._archives import tar_member
from fedlora.assets._rows import write_rows

BLUR = [comb(16, k) for k in range(17)]  # a binomial of standard deviation 2 pixels; sums to 2**16
FAINTEST = 80  # least difference in luma, of 255, between the ink and the ground of a coloured picture
SCANS_MEMBER = "scikit-learn-1.0.2/sklearn/datasets/data/digits.csv.gz"


def unpack_digit_domains(file: Path, folder: Path) -> None:
    """Write digit_domains.jsonl from the source archive of scikit-learn, and from `digits`, which is fetched."""
    from fedlora.assets import fetch

    with tarfile.open(file, "r:gz") as archive:
        lines = gzip.decompress(tar_member(archive, SCANS_MEMBER).read()).decode("ascii").splitlines()
    with fetch("digits").open(encoding="utf-8") as source:
        digits = [json.loads(line) for line in source]
    write_rows(domain_rows(digits, lines), folder / "digit_domains.jsonl", compact=True)


def domain_rows(digits: Iterable[Mapping[str, Any]], scans: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows with "image", "label" and "domain": each picture of MNIST in one domain only, each domain as large.

    The pictures of a digit go round over the domains of `CHANGES`, and there are as many scans of it as a domain
    has got of them. "coloured" is [28, 28, 3], "scans" [8, 8], the others [28, 28], all from 0 to 255.

    Args:
        digits: rows of `digits`.
        scans: lines of 64 values from 0 (white) to 16 (black) and a digit. Ink is bright, as in MNIST.

    References: LeCun, Cortes & Burges, "The MNIST database of handwritten digits"; Alpaydin & Kaynak, "Optical
    Recognition of Handwritten Digits", UCI, 1998, whose test part scikit-learn has.
    """
    draw, met = random.Random(0), Counter[int]()
    for row in digits:
        domain = list(CHANGES)[met[row["label"]] % len(CHANGES)]
        met[row["label"]] += 1
        changed = CHANGES[domain](np.asarray(row["image"], dtype=np.uint8), draw)
        yield {"image": changed.tolist(), "label": row["label"], "domain": domain}
    wanted = Counter({label: count // len(CHANGES) for label, count in met.items()})
    for line in scans:
        *values, label = (int(value) for value in line.split(","))
        if wanted[label] > 0:
            wanted[label] -= 1
            pixels = [value * 255 // 16 for value in values]
            yield {"image": [pixels[start : start + 8] for start in range(0, 64, 8)], "label": label, "domain": "scans"}


def _blurred(image: UInt8[np.ndarray, "h w"]) -> np.ndarray:
    blurred = image.astype(np.int64)
    for axis in (0, 1):
        blurred = np.apply_along_axis(np.convolve, axis, blurred, BLUR, "same")
    return (blurred + 2**31) >> 32


def _coloured(image: UInt8[np.ndarray, "h w"], draw: random.Random) -> np.ndarray:
    """Ink of one random colour on a ground of another: [h, w, 3]."""
    luma = np.array([299, 587, 114])
    while True:
        # Only `random` is promised to draw the same numbers in each version of Python.
        ground, ink = (np.array([int(256 * draw.random()) for _ in range(3)]) for _ in range(2))
        if abs(int(luma @ (ink - ground))) >= 1000 * FAINTEST:
            return np.asarray(ground + (image[:, :, None].astype(np.int64) * (ink - ground) + 127) // 255)


CHANGES: Mapping[str, Callable[[np.ndarray, random.Random], np.ndarray]] = {
    "plain": lambda image, _: image,
    "inverted": lambda image, _: 255 - image,
    "coloured": _coloured,
    "blurred": lambda image, _: _blurred(image),
    "rotated": lambda image, _: np.rot90(image),
}
"""Domain -> what is done to a picture of MNIST, [28, 28]. "rotated" is by 90 degrees, anticlockwise."""
