"""Whole training with the lower layers' states kept is training without; and where it cannot be, it says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators import Merge
from fedlora.config import TrainConfig, parse_config
from fedlora.errors import ModelError
from fedlora.privacy.calibrate import Schedule
from fedlora.training import TrainJob, evaluate, open_workbench, train
from fedlora.training import prefix as prefixes
from fedlora.training.cohort import train_cohort
from fedlora.training.job import rows_of
from fedlora.training.prefix import prepare
from fedlora.training.private import PrivateSettings, check_model
from fedlora.training.private_cohort import train_private
from fedlora.training.workbench import Workbench, close_workbench

HOW = TrainConfig(steps=4, batch_size=6, lr=1e-2)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    close_workbench()
    yield
    close_workbench()


def bench_of(model: Path, data: Path, *overrides: str) -> Workbench:
    return open_workbench(
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


def job(bench: Workbench, seed: int = 0) -> TrainJob:
    state = bench.base.initial_adapter(1)
    generator = torch.Generator().manual_seed(5)
    moved = {
        f"{name}:B": torch.randn(pair.B.shape, generator=generator, dtype=torch.float64) * 0.1
        for name, pair in state.pairs.items()
    }
    return TrainJob(state.with_tensors(moved), ALL_PARTS, np.arange(seed, 20 + seed), seed)


def gap(one: AdapterState, other: AdapterState) -> float:
    return max(float((a - other.tensors()[name]).abs().max()) for name, a in one.tensors().items())


def test_training_and_evaluation_are_the_same_with_and_without(tiny_bert: Path, tiny_csv: Path) -> None:
    found = {}
    for mode in ("on", "off"):
        bench = bench_of(tiny_bert, tiny_csv, f"runtime.prefix_cache={mode}")
        assert bench.prefix.mode == mode
        one = train(bench.base, bench.task, bench.data.train, job(bench), HOW).adapter
        jobs = [job(bench, seed) for seed in (0, 3)]
        many = train_cohort(bench.base, bench.task, bench.data.train, jobs, [HOW, HOW])
        bench.base.write(one)
        figures = evaluate(bench.base, bench.task, bench.data.test).overall
        settings = PrivateSettings(Schedule(1.0, 3, 1, 20.0), 1e-12, 1e3)
        check_model(bench.base, bench.task, bench.data.test, job(bench))
        quiet = train_private(bench.base, bench.task, bench.data.train, job(bench), HOW, settings).adapter
        found[mode] = (one, many[0].adapter, many[1].adapter, figures, quiet)  # type: ignore[union-attr]
        if mode == "on":
            prefix = bench.base.prefix
            assert prefix is not None
            # 23 rows in training, and the test set: each text once, whoever looks at it.
            assert prefix.fills <= 23 + len(bench.data.test)
            assert prefix.hits > prefix.fills
        else:
            assert bench.base.prefix is None
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

    bench = bench_of(tiny_bert, tiny_csv, *overrides)
    assert bench.prefix.mode == "off"
    assert re.search(words, bench.prefix.reason)
    assert bench.choices["prefix_cache_why"] == bench.prefix.reason
    if "runtime.prefix_cache=off" not in overrides:
        with pytest.raises(ModelError, match=words):
            bench_of(tiny_bert, tiny_csv, *overrides, "runtime.prefix_cache=on")


def test_packed_rows_are_no_examples(tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tiny_bert, tiny_csv)
    monkeypatch.setattr(type(bench.task), "rows_are_examples", False)
    report = prefixes.choose_prefix(bench.base, bench.task, [bench.data.train], "auto")
    assert (report.mode, bench.base.prefix) == ("off", None)
    assert "packed" in report.reason


def test_memory_decides(tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tiny_bert, tiny_csv)
    tokens = int(bench.data.train.lengths.sum() + bench.data.test.lengths.sum())
    assert f"{tokens} tokens" in bench.prefix.reason
    needed = tokens * 32 * 8
    close_workbench()
    monkeypatch.setattr(prefixes, "total_bytes", lambda _device: 8 * needed - 8)
    bench = bench_of(tiny_bert, tiny_csv)
    assert bench.prefix.mode == "off"
    assert "an eighth of the memory" in bench.prefix.reason
    assert bench_of(tiny_bert, tiny_csv, "runtime.prefix_cache=on").prefix.mode == "on"
    close_workbench()
    monkeypatch.setattr(prefixes, "total_bytes", lambda _device: 8 * needed)
    assert bench_of(tiny_bert, tiny_csv).prefix.mode == "on"


def test_runs_on_the_same_base_share_what_is_kept(tiny_bert: Path, tiny_csv: Path) -> None:
    bench = bench_of(tiny_bert, tiny_csv)
    evaluate(bench.base, bench.task, bench.data.test)
    prefix: Any = bench.base.prefix
    fills = prefix.fills
    again = bench_of(tiny_bert, tiny_csv, "partition.clients=3")
    assert again.base is bench.base
    assert again.base.prefix is prefix
    evaluate(again.base, again.task, again.data.test)
    assert prefix.fills == fills
    kernel = "runtime.kernels=onednn"  # of no layer in float64
    assert bench_of(tiny_bert, tiny_csv, kernel).base.prefix is prefix
    other: Any = bench_of(tiny_bert, tiny_csv, "runtime.attention=eager").base  # other bits
    assert other is bench.base
    assert other.prefix is not prefix
    assert len(other.model._forward_pre_hooks) == 1


def test_a_merge_below_the_adapters_is_refused(tiny_bert: Path, tiny_csv: Path) -> None:
    base = bench_of(tiny_bert, tiny_csv).base
    above, below = base.targets[0], base.targets[0].replace("layer.1", "layer.0")
    change = torch.full((32, 32), 0.1)
    base.rebase(1, [Merge(0, 1, AdapterState({}, {above: change}))])
    base.rebase(0, [])
    with pytest.raises(ModelError, match=r"runtime\.prefix_cache = 'off'"):
        base.rebase(1, [Merge(0, 1, AdapterState({}, {below: change}))])


def test_preparing_changes_no_bit(tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for prepared in (True, False):
        close_workbench()
        if not prepared:
            monkeypatch.setattr("fedlora.training.cohort.prepare", lambda *_: None)
        bench = bench_of(tiny_bert, tiny_csv, "model.dtype=float32")
        prefix: Any = bench.base.prefix
        before = prefix.fills
        if prepared:
            prepare(bench.base, bench.task, bench.data.train, np.array([3, 3, 5, 4]))
            assert prefix.fills == before + 3
        start = job(bench)
        start = replace(start, adapter=bench.base.initial_adapter(1))
        results.append(train(bench.base, bench.task, bench.data.train, start, HOW).adapter)
        assert prefix.company
        assert prefix.fills <= before + len(start.indices)
    assert gap(*results) == 0


def test_what_is_prepared_is_what_the_batches_hold(tiny_bert: Path, tiny_csv: Path) -> None:
    bench = bench_of(tiny_bert, tiny_csv)
    jobs = [job(bench, 0), job(bench, 3)]
    prepare(bench.base, bench.task, bench.data.train, rows_of(jobs, [HOW, HOW]))
    prefix: Any = bench.base.prefix
    fills, size = prefix.fills, prefix.size
    train_cohort(bench.base, bench.task, bench.data.train, jobs, [HOW, HOW])
    assert (prefix.fills, prefix.size) == (fills, size)
    prefix.clear(30)
    prepare(bench.base, bench.task, bench.data.train, np.arange(20))  # no more than there is room for
    assert prefix.size <= 31 * 32 * 8
    assert prefix.fills <= 4
