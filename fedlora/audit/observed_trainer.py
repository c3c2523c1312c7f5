"""A run's own private trainer, seen from outside: what it is given, and how far it moves what is trained.

The optimiser is plain gradient descent: what an optimiser does to noised gradients is post-processing.

k = clients, p = trained entries of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapter import EVERY_PART, AdapterState, Part
from fedlora.aggregators import ClientSpec
from fedlora.audit.probe_tasks import Probe, Scaled, Silent
from fedlora.config import TrainConfig
from fedlora.errors import PrivacyError
from fedlora.federation.given_adapter import read_start
from fedlora.federation.initial_state import first_state
from fedlora.federation.load_rule import load_rule
from fedlora.federation.planner import plan_for
from fedlora.privacy.dpsgd import ROUNDING, clipping_norm
from fedlora.rng import derive
from fedlora.tasks._base import Examples
from fedlora.training.cohort import why_alone
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import PrivateTrainingLoop, train_private_cohort
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.dropout_masks import Masks
from fedlora.training.job import TrainJob
from fedlora.training.opacus_loop import train_by_opacus
from fedlora.training.row_groups import PassCost
from fedlora.training.step import Outcome
from fedlora.training.workspace import Workspace

AT_ONCE = PassCost(0.0, float("inf"), 1 << 62)
"""A `Silent` probe is to see each sample whole, and its passes cost nothing."""
QUIET = 1e-6
"""The noise multiplier where sums are measured: a tensor that does not move in a noisy step is refused."""


def first_job(workspace: Workspace) -> TrainJob:
    """What a client of the run trains in the first round, without its examples.

    Raises:
        PrivacyError: it sends products of what it trains, off which no noise can be read.
    """
    config = workspace.config
    rule = load_rule(config)
    state = first_state(rule, workspace.base, config.seed, read_start(workspace))
    plan = plan_for(rule, state, ClientSpec(0, workspace.base.layout(config.clients.rank_of(0))))
    if any(pair.in_blocks for pair in plan.adapter.pairs.values()):
        raise PrivacyError(
            f"an audit reads the noise off what a client sends, and with {config.strategy.name!r} these are products "
            "of two things that noise was added to: audit strategy 'fedsb', which the same code trains",
            code="products-not-audited",
        )
    workspace.base.rebase(0, ())
    workspace.base.rebase(plan.base_version, plan.base_updates)
    trains: frozenset[Part] = frozenset(plan.trains) & EVERY_PART
    return TrainJob(plan.adapter, trains, np.empty(0, np.int64), derive(config.seed, "audit"))


@dataclass(frozen=True)
class Client:
    """A client of an observation.

    Args:
        indices: its examples.
        seed: number of its seed; two clients with the same one have the same seed.
        adapter: where it starts; None: at zeros.
        physical: most examples at once.
    """

    indices: np.ndarray
    seed: int = 0
    adapter: AdapterState | None = None
    physical: int | None = None


class Trainer:
    """The run's own private trainer, as an audit drives it.

    Args:
        workspace: opened for the config.
        settings: of the client under audit.
    """

    def __init__(self, workspace: Workspace, settings: PrivateSettings) -> None:
        self.workspace, self.base, self.settings = workspace, workspace.base, settings
        self.job = first_job(workspace)
        check_model(self.base, workspace.task, workspace.data.probes, self.job)
        self.names = tuple(self.base.tensor_names(self.job.trains))
        own = self.job.adapter.tensors()
        self.sizes = [own[name].numel() for name in self.names]
        self.width = sum(self.sizes)
        self.zeros = self.start(lambda value: torch.zeros_like(value))
        self.why_alone = why_alone(self.base)
        noise = settings.noise_multiplier * settings.max_grad_norm
        self.noise_rate = settings.schedule.expected_batch_size / noise
        self.clip_rate = settings.schedule.expected_batch_size / settings.max_grad_norm

    @property
    def kind(self) -> str:
        """Which of the two implementations trains."""
        return "by Opacus's hooks" if self.why_alone else "by an adapter for each example"

    @property
    def floor(self) -> float:
        """What the noise that is left adds to a sum's norm, at most, in units of C."""
        return max(1e-4, 5 * QUIET * self.width**0.5)

    @property
    def rounding(self) -> float:
        """By how much rounding may change one example's clipped gradient, in units of C."""
        clipped = clipping_norm(1.0, self.base.dtype, self.settings.schedule.expected_batch_size)
        return max(ROUNDING.get(self.base.dtype, max(ROUNDING.values())), 1 / clipped - 1) + self.floor

    @cached_property
    def copies(self) -> list[np.ndarray]:
        """The losses of one example in all rows of a batch: [steps, rows] of two clients in a cohort, and once more."""
        rows, steps = 16, 8
        plan = replace(self.settings.schedule, sample_rate=1.0, steps=steps)
        settings = replace(self.settings, schedule=plan)
        own = self.workspace.data.train.take([0] * (2 * rows))
        found = []
        for clients in (2, 1):
            probe = Scaled(self.workspace.task, [1.0] * 2 * rows, [0] * rows + [1] * rows)
            crowd = [Client(np.arange(k * rows, (k + 1) * rows), k, self.job.adapter) for k in range(clients)]
            self.run(probe, own, crowd, settings, lr=0.0)
            found += [np.concatenate(probe.seen[k]).reshape(steps, rows) for k in range(clients)]
        return found

    @property
    def drops_out(self) -> bool:
        """Whether the losses of one example differ: between rows, steps, clients or runs."""
        every = np.stack(self.copies)
        return bool(np.ptp(every) > max(1e-3, self.rounding) * np.abs(every).mean())

    def start(self, values: Callable[[Tensor], Tensor]) -> AdapterState:
        """An adapter whose trained tensors are `values` of the first round's."""
        own = self.job.adapter.tensors()
        return self.job.adapter.with_tensors({name: values(own[name]) for name in self.names})

    def run(
        self,
        probe: Probe,
        examples: Examples,
        clients: Sequence[Client],
        settings: PrivateSettings,
        *,
        look: bool = False,
        masks: Masks | None = None,
        **config: Any,
    ) -> Tensor:
        """Train some clients side by side, and see how far each has come [k, p].

        Args:
            probe: the task.
            examples: that the clients' indices number; a `Silent` probe needs none.
            clients: at least one.
            settings: of all.
            look: whether a `Silent` probe is to see the values of each step.
            masks: each example's key of dropout masks; None: as production draws them.
            config: of training, beside plain gradient descent.

        Raises:
            PrivacyError: training failed.
        """
        jobs = [
            replace(
                self.job,
                adapter=client.adapter or self.zeros,
                indices=client.indices,
                seed=derive(self.workspace.config.seed, "train", 1, client.seed),
            )
            for client in clients
        ]
        every = [replace(settings, physical_batch_size=client.physical) for client in clients]
        plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "proximal_mu": 0.0}
        train: TrainConfig = self.workspace.config.train_of(0).model_copy(update={**plain, **config})
        configs = [train] * len(jobs)
        cost = None
        if isinstance(probe, Silent):
            most = max((int(job.indices.max(initial=0)) for job in jobs), default=0)
            cost, examples = AT_ONCE, Examples({}, None, np.ones(most + 1, np.int64))
        outcomes: list[Outcome]
        if self.why_alone is None and (look or masks):
            work = list(zip(jobs, configs, strict=True))
            loop = PrivateTrainingLoop(self.base, probe.task, examples, work, every, cost=cost, masks=masks)
            if isinstance(probe, Silent):
                probe.look = lambda: torch.cat([leaf.flatten(1) for leaf in loop.leaves], dim=1)
            outcomes = loop.run()
        elif masks:
            each = zip(jobs, configs, every, strict=True)
            outcomes = [train_by_opacus(self.base, probe.task, examples, *one, masks=masks) for one in each]
        else:
            if look and isinstance(probe, Silent):
                own = self.base.parameters
                probe.look = lambda: torch.cat([own[name].flatten() for name in self.names])[None]
            outcomes = train_private_cohort(self.base, probe.task, examples, jobs, configs, every, cost=cost)
        moved = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            moved.append(self.flat(outcome.adapter) - self.flat(job.adapter))
        return torch.stack(moved)

    def flat(self, adapter: AdapterState) -> Tensor:
        """The trained entries [p]."""
        tensors = adapter.tensors()
        return torch.cat([tensors[name].flatten() for name in self.names])

    def by_name(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows [k, p] by tensor."""
        return dict(zip(self.names, rows.split(self.sizes, dim=1), strict=True))
