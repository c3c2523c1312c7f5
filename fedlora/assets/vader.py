"""The VADER corpus: texts of four domains with the mean of twenty people's ratings."""

from __future__ import annotations

import html
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fedlora.assets._archives import tar_member
from fedlora.assets._rows import write_rows

VADER_DOMAINS = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
"""Domain of the vader corpus -> its file."""


def unpack_vader(file: Path, folder: Path) -> None:
    """Write vader.jsonl from the source archive of vaderSentiment."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(file, "r:gz") as outer, tarfile.open(fileobj=tar_member(outer, inner), mode="r:gz") as archive:
        texts = {
            domain: tar_member(archive, f"hutto_ICWSM_2014/{name}").read().decode("utf-8")
            for domain, name in VADER_DOMAINS.items()
        }
    write_rows((row for domain, text in texts.items() for row in vader_rows(domain, text)), folder / "vader.jsonl")


def vader_rows(domain: str, text: str) -> Iterator[dict[str, str | int | float]]:
    r"""The rows of one of the corpus's files: lines of "id, tab, mean rating, tab, text".

    - label: the polarity, 1 for a rating of at least 0.5 and 0 for at most -0.5; the texts between are dropped, since
      the twenty raters found them neutral or did not agree. Ratings go from -4 to 4.
    - text: character references are resolved (`&amp;` is `&`) until none is left, since some were escaped twice.
    - document: what a text was cut from, such as "nyt-12" for the ids 12_1, 12_2, ...; a tweet and a movie snippet
      stand for themselves.

    Reference: Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text", ICWSM-14.
    """
    for line in text.replace("\r\n", "\n").split("\n"):
        if not line.strip():
            continue
        identity, value, content = line.split("\t", 2)
        rating = float(value)
        if abs(rating) < 0.5:
            continue
        while (plain := html.unescape(content)) != content:
            content = plain
        yield {
            "text": content.strip(),
            "label": int(rating > 0),
            "rating": rating,
            "domain": domain,
            "document": f"{domain}-{identity.split('_')[0]}",
        }
