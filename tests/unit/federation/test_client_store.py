"""What a client keeps: the round that the server names, and no more files than a server can still name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.errors import raises

from fedlora.errors import ReplyError
from fedlora.federation.client_ledger import LedgerPlace
from fedlora.federation.client_store import NOTHING_KEPT, ClientStore, last_used

RUN = "0123456789abcdef" * 2


def kept(value: float) -> dict[str, torch.Tensor]:
    return {"layer:B": torch.full((2, 3), value, dtype=torch.bfloat16), "head.weight": torch.tensor([value, -0.0])}


def rounds(store: ClientStore, client_id: int) -> list[int]:
    assert store.folder is not None
    return sorted(int(file.stem[:6]) for file in (store.folder / f"client-{client_id}").iterdir())


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path)


def test_what_is_kept_comes_back_as_it_was(store: ClientStore) -> None:
    store.save(3, 1, kept(0.1), 0)
    store.save(4, 1, kept(0.2), 0)
    found = store.load(3, 1)
    assert found.keys() == kept(0.1).keys()
    for name, value in kept(0.1).items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert store.load(3, 0) == {}


def test_one_that_reads_once_reads_once(store: ClientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(3, 1, kept(0.1), 0)
    store.save(3, 2, kept(0.2), 1)
    read: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), real(path))[1])
    once = store.reading_once()
    for number in (1, 2, 1, 2, 1):
        assert torch.equal(once.load(3, number)["head.weight"], kept(number / 10)["head.weight"])
    assert len(read) == 2
    store.load(3, 1)
    assert len(read) == 3, "the store itself holds nothing"
    with raises(ReplyError, "kept-part-lost"):
        once.load(3, 9)


def test_what_can_still_be_named_stays_and_the_rest_goes(store: ClientStore) -> None:
    """After round 7 that began from 4: its own, 4's, and that from which 4 began, for a server that lost round 7."""
    for number, since in ((1, 0), (2, 1), (4, 2), (5, 4), (6, 4), (7, 4)):  # 5 and 6 were lost on the way
        store.save(0, number, kept(number), since)
    assert rounds(store, 0) == [2, 4, 7]
    assert float(store.load(0, 4)["head.weight"][0]) == 4.0


def test_a_late_round_takes_no_later_one_away(store: ClientStore) -> None:
    for number, since in ((7, 0), (9, 7), (8, 7)):
        store.save(0, number, kept(number), since)
    assert 9 in rounds(store, 0)


def test_a_round_is_used_whose_aggregate_was() -> None:
    lines = [{"round": 1, "answered": [0, 1]}, {"round": 2, "answered": [0], "lost": True}]
    lines.append({"round": 3, "answered": [1], "rule": {"dropped": 1.0}})
    assert last_used(lines) == {0: 1, 1: 1}


def test_a_round_that_is_trained_again_takes_the_place_of_the_first(store: ClientStore) -> None:
    store.save(0, 4, kept(4.0), 0)
    store.save(0, 5, kept(5.0), 4)
    store.save(0, 5, kept(5.5), 0)  # the server went back to before round 4
    assert rounds(store, 0) == [5]
    assert float(store.load(0, 5)["head.weight"][0]) == 5.5


def test_what_is_lost_or_damaged_is_named(store: ClientStore, tmp_path: Path) -> None:
    store.save(2, 1, kept(1.0), 0)
    with raises(ReplyError, "kept-part-lost", "client 2 kept of round 2 is not there"):
        store.load(2, 2)
    (file,) = (tmp_path / "client-2").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with raises(ReplyError, "kept-part-lost", "client 2 kept of round 1 is damaged"):
        store.load(2, 1)


def test_without_a_place_nothing_is_kept_silently() -> None:
    with raises(ReplyError, "no-client-store", "ledger="):
        NOTHING_KEPT.save(0, 1, kept(1.0), 0)
    with raises(ReplyError, "no-client-store", "ledger="):
        NOTHING_KEPT.load(0, 0)


def test_each_run_has_a_place_of_its_own_beside_the_ledger(tmp_path: Path) -> None:
    own = LedgerPlace(own=tmp_path / "ledger.jsonl")
    assert own.store(RUN).folder == tmp_path / "ledger.jsonl.kept" / RUN
    assert LedgerPlace(folder=tmp_path).store(RUN).folder == tmp_path / "kept" / RUN
    for run in ("", "..", "../" + RUN, RUN.upper()):
        with raises(ReplyError, "no-run-id", "does not name its run"):
            own.store(run)
