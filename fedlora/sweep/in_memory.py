"""Runs of a few seconds, for studies of hundreds of them: they leave a row each and no folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, final

import pandas as pd

from fedlora.aggregators import Aggregator
from fedlora.callbacks import Callback, Callbacks
from fedlora.config import RunConfig
from fedlora.errors import DataError, PrivacyError, RoundError
from fedlora.federation.client_pool import ClientPool
from fedlora.federation.client_store import ClientStore
from fedlora.federation.load_rule import load_rule
from fedlora.federation.local_clients import LocalClients
from fedlora.federation.privacy_account import NoPrivacy
from fedlora.federation.server import FederatedServer
from fedlora.files import write_atomically
from fedlora.training import open_workspace
from fedlora.training.workspace import Workspace

PoolMaker: TypeAlias = Callable[[RunConfig, Aggregator, Workspace, ClientStore], ClientPool]
"""Makes a run's clients, with the place for what they keep."""
Row: TypeAlias = dict[str, Any]


def all_together(config: RunConfig, rule: Aggregator, workspace: Workspace, store: ClientStore) -> LocalClients:
    """All clients in this process, in one cohort."""
    return LocalClients(config, rule, workspace, cohort=len(workspace.data.clients), store=store)


def run_in_memory(
    config: RunConfig, *callbacks: Callback, make_pool: PoolMaker = all_together, say: Callable[[str], object] = print
) -> list[Mapping[str, Any]]:
    """A run that leaves nothing; what its clients keep from round to round is in a temporary folder.

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
    with TemporaryDirectory(prefix="fedlora-") as folder:
        pool = make_pool(config, rule, workspace, ClientStore(Path(folder)))
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

    A key's value stands in the file as text from which it can be told again: all digits of a number, and nothing for
    None.

    Args:
        path: of the file; an empty field is a value that is missing. Other columns have six digits.
        keys: names of these columns.
        say: told of each run that was done.

    Raises:
        DataError: the file lacks one of the columns.
    """

    def __init__(self, path: Path, keys: Sequence[str], say: Callable[[str], object] = print) -> None:
        self.path, self._keys, self._say = path, keys, say
        self.rows: list[Row] = []
        if path.exists():
            # By name: pandas would make a number of "01", and nothing of "NaN".
            table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(keys, str))
            for key in keys:
                if key not in table:
                    raise DataError(
                        f"{str(path)!r} has no column {key!r}, which says of which run a row is: move the file away, "
                        "and the runs are done again",
                        code="no-such-column",
                    )
                values = [_value(text) for text in table[key].fillna("")]
                table[key] = pd.Series(values, index=table.index, dtype=object)  # else None would become NaN
            self.rows = table.to_dict("records")

    def of(self, run: Sequence[Any], make: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows of a run.

        Args:
            run: its values of the keys: text, numbers or None.
            make: does it where its rows are not there, which are added to the file.
        """
        key = dict(zip(self._keys, run, strict=True))
        texts = {name: _text(value) for name, value in key.items()}
        found = [row | key for row in self.rows if all(_text(row[name]) == text for name, text in texts.items())]
        if not found:
            found = [key | row for row in make()]
            self.rows += found
            table = pd.DataFrame(self.rows).assign(**{k: [_text(row[k]) for row in self.rows] for k in self._keys})
            write_atomically(self.path, table.to_csv(index=False, float_format="%.6g").encode())
            self._say(str(found[-1]))
        return found


def _text(value: Any) -> str:
    """What stands in the file for a key's value; numbers that are equal have the same."""
    if value is None:
        return ""
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        return str(int(number)) if number.is_integer() else repr(number)
    return str(value)


def _value(text: str) -> Any:
    """The value of a key: the number that is written so, else the text itself."""
    if not text:
        return None
    for kind in (int, float):
        with suppress(ValueError):
            if _text(number := kind(text)) == text:
                return number
    return text
