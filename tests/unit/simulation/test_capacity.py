"""How many processes share a round, and how many clients each trains at once: by config, data and machine alone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.errors import raises
from support.tiny_federations import MakeConfig
from torch import nn

from fedlora.aggregators import rules
from fedlora.api import train
from fedlora.callbacks import Callback
from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError
from fedlora.partition import partitioners
from fedlora.simulation import capacity as sizing
from fedlora.simulation.capacity import (
    WORTH_PROCESSES,
    ProcessChoice,
    cohort_size,
    expected_tokens,
    process_count,
    said_of_cohort,
)
from fedlora.simulation.machines import Machine
from fedlora.training import runtime


class _Base:
    """A model of 10 x 100 weights beside a table of tokens, with an adapter of 1 kB."""

    device = torch.device("cpu")
    pass_tokens = cache = coupled = None
    needs_padding = "no layers of rows"

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Embedding(1000, 10), nn.Linear(10, 100, bias=False))

    def initial_adapter(self, _seed: int) -> Any:
        return SimpleNamespace(nbytes=lambda: 1000)

    def layout(self) -> dict[str, Any]:
        return {"m": SimpleNamespace(d_in=384)}


def workspace(config: RunConfig, sizes: tuple[int, ...] = (40, 80), tokens: int = 50) -> Any:
    starts = np.cumsum((0, *sizes))
    clients = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    train = SimpleNamespace(lengths=np.full(sum(sizes), tokens))
    return SimpleNamespace(
        config=config,
        speedups=SimpleNamespace(cache=SimpleNamespace(nbytes=0)),
        base=_Base(),
        task=object(),
        data=SimpleNamespace(clients=clients, train=train),
    )


def settled(*overrides: str, rounds: int = 10) -> RunConfig:
    return parse_config("", [f"rounds={rounds}", "train.batch_size=8", *overrides])


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, 8 GiB."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runtime, "usable_cores", lambda: 4)
    monkeypatch.setattr(sizing, "total_bytes", lambda _device: 8 << 30)
    monkeypatch.setattr(sizing, "why_alone", lambda _base: None)


LONG = 10**7  # rounds: 4 x 1000 weights x 60 examples x 50 tokens x 2 clients = 2.4e7 operations each


def test_a_long_run_gets_a_process_for_each_core_and_a_short_one_none() -> None:
    long = process_count(workspace(settled(rounds=LONG)), asked=50)
    assert (long.processes, long.threads, long.reason) == (4, 1, "4 cores, 50 clients a round, memory for 5")
    rounds = int(WORTH_PROCESSES / 2.4e7)
    assert process_count(workspace(settled(rounds=rounds - 10)), asked=2).processes == 1
    assert process_count(workspace(settled(rounds=rounds + 10)), asked=2).processes == 2


@pytest.mark.parametrize(
    ("overrides", "asked", "processes", "threads"),
    [
        ((), 3, 3, 1),  # no more than clients
        (("runtime.threads=2",), 50, 2, 2),
        (("runtime.threads=4",), 50, 1, 4),
        (("runtime.processes=2",), 50, 2, 2),
        (("runtime.processes=3", "runtime.threads=5"), 1, 3, 5),  # who says so gets it
        (("runtime.processes=8",), 50, 8, 1),
    ],
)
def test_processes_share_the_cores(overrides: tuple[str, ...], asked: int, processes: int, threads: int) -> None:
    choice = process_count(workspace(settled(*overrides, rounds=LONG)), asked)
    assert (choice.processes, choice.threads) == (processes, threads)


def test_the_environment_says_how_many_cores_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert process_count(workspace(settled(rounds=LONG)), 50).processes == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert process_count(workspace(settled(rounds=LONG)), 50).processes == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with raises(ConfigError, "bad-environment", "OMP_NUM_THREADS", "'many'"):
        process_count(workspace(settled(rounds=LONG)), 50)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sizing, "usable_cores", lambda: 4)
    assert "OMP_NUM_THREADS=1 in the environment: unset it" in process_count(workspace(settled(rounds=LONG)), 50).reason
    monkeypatch.setattr(sizing, "usable_cores", lambda: 1)
    assert process_count(workspace(settled(rounds=LONG)), 50).reason == "there is no second one of the cores"


def test_memory_sets_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "total_bytes", lambda _device: 2 << 30)
    assert process_count(workspace(settled(rounds=LONG)), 50).processes == 1
    monkeypatch.setattr(sizing, "total_bytes", lambda _device: 4 << 30)
    assert process_count(workspace(settled(rounds=LONG)), 50).processes == 2


@pytest.mark.parametrize(
    ("overrides", "machines", "asked", "processes", "threads"),
    [
        ((), [Machine(4), Machine(3)], 50, 7, 1),
        ((), [Machine(8), Machine(4)], 5, 5, 2),  # cores of two machines do not add up to a process
        ((), [Machine(8), Machine(8)], 3, 3, 4),
        ((), [Machine(64)], 50, 5, 12),  # each machine has the memory of this one
        ((), [Machine(64), Machine(64)], 50, 10, 12),
        (("runtime.threads=3",), [Machine(8), Machine(4)], 50, 3, 3),
        (("runtime.processes=2",), [Machine(8), Machine(4)], 50, 2, 4),
        ((), [Machine(1)], 50, 1, 1),
    ],
)
def test_on_a_cluster_its_machines_count(
    overrides: tuple[str, ...], machines: list[Machine], asked: int, processes: int, threads: int
) -> None:
    choice = process_count(workspace(settled(*overrides, rounds=LONG)), asked, machines)
    assert (choice.processes, choice.threads) == (processes, threads)
    assert process_count(workspace(settled("runtime.processes=auto", rounds=1)), asked, machines).processes == 1


def test_on_a_cluster_of_gpus_each_has_one() -> None:
    mine = workspace(settled(rounds=LONG))
    mine.base.device = torch.device("cuda")
    choice = process_count(mine, 50, [Machine(16, 2), Machine(16, 4)])
    assert (choice.processes, choice.threads) == (6, 4)
    assert choice.reason == "6 GPUs of the cluster, 50 clients a round, memory for 10"


def test_a_gpu_gets_no_more_bases_than_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has one of its own, and the server another beside them."""
    monkeypatch.setattr(sizing, "_base_bytes", lambda _base: 3 << 30)
    made = workspace(settled("runtime.processes=2"))
    made.base.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with raises(ConfigError, "gpu-too-small", "runtime.processes = 2", "3 bases"):
        process_count(made, 50)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process_count(made, 50).processes == 2


