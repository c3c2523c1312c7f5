"""`flwr run .` with Flower's own simulation (Ray) runs the same two app objects and reaches the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.config import load_config
from fedlora.flower import run_local
from fedlora.progress import NoProgress
from fedlora.rundir import RunDir

ROOT = Path(__file__).parents[2]

CONFIG = """
rounds = 2
name = "ray"
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
steps = 3
batch_size = 8
lr = 0.01
[strategy]
name = "flora"
[clients]
ranks = [4, 2]
[server]
clients_per_round = 3
[runtime]
threads = 1
kernels = "off"
"""


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[Path]:
    """A Flower home whose SuperLink is ended afterwards (flwr leaves it running)."""
    home = tmp_path / "home"
    home.mkdir()
    yield home
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if "flower-superlink" in command and str(home) in command:
            os.kill(int(process.name), signal.SIGTERM)


@pytest.mark.slow
def test_ray_reaches_the_same_adapter(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, flower_home: Path) -> None:
    file = tmp_path / "ray.toml"
    file.write_text(CONFIG.format(output=tmp_path / "runs", model=tiny_bert, data=tiny_csv))
    programs = Path(sys.executable).parent  # flwr starts flower-superlink by its name
    federation = "num-supernodes=4 client-resources-num-cpus=1"
    done = subprocess.run(
        [
            str(programs / "flwr"),
            "run",
            str(ROOT),
            "local",
            "--federation-config",
            federation,
            "--run-config",
            f"config='{file}'",
            "--stream",
        ],
        env={**os.environ, "FLWR_HOME": str(flower_home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    ray = tmp_path / "runs" / "ray"
    assert (ray / "result.json").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    # A client on Ray trains alone; in company its products have other shapes, and round differently.
    config = load_config(file, ["name=local", "runtime.cohort=1"])
    local = run_local(config, RunDir.create(config), NoProgress()).rundir.path
    weights = "adapter/adapter_model.safetensors"
    assert (ray / weights).read_bytes() == (local / weights).read_bytes()
