"""The wire loses nothing, and sends what a client holds already only once."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedlora.flower.wire import STYPE
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import ALL_PARTS, AdapterState, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import BaseUpdate, ClientPlan
from fedlora.errors import ReplyError
from fedlora.flower.messages import (
    Ask,
    Decoded,
    PlanEncoder,
    decode_plan,
    digest,
    from_array,
    frozen_tensors,
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
    base_update = BaseUpdate(0, 2, AdapterState(adapter(1, rank=7).pairs, {"c": torch.randn(4, 5)}))
    plan = ClientPlan(adapter(), base_version=2, base_updates=(base_update,), proximal_mu=0.5)
    received = decode_plan(PlanEncoder().encode(Ask(plan, 3, 1, "digest", "")))
    assert same(received.adapter(received.tensors("frozen/")), plan.adapter)
    (got,) = received.base_updates()
    assert (got.since, got.version) == (0, 2)
    assert same(got.change, base_update.change)
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


def test_clients_share_a_record_of_arrays_if_they_are_sent_the_very_same_tensors() -> None:
    encoder, plan = PlanEncoder(), ClientPlan(adapter(), trains=frozenset({"B", "dense"}))

    def sent(plan: ClientPlan, *, with_frozen: bool = True) -> ArrayRecord:
        content = encoder.encode(Ask(plan, 1, 0), with_frozen=with_frozen)
        found = decode_plan(content).tensors("adapter/") | decode_plan(content).tensors("frozen/")
        own = plan.adapter.tensors(ALL_PARTS if with_frozen else plan.trains)
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], value) for name, value in own.items())
        return content.array_records["arrays"]

    head = plan.adapter.with_tensors({"head.weight": torch.ones(2, 4)})
    frozen = plan.adapter.with_tensors({"a:A": torch.ones(3, 5)})
    first = sent(plan)
    assert sent(replace(plan, proximal_mu=1.0)) is first
    for other in (
        sent(plan, with_frozen=False),
        sent(replace(plan, adapter=head)),
        sent(replace(plan, adapter=frozen)),
        sent(replace(plan, adapter=plan.adapter.clone())),  # equal, but nobody looks at the values
    ):
        assert other is not first
        assert other["adapter/a:B"] is not first["adapter/a:B"]


def test_a_digest_of_frozen_parts_is_never_another_plans() -> None:
    encoder, plan = PlanEncoder(), ClientPlan(adapter(), trains=frozenset({"B"}))
    for change in ({}, {"a:B": torch.ones(4, 3)}, {"a:A": torch.ones(3, 5)}, {"head.weight": torch.ones(2, 4)}, {}):
        asked = replace(plan, adapter=plan.adapter.with_tensors(change))
        assert encoder.frozen_digest(asked) == digest(frozen_tensors(asked))


def test_plans_with_the_same_bytes_share_their_tensors_and_others_do_not() -> None:
    decoded, data = Decoded(), bytes(range(24))
    first = decoded.tensor(Array("float32", (2, 3), STYPE, data))
    assert decoded.tensor(Array("float32", (2, 3), STYPE, data)) is first
    for other in (
        Array("float32", (3, 2), STYPE, data),
        Array("float64", (3,), STYPE, data),
        Array("float32", (2, 3), STYPE, bytes(24)),
        Array("float32", (2, 3), STYPE, bytes(bytearray(data))),  # equal bytes of another message
    ):
        found = decoded.tensor(other)
        assert found is not first
        assert torch.equal(found, from_array(other))


def test_bytes_that_are_gone_give_their_tensor_to_nobody() -> None:
    decoded = Decoded()
    for value in range(50):  # a new object often has the address of one that was just let go of
        array = Array("float32", (256,), STYPE, np.full(256, value, np.float32).tobytes())
        assert decoded.tensor(array)[0] == value
        del array


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
