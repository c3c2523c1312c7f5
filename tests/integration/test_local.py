"""What a resumed run keeps of the choices that were made at its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig
from torch import nn

from fedlora import speedups
from fedlora.callbacks import Callback
from fedlora.config import RunConfig, parse_config
from fedlora.flower.app_config import config_of
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import as_begun, run_simulation
from fedlora.speedups.linear_kernels import KernelReport, ShapeTiming
from fedlora.training import close_workspace


@pytest.mark.parametrize("chosen", [{"kernels": "onednn", "attention": "sdpa"}, {"kernels": "off"}, {}])
def test_auto_stays_what_it_was_at_the_start(chosen: dict[str, str], tmp_path: Path) -> None:
    config = parse_config(f"output = {str(tmp_path)!r}")
    rundir = RunDir.create(config)
    rundir.write_json("environment.json", chosen)
    kept = as_begun(config, rundir).runtime
    assert {"kernels": kept.kernels, "attention": kept.attention} == {"kernels": "auto", "attention": "auto"} | chosen


def test_what_the_config_says_is_not_overruled(tmp_path: Path) -> None:
    config = parse_config(f"output = {str(tmp_path)!r}\n[runtime]\nkernels = 'off'\nattention = 'eager'")
    rundir = RunDir.create(config)
    rundir.write_json("environment.json", {"kernels": "onednn", "attention": "auto"})
    assert as_begun(config, rundir) == config


def test_the_clients_of_a_run_are_told_what_was_chosen_for_it(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    close_workspace()
    measured: list[str] = []

    def choose(model: nn.Module, mode: str) -> KernelReport:
        measured.append(mode)
        return KernelReport("off", 0, "measured", (ShapeTiming(2, 3, 1, 32, 5.0, 4.0),), "2026-01-01 00:00")

    monkeypatch.setattr(speedups, "accelerate", choose)
    config = tiny_config("runtime.kernels=auto", "rounds=1")
    rundir = RunDir.create(config)
    run_simulation(config, rundir, Callback())
    assert measured == ["auto"]  # the server's and the clients' config are one workspace
    facts = rundir.read_json("environment.json")
    assert (facts["kernels"], facts["kernels_measured"]) == ("off", "2026-01-01 00:00")
    assert facts["kernels_timings"] == [
        {
            "in_features": 2,
            "out_features": 3,
            "layers": 1,
            "rows": 32,
            "torch_gflops": 5.0,
            "onednn_gflops": 4.0,
        }
    ]
    assert facts["pass_cost"]["most"] > 0
    assert RunDir.open(rundir.path).config.runtime.kernels == "auto"
    close_workspace()


@pytest.mark.parametrize("asked", ["auto", "measure"])
@pytest.mark.parametrize("node", [{}, {"partition-id": 0}], ids=["server", "node"])
def test_where_nodes_are_machines_of_their_own_nothing_hangs_on_a_measurement(asked: str, node: dict[str, int]) -> None:
    run_config = {"toml": f"[runtime]\nkernels = '{asked}'"}
    found = config_of(Context(1, 1, UserConfig(node), RecordDict(), UserConfig(run_config))).runtime
    assert (found.kernels, found.prefix_cache) == ("off", "off")
    said = {"toml": "[runtime]\nkernels = 'onednn'\nprefix_cache = 'on'"}
    found = config_of(Context(1, 1, UserConfig(node), RecordDict(), UserConfig(said))).runtime
    assert (found.kernels, found.prefix_cache) == ("onednn", "on")


def test_a_resume_with_another_learning_rate_changes_the_rounds_to_come_alone(
    tiny_config: Callable[..., RunConfig],
) -> None:
    config = tiny_config("rounds=2")
    rundir = RunDir.create(config)
    run_simulation(config, rundir, Callback())
    before, state = rundir.read_metrics(), rundir.checkpoints.latest()
    assert state is not None
    changed = tiny_config("rounds=3", "train.lr=1e-9", "train.clip_norm=1.0", "server.max_norm=1e6")
    outcome = run_simulation(changed, RunDir.open(rundir.path), Callback(), resume=True)
    assert outcome.records[:3] == before
    moved = (outcome.state.adapter.tensors()[name] - value for name, value in state.adapter.tensors().items())
    assert max(float(change.abs().max()) for change in moved) < 1e-6
    assert [change.key for change in RunDir.open(rundir.path).changes] == [
        "server.max_norm",
        "train.clip_norm",
        "train.lr",
    ]
    assert {change.round for change in RunDir.open(rundir.path).changes} == {3}


def test_a_client_that_does_not_fit_ends_the_run(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.errors import TrainingError
    from fedlora.tasks.text_classification import TextClassification

    real = TextClassification.losses

    def losses(self: TextClassification, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if model.training and bool((batch["attention_mask"].sum(dim=1) > 10).any()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, model, batch)

    config = tiny_config("runtime.processes=1")
    run_simulation(config, RunDir.create(config), Callback())  # opens the workspace, which tries the model out
    monkeypatch.setattr(TextClassification, "losses", losses)
    config = tiny_config("runtime.processes=1", "name=small")
    with pytest.raises(
        TrainingError, match=r"train.batch_size.*task.max_length.*micro_batch_size.*checkpointing"
    ) as told:
        run_simulation(config, RunDir.create(config), Callback())
    assert told.value.code == "out-of-memory"


@pytest.mark.slow
def test_a_schedule_goes_over_all_rounds(tiny_config: Callable[..., RunConfig]) -> None:
    def losses(*overrides: str) -> list[float]:
        config = tiny_config("runtime.processes=1", *overrides)
        return [record["loss"] for record in run_simulation(config, RunDir.create(config), Callback()).records]

    constant = losses("name=constant")
    level = losses("name=level", "train.schedule=linear", "train.lr_end=0.01")
    falling = losses("name=falling", "train.schedule=linear")
    assert level == constant, "a line from lr to lr"
    assert len({*constant[1:], *falling[1:]}) == 6, "every round's rates are others"
