"""What is promised about single examples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fedlora.config._base import Counts, PositiveInt, Section
from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import require_accountant


class PrivacyConfig(Section):
    """Example-level differential privacy: each client trains with DP-SGD, whoever reads what it sends.

    What is protected is one example of one client, not all that a client (a person, a hospital) holds.
    """

    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Upper end after all rounds, for which the noise is calibrated; or
    `noise_multiplier`: the noise, whatever it adds up to."""
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the noise in units of `max_grad_norm`."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Well below 1 / public_examples."""
    accountant: str = "prv"
    """How steps are added up: prv (tight) or rdp (quick, a little more)."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Each example's gradient is clipped to this L2 norm."""
    physical_batch_size: PositiveInt | None = None
    """Most examples at once in memory; None: the whole batch."""
    public_examples: Counts
    """What each client declares in public as its number of examples (one for all, or several, dealt cyclically): rates
    and noise follow from it, never from the true number, which is secret. The claim holds whatever the true one is."""

    @model_validator(mode="after")
    def _is_a_claim(self) -> PrivacyConfig:
        require_accountant(self.accountant)
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise PrivacyError("give exactly one of privacy.epsilon and privacy.noise_multiplier")
        if self.delta * (most := max(self.public_examples)) >= 1:
            raise PrivacyError(
                f"privacy.delta {self.delta:g} protects nobody among {most} examples: choose one far below 1 / {most}"
            )
        return self

    def public_examples_of(self, client_id: int) -> int:
        """What a client declares."""
        return self.public_examples[client_id % len(self.public_examples)]
