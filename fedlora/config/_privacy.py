"""What is promised about the data: to whom (`unit`), how much (`epsilon`), and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from fedlora.config._base import Counts, PositiveInt, Section
from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Budget, require_accountant


class _Claim(Section):
    """What both units have."""

    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Epsilon that all rounds together may spend; the noise is calibrated to it. Give either this or
    `noise_multiplier`."""
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the noise in units of the sensitivity to one example (one client)."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Delta of the guarantee; choose it well below 1 / the number of examples (of clients)."""
    accountant: str = "prv"
    """How the privacy loss of the steps is composed: prv (tight) or rdp (faster, slightly larger epsilon)."""

    @model_validator(mode="after")
    def _one_source_of_noise(self) -> _Claim:
        require_accountant(self.accountant)
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise PrivacyError(
                "set exactly one of privacy.epsilon and privacy.noise_multiplier", code="not-exactly-one"
            )
        return self

    @property
    def budget(self) -> Budget | None:
        """Over everything in a ledger; None where the noise was given, and not what it may add up to."""
        return None if self.epsilon is None else Budget(self.epsilon, self.delta, self.accountant)


class ExamplePrivacyConfig(_Claim):
    """Example-level differential privacy: each client trains with DP-SGD, whoever reads what it sends.

    What is protected is one example of one client, not all that a client (a person, a hospital) holds.
    """

    unit: Literal["example"] = "example"
    """What is protected: one "example" of one client, or all that one "client" holds."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Each example's gradient is clipped to this L2 norm."""
    physical_batch_size: PositiveInt | None = None
    """Largest number of examples in memory at once. None: the whole batch."""
    public_examples: Counts
    """What each client declares in public as its number of examples (one for all, or several, dealt cyclically): rates
    and noise follow from it, never from the true number, which is secret. The claim holds whatever the true one is."""

    @model_validator(mode="after")
    def _is_a_claim(self) -> ExamplePrivacyConfig:
        if self.delta * (most := max(self.public_examples)) >= 1:
            raise PrivacyError(
                f"privacy.delta = {self.delta:g} is no protection for {most} examples: choose one far below 1 / {most}",
                code="delta-too-large",
            )
        return self

    def public_examples_of(self, client_id: int) -> int:
        """What a client declares."""
        return self.public_examples[client_id % len(self.public_examples)]


class ClientPrivacyConfig(_Claim):
    """User-level differential privacy: the server clips each client's update and adds noise to their mean.

    What is protected is all that one client holds, from whoever sees the global models and the run's files. The server
    itself is trusted: it sees each update. Rules that claim LINEAR only. See `fedlora.privacy.server_dp.Central`.
    """

    unit: Literal["client"]
    clip_norm: Annotated[float, Field(gt=0)]
    """Each client's update, over all its tensors, is clipped to this L2 norm; the first one under adaptive clipping."""
    minimum_cohort: Annotated[int, Field(ge=2)] = 2
    """A round with fewer replies changes nothing and costs nothing."""
    adaptive_clipping: bool = False
    """Move the clip norm towards the `quantile` of the updates' norms, by a count that the noise pays for too."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the updates that adaptive clipping leaves as they are."""
    clip_lr: Annotated[float, Field(gt=0)] = 0.2
    """Learning rate of the clip norm under adaptive clipping."""


UNITS: dict[str, type[_Claim]] = {"example": ExamplePrivacyConfig, "client": ClientPrivacyConfig}


def unit_of(value: object) -> Any:
    """Which unit a table [privacy], or its model, is about."""
    return value.get("unit", "example") if isinstance(value, Mapping) else getattr(value, "unit", None)


PrivacyConfig = Annotated[
    Annotated[ExamplePrivacyConfig, Tag("example")] | Annotated[ClientPrivacyConfig, Tag("client")],
    Discriminator(unit_of),
]
"""One unit for a run, never both: the two clips would fight, and each figure would read as the other's."""
