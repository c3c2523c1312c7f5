"""The client's answer to a train message of somebody else's strategy: plain PEFT tensors in, plain PEFT tensors out."""

from __future__ import annotations

from typing import cast

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedlora.adapter import ALL_PARTS, Part
from fedlora.errors import ConfigError, PrivacyError, ReplyError
from fedlora.flower.app_config import client_id_of, config_of
from fedlora.flower.flower_strategy import TRAINS, adapter_for
from fedlora.flower.peft_records import own_name, record_of, tensors_of
from fedlora.rng import derive
from fedlora.training.cohort import train
from fedlora.training.job import TrainJob
from fedlora.training.workspace import open_workspace


def is_plain(message: Message) -> bool:
    """Whether a train message comes from another strategy than fedlora's own server: it has arrays, and no plan."""
    return "plan" not in message.content and len(message.content.array_records) == 1


def train_plain(message: Message, context: Context) -> Message:
    """Train the adapter of a message on this client's examples.

    Of the message's config, "server-round" seeds the draws, "lr" and "proximal-mu" (of Flower's FedProx) take the place
    of `train.lr` and `train.proximal_mu`, and "fedlora-trains" names the parts that are trained.

    Raises:
        PrivacyError: the config has [privacy], which such a server knows nothing of.
        ReplyError: the arrays are not an adapter of this config's model.
        ConfigError: a value in the message's config cannot be, or clients are to keep something from round to round.
    """
    config = config_of(context)
    if config.privacy is not None:
        raise PrivacyError(
            "this config has [privacy], and the server's strategy is not fedlora's own: nobody would account for what "
            "it learns; remove [privacy], or run fedlora's ServerApp",
            code="foreign-server",
        )
    if config.clients_keep:
        raise ConfigError(
            f"{config.clients_keep[0]} needs fedlora's ServerApp, which says from which round a client goes on, and "
            "the server's strategy is not fedlora's own: remove it",
            code="foreign-server",
        )
    for way, wire in (("up", config.wire.up), ("down", config.wire.down)):
        if wire != "float32":
            raise ConfigError(
                f"wire.{way} = {wire!r} is for fedlora's ServerApp, and the server's strategy is not fedlora's own: "
                "remove it",
                code="foreign-server",
            )
    workspace, client_id = open_workspace(config), client_id_of(context)
    key, arrays = next(iter(message.content.array_records.items()))
    asked = next(iter(message.content.config_records.values()), ConfigRecord())
    like = workspace.base.initial_adapter(config.seed)
    start = adapter_for(like, arrays)
    lr, mu = (_number(asked, name) for name in ("lr", "proximal-mu"))
    if lr is not None and config.train.loop is not None:
        raise ConfigError(
            "the message's config has 'lr', which train.loop does not read: let the server leave it out, and set it in "
            "train.options",
            code="foreign-server",
        )
    trains = frozenset(str(asked.get(TRAINS, ",".join(ALL_PARTS))).split(","))
    if not trains <= ALL_PARTS:
        raise ReplyError(
            f"the message asks to train {min(trains - ALL_PARTS)!r}; the parts are A, B and dense", code="unknown-part"
        )
    clients = workspace.data.clients
    indices = clients[client_id] if 0 <= client_id < len(clients) else np.empty(0, np.int64)
    if not len(indices):
        raise ConfigError(
            f"client {client_id} has no examples: the partition has {len(clients)} clients", code="no-examples"
        )
    number = int(cast("int", asked.get("server-round", 0)))
    job = TrainJob(
        adapter=start,
        trains=cast("frozenset[Part]", trains),
        indices=indices,
        seed=derive(config.seed, "train", number, client_id),
        proximal_mu=config.train.proximal_mu if mu is None else mu,
        round=max(1, number),
        rounds=max(config.rounds, number),  # the server goes on as long as it likes: past the config's, at the end
        client_id=client_id,
    )
    how = config.train if lr is None else config.train.model_copy(update={"lr": lr})
    done = train(workspace.base, workspace.task, workspace.data.train, job, how)
    mine = done.adapter.tensors()
    reply = RecordDict(
        {
            key: record_of({name: mine[own_name(name)] for name in tensors_of(arrays)}),
            "metrics": MetricRecord({"num-examples": done.num_examples, "train_loss": float(done.loss)}),
        }
    )
    return Message(reply, reply_to=message)


def _number(asked: ConfigRecord, name: str) -> float | None:
    value = asked.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ConfigError(
            f"the message's config has {name} = {value!r}: it must be a number that is not negative",
            code="invalid-value",
        )
    return float(value)
