"""The audit of a config: checks of its private mechanism, attacks on it, and on broken steps that must be caught.

The checks look at one property after another (`fedlora.audit.mechanism`, `fedlora.privacy.server_dp_checks`); the
attacks bound the epsilon of all of them together.

unit = "example": canaries (`fedlora.privacy.audit`) ride on the examples of the config's own data, through the config's
own model, batches and training loop, at the two claims where a quarter of the noise is never missed; then the
config's own claim, over all its rounds, on canaries alone. The optimiser is plain gradient descent whatever the config
says: what it does to the noised gradients is post-processing, and the attacker of the claim sees the gradients.

unit = "client": one client against the server's noise, where it weighs most and where most of the others drop out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedlora.adapter import AdapterState, Part
from fedlora.aggregators.fedavg import FedAvg
from fedlora.audit.mechanism import check_examples
from fedlora.audit.observed_trainer import first_job
from fedlora.audit.probe_tasks import NUMBER, Probe
from fedlora.config import TrainConfig
from fedlora.errors import PrivacyError
from fedlora.federation.given_adapter import read_start
from fedlora.federation.initial_state import first_state
from fedlora.federation.load_rule import load_rule
from fedlora.model import Base
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.audit import (
    Attack,
    AuditResult,
    Canaries,
    audit_in_one_run,
    audit_two_worlds,
    canary_steps,
)
from fedlora.privacy.audit_clients import client_worlds
from fedlora.privacy.calibrate import Schedule, noise_multiplier_for
from fedlora.privacy.checks import Check
from fedlora.privacy.dpsgd import PrivateStep, secret_rng
from fedlora.privacy.mutants import MUTANTS, broken
from fedlora.privacy.server_dp import ServerDP
from fedlora.privacy.server_dp_checks import check_clients
from fedlora.tasks._base import Batch, Examples
from fedlora.training.cohort import why_alone
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings, private_settings
from fedlora.training.job import TrainJob
from fedlora.training.opacus_loop import train_by_opacus
from fedlora.training.workspace import Workspace

DELTA = 1e-5
COLUMNS = ((4.0, 1.0, 1), (1.0, 0.25, 8))
"""Claim, q and T at which no noise, no clipping, noise / 4 and noise / n are all caught; at epsilon 2 in one step a
quarter of the noise may be missed."""
PHYSICAL = 128
"""Examples at once in an audit's large samples, where the config sets no limit."""
MOST_MERGES = 20_000
"""Of the audit of all rounds together: more rounds, fewer trials."""


@dataclass(frozen=True)
class Finding:
    """One line of an audit.

    Args:
        what: was attacked.
        result: what came of it.
        broken: whether it is a mutant, which must be caught.
        bad: whether this line makes the audit fail.
    """

    what: str
    result: AuditResult
    broken: bool
    bad: bool

    @classmethod
    def of(cls, what: str, result: AuditResult, *, broken: bool = False) -> Finding:
        """A sound step must not be refuted, a broken one must."""
        return cls(what, result, broken, bad=result.refuted != broken)

    @property
    def verdict(self) -> str:
        """In one word or two."""
        if self.broken:
            return "missed" if self.bad else "caught"
        return "REFUTED" if self.bad else "holds"


def check(workspace: Workspace, asked: int, *, generators: int = 1000) -> Iterator[Check]:
    """Check a config's private mechanism, one property at a time.

    Args:
        workspace: opened for a config with [privacy].
        asked: clients of a round.
        generators: how many fresh ones are watched for repetitions; a thousand find seeds of 16 bits.

    Raises:
        PrivacyError: the config has no [privacy], or its model cannot be trained privately.
    """
    config = workspace.config
    if config.example_privacy is not None:
        own, worst, _ = _worst(workspace)
        yield from check_examples(workspace, own[worst], generators)
    elif config.client_privacy is not None:
        adapter = first_state(load_rule(config), workspace.base, config.seed, read_start(workspace)).adapter
        yield from check_clients(_averaging(workspace), adapter, largest_first(workspace, asked), generators)
    else:
        raise _nothing()


