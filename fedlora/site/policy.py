"""policy.toml: what runs may do at a site; read by the site's worker alone, anew for each request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from fedlora.config import Section, load_section
from fedlora.errors import ConfigError
from fedlora.privacy.accounting import Budget
from fedlora.site.signatures import Signer

POLICY = "policy.toml"
"""Name of the file in a site's folder."""


class Policy(Section):
    """What runs may do at a site. A key that is left out forbids nothing; without `code` there is none."""

    approval: bool = False
    """Whether a run starts only when somebody of this site has approved its config (`fedlora node approve`)."""
    private_only: bool = False
    """Whether clients may train only with example-level differential privacy, so that what leaves is noised here."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Largest epsilon that all runs together may spend, by the ledger of this site."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Delta at which `epsilon` is held; also the largest that a run may name."""
    base_models: dict[str, str] | None = None
    """Base models, as a run's `model.name` writes them (a path must be listed), -> fingerprint of the weights."""
    sources: tuple[str, ...] | None = None
    """Where this node names no data file of its own: what a run's `data.source` and `data.test` may be (a path must be
    listed)."""
    rules: tuple[str, ...] | None = None
    """Aggregation rules by name ("fedavg"), or by a claim in capitals ("ROBUST")."""
    tasks: tuple[str, ...] | None = None
    """Tasks by name."""
    code: tuple[str, ...] = ()
    """Code beside fedlora's own that a config may name ("my_module:MyTask", the name of an installed package's entry
    point, a model that brings code of its own). It must be installed here; no run can bring any."""
    columns: tuple[str, ...] | None = None
    """Columns of the data file that may be read."""
    max_rank: Annotated[int, Field(gt=0)] | None = None
    """Largest rank of an adapter."""
    max_rounds: Annotated[int, Field(gt=0)] | None = None
    """Largest number of rounds of a run."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Largest number of optimiser steps in a round."""
    min_examples: Annotated[int, Field(gt=0)] | None = None
    """Fewest examples to train on; in a private run the number that is declared in public, never the true one."""
    example_counts: bool = True
    """Whether numbers of examples, and what tells them (steps of an epoch, seconds), may leave."""
    losses: bool = True
    """Whether losses on this site's examples may leave."""
    metrics: bool = True
    """Whether this site evaluates on its own examples for the coordinator."""
    signers: tuple[str, ...] | None = None
    """Who may have signed a run (`fedlora deploy sign`): lines of OpenSSH's allowed_signers."""
    message_mb: Annotated[int, Field(gt=0, lt=2048)] = 1024
    """Largest message that the worker reads, in MiB."""

    @field_validator("signers")
    @classmethod
    def _are_signers(cls, lines: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for line in lines or ():
            Signer.read(line)
        return lines

    @model_validator(mode="after")
    def _caps_are_caps(self) -> Policy:
        if (self.epsilon is None) != (self.delta is None):
            raise ConfigError("epsilon holds at a delta: set both or neither", code="epsilon-without-delta")
        if self.epsilon is not None and not self.private_only:
            raise ConfigError(
                "epsilon caps nothing while runs without privacy are allowed: set private_only = true",
                code="cap-without-effect",
            )
        return self

    @property
    def budget(self) -> Budget | None:
        """The cap over everything in the ledger."""
        return None if self.epsilon is None or self.delta is None else Budget(self.epsilon, self.delta)


def load_policy(folder: Path) -> Policy:
    """The policy in a site's folder.

    Raises:
        ConfigError: it is missing, no TOML, has an unknown key (with the nearest valid one) or a wrong value.
    """
    return load_section(folder / POLICY, Policy, "policy")
