"""Messages lose nothing, send what a client holds already only once, and take the bytes that a simulation counts."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair, PairShape, Part, fresh_pairs
from fedlora.aggregators import BaseUpdate, ClientPlan
from fedlora.errors import ReplyError
from fedlora.federation.protocol import (
    FIGURE_BYTES,
    PartDigests,
    TrainedReply,
    TrainRequest,
    head_nbytes,
    tensors_by_part,
    update_head,
)
from fedlora.flower.arrays import from_array, to_array
from fedlora.flower.messages import (
    HeldParts,
    RequestEncoder,
    decode_request,
    decode_request_head,
    encode_reply,
    payload_bytes,
    request_digest,
)
from fedlora.hashing import tensors_digest
from fedlora.wire_formats import WIRES


def adapter(seed: int = 0, rank: int = 3) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(rank, 5, generator=g), torch.randn(4, rank, generator=g), 2.0) for name in ("b", "a")
    }
    return AdapterState(pairs, {"head.weight": torch.randn(2, 4, generator=g)})


FROZEN_A = ClientPlan(adapter(), trains=frozenset(("B", "dense")), sends=frozenset(("B", "dense")))
WITH_UPDATE = ClientPlan(
    adapter(),
    base_version=2,
    base_updates=(BaseUpdate(0, 2, AdapterState(adapter(1, rank=7).pairs, {"c": torch.randn(4, 5)})),),
    proximal_mu=0.5,
)
FRESH = ClientPlan(AdapterState(fresh_pairs({"m": PairShape(4, 5, 3, 2.0)}, 7), {"head": torch.ones(2)}), fresh_seed=7)
TILTED = replace(FROZEN_A, tilt={"a:B": torch.ones(4, 3), "head.weight": torch.ones(2, 4)}, asks=frozenset({"rates"}))
CORED = AdapterState(
    {name: replace(pair, core=torch.randn(3, 3)) for name, pair in adapter().pairs.items()}, adapter().dense
)
PLANS = {
    "plain": ClientPlan(adapter()),
    "frozen A": FROZEN_A,
    "base update": WITH_UPDATE,
    "fresh": FRESH,
    "tilted": TILTED,
    "core": ClientPlan(CORED, trains=frozenset(("R", "dense")), sends=frozenset(("R", "dense"))),
    "two phases": replace(TILTED, first=frozenset({"dense"}), first_times=3, asks=frozenset({"start_loss"})),
}


def planned(plan: ClientPlan, held: Iterable[Part] = (), **fields: Any) -> TrainRequest:
    known = {"digests": PartDigests()(plan), "held": frozenset(held)}
    return TrainRequest(plan, **{"round": 1, "client_id": 0, **known, **fields})


def encoded(plan: ClientPlan, held: Iterable[Part] = (), **fields: Any) -> RecordDict:
    return RequestEncoder().encode(planned(plan, held, **fields))


def decoded(content: RecordDict, held: HeldParts | None = None) -> TrainRequest | None:
    return decode_request(content, decode_request_head(content), held or HeldParts())


def same(left: AdapterState, right: AdapterState) -> bool:
    one, other = left.tensors(), right.tensors()
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one) and left.layout == right.layout


# ------------------------------------------------------------------------------------------------ arrays


def test_a_buffer_survives_as_an_array_and_another_array_is_none() -> None:
    good = to_array(b"abcd")
    assert from_array(good) == b"abcd"
    for odd in (
        Array("uint8", (4,), "numpy.ndarray", b"abcd"),
        Array("float32", (1,), good.stype, b"abcd"),
        Array("uint8", (2, 2), good.stype, b"abcd"),
        Array("uint8", (4,), good.stype, b"abcde"),
        Array(np.zeros(4, np.uint8)),
    ):
        with raises(ReplyError, "no-buffer"):
            from_array(odd)


@pytest.mark.parametrize("layers", [1, 30])
def test_a_message_has_one_array_for_the_adapter_and_one_for_each_change_of_the_base(layers: int) -> None:
    pairs = {f"m{n}": LoraPair(torch.ones(2, 3), torch.ones(4, 2), 2.0) for n in range(layers)}
    updates = tuple(BaseUpdate(version - 1, version, AdapterState(pairs, {})) for version in (3, 4))
    plan = ClientPlan(
        AdapterState(pairs, {}),
        trains=frozenset("B"),
        sends=frozenset("B"),
        base_version=4,
        base_updates=updates,
    )
    request = planned(plan)
    for held in ("", "A", "B"):
        assert set(encoded(plan, held).array_records["arrays"]) == {"adapter", "merge/3", "merge/4"}
    assert set(encoded(plan, "AB").array_records["arrays"]) == {"merge/3", "merge/4"}
    assert len(encode_reply(TrainedReply(request, request.starts, {}), 0).array_records["update"]) == 1


# ------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize("name", PLANS)
def test_a_request_survives_its_message(name: str) -> None:
    plan = PLANS[name]
    fields = {"round": 3, "client_id": 1, "base_digest": "digest", "since_digest": "", "wire": "int8", "run": "ab" * 16}
    received = decoded(encoded(plan, **fields))
    assert received is not None
    assert {key: getattr(received, key) for key in fields} == fields
    got = received.plan
    assert same(got.adapter, plan.adapter)
    assert (got.trains, got.sends, got.base_version) == (plan.trains, plan.sends, plan.base_version)
    assert (got.fresh_seed, got.proximal_mu) == (plan.fresh_seed, plan.proximal_mu)
    assert got.tilt.keys() == plan.tilt.keys()
    assert all(torch.equal(value, plan.tilt[name]) for name, value in got.tilt.items())
    assert [(update.since, update.version) for update in got.base_updates] == [
        (update.since, update.version) for update in plan.base_updates
    ]
    for mine, theirs in zip(got.base_updates, plan.base_updates, strict=True):
        assert same(mine.change, theirs.change)
    assert received.headers == TrainRequest(plan, 3, 1, wire="int8").headers


SENT = {"A": ["b:A", "a:A"], "B": ["b:B", "a:B"], "dense": ["head.weight"]}


@pytest.mark.parametrize("left_out", [{"A"}, {"B"}, {"dense"}, {"A", "B"}, {"A", "dense"}, {"A", "B", "dense"}])
def test_parts_that_a_client_holds_can_be_left_out(left_out: set[Part]) -> None:
    whole, short = encoded(FROZEN_A), encoded(FROZEN_A, left_out)
    assert [name for name, *_ in decode_request_head(whole)["buffers"]["adapter"]] == [*chain(*SENT.values())]
    sent = decode_request_head(short)["buffers"].get("adapter", [])
    assert [name for name, *_ in sent] == [*chain(*(names for part, names in SENT.items() if part not in left_out))]
    held = HeldParts()
    assert decoded(short, held) is None
    assert decoded(whole, held) is not None
    again = decoded(short, held)
    assert again is not None
    assert same(again.plan.adapter, FROZEN_A.adapter)


@pytest.mark.parametrize("part", ["A", "B", "dense"])
def test_parts_that_are_not_those_that_the_head_names_are_refused_and_not_kept(part: Part) -> None:
    other = FROZEN_A.adapter.with_tensors({SENT[part][0]: FROZEN_A.adapter.tensors()[SENT[part][0]] + 1})
    content, held = encoded(replace(FROZEN_A, adapter=other)), HeldParts()
    good = PartDigests()(FROZEN_A)
    with raises(ReplyError, "parts-differ", part):
        decoded(with_head(content, digests=good), held)
    assert all(held.get(digest) is None for digest in good.values())


def test_the_parts_that_were_used_last_are_held_as_far_as_they_fit() -> None:
    held, tensors = HeldParts(nbytes=8), {"a": torch.ones(1)}
    held.keep({"1": tensors})
    held.keep({"2": tensors})
    held.keep({"1": tensors})
    held.keep({"3": tensors})
    assert [held.get(key) is tensors for key in "123"] == [True, False, True]
    large = {"b": torch.ones(9)}
    held.keep({"4": large, "5": large})  # the last request's, whatever their size
    assert [held.get(key) is not None for key in "12345"] == [False, False, False, True, True]


def test_the_last_request_is_decoded_once_while_its_message_is_there() -> None:
    content, held = encoded(FROZEN_A), HeldParts()
    first = decoded(content, held)
    assert decoded(content, held) is first
    assert held.request_in(encoded(FROZEN_A)) is None  # the same in another message
    first = weakref.ref(cast("TrainRequest", first))
    del content
    gc.collect()
    assert first() is None


def test_fresh_pairs_are_drawn_by_the_client_and_do_not_travel() -> None:
    assert decode_request_head(encoded(FRESH))["buffers"] == {"adapter": [["head", "float32", [2]]]}


def test_requests_share_the_arrays_of_the_very_same_tensors() -> None:
    encoder, plan = RequestEncoder(), replace(WITH_UPDATE, trains=frozenset({"B", "dense"}))

    def sent(plan: ClientPlan, held: Iterable[Part] = ()) -> ArrayRecord:
        content, parts = encoder.encode(planned(plan, held)), tensors_by_part(plan)
        holds = HeldParts()
        holds.keep({PartDigests()(plan)[part]: parts[part] for part in held})
        received = decoded(content, holds)
        assert received is not None
        assert same(received.plan.adapter, plan.adapter)
        return content.array_records["arrays"]

    head = plan.adapter.with_tensors({"head.weight": torch.ones(2, 4)})
    first = sent(plan)
    for other, shared in (
        (sent(replace(plan, proximal_mu=1.0)), {"adapter", "merge/2"}),
        (sent(plan, {"A"}), {"merge/2"}),
        (sent(plan), {"merge/2"}),  # only the last ones are kept
        (sent(replace(plan, adapter=head)), {"merge/2"}),
        (sent(replace(plan, adapter=plan.adapter.clone())), {"merge/2"}),  # equal, but nobody looks at the values
    ):
        assert {name for name in other if other[name] is first[name]} == shared


def test_a_digest_of_parts_is_never_another_plans() -> None:
    digests_of, plan = PartDigests(), ClientPlan(adapter(), trains=frozenset({"B"}))
    for change in ({}, {"a:B": torch.ones(4, 3)}, {"a:A": torch.ones(3, 5)}, {"head.weight": torch.ones(2, 4)}, {}):
        asked = replace(plan, adapter=plan.adapter.with_tensors(change))
        assert digests_of(asked) == {part: tensors_digest(tensors) for part, tensors in tensors_by_part(asked).items()}


def test_a_request_is_named_by_what_it_asks_however_much_of_it_is_sent() -> None:
    def named(content: RecordDict, config: str = "config") -> str:
        return request_digest(decode_request_head(content), config)

    usual = named(encoded(FROZEN_A))
    assert usual == named(encoded(FROZEN_A, {"A"})) == named(encoded(FROZEN_A, since_digest="other"))
    other_start = replace(FROZEN_A, adapter=FROZEN_A.adapter.with_tensors({"a:B": torch.ones(4, 3)}))
    other_frozen = replace(FROZEN_A, adapter=FROZEN_A.adapter.with_tensors({"a:A": torch.ones(3, 5)}))
    others = [
        named(encoded(FROZEN_A), "another config"),
        named(encoded(FROZEN_A, round=2)),
        named(encoded(FROZEN_A, run="ab" * 16)),
        named(encoded(FROZEN_A, base_digest="another")),
        named(encoded(other_start)),
        named(encoded(other_frozen, {"A"})),
        named(encoded(replace(FROZEN_A, proximal_mu=1.0))),
        named(encoded(TILTED)),
        named(encoded(replace(TILTED, tilt={"a:B": torch.zeros(4, 3)}))),
    ]
    assert len({usual, *others}) == 1 + len(others)


def with_head(content: RecordDict, **fields: object) -> RecordDict:
    head = json.loads(str(content.config_records["plan"]["json"]))
    content.config_records["plan"] = ConfigRecord({"json": json.dumps(head | fields)})
    return content


LAYOUT = decode_request_head(encoded(FROZEN_A))["buffers"]


@pytest.mark.parametrize(
    "buffers",
    [
        None,
        {},
        {"adapter": []},
        {"adapter": [["x", "float32", [1]]]},
        {"adapter": LAYOUT["adapter"][:-1]},
        {**LAYOUT, "more": []},
        [["adapter", []]],
    ],
)
def test_a_request_that_is_not_laid_out_as_it_says_is_refused_before_it_is_read(buffers: Any) -> None:
    with raises(ReplyError, "invalid-layout", "install the same"):
        decoded(with_head(encoded(FROZEN_A), buffers=buffers))


@pytest.mark.parametrize("buffer", [b"", bytes(10_000)])
def test_a_request_whose_buffer_is_shorter_or_longer_is_refused(buffer: bytes) -> None:
    content = encoded(FROZEN_A)
    content.array_records["arrays"]["adapter"] = to_array(buffer)
    with raises(ReplyError, "invalid-layout", "describes", "buffer has"):
        decoded(content)


@pytest.mark.parametrize("tilt", [{"a:A": torch.ones(3, 5)}, {"a:B": torch.ones(4, 2)}, {"more": torch.ones(1)}])
def test_a_tilt_of_what_is_not_sent_is_refused(tilt: dict[str, torch.Tensor]) -> None:
    with raises(ReplyError, "tilt-differs"):
        decoded(encoded(replace(FROZEN_A, tilt=tilt)))
    with raises(ReplyError, "tilt-differs"):
        decoded(with_head(encoded(TILTED), tilt="another"))


def test_another_protocol_is_refused_with_both_versions() -> None:
    with raises(ReplyError, "other-protocol", "protocol 99 (fedlora 9.9)", "install the same"):
        decode_request_head(with_head(encoded(FROZEN_A), protocol=99, fedlora="9.9"))


def test_a_format_that_a_node_does_not_know_is_refused() -> None:
    with raises(ReplyError, "unknown-wire-format", "nf4", "9.9", *WIRES):
        decode_request_head(with_head(encoded(FROZEN_A), wire="nf4", fedlora="9.9"))


def test_what_the_server_sends_is_the_same_in_every_format() -> None:
    sent = [encoded(PLANS["plain"], wire=wire).array_records["arrays"] for wire in WIRES]
    bodies = [{name: array.data for name, array in record.items()} for record in sent]
    assert bodies[0] == bodies[1] == bodies[2]


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("held", ["", "A", "AB"])
def test_a_simulation_counts_the_bytes_of_the_request(name: str, held: Any) -> None:
    one = planned(PLANS[name], held, round=12, base_digest="digest")
    assert one.nbytes == payload_bytes(RequestEncoder().encode(one))


@pytest.mark.parametrize("wire", WIRES)
def test_a_simulation_counts_the_bytes_of_the_reply(wire: str) -> None:
    request = TrainRequest(PLANS["plain"], 12, 3, "digest", wire=wire)
    figures = {"num_examples": 7, "loss": 0.5}
    content = encode_reply(TrainedReply(request, request.starts, figures), seed=0)
    head = head_nbytes(update_head(request))
    assert payload_bytes(content) == request.reply_nbytes + head + FIGURE_BYTES * len(figures)


def test_a_digest_sees_names_shapes_and_values() -> None:
    base = {"x": torch.ones(2, 3)}
    others = [
        {"y": torch.ones(2, 3)},
        {"x": torch.ones(3, 2)},
        {"x": torch.ones(2, 3) * 2},
        {"x": torch.ones(2, 3).double()},
    ]
    assert tensors_digest(base) == tensors_digest({"x": torch.ones(2, 3)})
    assert len({tensors_digest(base), *(tensors_digest(other) for other in others)}) == 5
