from __future__ import annotations

import torch
from support.errors import raises

from fedlora.adapter import AdapterState, PairShape, fresh_pairs
from fedlora.aggregators import load_aggregator
from fedlora.errors import RuleError
from fedlora.evaluation.traffic import measure_traffic

D_OUT, D_IN, CLIENTS, FLOAT = 40, 50, 3, 4
HEAD = 5 * FLOAT


def layout(rank: int) -> dict[str, PairShape]:
    return {"m": PairShape(D_OUT, D_IN, rank, 2.0)}


def initial(rank: int) -> AdapterState:
    return AdapterState(fresh_pairs(layout(rank), 0), {"head": torch.zeros(5)})


def bytes_of(rank: int) -> tuple[int, int]:
    return rank * D_IN * FLOAT, D_OUT * rank * FLOAT


def test_averaging_sends_the_whole_adapter_both_ways_each_round() -> None:
    found = measure_traffic(load_aggregator("fedavg"), initial(2), [layout(2)] * CLIENTS)
    assert found.up == found.down == found.first_down == sum(bytes_of(2)) + HEAD


def test_a_frozen_factor_travels_once() -> None:
    A, B = bytes_of(2)
    found = measure_traffic(load_aggregator("ffa"), initial(2), [layout(2)] * CLIENTS)
    assert (found.up, found.down, found.first_down) == (B + HEAD, B + HEAD, A + B + HEAD)


def test_of_two_factors_that_are_trained_in_turn_each_travels_when_it_has_changed() -> None:
    A, B = bytes_of(2)
    found = measure_traffic(load_aggregator("rolora"), initial(2), [layout(2)] * CLIENTS)
    assert (found.up, found.down, found.first_down) == ((A + B) / 2 + HEAD, (A + B) / 2 + HEAD, A + B + HEAD)


def test_a_start_that_stays_the_same_travels_once() -> None:
    A, B = bytes_of(2)
    found = measure_traffic(load_aggregator("frlora"), initial(2), [layout(2)] * CLIENTS)
    change = 2 * (A + B)  # the round's change of the base, of rank 2 r
    assert (found.first_down, found.down) == (A + B + HEAD, change + HEAD)


def test_stacking_sends_back_everybodys_factors_and_fresh_pairs_are_drawn_not_sent() -> None:
    found = measure_traffic(load_aggregator("flora"), initial(2), [layout(2)] * CLIENTS)
    assert found.up == sum(bytes_of(2)) + HEAD
    assert found.first_down == HEAD
    assert found.down == CLIENTS * sum(bytes_of(2)) + HEAD


def test_clients_with_several_ranks_are_averaged() -> None:
    ranks = (1, 2)
    found = measure_traffic(load_aggregator("ffa"), initial(2), [layout(rank) for rank in ranks])
    assert found.up == sum(bytes_of(rank)[1] for rank in ranks) / 2 + HEAD
    with raises(RuleError, "mixed-ranks", "ffa"):
        measure_traffic(load_aggregator("fedavg"), initial(2), [layout(rank) for rank in ranks])


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    state = initial(2)
    copy = state.clone()
    measure_traffic(load_aggregator("fedavg"), state, [layout(2)] * CLIENTS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), copy.tensors().values(), strict=True))
