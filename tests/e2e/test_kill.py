"""`kill -9` in the middle of a run loses nothing: `--resume` ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """
rounds = 12
output = "{output}"
[model]
name = "{model}"
[adapter]
rank = 4
targets = ["query", "value"]
[data]
source = "{data}"
domain = "domain"
test_fraction = 0.25
[partition]
name = "domain"
clients = 4
[train]
steps = 6
batch_size = 8
lr = 0.01
[server]
fraction = 0.5
[strategy]
name = "{rule}"
[runtime]
threads = 1
"""


def fedlora(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedlora", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", pytest.param("flora", marks=pytest.mark.nightly)])
def test_a_killed_run_resumes_to_the_same_bytes(rule: str, tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(output=tmp_path / "runs", model=tiny_bert, data=tiny_csv, rule=rule))
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    finish(fedlora("run", str(file), "--set", "name=whole"))

    process = fedlora("run", str(file), "--set", "name=cut")
    metrics = cut / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "result.json").exists()

    finish(fedlora("run", "--resume", str(cut)))
    weights = "adapter/adapter_model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics.read_text().count("\n") == 13
