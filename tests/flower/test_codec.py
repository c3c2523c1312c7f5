"""The wire loses nothing, and sends what a client holds already only once."""

from __future__ import annotations

import json

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedlora.adapter import ALL_PARTS, AdapterState, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import ClientPlan, Merge
from fedlora.errors import ReplyError
from fedlora.flower.codec import (
    Ask,
    PlanEncoder,
    decode_plan,
    digest,
    from_array,
    payload_bytes,
    to_array,
)


def adapter(seed: int = 0, rank: int = 3) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, 5, generator=g), torch.randn(4, rank, generator=g), 2.0) for name in ("b", "a")
    }
    return AdapterState(pairs, {"head.weight": torch.randn(2, 4, generator=g)})


def same(left: AdapterState, right: AdapterState) -> bool:
    one, other = left.tensors(), right.tensors()
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one) and left.layout == right.layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (), (1,)])
def test_a_tensor_survives_the_wire(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape).to(dtype)
    back = from_array(to_array(value))
    assert back.dtype == dtype
    assert back.shape == value.shape
    assert torch.equal(back, value)


def test_a_transposed_tensor_is_sent_as_it_reads() -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(from_array(to_array(value)), value)


def test_a_plan_survives_the_wire() -> None:
    merge = Merge(0, 2, AdapterState(adapter(1, rank=7).pairs, {"c": torch.randn(4, 5)}))
    plan = ClientPlan(adapter(), base_version=2, merges=(merge,), proximal_mu=0.5)
    received = decode_plan(PlanEncoder().encode(Ask(plan, 3, 1, "digest", "")))
    assert same(received.adapter(received.tensors("frozen/")), plan.adapter)
    (got,) = received.merges()
    assert (got.since, got.version) == (0, 2)
    assert same(got.change, merge.change)
    assert received.head["proximal_mu"] == 0.5
    assert set(received.head["trains"]) == ALL_PARTS


def test_frozen_parts_travel_apart_and_can_be_left_out() -> None:
    plan = ClientPlan(adapter(), trains=frozenset(("B", "dense")), sends=frozenset(("B", "dense")))
    encoder = PlanEncoder()
    whole, short = (encoder.encode(Ask(plan, 1, 0), with_frozen=flag) for flag in (True, False))
    frozen = decode_plan(whole).tensors("frozen/")
    assert set(frozen) == {"a:A", "b:A"}
    assert decode_plan(short).tensors("frozen/") == {}
    assert same(decode_plan(short).adapter(frozen), plan.adapter)
    assert payload_bytes(whole) - payload_bytes(short) == 2 * 3 * 5 * 4
    assert decode_plan(short).head["frozen"] == digest(frozen)


def test_fresh_pairs_are_drawn_by_the_client_and_do_not_travel() -> None:
    layout = {"m": PairShape(4, 5, 3, 2.0)}
    plan = ClientPlan(AdapterState(fresh_pairs(layout, 7), {"head": torch.ones(2)}), fresh_seed=7)
    received = decode_plan(PlanEncoder().encode(Ask(plan, 1, 0)))
    assert set(received.arrays) == {"adapter/head"}
    assert same(received.adapter({}), plan.adapter)


def test_arrays_shared_by_clients_are_encoded_once_but_handed_out_apart() -> None:
    plan = ClientPlan(adapter())
    encoder = PlanEncoder()
    one, two = (encoder.encode(Ask(plan, 1, k)).array_records["arrays"]["adapter/a:A"] for k in (0, 1))
    assert one is not two
    assert one.data is two.data


def test_another_protocol_is_refused_with_both_versions() -> None:
    content = PlanEncoder().encode(Ask(ClientPlan(adapter()), 1, 0))
    head = json.loads(str(content.config_records["plan"]["json"]))
    content.config_records["plan"] = ConfigRecord({"json": json.dumps(head | {"protocol": 99, "fedlora": "9.9"})})
    with pytest.raises(ReplyError, match=r"protocol 99 \(fedlora 9\.9\).*install the same"):
        decode_plan(RecordDict(dict(content)))


def test_a_digest_sees_names_shapes_and_values() -> None:
    base = {"x": torch.ones(2, 3)}
    others = [
        {"y": torch.ones(2, 3)},
        {"x": torch.ones(3, 2)},
        {"x": torch.ones(2, 3) * 2},
        {"x": torch.ones(2, 3).double()},
    ]
    assert digest(base) == digest({"x": torch.ones(2, 3)})
    assert len({digest(base), *(digest(other) for other in others)}) == 5
