"""A worker pool on Ray: to the byte what processes come to, nothing is lost, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.errors import raises
from support.states import same_state
from support.tiny_federations import MakeConfig
from support.waiting import until

from fedlora.callbacks import Callback
from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError, PoolError, PrivacyError
from fedlora.federation.run import RunOutcome
from fedlora.runs.rundir import RunDir
from fedlora.simulation import processes, ray_pool
from fedlora.simulation.machines import Machine, most_threads, room
from fedlora.simulation.ray_pool import Actor, Cluster, require_ray
from fedlora.simulation.run import run_simulation

TWO = ("runtime.processes=2", "rounds=3", "partition.clients=5", "runtime.cohort=1")
RAY = (*TWO, "runtime.backend=ray")


def run(config: RunConfig) -> RunOutcome:
    return run_simulation(config, RunDir.create(config), Callback())


def actors() -> list[psutil.Process]:
    """Workers of the Ray below this process that hold a pool's actor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::Actor"] or "ray::Actor" in process.name():
                found.append(process)
        except psutil.Error:
            continue
    return found


# ------------------------------------------------------------------------------------------------- without a cluster


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(ray_pool, "find_spec", lambda name: None if name == "ray" else there(name))


@pytest.mark.usefixtures("no_ray")
def test_without_ray_a_config_that_wants_it_is_refused(tiny_config: MakeConfig) -> None:
    config = tiny_config(*RAY)
    with raises(ConfigError, "ray-missing", "pip install 'fedlora[ray]'"):
        run(config)
    with raises(ConfigError, "ray-missing", "pip install 'fedlora[ray]'"):
        require_ray(config)
    require_ray(parse_config(""))


def test_a_cluster_that_is_too_small_is_refused() -> None:
    cluster = Cluster([Machine(3), Machine(3)])
    with (
        raises(ConfigError, "cluster-too-small", 2, "2 CPUs", 3, "runtime.processes"),
        cluster.actors([{}] * 3, 2, gpu=False, file=None),
    ):
        pass
    with raises(ConfigError, "cluster-too-small", "2 CPUs and a GPU"), cluster.actors([{}], 2, gpu=True, file=None):
        pass


@pytest.mark.slow
def test_nobody_waits_for_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with raises(PoolError, "ray-unusable", "refused", "RAY_ADDRESS"), ray_pool.open_cluster():
        pass


def test_a_process_is_on_one_machine() -> None:
    two, gpus = [Machine(3), Machine(3)], [Machine(16, 2), Machine(4, 8)]
    assert [room(two, threads, gpus=False) for threads in (1, 2, 3, 4)] == [6, 2, 2, 0]
    assert [room(gpus, threads, gpus=True) for threads in (1, 2, 4, 8)] == [6, 4, 3, 2]
    assert [most_threads(two, processes, gpus=False) for processes in (1, 2, 3, 6, 7)] == [3, 3, 1, 1, 1]
    assert [most_threads(gpus, processes, gpus=True) for processes in (2, 3, 4, 6)] == [8, 4, 2, 1]


