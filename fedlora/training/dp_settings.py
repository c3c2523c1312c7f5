"""The settings of a client's private training: a function of the config alone.

Under example-level privacy nothing that depends on the data leaves the client but noised tensors: rates, steps and
noise follow from the config and from the number of examples that the client has declared in public.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fedlora.config import ExamplePrivacyConfig, RunConfig
from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Budget, Entry
from fedlora.privacy.calibrate import Schedule, noise_multiplier_for, schedule
from fedlora.privacy.dpsgd import clipping_norm


@dataclass(frozen=True)
class PrivateSettings:
    """How a client's steps are made private.

    Args:
        schedule: sample rate, steps a round, expected batch size.
        noise_multiplier: sigma.
        max_grad_norm: C, to which each example's gradient is clipped.
        physical_batch_size: most examples at once in memory; None: the whole sample.
        budget: over everything in the client's ledger; None: no end.
    """

    schedule: Schedule
    noise_multiplier: float
    max_grad_norm: float
    physical_batch_size: int | None = None
    budget: Budget | None = None

    @property
    def entry(self) -> Entry:
        """What one round costs."""
        return self.schedule.entry(self.noise_multiplier)

    def clipping_norm(self, dtype: torch.dtype) -> float:
        """To what norm gradients are clipped by a model that computes in `dtype`, so that the sensitivity is C."""
        return clipping_norm(self.max_grad_norm, dtype, self.schedule.expected_batch_size)


def private_settings(config: RunConfig, client_id: int) -> PrivateSettings:
    """The settings of one client: a function of the config alone, the same on the client and on the server.

    The plan counts every round as one in which the client takes part: the server knows whom it asks, so that asking
    few clients a round hides nothing from it.

    Raises:
        PrivacyError: the config has no [privacy], or its epsilon is out of reach.
    """
    privacy = require_privacy(config)
    train = config.train_of(client_id)
    plan = schedule(
        privacy.public_examples_of(client_id), train.batch_size, config.rounds, steps=train.steps, epochs=train.epochs
    )
    sigma, budget = privacy.noise_multiplier, privacy.budget
    if budget is not None:
        sigma = calibrated(budget, plan.sample_rate, plan.steps * plan.rounds)
    assert sigma is not None
    return PrivateSettings(plan, sigma, privacy.max_grad_norm, privacy.physical_batch_size, budget)


def require_privacy(config: RunConfig) -> ExamplePrivacyConfig:
    """The table [privacy] with unit = "example"; `PrivacyError` if there is none."""
    if config.example_privacy is None:
        raise PrivacyError(
            'this run does not train privately on its clients: add a table [privacy] with unit = "example" to its '
            "config",
            code="not-private",
        )
    return config.example_privacy


@lru_cache(maxsize=256)
def calibrated(budget: Budget, sample_rate: float, steps: int) -> float:
    """`noise_multiplier_for`, worked out once for all clients of the same rate."""
    return noise_multiplier_for(budget.epsilon, budget.delta, sample_rate, steps, budget.accountant)