def attack(workspace: Workspace, asked: int, *, canaries: int = 4000) -> Iterator[Finding]:
    """Attack a config's private steps, one finding at a time.

    Args:
        workspace: opened for a config with [privacy].
        asked: clients of a round.
        canaries: of the one-run audits (unit = "example"), half of which are examples; fewer are quicker, and find
            less. Trials of the two-world audits are half as many in each world.

    Raises:
        PrivacyError: the config has no [privacy], or its model cannot be trained privately.
    """
    if workspace.config.example_privacy is not None:
        yield from _of_examples(workspace, canaries)
    elif workspace.config.client_privacy is not None:
        yield from _of_clients(workspace, asked, canaries // 2)
    else:
        raise _nothing()


def _nothing() -> PrivacyError:
    return PrivacyError(
        "this run does not train privately: add a table [privacy] to its config, or audit a run that has one",
        code="not-private",
    )


# ------------------------------------------------------------------------------------------------ examples


def _worst(workspace: Workspace) -> tuple[Mapping[int, PrivateSettings], int, float]:
    """Each client's settings, and the client whose claim is the largest, with it."""
    config, privacy = workspace.config, workspace.config.example_privacy
    assert privacy is not None
    own = {k: private_settings(config, k) for k in range(len(workspace.data.clients))}

    def claim(k: int) -> float:
        s = own[k]
        return epsilon([s.schedule.entry(s.noise_multiplier)] * config.rounds, privacy.delta, privacy.accountant)

    worst = max(own, key=claim)
    return own, worst, claim(worst)


def _of_examples(workspace: Workspace, canaries: int) -> Iterator[Finding]:
    config, privacy = workspace.config, workspace.config.example_privacy
    assert privacy is not None
    own, worst, claim = _worst(workspace)
    whole = partial(audit_in_one_run, canaries=canaries)
    for claimed, q, steps in COLUMNS:
        sigma = noise_multiplier_for(claimed, DELTA, q, steps)
        settings = replace(
            own[worst], schedule=Schedule(q, steps, 1, canaries / 2 * q), noise_multiplier=sigma, budget=None
        )
        column = f"q = {q:g}, {steps} step{'s' * (steps > 1)}"
        one = partial(whole, claimed=claimed, delta=DELTA)
        alone = partial(canary_steps, sample_rate=q, steps=steps, canaries=canaries)
        make = step_of(settings)
        canary, count = through_model(workspace, settings, canaries)
        yield Finding.of(f"your model, {column}", one(canary, canaries=count))
        yield Finding.of(f"step alone, {column}", one(alone(make)))
        for name, mutant in MUTANTS.items():
            yield Finding.of(f"  {name}", one(alone(broken(make, mutant))), broken=True)
    s = own[worst]
    all_rounds = canary_steps(
        step_of(replace(s, schedule=replace(s.schedule, expected_batch_size=canaries / 2 * s.schedule.sample_rate))),
        sample_rate=s.schedule.sample_rate,
        steps=s.schedule.steps,
        rounds=config.rounds,
        canaries=canaries,
    )
    what = f"your claim, {config.rounds} rounds"
    yield Finding.of(what, whole(all_rounds, claimed=claim, delta=privacy.delta))


def step_of(settings: PrivateSettings) -> Any:
    """Model and optimiser -> `PrivateStep` with these settings."""
    return lambda model, optimizer: PrivateStep(
        model,
        optimizer,
        max_grad_norm=settings.max_grad_norm,
        noise_multiplier=settings.noise_multiplier,
        expected_batch_size=settings.schedule.expected_batch_size,
        physical_batch_size=settings.physical_batch_size,
    )


def through_model(workspace: Workspace, settings: PrivateSettings, canaries: int) -> tuple[Attack, int]:
    """An attack on the training that federations run: canary i rides on an example of the training set, so that its
    gradient is clipped together with the example's.

    Where every example is given an adapter of its own, a canary is one entry of the adapter; where Opacus's hooks see
    to it, a parameter beside the model's.

    Returns:
        The attack, and of how many canaries: at most as many as the adapter has entries.
    """
    job = first_job(workspace)
    check_model(workspace.base, workspace.task, workspace.data.probes, job)
    if settings.physical_batch_size is None:  # an audit's samples are larger than a client's
        settings = replace(settings, physical_batch_size=PHYSICAL)
    plain = {"optimizer": "sgd", "lr": 1e-2, "momentum": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
    config = workspace.config.train_of(0).model_copy(update=plain)
    if why_alone(workspace.base) is not None:
        return _on_parameters(workspace, settings, job, config, canaries), canaries
    names = workspace.base.tensor_names(job.trains)
    entries = sum(value.numel() for name, value in job.adapter.tensors().items() if name in set(names))
    count = min(canaries, entries)
    return _on_entries(workspace, settings, job, config, secret_rng().permutation(entries)[:count]), count


def _on_entries(
    workspace: Workspace, settings: PrivateSettings, job: TrainJob, config: TrainConfig, entries: np.ndarray
) -> Attack:
    """Canary i is entry `entries[i]` of the flat adapter; see `fedlora.training.dp_loop`."""
    names = workspace.base.tensor_names(job.trains)

    def flat(adapter: AdapterState) -> np.ndarray:
        tensors = adapter.tensors()
        row: np.ndarray = torch.cat([tensors[name].flatten() for name in names]).double().numpy()
        return row[entries]

    def attack(members: np.ndarray) -> np.ndarray:
        def term(canary: Tensor) -> Tensor:
            own = torch.cat([leaf.reshape(len(canary), -1) for leaf in loop.leaves], dim=1)
            places = torch.from_numpy(entries).to(canary.device)[canary]
            return 1e4 * own.gather(1, places[:, None]).squeeze(1)

        task = _CanaryTask(workspace, lambda model: (model, term)).task
        work = [(replace(job, indices=members), config)]
        loop = PrivateTrainingLoop(workspace.base, task, _carriers(workspace, len(entries)), work, [settings])
        (outcome,) = loop.run()
        if isinstance(outcome, Exception):
            raise outcome
        return flat(job.adapter) - flat(outcome.adapter)

    return attack


def _on_parameters(
    workspace: Workspace, settings: PrivateSettings, job: TrainJob, config: TrainConfig, canaries: int
) -> Attack:
    """Canary i is a parameter of its own; see `fedlora.training.opacus_loop.train_by_opacus`."""

    def attack(members: np.ndarray) -> np.ndarray:
        model = _WithCanaries(workspace.base.model, Canaries(canaries).to(workspace.base.device))
        task = _CanaryTask(workspace, lambda _: (model.user, model.canaries)).task
        base = cast(Base, _CanaryBase(workspace.base, model))
        train_by_opacus(base, task, _carriers(workspace, canaries), replace(job, indices=members), config, settings)
        return model.canaries.scores()

    return attack


class _WithCanaries(torch.nn.Module):
    def __init__(self, user: torch.nn.Module, canaries: Canaries) -> None:
        super().__init__()
        self.user, self.canaries = user, canaries


class _CanaryBase:
    """As much of a `Base` as `train_private` uses, with the canaries' weights beside the adapter's."""

    def __init__(self, base: Base, model: _WithCanaries) -> None:
        self._base, self.model, self.device, self.dtype = base, model, base.device, base.dtype

    def write(self, state: AdapterState, trains: frozenset[Part]) -> list[torch.nn.Parameter]:
        return [*self._base.write(state, trains), *self.model.canaries.parameters()]

    def tensor_names(self, parts: Iterable[Part]) -> list[str]:
        return [*self._base.tensor_names(parts), *(name for name, _ in self.model.canaries.named_parameters())]

    def train_mode(self, training: bool) -> None:
        self._base.train_mode(training)

    def read(self) -> AdapterState:
        return self._base.read()


def _carriers(workspace: Workspace, canaries: int) -> Examples:
    """One example for each canary, by its length alone: `_CanaryTask` takes the rest from the training set."""
    return Examples({}, None, np.resize(workspace.data.train.lengths, canaries))


class _CanaryTask(Probe):
    """The config's task, whose example i is example i modulo n of the n in the training set, with canary i on it.

    Args:
        workspace: of the config.
        parts: what the loop calls the model -> the task's own model, and canaries [b] -> their losses [b].
    """

    def __init__(self, workspace: Workspace, parts: Callable[[Any], tuple[Any, Callable[[Tensor], Tensor]]]) -> None:
        super().__init__(workspace.task)
        self._train, self._parts = workspace.data.train, parts

    def collate(self, examples: Examples, indices: np.ndarray) -> Batch:
        return {**super().collate(self._train, indices % len(self._train)), NUMBER: torch.from_numpy(indices)}

    def losses(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        user, canaries = self._parts(model)
        return super().losses(user, batch) + canaries(batch[NUMBER])


# ------------------------------------------------------------------------------------------------ clients


def _of_clients(workspace: Workspace, asked: int, trials: int) -> Iterator[Finding]:
    config, privacy = workspace.config, workspace.config.client_privacy
    assert privacy is not None
    rule = _averaging(workspace)
    one = epsilon([rule.entry()], privacy.delta, privacy.accountant)
    every = epsilon([rule.entry()] * config.rounds, privacy.delta, privacy.accountant)
    weights = largest_first(workspace, asked)
    few = weights[: privacy.minimum_cohort]
    two = partial(audit_two_worlds, delta=privacy.delta, claimed=one, trials=trials)
    yield Finding.of(f"the heaviest of {asked} clients, 1 round", two(client_worlds(rule, weights)))
    yield Finding.of(f"the same, all but {len(few)} drop out", two(client_worlds(rule, few)))
    seen = max(200, min(trials, MOST_MERGES // config.rounds // 2))
    whole = client_worlds(rule, weights, rounds=config.rounds)
    yield Finding.of(f"your claim, {config.rounds} rounds", two(whole, claimed=every, trials=seen))
    yield Finding.of("  noise / 4", two(_quarter(rule, weights)), broken=True)
    for what, there, share in (
        ("noise for equal weights", weights, 1 / len(weights)),
        ("noise for all who were asked", few, max(weights) / sum(weights)),
    ):
        if share < 0.4 * max(there) / sum(there):  # nearer to the truth it is hardly a lie
            yield Finding.of(f"  {what}", two(client_worlds(rule, there, noise_for=share)), broken=True)
    if rule.adaptive:
        # The count's own noise is so large that most of it has to go until the loss shows in a round.
        yield Finding.of(
            "  clip norm with little noise", two(client_worlds(rule, weights, count_noise=0.05)), broken=True
        )


def _averaging(workspace: Workspace) -> ServerDP:
    """The config's own clipping and noise around an average: what its rule does with the mean is post-processing."""
    central = load_rule(workspace.config)
    assert isinstance(central, ServerDP)
    return replace(central, rule=FedAvg())


def _quarter(rule: ServerDP, weights: list[float]) -> Any:
    return client_worlds(rule, weights, noise_for=max(weights) / sum(weights) / 4)


def largest_first(workspace: Workspace, asked: int) -> list[float]:
    """Weights of a round's clients: the heaviest, and the lightest others, which is the worst draw for it."""
    sizes = sorted(float(max(1, len(part))) for part in workspace.data.clients)
    if workspace.config.server.weighting == "uniform":
        return [1.0] * asked
    return [sizes[-1], *sizes[: asked - 1]]
