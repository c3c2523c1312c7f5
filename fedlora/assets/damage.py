"""Why the files of a model cannot be loaded: libraries say "header too large" where a file is no weights at all."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fedlora.errors import closest
from fedlora.sanitize import clean_text

LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it


def why_not_loaded(source: str, error: Exception, named: tuple[str, ...] = ()) -> str:
    """One clause on a checkpoint that a library refused.

    Args:
        source: a folder or hub name.
        error: the library's.
        named: models that have a name here, for a source that was meant to be one.

    Returns:
        The damage that is found in the folder, else the first line of the error.
    """
    first = clean_text(next(iter(str(error).strip().splitlines()), "") or type(error).__name__, 250)
    folder = Path(source)
    if folder.is_dir():
        return next(_damages(folder), first)
    near = closest(source, named)
    return (
        f"it is no folder here and no named model{f' (did you mean {near!r}?)' if near else ''}, and the hub gave: "
        f"{first.rstrip('.')}"
    )


def _damages(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        try:
            problem = _problem(path)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            yield f"{path.name} {problem}"


def _problem(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not the file itself: run `git lfs pull` in the folder it was cloned to"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, as of a failed download: download it again"
    weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth")
    if not head and (weights or path.suffix == ".json"):
        return "is empty: download it again"
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.name.startswith("pytorch_model") and path.suffix == ".bin":
        legacy = head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04"))
        return None if legacy or zipfile.is_zipfile(path) else "is damaged or cut short: download it again"
    return _json(path) if path.suffix == ".json" else None


def _safetensors(path: Path) -> str | None:
    """A file of eight bytes with the header's length, the header, and the tensors."""
    size = path.stat().st_size
    damaged = "is damaged: download it again"
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER
        if length >= LARGEST_HEADER:
            return damaged
        header = file.read(length)
    if len(header) < length:
        return f"is cut short ({size} bytes, and its header alone has {8 + length}): download it again"
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return damaged
    if size < whole:
        return f"is cut short ({size} of {whole} bytes): download it again"
    return None if size == whole else damaged


def _json(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({clean_text(error, 80)}): restore it"
    if path.name.endswith(".index.json"):
        shards = found.get("weight_map", {}) if isinstance(found, dict) else {}
        missing = sorted(name for name in set(map(str, shards.values())) if not (path.parent / name).is_file())
        return f"names {missing[0]!r}, which is not there: download it" if missing else None
    return None
