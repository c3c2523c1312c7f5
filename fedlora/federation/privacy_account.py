"""What a run spends of its clients' privacy, as the server knows it: one account for whatever the config promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, final

from fedlora.aggregators import Aggregator, GlobalState
from fedlora.config import RunConfig
from fedlora.errors import PrivacyError
from fedlora.federation.client_pool import RoundRequest
from fedlora.federation.example_level_account import ExampleLevelAccount
from fedlora.federation.user_level_account import UserLevelAccount
from fedlora.privacy.server_dp import ServerDP
from fedlora.runs.rundir import RunDir


class PrivacyAccount(Protocol):
    """The account of a run."""

    def prepare(self) -> None:
        """Before a resume cuts anything back: whatever was completed is on record, and what was written counts.

        Raises:
            PrivacyError: the record lacks a completed round.
        """

    def base_of(self, state: GlobalState) -> str | None:
        """How a state's base was named when its next round was asked for before; None if it was not."""

    def solvent(self, clients: Iterable[int]) -> list[int]:
        """Those whose budget is not known to be spent, in ascending order."""
        ...

    def round(self, request: RoundRequest) -> AbstractContextManager[None]:
        """Inside, the clients are asked, what they send is aggregated, and both are written down.

        Raises:
            PrivacyError: the budget does not allow the round.
        """
        ...

    def settle(self, record: Mapping[str, Any], spent: Sequence[int]) -> dict[str, Any]:
        """Take note of the outcome of a round.

        Args:
            record: Its line of metrics so far.
            spent: Clients that said that their budget is spent.

        Returns:
            Figures for the line of metrics.
        """
        ...

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The run's claim, for result.json, with one line ("statement") that says all of it; {} where there is none.

        Args:
            records: The run's lines of metrics.
        """
        ...


@final
class NoPrivacy:
    """The account of a run without [privacy]."""

    def prepare(self) -> None:
        """Nothing is on record."""

    def base_of(self, state: GlobalState) -> str | None:
        """Not known."""
        return None

    def solvent(self, clients: Iterable[int]) -> list[int]:
        """All."""
        return sorted(clients)

    def round(self, request: RoundRequest) -> AbstractContextManager[None]:
        """Nothing is spent."""
        return nullcontext()

    def settle(self, record: Mapping[str, Any], spent: Sequence[int]) -> dict[str, Any]:
        """No figures."""
        return {}

    def summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """No claim."""
        return {}


def open_account(config: RunConfig, rule: Aggregator, rundir: RunDir, ledgers: Path | None = None) -> PrivacyAccount:
    """The account of a run.

    Args:
        config: Of the run.
        rule: What `load_rule` made of it.
        rundir: Of the run.
        ledgers: Folder with the clients' ledgers, where they can be read here.

    Raises:
        PrivacyError: the rule adds no noise, and the config promises it; or what was asked is damaged.
    """
    if (config.client_privacy is None) == isinstance(rule, ServerDP):
        raise PrivacyError(
            "privacy.unit = 'client' needs the rule that load_rule makes of the config, no other", code="wrong-rule"
        )
    if isinstance(rule, ServerDP):
        return UserLevelAccount(config, rule, rundir)
    return ExampleLevelAccount(config, rundir, ledgers) if config.example_privacy is not None else NoPrivacy()
