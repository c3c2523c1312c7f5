"""The training loop: some clients with a common optimiser and common trained parts, until all of them are done.

In each step every client that is not done has its next batch. The rows of all these batches are computed in groups of
like length (`fedlora.training.row_groups`), whoever's they are; each client's gradients are added up, and then it takes
its optimiser step. `Loop` is what plain training (`fedlora.training.plain_loop`) and private training
(`fedlora.training.dp_loop`) share.

Shapes: K = clients, k = those in one step or group, p = trained entries of an adapter, b = rows of a group, e = its
examples (as many as rows, where the task does not pack them).
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.config import TrainConfig
from fedlora.errors import TrainingError
from fedlora.model import Base, seeded
from fedlora.progress import activity
from fedlora.speedups.unpadding import Unpadding
from fedlora.tasks._base import REFERENCE, Batch, Examples, Task, to_device
from fedlora.training.block_factors import closed, factor_names, opened
from fedlora.training.checkpointing import checkpointed
from fedlora.training.dropout_masks import Keys, RowDropout, RowsError
from fedlora.training.embedding_noise import EmbeddingNoise
from fedlora.training.job import TrainJob, TrainResult, nothing_to_train
from fedlora.training.out_of_memory import released, too_large
from fedlora.training.row_groups import PassCost, cut, leaves_padding_out, pass_cost
from fedlora.training.row_optimizer import Columns, FlatOptimizer, add, sent, take
from fedlora.training.stacked_lora import Alone, Stacked, cannot_stack
from fedlora.training.step import Binding, Client, Group, Outcome
from fedlora.unexpected import ran_out

logger = logging.getLogger(__name__)


class Loop(ABC):
    """Trains one cohort; a subclass says how a step moves its clients.

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        work: each client's job and config.
        cost: of a pass over some rows; None: by the model's size.
        synchronize: wait for the device at each step.
    """

    UNPADS: ClassVar[bool] = True
    """Whether padding may be left out (`fedlora.speedups.unpadding`)."""

    def __init__(
        self,
        base: Base,
        task: Task,
        examples: Examples,
        work: Sequence[tuple[TrainJob, TrainConfig]],
        cost: PassCost | None,
        synchronize: bool,
    ) -> None:
        self._base, self._task, self._examples = base, task, examples
        micro = [config.micro_batch_size for _, config in work if config.micro_batch_size is not None]
        self._cost = cost or replace(pass_cost(base), rows=min(micro, default=0))
        checkpoints = any(config.gradient_checkpointing for _, config in work)
        if not self.UNPADS or checkpoints or not leaves_padding_out(base):
            self._cost = replace(self._cost, padding=1.0)
        self._unpadding = Unpadding()
        self._under_way = (0, 0)
        self._moving = False
        self._embedding_noise: EmbeddingNoise | None = None
        self._synchronize = synchronize
        self._references: dict[tuple[int, int], Tensor] = {}
        self._clients = [Client(row, job, config) for row, (job, config) in enumerate(work)]

    def run(self) -> list[Outcome]:
        """Train all clients to their ends.

        Raises:
            RowsError: of more than one client: they cannot go together through this model.
        """
        begin = time.perf_counter()
        ready = [client for client in self._clients if self._prepared(client)]
        if ready:
            first = ready[0].job
            if not self._base.write(first.adapter, first.trains):
                for client in ready:
                    client.outcome = nothing_to_train(first)
            else:
                self._train(ready)
        overhead = (time.perf_counter() - begin - sum(client.seconds for client in ready)) / max(1, len(ready))
        out: list[Outcome] = []
        for client in self._clients:
            assert client.outcome is not None
            if isinstance(client.outcome, TrainResult):
                seconds = client.seconds + max(0.0, overhead)
                client.outcome = replace(client.outcome, seconds=seconds, compute_seconds=client.compute)
            out.append(client.outcome)
        return out

    @abstractmethod
    def _begin(self, client: Client) -> None:
        """Set a client's steps and batches; an error leaves it out."""

    @abstractmethod
    def _keys(self, group: Group) -> Keys:
        """The keys of the dropout masks of a group's rows."""

    @abstractmethod
    def _gradients(self, group: Group, batch: Batch) -> tuple[Float[Tensor, "k p"], Float[Tensor, "e"]]:
        """A group's part of its clients' gradients, and the loss of each example.

        Args:
            group: whose rows.
            batch: the group's, where the model is.
        """

    @abstractmethod
    def _move(self, members: list[Client], gradients: Float[Tensor, "k p"], losses: Float[Tensor, "k"]) -> None:
        """Take a step.

        Args:
            members: whose.
            gradients: of each, over its whole batch.
            losses: the mean of each one's batch.
        """

    @abstractmethod
    def _random(self, clients: list[Client]) -> tuple[RowDropout | None, int]:
        """What draws dropout masks (None if nothing drops out), and a seed for torch's default generators."""

    def _alone_failed(self, client: Client, error: Exception) -> None:
        """A step of this client alone has failed."""
        self._fail(client, error)

    def _fail(self, client: Client, error: Exception) -> None:
        """A client leaves because of what its training raised."""
        client.outcome = error

    def _prepared(self, client: Client) -> bool:
        """Whether a client can begin."""
        try:
            self._base.require_fit(client.job.adapter)
            self._begin(client)
        except Exception as error:
            client.outcome = error
        return client.outcome is None

    def _train(self, clients: list[Client]) -> None:
        base = self._base
        for row, client in enumerate(clients):
            client.row = row
            if "R" in client.job.trains:
                client.job = opened(client.job)
        jobs = [client.job for client in clients]
        like = torch.empty(0, dtype=base.adapter_dtype, device=base.device)
        adapters = [job.adapter for job in jobs]
        self._columns = Columns(adapters, [*base.tensor_names(jobs[0].trains), *factor_names(adapters[0])])
        self._values = self._columns.rows(adapters, like)
        self._mu = [client.job.proximal_mu or client.config.proximal_mu for client in clients]
        anchors = [job.toward or job.adapter for job in jobs]
        self._anchor = self._columns.rows(anchors, like) if any(self._mu) or self._task.refers else None
        tilted = any(job.tilt for job in jobs)
        self._tilt = self._columns.rows([_tilt_of(job) for job in jobs], like) if tilted else None
        self._optimizer = FlatOptimizer(len(jobs), self._columns.width, [client.config for client in clients], like)
        for client in clients:
            if client.job.optimizer:
                try:
                    self._optimizer.load(client.row, self._columns, client.job.adapter, client.job.optimizer)
                except TrainingError as error:
                    client.outcome = error
        self._dropout, seed = self._random(clients)
        base.train_mode(True)
        with ExitStack() as stack:
            stack.enter_context(seeded(seed, *base.devices))
            if self._dropout is not None:
                stack.enter_context(self._dropout)
            if self._dropout is not None and any(client.config.neftune_noise_alpha for client in clients):
                stack.enter_context(base.uncached())
                self._embedding_noise = stack.enter_context(EmbeddingNoise(base.model, self._dropout))
            if any(client.config.gradient_checkpointing for client in clients):
                stack.enter_context(checkpointed(base.model, self._dropout))
            binding: Binding = (
                Stacked(base, self._columns, adapters, self._unpadding)
                if cannot_stack(base) is None
                else Alone(base, self._columns)
            )
            self._binding = stack.enter_context(binding)
            if self._cost.padding < 1:
                stack.enter_context(self._unpadding.of(base.model))
            for client in clients:
                if client.outcome is None:
                    self._next_batch(client)
            while active := [client for client in clients if client.outcome is None]:
                activity.info(
                    "training: %d of %d steps of %d clients",
                    sum(client.done for client in clients),
                    sum(client.steps for client in clients),
                    len(clients),
                )
                self._joint(active)

    # ------------------------------------------------------------------------------------------ one step

    def _joint(self, members: list[Client]) -> None:
        """One step of some clients; if that fails, of each of them alone, to see whose fault it is.

        Where memory ran out, the step is first taken again in passes of half as many tokens, as often as that helps.
        """
        error = self._tried(members)
        while error is not None and ran_out(error) and not self._moving and self._halved():
            error = self._tried(members)
        if error is None:
            return
        if ran_out(error) and (self._moving or len(members) == 1):
            error = too_large(error, self._base.device)
        if self._moving:  # values and optimiser states may have changed in part, so the step cannot be taken again
            for client in members:
                self._fail(client, error)
        elif len(members) == 1:
            self._alone_failed(members[0], error)
        else:
            for client in members:
                self._joint([client])

    def _tried(self, members: list[Client]) -> Exception | None:
        """What a step raised, holding nothing of it any more: a retry needs the memory of its activations."""
        self._moving, self._under_way = False, (0, 0)
        try:
            self._step(members)
        except Exception as error:
            if isinstance(error, RowsError) and len(self._clients) > 1:
                raise
            released(error)
            return error
        return None

    def _halved(self) -> bool:
        """Give passes of this base half the tokens from now on; False where the last one cannot be cut in two."""
        rows, tokens = self._under_way
        if rows < 2 or self._base.coupled is not None:
            return False
        self._base.pass_tokens = max(1, min(self._cost.most, rows * tokens) // 2)
        self._cost = replace(self._cost, most=self._base.pass_tokens)
        logger.warning("memory ran out: a pass has at most %d tokens from now on", self._cost.most)
        return True

    def _step(self, members: list[Client]) -> None:
        begin, computed = time.perf_counter(), 0.0
        gradients = self._values.new_zeros(len(members), self._columns.width)
        losses = self._values.new_zeros(len(members))
        for group in self._groups(members):
            if self._dropout is not None:
                self._dropout.begin(self._keys(group))
            if self._embedding_noise is not None:
                self._embedding_noise.begin(sent(self._noise_scales(group), losses))
            batch = to_device(self._task, group.batch, self._base.device)
            if self._task.refers:
                batch = {**batch, REFERENCE: self._reference(group, batch)}
            self._under_way = (sum(group.sizes), self._task.tokens(batch) or 1)
            started = self._now()
            found, each = self._gradients(group, batch)
            add(gradients, group.members, found)
            owners = sent(group.of_examples(group.members), losses, torch.int64)
            losses.index_add_(0, owners, each.detach().to(losses))
            computed += self._now() - started
        # Whatever can fail on the data comes before the move: a step that failed is taken again.
        shares = self._shares(members)
        started = self._now()
        self._moving, self._under_way = True, (0, 0)
        self._move(members, gradients, losses / sent([max(1, len(c.chosen)) for c in members], losses))
        computed += self._now() - started
        for client, share in zip(members, shares, strict=True):
            client.compute += computed * share
            if client.outcome is None:
                self._next_batch(client)
        taken = time.perf_counter() - begin
        for client, share in zip(members, shares, strict=True):
            client.seconds += taken * share

    def _shares(self, members: list[Client]) -> list[float]:
        """Each client's part of a step's time, by tokens."""
        if len(members) == 1:
            return [1.0]
        tokens = [float(np.maximum(self._examples.lengths[client.chosen], 1).sum()) for client in members]
        return [own / sum(tokens) for own in tokens]

    @torch.no_grad()
    def _reference(self, group: Group, batch: Batch) -> Float[Tensor, "e ..."]:
        """What the models that the clients were sent say of a group's examples, computed when first drawn."""
        rows = [client.row for client in group.clients]
        wanted = list(zip(group.of_examples(rows), group.chosen.tolist(), strict=True))
        if any(each not in self._references for each in wanted):
            assert self._anchor is not None
            self._base.train_mode(False)
            try:
                self._binding.bind(take(self._anchor, rows), rows, group.sizes)
                found = self._task.reference(self._base.model, batch)
            finally:
                self._base.train_mode(True)
            self._references |= zip(wanted, found, strict=True)
        return torch.stack([self._references[each] for each in wanted])

    def _groups(self, members: list[Client]) -> Iterator[Group]:
        """The step's rows, in groups of like length; in each those first whose client has the most there."""
        if self._base.coupled is not None:  # clients go one by one, and a batch in one pass
            (client,) = members
            assert client.whole is not None
            rows = np.arange(len(next(iter(client.whole.values()))))
            yield Group([0], [client], [rows], [np.arange(len(client.chosen))], client.whole)
            return
        lengths = [self._lengths(client) for client in members]
        if len(members) == 1:
            for found in cut(lengths[0], self._cost):
                own = [np.sort(found)]
                yield Group([0], members, own, *self._batch(members, own))
            return
        owners = np.repeat(np.arange(len(members)), [len(own) for own in lengths])
        rows = np.concatenate([np.arange(len(own)) for own in lengths])
        for found in cut(np.concatenate(lengths), self._cost):
            held = np.bincount(owners[found], minlength=len(members))
            order = sorted(np.flatnonzero(held).tolist(), key=lambda k: (-held[k], k))
            own = [np.sort(rows[found[owners[found] == k]]) for k in order]
            clients = [members[k] for k in order]
            yield Group(order, clients, own, *self._batch(clients, own))

    def _trained(self, client: Client) -> AdapterState:
        """The adapter as it is in the client's row."""
        found = self._columns.read(self._values[client.row], client.job.adapter)
        return closed(found) if "R" in client.job.trains else found

    def _optimizer_of(self, client: Client) -> dict[str, Tensor]:
        """The state that the client keeps for its next round."""
        if not client.config.keep_optimizer:
            return {}
        return {**client.job.optimizer, **self._optimizer.state_of(client.row, self._columns, client.job.adapter)}

    def _lengths(self, client: Client) -> Int[np.ndarray, "n"]:
        """Tokens of each row of a client's batch."""
        if client.whole is None or self._task.rows_are_examples:
            return self._examples.lengths[client.chosen]
        return self._task.row_lengths(client.whole)

    def _noise_scales(self, group: Group) -> list[float]:
        """NEFTune's alpha / sqrt(L) of each row."""
        return [
            (client.config.neftune_noise_alpha or 0.0) / math.sqrt(max(1, length))
            for client, rows in zip(group.clients, group.rows, strict=True)
            for length in self._lengths(client)[rows].tolist()
        ]

    def _batch(self, clients: list[Client], rows: list[np.ndarray]) -> tuple[list[np.ndarray], Batch]:
        """The places of the examples in some rows of clients' batches, and these rows as one batch."""
        if self._task.rows_are_examples:
            wanted = np.concatenate([client.chosen[own] for client, own in zip(clients, rows, strict=True)])
            return rows, self._task.collate(self._examples, wanted)
        parts = [self._task.take_rows(client.whole or {}, own) for client, own in zip(clients, rows, strict=True)]
        return [places for _, places in parts], self._task.join(self._examples, [batch for batch, _ in parts])

    @torch.no_grad()
    def _add_terms(self, rows: Sequence[int], values: Float[Tensor, "k p"], gradients: Float[Tensor, "k p"]) -> None:
        """The gradient of (mu / 2) |w - w0|^2, FedProx's term (arXiv 1812.06127, equation (2)), and of the tilt's."""
        if self._anchor is not None and any(self._mu):
            mu = sent([self._mu[row] for row in rows], values)
            gradients.addcmul_(values - take(self._anchor, rows), mu[:, None])
        if self._tilt is not None:
            gradients.add_(take(self._tilt, rows))

    # ------------------------------------------------------------------------------------------ batches and ends

    def _next_batch(self, client: Client) -> None:
        try:
            client.chosen = next(client.batches)
            if self._base.coupled is not None or not self._task.rows_are_examples:
                client.whole = self._task.collate(self._examples, client.chosen)
        except Exception as error:
            self._fail(client, error)

    def _now(self) -> float:
        device = self._base.device
        if self._synchronize and device.type == "cuda":
            torch.cuda.synchronize(device)
        elif self._synchronize and device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def _tilt_of(job: TrainJob) -> AdapterState:
    """A job's tilt in the layout of its adapter, zero where it has none."""
    tensors = job.adapter.tensors().items()
    return job.adapter.with_tensors({name: job.tilt.get(name, torch.zeros_like(value)) for name, value in tensors})
