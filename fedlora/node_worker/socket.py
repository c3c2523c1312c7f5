"""The socket's folder and file: what both ends check, so that nobody but the node's user is at either of them.

Whoever can enter the folder can speak to the worker, and whoever can write in it can take the worker's place: so it
must belong to the user and be closed to everybody else. The socket itself is the user's too, with mode 0600. A worker
that is its site's gate may let a group in, whose members can speak to it and change nothing: the folder then has that
group and mode 2750, by which the socket has the group too.

Whoever can rename the folder can put one of their own in its place: so nobody but the user and root may write in the
folders above it, unless they are sticky (as /tmp is), where only its owner can rename an entry.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from fedlora.errors import WorkerError

KEY = "worker"
VARIABLE = "FEDLORA_WORKER"
LONGEST = 100
"""Bytes of a socket's path; the kernel allows 107, and gRPC needs some for itself."""
METHOD = "/fedlora.Worker/Answer"
SERVICE = "fedlora.Worker"
ERROR_CODE = "fedlora-error-code"
"""Trailing metadata with the code of a `WorkerError`, whose text is the status's."""
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


def named_by(node_config: Mapping[str, bool | float | int | str]) -> Path | None:
    """The socket that a node's config (`worker="/run/fedlora/worker.sock"`) or environment names, if any."""
    name = str(node_config.get(KEY, "") or os.environ.get(VARIABLE, ""))
    return Path(name).absolute() if name else None


def make_folder(path: Path, *, for_a_group: bool = False) -> None:
    """See that the folder of a socket is there, and the user's alone.

    Args:
        path: Path of the socket.
        for_a_group: Whether a group may enter it.

    Raises:
        WorkerError: it is open to others or belongs to another user, or the path is too long.
    """
    if len(os.fsencode(path)) > LONGEST:
        raise WorkerError(
            f"socket path {str(path)!r} is longer than {LONGEST} bytes: choose a shorter one", code="path-too-long"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise WorkerError(
            f"folder {str(path.parent)!r} cannot be made: {error.strerror}", code="folder-not-made"
        ) from None
    _require_closed(path.parent, os.geteuid(), 0o027 if for_a_group else 0o077)


def socket_mode(folder: Path) -> int:
    """Mode of a socket: for the group of its folder too, if that may enter."""
    return 0o660 if folder.stat().st_mode & 0o070 else 0o600


def require_own(path: Path, *, gate: bool = False) -> None:
    """The other end's check, before anything is sent.

    Args:
        path: Path of the socket.
        gate: Whether the worker may be of another user, who owns the folder.

    Raises:
        WorkerError: there is no socket, or somebody else could be behind it.
    """
    try:
        facts = path.lstat()
    except OSError as error:
        raise WorkerError(
            f"there is no worker's socket at {str(path)!r} ({error.strerror})", code="no-socket"
        ) from None
    owner = path.parent.lstat().st_uid if gate else os.geteuid()
    _require_closed(path.parent, owner, 0o027 if gate else 0o077)
    if not stat.S_ISSOCK(facts.st_mode):
        raise WorkerError(
            f"{str(path)!r} is no socket: name the one that fedlora worker was started with", code="not-a-socket"
        )
    if facts.st_uid != owner:
        raise WorkerError(
            f"socket {str(path)!r} belongs to another user: start the worker as the node's user", code="other-owner"
        )


def _require_closed(folder: Path, owner: int, closed: int) -> None:
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise WorkerError(
            f"{str(folder)!r} is no folder (or a link to one): name the socket by its real path", code="not-a-folder"
        )
    if facts.st_uid != owner:
        raise WorkerError(
            f"folder {str(folder)!r} belongs to another user: choose one of the node's user", code="other-owner"
        )
    if facts.st_mode & closed:
        mode = f"{0o777 & ~closed:o}"
        raise WorkerError(f"others can enter folder {str(folder)!r}: chmod {mode} {folder}", code="open-to-others")
    if owner != os.geteuid() and folder.absolute().parent.stat().st_mode & 0o002:  # anybody could have made it there
        raise WorkerError(
            f"folder {str(folder)!r} is another user's in one where everybody can write: choose another place",
            code="open-to-others",
        )
    for above in dict.fromkeys((*folder.absolute().parents, *folder.resolve().parents)):  # also of what a link names
        _require_ours(above, owner)


def _require_ours(above: Path, owner: int) -> None:
    """Raise `WorkerError` if another user could rename what is in a folder."""
    facts = above.lstat()
    if facts.st_uid not in (0, os.geteuid(), owner):
        raise WorkerError(
            f"{str(above)!r} belongs to another user, who could replace what is in it: choose another",
            code="other-owner",
        )
    if stat.S_ISLNK(facts.st_mode) or facts.st_mode & stat.S_ISVTX:
        return
    others = 0o002 if facts.st_gid == os.getegid() else 0o022
    if facts.st_mode & others:
        raise WorkerError(
            f"others can write in {str(above)!r}, and could replace what is in it: chmod go-w {above}, or choose "
            "another",
            code="open-to-others",
        )