def test_a_base_on_all_gpus_has_one_process() -> None:
    choice = process_count(workspace(settled("runtime.device_map=auto", rounds=LONG)), 50)
    assert (choice.processes, choice.reason) == (1, "the base lies on all GPUs")


def test_kept_prefixes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = workspace(settled(rounds=LONG), sizes=(40,) * 10)
    mine.speedups.cache.nbytes = 2 << 30
    assert process_count(mine, 10).processes == 2  # of 4 GiB one cache that all share out
    assert process_count(mine, 9).processes == 1  # or one for each
    mine.speedups.cache.nbytes = 0
    assert process_count(mine, 9).processes == 4


def test_a_task_of_the_main_program_stays_with_it() -> None:
    mine = workspace(settled(rounds=LONG))
    mine.task = type("Mine", (), {"__module__": "__main__"})()
    choice = process_count(mine, 50)
    assert choice.processes == 1
    assert "main program" in choice.reason


@pytest.mark.parametrize("of", [partitioners, rules])
def test_so_does_a_rule_or_a_partition(monkeypatch: pytest.MonkeyPatch, of: Any) -> None:
    monkeypatch.setitem(of._entries, "mine", type("Mine", (), {"__module__": "__main__"}))
    key = "partition" if of is partitioners else "strategy"
    assert "main program" in process_count(workspace(settled(f"{key}.name=mine", rounds=LONG)), 50).reason


def test_each_process_is_told_its_threads_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = ProcessChoice(3, 2, "")
    assert choice.environment(0) == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [choice.environment(k)["CUDA_VISIBLE_DEVICES"] for k in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [choice.environment(k)["CUDA_VISIBLE_DEVICES"] for k in range(3)] == ["5", "3", "5"]
    assert "CUDA_VISIBLE_DEVICES" not in choice.environment(1, spread=False)


def test_work_is_tokens_of_a_round() -> None:
    one = workspace(settled("train.epochs=2"), sizes=(40, 0, 80), tokens=50)
    assert expected_tokens(one) == [2 * 40 * 50, 0.0, 2 * 80 * 50]
    steps = workspace(settled("train.steps=3"), sizes=(40, 80), tokens=50)
    assert expected_tokens(steps) == [3 * 8 * 50] * 2


@given(asked=st.integers(1, 300), processes=st.integers(2, 9), rows=st.sampled_from([1, 4, 16]))
def test_all_processes_get_about_as_many(asked: int, processes: int, rows: int) -> None:
    config = settled(f"train.batch_size={rows}")
    alone = cohort_size(workspace(config), asked).clients
    shared = cohort_size(workspace(config), asked, processes).clients
    assert 1 <= shared <= alone
    waves = -(-asked // (shared * processes))
    assert waves == -(-asked // (alone * processes))  # smaller groups, and no more of them
    assert shared * processes * waves < asked + processes * waves  # and nobody waits for more than one client


def test_a_cohort_that_is_asked_for_and_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, auto = workspace(settled("runtime.cohort=8")), workspace(settled())
    assert not list(said_of_cohort(asked.config, cohort_size(asked, 8)))
    monkeypatch.setattr(sizing, "why_alone", lambda _base: "DoRA has magnitudes")
    assert list(said_of_cohort(asked.config, cohort_size(asked, 8))) == [
        "runtime.cohort = 8 has no effect: clients train one after the other: DoRA has magnitudes"
    ]
    assert not list(said_of_cohort(auto.config, cohort_size(auto, 8)))


class Heard(Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.slow
def test_a_run_says_it(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    heard = Heard()
    more = ("rounds=1", "train.steps=1", "runtime.processes=1", "adapter.method=dora", "runtime.cohort=8")
    train(tiny_config(*more), heard)
    (line,) = [line for line in heard.lines if "cohort" in line]
    assert line.startswith("runtime.cohort = 8 has no effect: clients train one after the other: ")
