from __future__ import annotations

import json
import math
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import raises
from support.states import same_state

from fedlora import files, state_io
from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import BaseUpdate, GlobalState
from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError, RunDirError
from fedlora.files import write_atomically
from fedlora.model import export
from fedlora.runs import rundir
from fedlora.runs.rundir import RunDir
from fedlora.state_io import (
    flatten_adapter,
    flatten_state,
    pack,
    unflatten_adapter,
    unflatten_state,
    unpack,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ALL_DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
# The bytes are what is drawn, so that NaNs with payloads, infinities, subnormals and -0.0 all come by.
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@st.composite
def tensors(draw, shape: tuple[int, ...], dtypes=ALL_DTYPES) -> torch.Tensor:
    dtype = draw(st.sampled_from(dtypes))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return (flat % 2 if dtype == torch.bool else flat).view(dtype).reshape(shape)


@st.composite
def adapters(draw) -> AdapterState:
    pairs = {}
    for name in draw(st.lists(names, unique=True, max_size=3)):
        o, i, r = (draw(st.integers(low, 4)) for low in (1, 1, 0))
        scale = draw(st.floats(allow_nan=False, allow_infinity=False))
        pairs[name] = LoraPair(draw(tensors((r, i), FLOATS)), draw(tensors((o, r), FLOATS)), scale)
    dense = {
        name: draw(tensors(tuple(draw(st.lists(st.integers(0, 3), max_size=3)))))
        for name in draw(st.lists(names, unique=True, max_size=3))
    }
    return AdapterState(pairs, dense)


@st.composite
def states(draw) -> GlobalState:
    versions = sorted(draw(st.sets(st.integers(1, 50), max_size=3)))
    base_updates = [
        BaseUpdate(since, version, draw(adapters())) for since, version in zip([0, *versions], versions, strict=False)
    ]
    memory = {name: draw(tensors((2,))) for name in draw(st.lists(names, unique=True, max_size=2))}
    return GlobalState(
        adapter=draw(adapters()),
        seed=draw(st.integers(0, 2**63 - 1)),
        round=draw(st.integers(0, 1000)),
        base_updates=tuple(base_updates),
        memory=memory,
        metrics=draw(st.dictionaries(names, st.floats(), max_size=2)),
    )


@pytest.mark.slow
@given(states())
@settings(deadline=None)
def test_a_state_comes_back_bit_for_bit(state: GlobalState) -> None:
    assert same_state(unflatten_state(*unpack(pack(*flatten_state(state)))), state)


@given(adapters(), st.sampled_from(["", "x/", "A/"]))
@settings(deadline=None, max_examples=30)
def test_an_adapter_comes_back_under_any_prefix(adapter: AdapterState, prefix: str) -> None:
    back = unflatten_adapter(*unpack(pack(*flatten_adapter(adapter, prefix))), prefix)
    assert same_state(GlobalState(back), GlobalState(adapter))
    assert list(back.pairs) == list(adapter.pairs)
    assert list(back.dense) == list(adapter.dense)


def test_names_that_look_alike_are_kept_apart() -> None:
    pair = LoraPair(torch.zeros(1, 2), torch.ones(3, 1), 1.0)
    adapter = AdapterState(
        {"x": pair, "A/x": pair}, {"x:A": torch.ones(1), "A/x": torch.zeros(1), "B/x": torch.ones(2)}
    )
    assert same_state(GlobalState(unflatten_adapter(*flatten_adapter(adapter))), GlobalState(adapter))


def test_views_and_shared_memory_are_stored_by_value() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    adapter = AdapterState({"m": LoraPair(whole.T, whole[:2], 2.0)}, {"d": whole[0].expand(2, 4), "e": whole[0]})
    back = unflatten_adapter(*unpack(pack(*flatten_adapter(adapter))))
    assert same_state(GlobalState(back), GlobalState(adapter))


def test_same_state_sees_every_difference() -> None:
    base = GlobalState(AdapterState({"m": LoraPair(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, {"d": torch.zeros(2)}))
    pair = base.adapter.pairs["m"]
    others = [
        GlobalState(AdapterState({"m": LoraPair(pair.A, pair.B, 2.0)}, base.adapter.dense)),
        GlobalState(AdapterState({"m": LoraPair(pair.A * 2, pair.B, 1.0)}, base.adapter.dense)),
        GlobalState(AdapterState({"n": pair}, base.adapter.dense)),
        GlobalState(AdapterState({"m": pair}, {"d": torch.zeros(2, dtype=torch.bfloat16)})),
        GlobalState(AdapterState({"m": pair}, {"d": torch.tensor([0.0, -0.0])})),
        GlobalState(base.adapter, seed=1),
        GlobalState(base.adapter, round=1),
        GlobalState(base.adapter, base_updates=(BaseUpdate(0, 1, AdapterState()),)),
        GlobalState(base.adapter, memory={"v": torch.zeros(1)}),
        GlobalState(base.adapter, metrics={"x": 1.0}),
    ]
    assert same_state(base, base)
    assert not any(same_state(base, other) for other in others)


@pytest.mark.parametrize("damage", [b"", b"short", lambda data: data[:-1], lambda data: b"\xff" * 8 + data[8:]])
def test_damaged_bytes_are_refused(damage) -> None:
    data = pack(*flatten_state(make_state(1)))
    with raises(RunDirError, "file-damaged"):
        unpack(damage(data) if callable(damage) else damage)


def test_equal_states_are_equal_bytes() -> None:
    assert len({pack(*flatten_state(make_state(1))) for _ in range(20)}) == 1


@given(st.data())
def test_a_flipped_bit_is_found_wherever_it_is(data) -> None:
    good = pack(*flatten_state(make_state(1)))
    place = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[place // 8] ^= 1 << place % 8
    try:
        tensors, meta = unpack(bytes(bad))
    except RunDirError:
        return
    assert same_state(unflatten_state(tensors, meta), make_state(1))  # the bit carries nothing: a space, for instance


# ---------------------------------------------------------------------------------------------- the folder


def make_state(number: int, base_updates: tuple[BaseUpdate, ...] = ()) -> GlobalState:
    generator = torch.Generator().manual_seed(number)
    pair = LoraPair(torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator), 2.0)
    return GlobalState(AdapterState({"m": pair}, {"d": torch.ones(2)}), seed=7, round=number, base_updates=base_updates)


def make_base_update(since: int, version: int) -> BaseUpdate:
    return BaseUpdate(since, version, AdapterState(dict(make_state(version).adapter.pairs)))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_config("", [f"output={json.dumps(str(tmp_path / 'runs'))}", "name=first", "train.lr=0.002"])


def test_the_config_that_is_written_is_the_config(config: RunConfig) -> None:
    run = RunDir.create(config)
    assert RunDir.open(run.path).config == config
    facts = run.read_json("environment.json")
    assert facts["seed"] == config.seed
    assert facts["packages"]["torch"] == version("torch")
    assert not run.finished


def test_a_run_in_the_way_is_never_written_over_unasked(config: RunConfig) -> None:
    run = RunDir.create(config)
    run.append_metrics({"round": 0})
    with raises(RunDirError, "run-unfinished", run.path, "--resume", "--overwrite", "--set name="):
        RunDir.create(config)
    run.write_json("result.json", {})
    with raises(RunDirError, "run-exists", run.path, "--overwrite", "--set name="):
        RunDir.create(config)
    assert run.read_metrics() == [{"round": 0}]
    again = RunDir.create(config, overwrite=True)
    assert again.read_metrics() == []
    assert not again.finished


def test_overwrite_removes_nothing_that_is_not_a_run(config: RunConfig) -> None:
    folder = Path(config.output) / config.name
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with raises(RunDirError, "folder-holds-other-files", folder, "--set name="):
        RunDir.create(config, overwrite=True)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_two_processes_never_write_one_run(config: RunConfig) -> None:
    run = RunDir.create(config)
    run.checkpoints.save(make_state(1))
    with run.writing():
        with (
            raises(RunDirError, "run-in-use", run.path),
            RunDir.open(run.path).writing(),
        ):
            pass
        with raises(RunDirError, "run-in-use", run.path):
            RunDir.create(config, overwrite=True)
    assert RunDir.open(run.path).checkpoints.latest() is not None
    with run.writing():  # the lock was given back
        pass


def test_an_empty_folder_is_not_in_the_way(config: RunConfig) -> None:
    (Path(config.output) / config.name).mkdir(parents=True)
    assert RunDir.create(config).path.is_dir()


@pytest.mark.parametrize("name", ["create", "overwrite", "discard"])
def test_a_kill_while_a_folder_is_made_or_removed_leaves_a_whole_run_or_none(
    config: RunConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever change of the disk: of an earlier run nothing is left, or all of it, with its ledgers."""
    path, steps = Path(config.output) / config.name, range(1, 60)

    def files_of_the_run() -> set[str]:
        return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != ".lock"}

    for step in steps:
        shutil.rmtree(path, ignore_errors=True)
        new = files_of_the_run() if RunDir.create(config) else set()
        before = set() if name == "create" else new
        if name == "create":
            shutil.rmtree(path)
        else:
            run = RunDir.open(path)
            run.append_metrics({"round": 0})
            run.checkpoints.save(make_state(0))
            if name == "overwrite":
                run.write_json("result.json", {"rounds": 0})
                (path / "privacy").mkdir()
                (path / "privacy" / "client-0.jsonl").write_text("{}\n")
            before = files_of_the_run()
        changes = iter(steps)

        def dying(real: Any, changes: Any = changes, step: int = step) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(changes) >= step:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, called in ((os, "fsync"), (os, "rmdir"), (os, "unlink"), (Path, "mkdir"), (Path, "rename")):
                patch.setattr(owner, called, dying(getattr(owner, called)))
            try:
                RunDir.open(path).discard_if_untrained() if name == "discard" else RunDir.create(config, overwrite=True)
                break
            except KeyboardInterrupt:
                pass
        if path.exists():
            assert files_of_the_run() in (before, new)
            RunDir.open(path).resume()
        else:
            RunDir.create(config)
            assert not list(path.parent.glob(".*.removed"))
    assert 3 < step < 59


def test_of_two_starts_of_one_name_one_wins(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[str] = []
    real = rundir.describe_environment

    def slow(given: RunConfig) -> dict[str, Any]:
        monkeypatch.undo()
        first.append(RunDir.create(given).run_id)  # while the other one is still at it
        return real(given)

    monkeypatch.setattr(rundir, "describe_environment", slow)
    with raises(RunDirError, "run-unfinished"):
        RunDir.create(config)
    assert [RunDir.open(Path(config.output) / config.name).run_id] == first


@pytest.mark.parametrize("other", ["environment.json", ".cache.tmp/notes"])
def test_what_is_no_runs_is_not_removed(config: RunConfig, other: str) -> None:
    file = Path(config.output) / config.name / other
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with raises(RunDirError, "folder-holds-other-files"):
        RunDir.create(config, overwrite=True)
    assert file.is_file()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\\b"])
def test_a_run_cannot_be_named_out_of_its_folder(config: RunConfig, name: str) -> None:
    with raises(ConfigError, "bad-run-name", repr(name)):
        RunDir.create(config.model_copy(update={"name": name}))


def test_opening_another_config_says_which_keys_differ(config: RunConfig) -> None:
    run = RunDir.create(config)
    other = parse_config("", ["name=first", "train.lr=0.1", "adapter.rank=3", "strategy.name=ffa", "strategy.x=1"])
    changed = ("adapter.rank was 8 and is now 3", "strategy.name was 'fedavg' and is now 'ffa'")
    with raises(RunDirError, "config-differs", *changed) as caught:
        RunDir.open(run.path, other)
    assert "train.lr" not in str(caught.value)  # which decides the rounds to come alone
    assert "output" not in str(caught.value)


def test_another_machine_may_go_on_with_a_run(config: RunConfig) -> None:
    run = RunDir.create(config)
    elsewhere = parse_config("", ["name=first", "train.lr=0.002", "runtime.threads=3", "output=elsewhere"])
    assert RunDir.open(run.path, elsewhere).config.runtime.threads == 3


def test_a_run_can_go_on_to_a_later_round_and_then_says_so(config: RunConfig) -> None:
    run = RunDir.create(config)
    run.append_metrics({"round": 10})
    run.checkpoints.save(make_state(10))
    run.write_json("result.json", {"rounds": 10})
    assert RunDir.open(run.path).finished
    more = RunDir.open(run.path, config.model_copy(update={"rounds": 20}))
    assert not more.finished
    more.resume()
    assert RunDir.open(run.path).config.rounds == 20
    assert not RunDir.open(run.path).finished


def test_a_run_cannot_be_cut_to_fewer_rounds_than_it_has_done(config: RunConfig) -> None:
    run = RunDir.create(config)
    run.checkpoints.save(make_state(7))
    fewer = config.model_copy(update={"rounds": 6})
    with raises(RunDirError, "rounds-already-done", 7, "rounds = 6"):
        RunDir.open(run.path, fewer)
    assert RunDir.open(run.path).config.rounds == 10


def test_opening_what_is_not_there_names_the_nearest_run(config: RunConfig) -> None:
    run = RunDir.create(config)
    with raises(RunDirError, "no-such-run", run.path):
        RunDir.open(run.path.parent / "firts")


def test_json_has_no_nan_and_takes_numpy(config: RunConfig) -> None:
    run = RunDir.create(config)
    value = {"x": math.inf, 3: torch.tensor([1.5, math.nan]), "s": {2, 1}, "p": Path("a"), "t": (1, "x")}
    run.write_json("x.json", value)
    assert run.read_json("x.json") == {"x": None, "3": [1.5, None], "s": [1, 2], "p": "a", "t": [1, "x"]}
    assert run.read_json("absent.json") is None
    run.append_metrics({"round": 0, "loss": math.nan})
    assert run.read_metrics() == [{"round": 0, "loss": None}]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_torn_last_line_is_dropped_and_never_glued_to_the_next(config: RunConfig, cut: int) -> None:
    run = RunDir.create(config)
    for number in range(3):
        run.append_metrics({"round": number})
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run.checkpoints.save(make_state(1))
    whole = [{"round": number} for number in range(2)]
    assert run.read_metrics() == whole
    again = RunDir.open(run.path)
    again.resume()
    again.append_metrics({"round": 2})
    assert again.read_metrics() == [*whole, {"round": 2}]


def test_damage_inside_the_metrics_is_not_passed_over(config: RunConfig) -> None:
    run = RunDir.create(config)
    (run.path / "metrics.jsonl").write_text('{"round": 0}\n{"rou\n{"round": 2}\n')
    with raises(RunDirError, "file-damaged", "line 2", "metrics.jsonl"):
        run.read_metrics()


def test_the_latest_checkpoint_comes_back_and_two_are_kept(config: RunConfig) -> None:
    run = RunDir.create(config)
    assert run.checkpoints.latest() is None
    for number in range(1, 13):
        run.checkpoints.save(make_state(number))
    assert sorted(os.listdir(run.path / "checkpoints")) == ["000011.safetensors", "000012.safetensors"]
    state = RunDir.open(run.path).checkpoints.latest()
    assert state is not None
    assert same_state(state, make_state(12))


def test_resume_cuts_the_metrics_to_the_checkpoint(config: RunConfig) -> None:
    run = RunDir.create(config)
    for number in range(4):
        run.append_metrics({"round": number})
    run.checkpoints.save(make_state(2))
    run.write_json("result.json", {})
    again = RunDir.open(run.path)
    state = again.resume()
    assert state is not None
    assert state.round == 2
    assert [record["round"] for record in again.read_metrics()] == [0, 1, 2]
    assert not again.finished
    assert [entry["round"] for entry in again.read_json("environment.json")["resumed"]] == [2]


def test_resume_before_the_first_checkpoint_starts_from_nothing(config: RunConfig) -> None:
    run = RunDir.create(config)
    run.append_metrics({"round": 0})
    assert RunDir.open(run.path).resume() is None
    assert run.read_metrics() == []


def test_merges_are_written_once_and_go_when_no_checkpoint_names_them(config: RunConfig) -> None:
    run = RunDir.create(config)
    base_updates = (make_base_update(0, 1), make_base_update(1, 2))
    run.checkpoints.save(make_state(1, base_updates[:1]))
    first = run.path / "merges" / "000000-000001.safetensors"
    before = first.stat()
    run.checkpoints.save(make_state(2, base_updates))
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    again = RunDir.open(run.path)
    state = again.checkpoints.latest()
    assert state is not None
    assert same_state(state, make_state(2, base_updates))
    again.checkpoints.save(make_state(3, state.base_updates))  # read back, and so known to be there
    assert first.stat().st_ino == before.st_ino

    compact = (make_base_update(0, 3),)
    again.checkpoints.save(make_state(4, compact))
    assert first.exists()  # the checkpoint of round 3 still needs it
    again.checkpoints.save(make_state(5, compact))
    assert os.listdir(run.path / "merges") == ["000000-000003.safetensors"]


def test_a_merge_of_a_round_that_was_lost_is_replaced(config: RunConfig) -> None:
    run = RunDir.create(config)
    run.checkpoints.save(make_state(1))
    lost = BaseUpdate(0, 1, make_state(99).adapter)
    write_atomically(
        run.path / "merges" / "000000-000001.safetensors", pack(*state_io.flatten_base_update(lost))
    )  # and then the power went, before the checkpoint
    again = RunDir.open(run.path)
    again.resume()
    state = make_state(2, (make_base_update(0, 1),))
    again.checkpoints.save(state)
    found = RunDir.open(run.path).checkpoints.latest()
    assert found is not None
    assert same_state(found, state)


@pytest.mark.parametrize("step", range(4))
def test_a_kill_anywhere_in_a_checkpoint_leaves_the_one_before(
    config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at the `step`th write to disk of round 2: before or after the merge's file, or the state's."""
    run = RunDir.create(config)
    first = make_state(1, (make_base_update(0, 1),))
    run.checkpoints.save(first)

    class Killed(BaseException):
        pass

    seen = iter(range(100))

    def dying(real):
        def call(*args, **kwargs):
            if next(seen) == step:
                raise Killed
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(files.os, "fsync", dying(os.fsync))
    state = make_state(2, (make_base_update(0, 1), make_base_update(1, 2)))
    state = GlobalState(state.adapter, state.seed, 2, (first.base_updates[0], state.base_updates[1]))
    with pytest.raises(Killed):
        run.checkpoints.save(state)
    monkeypatch.undo()
    found = RunDir.open(run.path).checkpoints.latest()
    assert found is not None
    # fsyncs: merge file, merges/, checkpoint file, checkpoints/; after the third the new checkpoint is in place
    expected = state if step == 3 else make_state(1, (make_base_update(0, 1),))
    assert same_state(found, expected)


def test_a_resume_removes_what_killed_writes_left(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(config)
    before = set(run.path.rglob("*"))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def export_adapter() -> None:
        with export._replaced(run.adapter_dir) as fresh:
            (fresh / "adapter_model.safetensors").touch()
            killed()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        for owner, name in ((Path, "unlink"), (shutil, "rmtree")):  # a process that is killed clears nothing up
            patch.setattr(owner, name, lambda *_, **__: None)
        for write in (lambda: run.checkpoints.save(make_state(1)), lambda: run.write_json("samples.json", [])):
            with pytest.raises(KeyboardInterrupt):
                write()
        with pytest.raises(KeyboardInterrupt):
            export_adapter()
    left = {path for path in run.path.rglob("*") if path.is_file()} - before
    assert len(left) == 3
    RunDir.open(run.path).resume()
    assert not any(path.exists() for path in left)


def test_a_damaged_checkpoint_is_named(config: RunConfig) -> None:
    run = RunDir.create(config)
    for number in (1, 2):
        run.checkpoints.save(make_state(number))
    last = run.path / "checkpoints" / "000002.safetensors"
    last.write_bytes(last.read_bytes()[:-3])
    with raises(RunDirError, "file-damaged", last):
        RunDir.open(run.path).checkpoints.latest()
    last.unlink()
    state = RunDir.open(run.path).checkpoints.latest()
    assert state is not None
    assert state.round == 1


def test_a_missing_merge_is_named(config: RunConfig) -> None:
    run = RunDir.create(config)
    run.checkpoints.save(make_state(1, (make_base_update(0, 1),)))
    (run.path / "merges" / "000000-000001.safetensors").unlink()
    with raises(RunDirError, "file-missing", "000000-000001.safetensors"):
        RunDir.open(run.path).checkpoints.latest()


def test_nothing_in_the_folder_names_the_machine(config: RunConfig) -> None:
    facts = json.dumps(RunDir.create(config).read_json("environment.json"))
    assert str(Path.home()) not in facts
