"""The command that prints the reference values: what is exact by theory must come out exact."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def command() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "reference_values.py"
    spec = importlib.util.spec_from_file_location("reference_values", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_values"] = module
    spec.loader.exec_module(module)
    return module


def test_exact_rules_are_exact_and_the_known_mistake_is_exactly_as_wrong(command: ModuleType) -> None:
    table = {row.what: row for row in command.rows(draws=1)}
    assert table["FLoRA, independent A, dense"].measured < 1e-15
    assert table["FLoRA, mixed ranks, by QR"].measured < 5e-15
    assert table["FFA-LoRA, one frozen A, dense"].measured < 1e-15
    assert abs(table["p on A and on B (wrong), less 1 - 1/K"].measured) < 1e-14
    assert table["FedAvg, drift 0.3"].measured < table["FedAvg, drift 1"].measured
    assert table["LoRA-FAIR, rotation 0.3"].measured < table["FedAvg, rotation 0.3"].measured / 4
    for name, row in table.items():
        if name.startswith("MiB"):
            assert row.measured == pytest.approx(float(row.published), abs=5e-4)
