"""What a machine was found to do faster, kept in the cache folder: the next run of its kind computes the same bits.

A measurement differs from one time to the next, and with it the choice that hangs on it; a run that is started again
must come to the same bytes. So a choice is made once for a machine (processor, cores, threads) and its versions.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedlora.files import cache_dir, write_atomically
from fedlora.hashing import digest_of
from fedlora.runs.environment import instructions, processor, version_of


def machine() -> dict[str, Any]:
    """What a timing depends on besides what is timed."""
    return {
        "processor": processor(),
        "instructions": instructions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": version_of("torch"),
        "fedlora": version_of("fedlora"),
    }


def once(kind: str, what: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]], *, anew: bool) -> dict[str, Any]:
    """What was measured on this machine, now or at an earlier time.

    Where two processes measure at once, both go by what the first of them has written.

    Args:
        kind: of the measurement, a plain word.
        what: is timed; JSON.
        measure: does it, and gives JSON.
        anew: whether to measure again, and keep that instead.

    Returns:
        What `measure` gave, with "measured", the day and hour (UTC), and "kept", whether it is in the cache now.
    """
    key = {"machine": machine(), "what": dict(what)}
    path = cache_dir() / "probes" / f"{kind}-{digest_of(key)}.json"
    if not anew and (found := _read(path)) is not None:
        return found
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    found = {**measure(), "measured": now, "kept": True}
    text = (json.dumps({**key, "found": found}, indent=1) + "\n").encode()
    try:
        if anew:
            write_atomically(path, text)
        else:
            _write_first(path, text)
    except OSError:
        return {**found, "kept": False}
    return _read(path) or found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())["found"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _write_first(path: Path, text: bytes) -> None:
    """Put a file where none is; another one's is left alone."""
    own = path.with_name(f".{path.name}.{os.getpid()}.new")
    write_atomically(own, text)
    try:
        if _read(path) is None:
            path.unlink(missing_ok=True)  # damaged
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink(missing_ok=True)
