"""What a resume may change in a run's config, and the record of what it changed (`config_changes.json`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from fedlora.config import NODES, RunConfig, different_keys, flat_keys

MACHINE = ("output", "rounds", "runtime", "tracking")
"""Tables and keys that change nothing that a round computes: where the run is, how far it goes, on what machine, and
who else is told."""
PLACES = ("model.name", "model.revision", "model.trust_remote_code", "data.source", "data.options", "data.test")
"""Keys that say where something lies: it may be moved, since its content is compared (`fedlora.provenance`)."""
FROM_NOW_ON = (
    "train",
    "server",
    "evaluation.every",
    "evaluation.sample",
    "evaluation.clients_fraction",
    "selection.patience",
    "selection.keep",
)
"""Tables and keys that decide the rounds to come and leave those that are done as they are."""

MECHANISM = {
    "example": ("train.steps", "train.epochs", "train.batch_size"),
    "client": (),
}
"""By privacy unit: keys of `FROM_NOW_ON` on which a private run's noise was calculated."""
SAMPLING = ("server.fraction", "server.clients_per_round", "server.weighting")
"""Keys of `FROM_NOW_ON` by which a private run's clients were promised to be drawn and weighed."""


@final
@dataclass(frozen=True)
class Change:
    """A key that a resume changed.

    Args:
        round: the first that was done with the new value.
        key: dotted.
        before: its value in the rounds before, as in JSON.
        after: its value from then on.
    """

    round: int
    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} from {_say(self.before)} to {_say(self.after)} at round {self.round}"

    @property
    def json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def refused(written: RunConfig, wanted: RunConfig) -> list[str]:
    """The keys in which a resume's config differs from the run's and may not."""
    return [key for key in different_keys(written, wanted) if not _allowed(key, written, wanted)]


def differs_in_more_than_machine(written: RunConfig, wanted: RunConfig) -> list[str]:
    """The keys in which two configs ask for different results."""
    return [key for key in different_keys(written, wanted) if not _of_machine(key, wanted)]


def changes_of(rows: Sequence[Mapping[str, Any]] | None) -> list[Change]:
    """From what `Change.json` gave."""
    return [Change(int(row["round"]), str(row["key"]), row["before"], row["after"]) for row in rows or ()]


def record(earlier: Sequence[Change], written: RunConfig, wanted: RunConfig, done: int) -> list[Change]:
    """All changes of a run that goes on.

    A change whose first round was never completed did not happen: its key had the value before it until now.

    Args:
        earlier: that were recorded.
        written: the config that the run has.
        wanted: that it goes on with.
        done: rounds that are done.
    """
    before, after = flat_keys(written), flat_keys(wanted)
    kept = [change for change in earlier if change.round <= done]
    for change in sorted((c for c in earlier if c.round > done), key=lambda c: -c.round):
        before[change.key] = change.before
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    new = [
        Change(done + 1, key, before.get(key), after.get(key))
        for key in keys
        if not _of_machine(key, wanted) and not _in(key, PLACES)
    ]
    return kept + new


def _allowed(key: str, written: RunConfig, wanted: RunConfig) -> bool:
    if _in(key, MACHINE):
        return True
    unit = written.privacy.unit if written.privacy is not None else None
    if _in(key, ("data.source", "data.options")):
        return unit is None and NODES not in (written.data.source, wanted.data.source)
    if key == "data.test":
        return None not in (written.data.test, wanted.data.test)
    if key == "partition.clients":
        # Nodes with data of their own may join; any other partition would divide all examples anew.
        mine, yours = (config.partition.fields.get("clients", 0) for config in (written, wanted))
        return wanted.partition.name == NODES and unit != "client" and isinstance(yours, int) and yours > mine
    if key in ("train.keep_optimizer", "train.personal"):  # of rounds that are done nothing is there to go on from
        return written.train.keep_optimizer if key == "train.keep_optimizer" else written.train.personal is not None
    if _in(key, PLACES):
        return True
    return _in(key, FROM_NOW_ON) and not (unit is not None and _in(key, (*MECHANISM[unit], *SAMPLING)))


def _of_machine(key: str, config: RunConfig) -> bool:
    """Whether a key changes nothing that a round computes; a schedule of the learning rate goes by all rounds."""
    return _in(key, MACHINE) and not (key == "rounds" and config.train.schedule != "constant")


def _in(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _say(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
