"""audit.jsonl: what was asked of a site and what it answered, one line each, which its worker alone writes.

A request's line is on the disk before anything is done for it, and an answer's line before the answer leaves: what
cannot be written down is refused. Lines are chained by hashes (`fedlora.hash_chain`); a copy of the head that somebody
keeps elsewhere (`fedlora node log --verify` prints it) shows lines that were cut off, too.

The log stays at the site. It holds no example and no tensor: kinds, sizes and norms of what was sent, and for private
runs only what they sent or what is in the ledger.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, final

from fedlora.errors import DeployError
from fedlora.hash_chain import Chain, ChainError, ChainWriter, Mark, read_chain

logger = logging.getLogger(__name__)

AUDIT_LOG = "audit.jsonl"
"""Name of the file in a site's folder."""


@final
class AuditLog:
    """The log of a site, open for writing; a line that a crash cut short is kept, and recorded as such.

    Args:
        site: The site's folder.

    Attributes:
        ledger: The head of the site's privacy ledger in the last line that has one; "" where none has.

    Raises:
        DeployError: a line was changed, removed or moved, or the file cannot be written.
    """

    def __init__(self, site: Path) -> None:
        self.path = site / AUDIT_LOG
        self._left: Mark | None = None
        with closing(self._writer()) as writer:
            chain = writer.chain
            self.ledger = next((str(r["ledger"]) for r in reversed(chain.records) if r.get("ledger")), "")
            if chain.torn is not None:
                size = len(chain.torn)
                logger.warning("%s: a crash left %d bytes of an unfinished line, which are kept", self.path, size)
                writer.append([], {"time": _now()})
            self._left = writer.mark

    def write(self, event: str, facts: Mapping[str, Any]) -> str:
        """Append a line; it is on the disk when this returns.

        Args:
            event: "request" or "answer".
            facts: What JSON can hold; None values are left out.

        Returns:
            The hash of the line.

        Raises:
            DeployError: it cannot be written, or the file is damaged.
        """
        line = {"event": event, "time": _now(), **{key: value for key, value in facts.items() if value is not None}}
        with closing(self._writer()) as writer:
            head = writer.append([line])
            self._left = writer.mark
        self.ledger = str(facts.get("ledger") or self.ledger)
        return head

    def _writer(self) -> ChainWriter:
        try:
            return ChainWriter(self.path, "audit log", DeployError, wait=True, left=self._left)
        except ChainError as error:
            raise _damaged(self.path, error) from None
        except OSError as error:
            raise DeployError(
                f"audit log {str(self.path)!r} cannot be opened: {error.strerror}", code="log-not-writable"
            ) from None


def read_log(site: Path, head: str | None = None) -> Chain:
    """All lines of a site's log, checked.

    Args:
        site: The site's folder.
        head: A hash that a line of it must have, as printed earlier.

    Raises:
        DeployError: there is no log, a line was changed, removed or moved, or none has the hash.
    """
    path = site / AUDIT_LOG
    try:
        chain = read_chain(path.read_bytes())
    except FileNotFoundError:
        raise DeployError(
            f"there is no audit log {str(path)!r}: the worker of a site writes it", code="no-log"
        ) from None
    except OSError as error:
        raise DeployError(
            f"audit log {str(path)!r} cannot be read: {error.strerror}", code="log-not-readable"
        ) from None
    except ChainError as error:
        raise _damaged(path, error) from None
    if head is not None and not chain.holds(head):
        raise DeployError(
            f"audit log {str(path)!r} is cut off after line {chain.lines}, or was written anew: no line has the hash "
            f"{head}",
            code="log-cut-off",
        )
    return chain


def _damaged(path: Path, error: ChainError) -> DeployError:
    return DeployError(
        f"audit log {str(path)!r} is not as it was written: {error}; keep the file for whoever looks into it, and "
        "start the worker on a new one",
        code="log-damaged",
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
