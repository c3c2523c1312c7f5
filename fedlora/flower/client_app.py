"""The client: one ClientApp for the in-process engine, Flower's simulation and real nodes.

What a process keeps between messages (the base model, the data, frozen parts of adapters) lives in imported modules:
Ray pickles an app's globals by value for each message, so a cache in a closure or in `__main__` would do nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fedlora import __version__
from fedlora.devices import train_config
from fedlora.errors import FedloraError, ReplyError, TrainingError
from fedlora.flower.codec import ReceivedPlan, decode_plan, digest, encode_note, encode_update
from fedlora.flower.following import can_follow, follow
from fedlora.flower.settings import client_id_of, config_of
from fedlora.rng import derive
from fedlora.training.loop import TrainJob, TrainResult, train
from fedlora.training.workbench import Workbench, open_workbench

app = ClientApp()


class FrozenStore:
    """Frozen tensors by their digest, the most recently used few of them."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._held: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under their digest."""
        self._held[key] = tensors
        self._held.move_to_end(key)
        while len(self._held) > self._size:
            self._held.popitem(last=False)

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors of a digest, or None if they are not held."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)


frozen_store = FrozenStore()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this node is, and whether its versions fit the server's."""
    try:
        config = config_of(context)
        client_id = client_id_of(context)
        bench = open_workbench(config)
        note = encode_note(
            "hello",
            client_id=client_id,
            fedlora=__version__,
            fingerprint=bench.base.fingerprint,
            num_examples=len(_indices(bench, client_id)),
        )
    except FedloraError as error:
        note = encode_note("error", error=str(error))
    return Message(note, reply_to=message)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """One round of local training: plan in, the asked parts of the trained adapter out."""
    try:
        plan = decode_plan(message.content)
        bench = open_workbench(config_of(context))
        client_id = client_id_of(context)
        if client_id != plan.head["client_id"]:
            raise ReplyError(
                f"the plan is for client {plan.head['client_id']}, and this node is client {client_id} now"
            )
        frozen = _frozen(plan)
        base_fits = can_follow(bench.base, plan.head["base_digest"], plan.head["since_digest"])
        if frozen is None or not base_fits:
            need = encode_note("need", frozen=frozen is None, base=not base_fits)
            return Message(need, reply_to=message)
        result = run_plan(plan, frozen, bench, client_id)
        head = plan.head
        reply = encode_update(
            result.adapter.tensors(head["sends"]),
            {
                "num_examples": result.num_examples,
                "examples_seen": float(result.examples_seen),
                "loss": result.loss,
                "steps": float(result.steps),
                "seconds": result.seconds,
                "compute_seconds": result.compute_seconds,
            },
            round_number=head["round"],
            base_digest=head["base_digest"],
        )
    except FedloraError as error:
        # In plain words instead of Flower's traceback, so that the server can name the client and the cure.
        reply = encode_note("error", error=str(error))
    return Message(reply, reply_to=message)


def _frozen(plan: ReceivedPlan) -> Mapping[str, Tensor] | None:
    """The plan's frozen tensors, from this message or an earlier one; None if they are not here."""
    key, frozen = plan.head["frozen"], plan.tensors("frozen/")
    if key and frozen:
        if digest(frozen) != key:
            raise ReplyError("the frozen parts of the plan are not those that it names (another hash): report this bug")
        frozen_store.put(key, frozen)
    return frozen if frozen or not key else frozen_store.get(key)


def run_plan(plan: ReceivedPlan, frozen: Mapping[str, Tensor], bench: Workbench, client_id: int) -> TrainResult:
    """Train what a plan asks on this client's examples."""
    indices = _indices(bench, client_id)
    if not len(indices):
        raise TrainingError(f"client {client_id} has no examples: give it some, or lower partition.clients")
    head = plan.head
    follow(bench.base, plan.merges(), head["base_version"], head["base_digest"], head["since_digest"])
    job = TrainJob(
        adapter=plan.adapter(frozen),
        trains=frozenset(head["trains"]),
        indices=indices,
        seed=derive(bench.config.seed, "train", head["round"], client_id),
        proximal_mu=max(head["proximal_mu"], bench.config.train.proximal_mu),
    )
    return train(bench.base, bench.task, bench.data.train, job, train_config(bench.config, client_id))


def _indices(bench: Workbench, client_id: int) -> np.ndarray:
    clients = bench.data.clients
    if not 0 <= client_id < len(clients):
        raise TrainingError(f"there is no client {client_id}: the partition has {len(clients)}, numbered from 0")
    return clients[client_id]
