"""The family matrix: each family of the table against each column, and docs/models.md says what came of it.

`make test-nightly` runs all of it; with FEDLORA_WRITE_DOCS=1 it writes the rows of docs/models.md anew.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import pytest

from families.columns import COLUMNS, IN_FOUR_BITS, YES, opened, quantised
from families.table import FAMILIES, Family
from fedlora.errors import DataError, ModelError

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ALWAYS = ("Bert classifier", "Mistral causal", "FNet classifier")
OFTEN = (
    "DebertaV2 classifier",
    "Llama classifier",
    "Bert pairs",
    "GPT2 labels",
    "Bert tags",
    "T5 seq2seq",
    "GPT2 causal",
    "Mixtral causal",
    "ViT image",
)
IN_FOUR_BITS_OFTEN = (
    "Bert classifier",
    "Llama classifier",
    "GPT2 causal",
)
NOT_IN_FOUR_BITS = {
    "Rwkv causal": "remove model.quantize",  # its own code for such layers fails
    "Falcon causal": "has none beside its head",  # all of a class of its own
    "Falcon with alibi causal": "has none beside its head",
    "Falcon classifier": "has none beside its head",
    "PoolFormer image": "has none beside its head",
    "ResNet image": "has none beside its head",
}
"""Families that are refused there -> words of the refusal."""
REFUSALS = {
    "is to predict": "sees later tokens",
    "on the left": "must be padded on the left",
    "cannot be trained": "cannot be trained on texts of any length",
    "no module would get an adapter": "has no plain linear layer",
}
TASKS = {
    "classifier": "text",
    "pairs": "regression",
    "labels": "multi-label",
    "tags": "tokens",
    "causal": "causal-lm",
    "seq2seq": "seq2seq",
    "image": "image",
}


def tier(family: Family) -> list[pytest.MarkDecorator]:
    if family.id in ALWAYS:
        return []
    return [pytest.mark.slow] if family.id in OFTEN else [pytest.mark.nightly]


def outcome(family: Family, folder: Path, columns: Collection[str] = tuple(COLUMNS), *overrides: str) -> dict[str, str]:
    """Column -> "yes" or why not; or "model" -> why it is refused altogether. It fails where a result is wrong."""
    try:
        with opened(family, folder / "model", *overrides) as case:
            found, wrong = {"notes": " ".join(case.workspace.base.notes)}, {}
            if case.workspace.base.config.quantize is not None:
                quantised(case)
            for name in columns:
                try:
                    found[name] = COLUMNS[name](case, folder)
                except Exception as error:
                    wrong[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            assert not wrong, wrong
            return found
    except (ModelError, DataError) as error:
        return {"model": str(error)}


def row_of(family: Family, found: dict[str, str]) -> str:
    """The family's row of docs/models.md."""

    def cell(column: str) -> str:
        return cell_of(column, found[column])

    name = f"{family.name or family.config}"
    if "model" in found:
        why = next((short for word, short in REFUSALS.items() if word in found["model"]), None)
        assert why is not None, found
        return f"| {name} | {TASKS[family.kind]} | refused: {why} | - | - | - | - |"
    cells = " | ".join(cell(column) or "-" for column in ("cohort", "private", "packing", "prefix"))
    padding = "yes" if found["alone"] == YES else "looks at padding"
    return f"| {name} | {TASKS[family.kind]} | {padding} | {cells} |"


def cell_of(column: str, said: str) -> str:
    """What a column of docs/models.md says."""
    return said if said in (YES, "") else "one by one" if column == "cohort" else "no"


def test_the_table_has_no_family_twice() -> None:
    names = [family.id for family in FAMILIES]
    assert len(set(names)) == len(names) >= 60
    assert {*ALWAYS, *OFTEN, *IN_FOUR_BITS_OFTEN} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(family, id=family.id.replace(" ", "-"), marks=tier(family)) for family in FAMILIES]
)
def test_family(family: Family, tmp_path: Path) -> None:
    found = outcome(family, tmp_path)
    for refused in found.values():  # what is refused is refused with a sentence
        assert refused in (YES, "") or len(refused.split()) > 5, found
    row = row_of(family, found)
    page = PAGE.read_text(encoding="utf-8")
    if os.environ.get("FEDLORA_WRITE_DOCS"):
        PAGE.write_text(written(page, row), encoding="utf-8")
    else:
        assert row in page.splitlines(), f"docs/models.md lacks the row {row!r}; {found}"


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family,
            id=family.id.replace(" ", "-"),
            marks=pytest.mark.slow if family.id in IN_FOUR_BITS_OFTEN else pytest.mark.nightly,
        )
        for family in FAMILIES
    ],
)
def test_family_in_four_bits(family: Family, tmp_path: Path) -> None:
    """A base in NF4 does what the same family does unquantised; against plain PEFT on the same layers."""
    pytest.importorskip("bitsandbytes")
    name = f"| {family.name or family.config} | {TASKS[family.kind]} |"
    (row,) = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    found = outcome(family, tmp_path, IN_FOUR_BITS, "model.quantize=nf4", "model.dtype=float32")
    if (reason := NOT_IN_FOUR_BITS.get(family.id)) is not None or "refused" in row:
        assert (reason or "") in found["model"], found
        return
    cells = [cell.strip() for cell in row.split("|")]
    wanted = {"alone": YES if cells[3] == YES else "no", "cohort": cells[4], "private": cells[5]}
    assert {name: cell_of(name, found.get(name, found.get("model", ""))) for name in wanted} == wanted, found


def written(page: str, row: str) -> str:
    """The page with the row in its place, in the order of the table."""
    head, mark, rest = page.partition("| --- |")
    rule, _, rest = rest.partition("\n")
    rows = [line for line in rest.splitlines() if line.startswith("| ")]
    after = rest[rest.rfind(rows[-1]) + len(rows[-1]) :] if rows else rest
    names = [f"| {family.name or family.config} | {TASKS[family.kind]} |" for family in FAMILIES]
    kept = {name: line for line in [*rows, row] for name in names if line.startswith(name)}
    table = "\n".join(kept[name] for name in names if name in kept)
    return f"{head}{mark}{rule}\n{table}{after}"
