"""Commands under another user of this machine, who need not be in its list of users. Needs root."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fedlora

NEEDED = (Path(sys.prefix), Path(sys.base_prefix), Path(fedlora.__file__).resolve().parents[1])
"""What a Python program of ours reads."""


def cannot() -> str:
    """Why there can be no other user here; "" where there can."""
    if os.geteuid() != 0:
        return "needs root, to start processes of other users"
    missing = [name for name in ("unshare", "setpriv") if shutil.which(name) is None]
    return f"needs {missing[0]} (Debian: util-linux)" if missing else ""


def command_as(uid: int, groups: Sequence[int], command: Sequence[str]) -> list[str]:
    """The command as another user, whose own group has the same number.

    Where Python lies in a folder that is closed to others (root's home), the command sees that folder with nothing in
    it but what is needed, in a mount namespace of its own.

    Args:
        uid: Number of the user.
        groups: Other groups that it is in.
        command: Program and arguments.
    """
    more = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
    inner = ["setpriv", "--reuid", str(uid), "--regid", str(uid), *more, "--no-new-privs", "--", *command]
    closed = {found: path for path in NEEDED if (found := _closed_folder(path)) is not None}
    steps = ["set -e", "keep=$(mktemp -d /tmp/fedlora-kept-XXXXXX)", 'mount -t tmpfs none "$keep"']
    for folder, path in closed.items():
        place = f'"$keep{path}"'
        steps += [f"mkdir -p {place}", f"mount --bind {shlex.quote(str(path))} {place}"]
        steps += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(folder))}"]
        steps += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind {place} {shlex.quote(str(path))}"]
    steps += ['umount --lazy "$keep"', 'rmdir "$keep"', f"exec {shlex.join(inner)}"]
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(steps)] if closed else inner


def run_as(uid: int, command: Sequence[str], *, groups: Sequence[int] = (), **how: object) -> subprocess.Popen[bytes]:
    """Start a command as another user, in a process group of its own."""
    return subprocess.Popen(command_as(uid, groups, command), start_new_session=True, **how)  # type: ignore[call-overload]


def _closed_folder(path: Path) -> Path | None:
    """The first folder on the way to a path that others cannot pass."""
    return next((f for f in [*reversed(path.parents), path] if not f.stat().st_mode & 0o001), None)
