"""Plain training: each client's batches and dropout masks follow from its seed, its gradient is its batch's mean.

Shapes: k = clients of a step or group, p = trained entries of an adapter, e = examples of a group.
"""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.errors import TrainingError
from fedlora.rng import derive
from fedlora.tasks._base import Batch
from fedlora.training.dropout_masks import Keys, RowDropout, RowsError, Watch, drops_out, row_keys
from fedlora.training.job import TrainResult, batches, learning_rate, number_of_steps
from fedlora.training.loop import Loop
from fedlora.training.row_optimizer import put, sent, take
from fedlora.training.step import Client, Group, Outcome

CHECK_EVERY = 32  # steps between looks at the losses on a device where looking waits for all work to end


@final
class TrainingLoop(Loop):
    """Plain training of one cohort; see `Loop`."""

    def _begin(self, client: Client) -> None:
        size = len(client.job.indices)
        if not size:
            raise TrainingError(
                "the client has no examples: give it some, or leave it out with a larger min_size in [partition]",
                code="no-examples",
            )
        client.steps = number_of_steps(size, client.config)
        client.batches = batches(client.job.indices, client.config.batch_size, client.steps, client.job.seed)

    def _random(self, clients: list[Client]) -> tuple[RowDropout | None, int]:
        self._unseen: list[tuple[list[Client], Tensor]] = []
        self._look_every = 1 if self._base.device.type == "cpu" else CHECK_EVERY
        self._seeds = [derive(client.job.seed, "dropout") for client in clients]
        if self._base.drops_out is None:
            self._base.drops_out = drops_out(self._base.model)
        random = self._base.drops_out or any(client.config.neftune_noise_alpha for client in clients)
        return RowDropout(strict=len(clients) > 1, unpadding=self._unpadding) if random else None, self._seeds[0]

    def _keys(self, group: Group) -> Keys:
        own = zip(group.clients, group.rows, strict=True)
        return np.concatenate([row_keys(self._seeds[client.row], client.done, rows) for client, rows in own])

    def _losses(self, batch: Batch) -> Float[Tensor, "e"]:
        if len(self._clients) == 1:
            return self._task.losses(self._base.model, batch)
        with Watch(*self._base.devices) as watch:
            each = self._task.losses(self._base.model, batch)
        if watch.drawn:
            raise RowsError("it draws random numbers in a way that cannot be told apart by clients")
        return each

    def _gradients(self, group: Group, batch: Batch) -> tuple[Float[Tensor, "k p"], Float[Tensor, "e"]]:
        rows = [client.row for client in group.clients]
        leaves = self._binding.bind(take(self._values, rows), rows, group.sizes)
        each = self._losses(batch)
        shares = sent(group.of_examples([1 / len(client.chosen) for client in group.clients]), each)
        found = torch.autograd.grad(each, leaves, shares, materialize_grads=True)
        return torch.cat([gradient.reshape(len(rows), -1) for gradient in found], dim=1), each

    def _move(self, members: list[Client], gradients: Float[Tensor, "k p"], losses: Float[Tensor, "k"]) -> None:
        rows = [client.row for client in members]
        values = take(self._values, rows)
        self._add_terms(rows, values, gradients)
        if any(client.config.clip_norm is not None for client in members):
            most = [c.config.clip_norm if c.config.clip_norm is not None else float("inf") for c in members]
            norms = torch.linalg.vector_norm(gradients, dim=1)
            gradients.mul_((sent(most, values) / (norms + 1e-6)).clamp_(max=1.0)[:, None])
        rates = [learning_rate(client.done, client.steps, client.config, client.job) for client in members]
        self._optimizer.step(values, gradients, rows, rates)
        put(self._values, rows, values)
        for client in members:
            client.done += 1
            client.seen += len(client.chosen)
        self._unseen.append((members, losses))
        ended = any(client.done == client.steps for client in members)
        if ended or len(self._unseen) >= self._look_every:
            self._look()

    def _look(self) -> None:
        """Take note of the losses so far; clients whose loss is not finite leave, and those that are done end."""
        found, ended = torch.cat([losses for _, losses in self._unseen]).tolist(), list[Client]()
        for client, loss in zip((client for members, _ in self._unseen for client in members), found, strict=True):
            client.losses.append(loss)
            if not np.isfinite(loss) and client.outcome is None:
                client.outcome = TrainingError(
                    f"the loss is not finite at step {len(client.losses)}: {_cure(client.config)}",
                    code="loss-not-finite",
                )
            elif client.done == client.steps == len(client.losses) and client.outcome is None:
                ended.append(client)
        self._unseen.clear()
        if ended:
            finite = torch.isfinite(take(self._values, [client.row for client in ended])).all(1).tolist()
            for client, sound in zip(ended, finite, strict=True):
                client.outcome = self._ended(client) if sound else _not_finite(client)

    def _ended(self, client: Client) -> Outcome:
        return TrainResult(
            adapter=self._trained(client),
            num_examples=len(client.job.indices),
            steps=client.steps,
            examples_seen=client.seen,
            loss=float(np.mean(client.losses)),
            seconds=client.seconds,
            compute_seconds=client.compute,
            optimizer=self._optimizer_of(client),
        )


def _not_finite(client: Client) -> TrainingError:
    return TrainingError(
        f"the adapter is not finite after step {client.steps}: {_cure(client.config)}", code="adapter-not-finite"
    )


def _cure(config: TrainConfig) -> str:
    clip = "" if config.clip_norm is not None else ", or set train.clip_norm (1.0 is usual)"
    return f"lower train.lr (now {config.lr:g}){clip}"
