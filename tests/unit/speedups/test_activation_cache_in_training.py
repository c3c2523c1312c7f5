"""Whole training with the lower layers' states kept is training without; and where it cannot be, it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises
from support.states import gap

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators import BaseUpdate
from fedlora.config import TrainConfig, parse_config
from fedlora.errors import ModelError
from fedlora.privacy.calibrate import Schedule
from fedlora.speedups import cache_choice
from fedlora.speedups.activation_cache import ActivationCache, prepare
from fedlora.training import TrainJob, evaluate, open_workspace, train
from fedlora.training.cohort import train_cohort
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.job import rows_of
from fedlora.training.workspace import Workspace, close_workspace

pytestmark = pytest.mark.usefixtures("no_workspace")

HOW = TrainConfig(steps=4, batch_size=6, lr=1e-2)


def bench_of(model: Path, data: Path, *overrides: str) -> Workspace:
    return open_workspace(
        parse_config(
            "",
            [
                f"model.name='{model}'",
                "model.dtype=float64",
                f"data.source='{data}'",
                "adapter.targets=['query','value']",
                "adapter.layers=top:1",
                "runtime.threads=1",
                "runtime.kernels=off",
                "runtime.device=cpu",
                *overrides,
            ],
        )
    )


def job(workspace: Workspace, seed: int = 0) -> TrainJob:
    state = workspace.base.initial_adapter(1)
    generator = torch.Generator().manual_seed(5)
    moved = {
        f"{name}:B": torch.randn(pair.B.shape, generator=generator, dtype=torch.float64) * 0.1
        for name, pair in state.pairs.items()
    }
    return TrainJob(state.with_tensors(moved), ALL_PARTS, np.arange(seed, 20 + seed), seed)


@pytest.mark.slow
def test_training_and_evaluation_are_the_same_with_and_without(tiny_bert: Path, tiny_csv: Path) -> None:
    found = {}
    for mode in ("on", "off"):
        workspace = bench_of(tiny_bert, tiny_csv, f"runtime.prefix_cache={mode}")
        assert workspace.speedups.cache.mode == mode
        one = train(workspace.base, workspace.task, workspace.data.train, job(workspace), HOW).adapter
        jobs = [job(workspace, seed) for seed in (0, 3)]
        many = train_cohort(workspace.base, workspace.task, workspace.data.train, jobs, [HOW, HOW])
        workspace.base.write(one)
        figures = evaluate(workspace.base, workspace.task, workspace.data.test).overall
        settings = PrivateSettings(Schedule(1.0, 3, 1, 20.0), 1e-12, 1e3)
        check_model(workspace.base, workspace.task, workspace.data.test, job(workspace))
        quiet = train_private(
            workspace.base, workspace.task, workspace.data.train, job(workspace), HOW, settings
        ).adapter
        found[mode] = (one, many[0].adapter, many[1].adapter, figures, quiet)  # type: ignore[union-attr]
        if mode == "on":
            prefix = workspace.base.cache
            assert isinstance(prefix, ActivationCache)
            # 23 rows in training, and the test set: each text once, whoever looks at it.
            assert prefix.fills <= 23 + len(workspace.data.test)
            assert prefix.hits > prefix.fills
        else:
            assert workspace.base.cache is None
    on, off = found["on"], found["off"]
    assert max(gap(on[k], off[k]) for k in (0, 1, 2)) < 1e-10
    assert gap(on[4], off[4]) < 1e-6  # the noise, which is never the same
    assert on[3]["loss"] == pytest.approx(off[3]["loss"], abs=1e-12)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.layers=top:2"], "first layer has an adapter"),
        (["adapter.modules_to_save=['classifier','embeddings']"], "trained too"),
        (["model.dropout=0.1"], r"model\.dropout = 0"),
        (["runtime.prefix_cache=off"], "switched off"),
    ],
)
def test_where_it_cannot_be_the_reason_is_told(
    overrides: list[str], words: str, tiny_bert: Path, tiny_csv: Path
) -> None:
    import re

    workspace = bench_of(tiny_bert, tiny_csv, *overrides)
    assert workspace.speedups.cache.mode == "off"
    assert re.search(words, workspace.speedups.cache.reason)
    assert workspace.speedups.choices["prefix_cache_why"] == workspace.speedups.cache.reason
    if "runtime.prefix_cache=off" not in overrides:
        with raises(ModelError, "prefix-cache-not-supported", workspace.speedups.cache.reason):
            bench_of(tiny_bert, tiny_csv, *overrides, "runtime.prefix_cache=on")


def test_packed_rows_are_no_examples(tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = bench_of(tiny_bert, tiny_csv)
    monkeypatch.setattr(type(workspace.task), "rows_are_examples", False)
    report = cache_choice.choose_cache(workspace.base, workspace.task, [workspace.data.train], "auto")
    assert (report.mode, workspace.base.cache) == ("off", None)
    assert "packed" in report.reason


@pytest.mark.slow
def test_memory_decides(tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = bench_of(tiny_bert, tiny_csv)
    tokens = int(workspace.data.train.lengths.sum() + workspace.data.test.lengths.sum())
    assert f"{tokens} tokens" in workspace.speedups.cache.reason
    needed = tokens * 32 * 8
    close_workspace()
    monkeypatch.setattr(cache_choice, "total_bytes", lambda _device: 8 * needed - 8)
    workspace = bench_of(tiny_bert, tiny_csv)
    assert workspace.speedups.cache.mode == "off"
    assert "an eighth of the memory" in workspace.speedups.cache.reason
    assert bench_of(tiny_bert, tiny_csv, "runtime.prefix_cache=on").speedups.cache.mode == "on"
    close_workspace()
    monkeypatch.setattr(cache_choice, "total_bytes", lambda _device: 8 * needed)
    assert bench_of(tiny_bert, tiny_csv).speedups.cache.mode == "on"


def test_there_is_room_for_all_that_a_run_evaluates_on(tiny_bert: Path, tiny_csv: Path) -> None:
    workspace = bench_of(tiny_bert, tiny_csv, "selection.patience=3", "data.validation_fraction=0.3")
    data, prefix = workspace.data, workspace.base.cache
    assert isinstance(prefix, ActivationCache)
    fills = []
    for _ in range(2):
        for examples in (data.train, data.require_test(), data.validation):
            assert examples is not None
            evaluate(workspace.base, workspace.task, examples)
        fills.append(prefix.fills)
    assert fills[0] == fills[1]


def test_runs_on_the_same_base_share_what_is_kept(tiny_bert: Path, tiny_csv: Path) -> None:
    workspace = bench_of(tiny_bert, tiny_csv)
    evaluate(workspace.base, workspace.task, workspace.data.test)
    prefix: Any = workspace.base.cache
    fills = prefix.fills
    again = bench_of(tiny_bert, tiny_csv, "partition.clients=3")
    assert again.base is workspace.base
    assert again.base.cache is prefix
    evaluate(again.base, again.task, again.data.test)
    assert prefix.fills == fills
    kernel = "runtime.kernels=onednn"  # of no layer in float64
    assert bench_of(tiny_bert, tiny_csv, kernel).base.cache is prefix
    other: Any = bench_of(tiny_bert, tiny_csv, "runtime.attention=eager").base  # other bits
    assert other is workspace.base
    assert other.cache is not prefix
    assert len(other.model._forward_pre_hooks) == 1


def test_a_merge_below_the_adapters_is_refused(tiny_bert: Path, tiny_csv: Path) -> None:
    base = bench_of(tiny_bert, tiny_csv).base
    above, below = base.targets[0], base.targets[0].replace("layer.1", "layer.0")
    change = torch.full((32, 32), 0.1)
    base.rebase(1, [BaseUpdate(0, 1, AdapterState({}, {above: change}))])
    base.rebase(0, [])
    with raises(ModelError, "base-update-below-adapters", below, "runtime.prefix_cache = 'off'"):
        base.rebase(1, [BaseUpdate(0, 1, AdapterState({}, {below: change}))])


def test_preparing_changes_no_bit(tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for prepared in (True, False):
        close_workspace()
        if not prepared:
            monkeypatch.setattr("fedlora.training.cohort.prepare", lambda *_: None)
        workspace = bench_of(tiny_bert, tiny_csv, "model.dtype=float32")
        prefix: Any = workspace.base.cache
        before = prefix.fills
        if prepared:
            prepare(workspace.base, workspace.task, workspace.data.train, np.array([3, 3, 5, 4]))
            assert prefix.fills == before + 3
        start = job(workspace)
        start = replace(start, adapter=workspace.base.initial_adapter(1))
        results.append(train(workspace.base, workspace.task, workspace.data.train, start, HOW).adapter)
        assert prefix.fills <= before + len(start.indices)
    assert gap(*results) == 0
    if not prefix.grouped:
        pytest.skip("no bit changed, one by one: on this processor a product's bits depend on how many rows it has")


def test_what_is_prepared_is_what_the_batches_hold(tiny_bert: Path, tiny_csv: Path) -> None:
    workspace = bench_of(tiny_bert, tiny_csv)
    jobs = [job(workspace, 0), job(workspace, 3)]
    prepare(workspace.base, workspace.task, workspace.data.train, rows_of(jobs, [HOW, HOW]))
    prefix: Any = workspace.base.cache
    fills, size = prefix.fills, prefix.size
    train_cohort(workspace.base, workspace.task, workspace.data.train, jobs, [HOW, HOW])
    assert (prefix.fills, prefix.size) == (fills, size)
    prefix.clear(30)
    prepare(workspace.base, workspace.task, workspace.data.train, np.arange(20))  # no more than there is room for
    assert prefix.size <= 31 * 32 * 8
    assert prefix.fills <= 4
