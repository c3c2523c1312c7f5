"""Every error that fedlora raises on purpose; each message is one line and names the cure.

```
FedloraError
├── ConfigError        a key, value or name in a config file or on the command line is wrong
├── AssetError         a named model or corpus cannot be fetched, or its hash differs
├── DataError          a data file, column or partition is not usable
├── ModelError         a base model or an adapter on it is not usable
│   └── ExportError    what was exported is not what was trained, or cannot be loaded to see
├── RuleError          an aggregation rule was asked for something that it cannot do
├── ReplyError         one client's reply was refused (the round goes on above the quorum)
├── TrainingError      local training failed: a loss that is not finite, an empty client
├── RoundError         a round could not be completed: quorum missed, no node there
│   └── PoolError      a process that trains clients of a simulation is gone
├── PrivacyError       a private run would not be private, or its budget is spent
├── WorkerError        a node's worker is not there, or could be somebody else's
├── PolicyError        a site's policy does not allow what a run asks of it
├── DeployError        a federation's folders are in the way, incomplete or not usable
└── RunDirError        a run directory is in the way, incomplete or damaged
```

The command line prints `FedloraError` as one line and exits with 1; `--debug` shows the traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class FedloraError(Exception):
    """Base of all errors that a user can cause and cure.

    Args:
        message: One line that names the cure.
        code: Stable name of what went wrong, such as "unknown-key", for programs and tests: wordings may change.
    """

    def __init__(self, message: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class ConfigError(FedloraError):
    """A key, value or name in a config file or on the command line is wrong."""


class AssetError(FedloraError):
    """A named model or corpus cannot be fetched, or its bytes are not the expected ones."""


class DataError(FedloraError):
    """A data file, a column or a partition is not usable."""


class ModelError(FedloraError):
    """A base model, or an adapter on it, is not usable."""


class ExportError(ModelError):
    """What was exported does not say the same as the trained model, or cannot be loaded without us."""


class RuleError(FedloraError):
    """An aggregation rule was asked for something that it cannot do."""


class ReplyError(FedloraError):
    """One client's reply was refused; the message says which check it failed."""


class TrainingError(FedloraError):
    """Local training failed: the loss is not finite, or the client has no data."""


class RoundError(FedloraError):
    """A round could not be completed: the quorum was missed, or no node is there."""


class PoolError(RoundError):
    """A process that trains clients of a simulated round is gone, or cannot go on."""


class PrivacyError(FedloraError):
    """A run that was asked to be private would not be, or its budget is spent."""


class WorkerError(FedloraError):
    """A node's worker is not there, or could be somebody else's; the node's own process can do the work."""


class PolicyError(FedloraError):
    """A site's policy does not allow what a run asks of it.

    As text it is what the coordinator is told: the clause, and no value of the site's.

    Args:
        clause: Key of the policy that forbids it.
        why: The reason in full, for the node's own log.
    """

    def __init__(self, clause: str, why: str, *, code: str = "") -> None:
        super().__init__(f"this site's policy does not allow it: {clause}", code=code)
        self.clause, self.why = clause, why


class DeployError(FedloraError):
    """A federation's folders are in the way, incomplete, or what was asked for them is not usable."""


class RunDirError(FedloraError):
    """A run directory is in the way, incomplete or damaged."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The tail of an error message: the valid name nearest to `name`, or all of them.

    Example:
        >>> nearest("fedavgg", ["fedavg", "ffa"])
        "did you mean 'fedavg'?"
        >>> nearest("zzz", ["fedavg", "ffa"])
        'valid names: fedavg, ffa'
    """
    names = sorted(valid)
    if (close := closest(name, names)) is not None:
        return f"did you mean {close!r}?"
    return "valid names: " + ", ".join(names) if names else "there are none"


def nearest_file(path: Path, others: Iterable[str]) -> str:
    """As `nearest`, for a file or folder that is not there: what lies beside it is not listed, it may be anything."""
    close = closest(str(path), others)
    return f"did you mean {close!r}?" if close is not None else f"nothing with a name like that is in {path.parent}"


def looks_like_path(name: str) -> bool:
    """Whether a name is meant as a path, and cannot be one of the hub's ("name" or "owner/name")."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` was most likely meant to be; None if it is like none of them."""
    return next(iter(get_close_matches(name, sorted(valid), n=1, cutoff=0.6)), None)


def in_words(error: Exception) -> str:
    """What is told of an error elsewhere: fedlora's own speak for themselves, others are named."""
    return str(error) if isinstance(error, FedloraError) else f"{type(error).__name__}: {error}"
