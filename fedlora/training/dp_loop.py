"""DP-SGD of many clients at once (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1 for each of them).

Every example of a group is given an adapter of its own, a copy of its client's: the same stacked layers that keep
clients apart then give each example's gradient, all in one backward pass. Clipping, sums, noise and the division by the
expected batch size are each client's own. The numbers are those of Opacus and `fedlora.privacy.dpsgd.PrivateStep`,
which stays in charge where a base's layers have no stacked form.

Batches are Poisson samples of unequal sizes, empty ones included; they, the noise and each example's dropout masks are
drawn from the operating system's randomness. The company that an example keeps shows in its gradient by rounding
alone, for which `fedlora.privacy.dpsgd.clipping_norm` leaves room.

Shapes: b = examples of a group, k = clients in it, p = trained entries of an adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.errors import PrivacyError
from fedlora.memory import widest
from fedlora.model import Base
from fedlora.privacy.dpsgd import noise, poisson_batches, secret_generator
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Task
from fedlora.training.cohort import alike, why_alone
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.dropout_masks import Keys, Masks, RowDropout, RowsError, secret_keys
from fedlora.training.embedding_noise import WITHOUT_ROWS
from fedlora.training.job import TrainJob, TrainResult, learning_rate
from fedlora.training.loop import Loop
from fedlora.training.opacus_loop import not_finite, secret_seed, train_by_opacus, unshared_losses, veiled
from fedlora.training.row_groups import PassCost
from fedlora.training.row_optimizer import put, sent, take
from fedlora.training.step import Client, Group, Outcome

logger = logging.getLogger(__name__)


@final
class PrivateTrainingLoop(Loop):
    """Private training; see `Loop`.

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        work: each client's job and config.
        settings: each client's rates and noise.
        cost: of a pass over some rows; None: by the model's size.
        generators: draw each client's noise; None: seeded by the operating system. A test may bring its own.
        samples: each client's batches, as positions among its examples; None: Poisson samples from the operating
            system's randomness. A test may bring its own.
        masks: each example's key of dropout masks; None: from the operating system. A test may bring its own.

    Attributes:
        leaves: each example's own trained tensors in the step under way, [b, *shape] each; an audit attacks them.
    """

    UNPADS = False  # each example is a client of its own there, and their tokens are unequally many

    def __init__(
        self,
        base: Base,
        task: Task,
        examples: Examples,
        work: Sequence[tuple[TrainJob, TrainConfig]],
        settings: Sequence[PrivateSettings],
        *,
        cost: PassCost | None = None,
        generators: Sequence[torch.Generator] | None = None,
        samples: Sequence[Iterator[np.ndarray]] | None = None,
        masks: Masks | None = None,
    ) -> None:
        super().__init__(base, task, examples, work, cost, synchronize=False)
        self.leaves: list[Tensor] = []
        self._masks = masks or secret_keys
        self._how: dict[int, PrivateSettings] = {}
        self._noise: dict[int, torch.Generator] = {}
        self._samples: dict[int, Iterator[np.ndarray]] = {}
        self._parts: dict[int, list[np.ndarray]] = {}
        self._sums: dict[int, Tensor] = {}
        for number, (client, how) in enumerate(zip(self._clients, settings, strict=True)):
            key = id(client)
            self._how[key], self._parts[key] = how, []
            self._noise[key] = generators[number] if generators else secret_generator(base.device)
            plan, size = how.schedule, len(client.job.indices)
            self._samples[key] = samples[number] if samples else poisson_batches(size, plan.sample_rate, plan.steps)

    def _begin(self, client: Client) -> None:
        if client.job.indices.max(initial=-1) >= len(self._examples):  # each would be left out as if it were broken
            raise PrivacyError(
                "a client's examples are not all in the training set: report this bug", code="no-such-example"
            )
        client.steps = self._how[id(client)].schedule.steps

    def _next_batch(self, client: Client) -> None:
        """The next part of the client's sample; empty samples take their steps of noise on the way."""
        key = id(client)
        try:
            while not self._parts[key]:
                if client.done == client.steps:
                    client.outcome = self._ended(client)
                    return
                sample = client.job.indices[next(self._samples[key])]
                size = self._how[key].physical_batch_size or max(1, len(sample))
                self._parts[key] = [sample[start : start + size] for start in range(0, len(sample), size)]
                self._sums[key] = self._values.new_zeros(self._columns.width)
                if not len(sample):
                    self._step_with_noise(client)
            client.chosen = self._parts[key].pop(0)
        except Exception as error:
            self._fail(client, error)

    def _narrow(self, client: Client, error: Exception) -> None:
        """Go on without the example that cannot be computed: by halves, until it is alone, when it adds nothing.

        A client that failed as a whole would let one example move all others' part in its update.
        """
        key, size = id(client), len(client.chosen)
        of_the_model = isinstance(error, PrivacyError | RowsError) or getattr(error, "code", "") == WITHOUT_ROWS
        if of_the_model:  # whatever its examples
            raise error
        if size > 1:
            self._parts[key][:0] = np.array_split(client.chosen, 2)
            return
        logger.warning("an example is left out of a private step: %s: %s", type(error).__name__, clean_text(error))
        if not self._parts[key]:
            self._step_with_noise(client)

    def _alone_failed(self, client: Client, error: Exception) -> None:
        try:
            self._narrow(client, error)
        except Exception as found:
            self._fail(client, found)
        else:
            self._next_batch(client)

    def _fail(self, client: Client, error: Exception) -> None:
        client.outcome = veiled(error)

    def _random(self, clients: list[Client]) -> tuple[RowDropout, int]:
        return RowDropout(), secret_seed()

    def _keys(self, group: Group) -> Keys:
        return self._masks(group.chosen)

    def _losses(self, batch: Batch) -> Float[Tensor, "b"]:
        return unshared_losses(self._task, self._base.model, batch, self._base.device)

    def _gradients(self, group: Group, batch: Batch) -> tuple[Float[Tensor, "k p"], Float[Tensor, "b"]]:
        """The sums of the clients' clipped gradients."""
        owners = sent(group.of_examples(range(len(group.clients))), self._values, torch.int64)
        rows = group.of_examples([client.row for client in group.clients])
        leaves = self.leaves = self._binding.bind(self._values[rows], rows, [1] * len(rows))
        losses = self._losses(batch)
        if losses.shape != owners.shape:
            raise ValueError(f"{list(losses.shape)} losses for {len(owners)} examples: they must be one for each")
        found = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        gradients = torch.cat([gradient.reshape(len(rows), -1) for gradient in found], dim=1)
        return self._clipped_sums(gradients, owners, group.clients), losses

    def _move(self, members: list[Client], gradients: Float[Tensor, "k p"], losses: Float[Tensor, "k"]) -> None:
        """Add each member's clipped gradients to its sum, and step with those whose sample is complete."""
        for client, own in zip(members, gradients, strict=True):
            self._sums[id(client)] += own
            try:
                if not self._parts[id(client)]:
                    self._step_with_noise(client)
            except Exception as error:  # nobody else's step may be taken again
                self._fail(client, error)

    @torch.no_grad()
    def _clipped_sums(
        self, gradients: Float[Tensor, "b p"], owners: Tensor, members: list[Client]
    ) -> Float[Tensor, "k p"]:
        """The sum of each member's gradients, each clipped to the member's C; one that is not finite counts as 0."""
        wide = widest(gradients.device)
        norms = torch.linalg.vector_norm(gradients, dim=1, dtype=wide)
        if not bool(norms.isfinite().all()):
            # One example's infinite or undefined gradient would make the whole sum so, whatever the noise.
            gradients[~gradients.isfinite().all(dim=1)] = 0.0
            norms = torch.linalg.vector_norm(gradients, dim=1, dtype=wide)
        limits = [self._how[id(client)].clipping_norm(self._base.dtype) for client in members]
        most = sent(limits, norms)[owners]
        gradients.mul_((most / (norms + 1e-6)).clamp_(max=1.0)[:, None].to(gradients.dtype))
        return gradients.new_zeros(len(members), gradients.shape[1]).index_add_(0, owners, gradients)

    @torch.no_grad()
    def _step_with_noise(self, client: Client) -> None:
        how, rows = self._how[id(client)], [client.row]
        gradient = self._sums.pop(id(client))[None]
        own, columns = client.job.adapter.tensors(), self._columns.columns
        sizes = [own[column.name].numel() for column in columns]
        drawn = noise(how.noise_multiplier * how.max_grad_norm, gradient.new_empty(sum(sizes)), self._noise[id(client)])
        if len(drawn) == self._columns.width:
            gradient += drawn
        else:  # padding of a smaller rank gets none, so that it stays zero
            for column, part in zip(columns, drawn.split(sizes), strict=True):
                shape = own[column.name].shape
                column.within(gradient[0], shape).add_(part.view(shape))
        gradient /= how.schedule.expected_batch_size
        values = take(self._values, rows)
        before = values.clone() if client.done == 0 else None
        self._add_terms(rows, values, gradient)
        rate = learning_rate(client.done, client.steps, client.config, client.job)
        self._optimizer.step(values, gradient, rows, [rate])
        put(self._values, rows, values)
        if before is not None and rate:
            self._require_moved(client, before, values)
        client.done += 1

    def _require_moved(self, client: Client, before: Tensor, after: Tensor) -> None:
        own, changed = client.job.adapter.tensors(), before != after
        columns = [column for column in self._columns.columns if own[column.name].numel()]
        moved = torch.stack([column.of(changed).any() for column in columns]).tolist()
        if not all(moved):
            raise ValueError(f"{columns[moved.index(False)].name!r} did not move in a noisy step")

    def _ended(self, client: Client) -> Outcome:
        row = self._values[client.row]
        if not bool(torch.isfinite(row).all()):
            return not_finite(client.config)
        kept = self._optimizer_of(client)
        return TrainResult(self._trained(client), 1, client.steps, 0, float("nan"), client.seconds, 0.0, kept)


