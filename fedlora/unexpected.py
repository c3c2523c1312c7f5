"""The net below `FedloraError`: one line for an exception that nobody foresaw, and a file that keeps its traceback.

A mistake that a user can make is a `FedloraError` where it is found, with the cure. What is caught here is the rest:
the system's own errors (a full disk, no permission, no memory), which get a line of their own; faults of a user's own
code, such as a rule, which are named by file and line; and faults of fedlora or of the libraries below it, whose
traceback is of use to whoever mends them and to nobody else.
"""

from __future__ import annotations

import errno
import itertools
import os
import platform
import sys
import sysconfig
import traceback
from datetime import datetime
from pathlib import Path

from fedlora.files import cache_dir
from fedlora.sanitize import clean_text

KEPT_LOGS = 20
"""Of the newest errors; older files are removed."""
CURES = {
    errno.ENOSPC: "free some space or name another folder, then go on with --resume where a run was under way",
    errno.EDQUOT: "free some space or name another folder, then go on with --resume where a run was under way",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name another, or change its permissions",
    errno.EPERM: "name another, or change its permissions",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "something in this path is a file and no folder: name another",
    errno.EISDIR: "it is a folder and no file: name another",
    errno.EMFILE: "raise the limit (ulimit -n), or lower runtime.processes",
    errno.ENOMEM: "lower train.batch_size, task.max_length, runtime.cohort or runtime.processes",
}
"""What to do about an error of the system's, by its number."""


def describe_exception(error: BaseException) -> str:
    """One line for any exception that is no `FedloraError`; an unexpected one is kept in a file, which the line names.

    Example:
        >>> describe_exception(OSError(28, "No space left on device", "runs/a"))[:40]
        "'runs/a': No space left on device; free "
    """
    if ran_out(error):
        first = clean_text(str(error).split(". ")[0], 200)
        return f"memory ran out{f' ({first})' if first else ''}: {CURES[errno.ENOMEM]}"
    if isinstance(error, OSError) and error.errno in errno.errorcode and error.strerror:
        where = "" if error.filename is None else f"{clean_text(repr(str(error.filename)), 300)}: "
        cure = CURES.get(error.errno or 0)
        return f"{where}{error.strerror}" + (f"; {cure}" if cure else "")
    kind, first = type(error).__name__, clean_text(next(iter(str(error).splitlines()), ""), 200)
    log = keep_traceback(error)
    known = "rerun with --debug for the traceback" if log is None else f"the traceback is in {log}"
    what = f"{kind}{': ' if first else ''}{first}"
    if (own := _place_in_own_code(error)) is not None:
        return f"your code fails in {clean_text(own, 300)}: {what}; {known}"
    return f"unexpected {what}; {known} (please report it)"


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch has a class for it on CUDA alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


def _place_in_own_code(error: BaseException) -> str | None:
    """File and line of a user's code that fedlora called and that failed, by itself or in what it called."""
    installed = [str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]

    def is_own(file: str) -> bool:
        return Path(file).is_file() and not any(Path(file).is_relative_to(folder) for folder in installed)

    if isinstance(error, SyntaxError) and error.filename is not None and is_own(error.filename):
        return f"{error.filename}, line {error.lineno}"
    called = itertools.dropwhile(
        lambda frame: not Path(frame.filename).is_relative_to(installed[0]), traceback.extract_tb(error.__traceback__)
    )
    own = [frame for frame in called if is_own(frame.filename)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else None


def keep_traceback(error: BaseException) -> Path | None:
    """Write an exception with its traceback to a file of the cache folder.

    Returns:
        The file, or None where it cannot be written.
    """
    from fedlora import __version__

    folder = cache_dir() / "errors"
    now = datetime.now().astimezone()
    path = folder / f"{now:%Y-%m-%d-%H%M%S}-{os.getpid()}.log"
    head = f"fedlora {__version__}, Python {platform.python_version()}, {platform.platform()}\n{' '.join(sys.argv)}\n\n"
    text = head + "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        for old in sorted(folder.glob("*.log"))[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
    except OSError:
        return None
    return path
