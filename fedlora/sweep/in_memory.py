"""Runs of a few seconds, for studies of hundreds of them: they leave a row each and no folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import pandas as pd

from fedlora.aggregators import Aggregator
from fedlora.callbacks import Callback, Callbacks
from fedlora.config import RunConfig
from fedlora.errors import PrivacyError, RoundError
from fedlora.federation.client_pool import ClientPool
from fedlora.federation.load_rule import load_rule
from fedlora.federation.local_clients import LocalClients
from fedlora.federation.privacy_account import NoPrivacy
from fedlora.federation.server import FederatedServer
from fedlora.training import open_workspace
from fedlora.training.workspace import Workspace

PoolMaker: TypeAlias = Callable[[RunConfig, Aggregator, Workspace], ClientPool]
Row: TypeAlias = dict[str, Any]


def all_together(config: RunConfig, rule: Aggregator, workspace: Workspace) -> LocalClients:
    """All clients in this process, in one cohort."""
    return LocalClients(config, rule, workspace, cohort=len(workspace.data.clients))


def run_in_memory(
    config: RunConfig, *callbacks: Callback, make_pool: PoolMaker = all_together, say: Callable[[str], object] = print
) -> list[Mapping[str, Any]]:
    """A run that writes nothing.

    Args:
        config: of the run.
        callbacks: told what happens.
        make_pool: the clients.
        say: told why a round failed.

    Returns:
        Its lines of metrics, round 0's first; fewer than `rounds` + 1 where a round failed.

    Raises:
        PrivacyError: the run is private, and its ledgers have to be kept.
    """
    if config.privacy is not None:
        raise PrivacyError("a run in memory keeps no ledger: use fedlora.run with [privacy]", code="no-ledger-kept")
    rule, workspace, lines = load_rule(config), open_workspace(config), _Lines()
    pool = make_pool(config, rule, workspace)
    server = FederatedServer(pool, config, rule, workspace, NoPrivacy(), Callbacks(lines, *callbacks))
    try:
        server.run(None, [])
    except RoundError as error:
        say(str(error))
    return lines.seen


class _Lines(Callback):
    """The lines of metrics of a run."""

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """Keep it."""
        self.seen.append(record)


@final
class ResultRows:
    """The rows of a results.csv, by the columns that say of which run they are; a run whose rows are there is not
    repeated.

    Args:
        path: of the file; an empty field is a value that is missing.
        keys: names of these columns.
        say: told of each run that was done.
    """

    def __init__(self, path: Path, keys: Sequence[str], say: Callable[[str], object] = print) -> None:
        self.path, self._keys, self._say = path, keys, say
        self.rows: list[Row] = []
        if path.exists():
            self.rows = pd.read_csv(path, keep_default_na=False, na_values=[""]).to_dict("records")

    def of(self, run: Sequence[Any], make: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows of a run.

        Args:
            run: its values of the keys.
            make: does it where its rows are not there, which are added to the file.
        """
        key = dict(zip(self._keys, run, strict=True))
        found = [row for row in self.rows if all(row[name] == value for name, value in key.items())]
        if not found:
            found = [key | row for row in make()]
            self.rows += found
            pd.DataFrame(self.rows).to_csv(self.path, index=False, float_format="%.6g")
            self._say(str(found[-1]))
        return found