def test_an_actor_says_what_serve_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Jobs in their order, answers in theirs, tensors as they are; after the last of them nothing."""
    monkeypatch.chdir(tmp_path)

    def twice(pipe: processes.Channel) -> None:
        for _ in range(2):
            pipe.tell({"heard": pipe.hear()})

    monkeypatch.setattr("fedlora.simulation.pool_worker.serve", twice)
    actor = Actor([], str(tmp_path))
    (tmp_path / "run-id").write_text("7")
    assert actor.begin(tmp_path / "run-id")[2] == b"7"
    for value in (1.5, 2.5):
        actor.tell(processes.pack(torch.full((2,), value)))
    answers = [processes.pickle.loads(actor.hear() or b"") for _ in range(2)]
    assert [answer["heard"].tolist() for answer in answers] == [[1.5, 1.5], [2.5, 2.5]]
    assert actor.hear() is None


# ---------------------------------------------------------------------------------------------------- with a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray that was there before the run."""
    import ray

    with processes.variables({"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}):
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.nightly
@pytest.mark.parametrize("rule", ["fedavg", "flora"])
def test_ray_comes_to_what_processes_do_to_the_byte(tiny_config: MakeConfig, cluster: Any, rule: str) -> None:
    here, there = (
        run(tiny_config(*TWO, f"strategy.name={rule}")),
        run(tiny_config(*RAY, f"strategy.name={rule}", name="ray")),
    )
    assert same_state(here.state, there.state)
    facts = there.rundir.read_json("environment.json")
    assert (facts["backend"], facts["processes"]) == ("ray", 2)
    assert cluster.is_initialized()
    until(lambda: not actors(), lambda: "an actor outlived its run")


class _At2(Callback):
    """Does something when round 2 begins."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def round_started(self, number: int, asked: object) -> None:
        if number == 2:
            self._act()


@pytest.mark.nightly
def test_a_killed_actor_is_replaced_and_the_run_ends_with_the_same_bytes(tiny_config: MakeConfig, cluster: Any) -> None:
    whole = run(tiny_config(*TWO))
    config = tiny_config(*RAY, name="killed")

    def kill() -> None:
        assert len(actors()) == 2
        os.kill(actors()[0].pid, signal.SIGKILL)

    assert same_state(run_simulation(config, RunDir.create(config), _At2(kill)).state, whole.state)
    until(lambda: not actors(), lambda: "an actor outlived its run")


@pytest.mark.nightly
def test_an_actor_has_the_threads_of_its_choice(tiny_config: MakeConfig, cluster: Any) -> None:
    seen: list[dict[str, str]] = []
    config = tiny_config(*RAY, "runtime.threads=2")
    run_simulation(config, RunDir.create(config), _At2(lambda: seen.extend(actor.environ() for actor in actors())))
    assert [variables["OMP_NUM_THREADS"] for variables in seen] == ["2", "2"]
    assert [variables["OMP_WAIT_POLICY"] for variables in seen] == ["PASSIVE", "PASSIVE"]


@pytest.mark.nightly
def test_a_private_run_needs_its_folder_on_every_machine(
    tiny_config: MakeConfig, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = ("privacy.noise_multiplier=1.0", "privacy.delta=1e-3", "privacy.max_grad_norm=0.5")
    config = tiny_config(*RAY, *private, "privacy.public_examples=40", "server.weighting=uniform")
    ledgers = run(config).rundir.privacy_dir.glob("client-*.jsonl")
    assert len(list(ledgers)) == 5
    monkeypatch.setattr(ray_pool, "_content", lambda file: b"of another machine")
    with raises(PrivacyError, "folder-not-shared", "output"):
        run(config.model_copy(update={"name": "elsewhere"}))
    until(lambda: not actors(), lambda: "an actor outlived its run")


@pytest.mark.nightly
def test_a_cluster_of_the_runs_own_is_gone_afterwards(tiny_config: MakeConfig) -> None:
    """In a process without a cluster, which tests above may have here."""
    config = tiny_config(*RAY)
    child = processes.Child(_on_a_ray_of_its_own, {"RAY_ADDRESS": ""})
    try:
        child.pipe.tell(config)
        said = [child.pipe.hear() for _ in range(3)]
        assert said == [("during", True, 2), ("after", False, 0), ("after a failure", False, 0)]
    finally:
        child.end()


def _on_a_ray_of_its_own(pipe: processes.Pipe) -> None:
    import ray

    config = pipe.hear()
    run_simulation(
        config, RunDir.create(config), _At2(lambda: pipe.tell(("during", ray.is_initialized(), len(actors()))))
    )
    pipe.tell(("after", ray.is_initialized(), len(_rays())))
    config = config.model_copy(update={"name": "fails"})
    try:
        run_simulation(config, RunDir.create(config), _At2(_fail))
    except ZeroDivisionError:
        pipe.tell(("after a failure", ray.is_initialized(), len(_rays())))


def _fail() -> None:
    raise ZeroDivisionError


def _rays() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "ray" in p.name() or "gcs" in p.name()]
