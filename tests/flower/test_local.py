"""What a resumed run keeps of the choices that were made at its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config import parse_config
from fedlora.flower.local import _as_before
from fedlora.rundir import RunDir


@pytest.mark.parametrize("chosen", [{"kernels": "onednn", "attention": "sdpa"}, {"kernels": "off"}, {}])
def test_auto_stays_what_it_was_at_the_start(chosen: dict[str, str], tmp_path: Path) -> None:
    config = parse_config(f"output = {str(tmp_path)!r}")
    rundir = RunDir.create(config)
    rundir.write_json("environment.json", chosen)
    kept = _as_before(config, rundir).runtime
    assert {"kernels": kept.kernels, "attention": kept.attention} == {"kernels": "auto", "attention": "auto"} | chosen


def test_what_the_config_says_is_not_overruled(tmp_path: Path) -> None:
    config = parse_config(f"output = {str(tmp_path)!r}\n[runtime]\nkernels = 'off'\nattention = 'eager'")
    rundir = RunDir.create(config)
    rundir.write_json("environment.json", {"kernels": "onednn", "attention": "auto"})
    assert _as_before(config, rundir) == config
