"""`flwr run .` with Flower's own simulation (Ray) runs the same two app objects and reaches the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.callbacks import Callback
from fedlora.config import load_config
from fedlora.flower.peft_records import own_name
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training import open_workspace

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
[runtime]
threads = 1
kernels = "off"
[server]
clients_per_round = 3
"""


PRIVATE = """
weighting = "uniform"
[privacy]
epsilon = 4.0
delta = 1e-3
max_grad_norm = 1.0
public_examples = 40
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


def on_ray(file: Path, folder: Path, home: Path, *keys: str, app: Path = ROOT) -> str:
    """`flwr run` on a config, with more keys of its run config; what it printed."""
    programs = Path(sys.executable).parent  # flwr starts flower-superlink by its name
    federation = ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
    given = " ".join([f"config='{file}'", *keys])
    done = subprocess.run(
        [str(programs / "flwr"), "run", str(app), "local", *federation, "--run-config", given, "--stream"],
        env={**os.environ, "FLWR_HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.nightly
def test_ray_reaches_the_same_adapter(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, flower_home: Path) -> None:
    file = tmp_path / "ray.toml"
    file.write_text(CONFIG.format(output=tmp_path / "runs", model=tiny_bert, data=tiny_csv))
    printed = on_ray(file, tmp_path, flower_home)
    ray = tmp_path / "runs" / "ray"
    assert (ray / "result.json").is_file(), printed[-6000:]
    # A client on Ray trains alone; in company its products have other shapes, and round differently.
    config = load_config(file, ["name=local", "runtime.cohort=1"])
    local = run_simulation(config, RunDir.create(config), Callback()).rundir.path
    weights = "adapter/adapter_model.safetensors"
    assert (ray / weights).read_bytes() == (local / weights).read_bytes()


@pytest.mark.nightly
def test_ray_spends_what_the_engine_spends(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, flower_home: Path) -> None:
    """Each client's ledger lies where its actor finds it again in the next round, and the claim is the same."""
    file = tmp_path / "ray.toml"
    file.write_text(CONFIG.format(output=tmp_path / "runs", model=tiny_bert, data=tiny_csv) + PRIVATE)
    printed = on_ray(file, tmp_path, flower_home, f"ledger-dir='{tmp_path / 'ledgers'}'")
    ray = RunDir.open(tmp_path / "runs" / "ray")
    assert (ray.path / "result.json").is_file(), printed[-6000:]
    config = load_config(file, ["name=local"])
    local = run_simulation(config, RunDir.create(config), Callback()).rundir
    on_machine, in_process = (where.read_json("result.json")["privacy"] for where in (ray, local))
    assert on_machine == in_process
    assert on_machine["epsilon"] == pytest.approx(4.0, rel=0.01)
    assert len(list((tmp_path / "ledgers").glob("client-*.jsonl"))) == 4


APP = """
[project]
name = "somebody"
version = "1.0.0"
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "somebody.server:app"
clientapp = "fedlora.flower.client_app:app"
[tool.flwr.app.config]
config = ""
out = ""
strategy = ""
"""

SERVER = """
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from fedlora import load_config
from fedlora.flower import FedLoraStrategy, initial_arrays

app = ServerApp()


@app.main()
def main(grid, context):
    config = load_config(context.run_config["config"])
    options = {"fraction_evaluate": 0.0, "min_train_nodes": 4, "min_available_nodes": 4}
    ours = FedLoraStrategy("fair", alpha=config.adapter.alpha, **options)
    strategy = ours if context.run_config["strategy"] == "fair" else FedAvg(**options)
    result = strategy.start(grid, initial_arrays(config), num_rounds=2)
    save_file(result.arrays.to_torch_state_dict(), context.run_config["out"])
"""


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["fair", "fedavg"])
def test_somebody_elses_server_app_on_flowers_simulation(
    strategy: str, tiny_bert: Path, tiny_csv: Path, tmp_path: Path, flower_home: Path
) -> None:
    file = tmp_path / "ray.toml"
    text = CONFIG.format(output=tmp_path / "runs", model=tiny_bert, data=tiny_csv)
    text = text.replace('name = "flora"', f'name = "{strategy}"').replace("ranks = [4, 2]", "")
    file.write_text(text.replace("clients_per_round = 3", ""))
    app = tmp_path / "app"
    (app / "somebody").mkdir(parents=True)
    (app / "pyproject.toml").write_text(APP)
    (app / "somebody" / "__init__.py").write_text("")
    (app / "somebody" / "server.py").write_text(SERVER)
    out = tmp_path / "final.safetensors"
    printed = on_ray(file, tmp_path, flower_home, f"out='{out}'", f"strategy='{strategy}'", app=app)
    assert out.is_file(), printed[-6000:]
    config = load_config(file, ["name=local", "runtime.cohort=1"])
    run = run_simulation(config, RunDir.create(config), Callback())
    expected = run.state.adapter.tensors()
    found = {own_name(name): value for name, value in load_file(out).items()}
    assert found.keys() == expected.keys()
    if strategy == "fair":
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        return
    # Flower averages in float32 and in the order of arrival, and AdamW enlarges that where gradients are near zero.
    first = open_workspace(config).base.initial_adapter(config.seed).tensors()
    off, moved = (
        torch.cat([(one[name] - other[name]).flatten() for name in expected]).norm()
        for one, other in ((found, expected), (expected, first))
    )
    assert off / moved < 1e-3