def train_private(
    base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig, settings: PrivateSettings
) -> TrainResult:
    """Train an adapter on one client's examples with DP-SGD, as `train_private_cohort` does.

    Raises:
        PrivacyError: training failed; why is in this process's log alone, since it may tell of the data.
        TrainingError: nothing trains.
        ModelError: the adapter does not fit the model.
    """
    (outcome,) = train_private_cohort(base, task, examples, [job], [config], [settings])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def train_private_cohort(
    base: Base,
    task: Task,
    examples: Examples,
    jobs: Sequence[TrainJob],
    configs: Sequence[TrainConfig],
    settings: Sequence[PrivateSettings],
    *,
    cost: PassCost | None = None,
) -> list[Outcome]:
    """Train many clients' adapters with DP-SGD, side by side where the base allows it; `check_model` comes first.

    Batches, noise and dropout are drawn from the operating system's randomness, never from the run's seed: no two runs
    are the same.

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        jobs: what to train; without examples a client takes steps of noise alone, as far as anybody can tell.
        configs: learning rate, optimiser and proximal term; `clip_norm` is not used.
        settings: each client's rates and noise.
        cost: of a pass over some rows; None: by the model's size.

    Returns:
        For each job the adapter, with `num_examples` 1 and no figure that depends on the data but the seconds; or an
        error that tells nothing of the data.
    """
    outcomes: dict[int, Outcome] = {}
    todo = alike(jobs, configs)
    while todo:
        part = todo.pop(0)
        alone = why_alone(base) is not None
        if len(part) > 1 and alone:
            todo = [[number] for number in part] + todo
            continue
        if alone:
            try:
                (k,) = part
                outcomes[k] = train_by_opacus(base, task, examples, jobs[k], configs[k], settings[k])
            except Exception as error:
                outcomes[k] = error
            continue
        work, how = [(jobs[k], configs[k]) for k in part], [settings[k] for k in part]
        try:
            found = PrivateTrainingLoop(base, task, examples, work, how, cost=cost).run()
        except RowsError as error:
            base.alone = str(error)
            todo.insert(0, part)
            continue
        outcomes.update(zip(part, map(timeless, found), strict=True))
    return [outcomes[number] for number in range(len(jobs))]


def timeless(outcome: Outcome) -> Outcome:
    """Without the seconds of computing, which tell how many examples there were."""
    return outcome if isinstance(outcome, Exception) else replace(outcome, examples_seen=0, compute_seconds=0.0)
