"""The identity of a checkpoint's weights: what two machines compare before they train on the same base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedlora.assets import Checkpoint
from fedlora.errors import ModelError
from fedlora.hashing import Stamp, file_digest, stamp
from fedlora.provenance import config_digest

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What transformers loads, the first that is there, in one file or in the shards that `<name>.index.json` names."""
LOOSE = ("*.safetensors", "pytorch_model*.bin")
"""Other names under which weights lie, the first kind that is there."""


def fingerprint(
    checkpoint: Checkpoint,
    commit: str | None = None,
    stamps: tuple[Stamp, ...] | None = None,
    quantize: str | None = None,
) -> str:
    """SHA-256 of a checkpoint's weight files, its architecture, and the Python code that it may run.

    The same for the same files in any folder or in the hub's cache; of a hub model whose files are not in the cache it
    is one of name and commit.

    Args:
        checkpoint: that was loaded.
        commit: of a hub model, as transformers found it.
        stamps: of the folder when it was loaded; None: not known.
        quantize: how the weights are quantised while they are loaded; None: not.

    Raises:
        ModelError: a file was changed since then.
    """
    digest = hashlib.sha256() if quantize is None else hashlib.sha256(f"{quantize} ".encode())
    folder = _folder(checkpoint, commit)
    if folder is None:
        digest.update(f"{checkpoint.source}@{commit or checkpoint.revision or 'main'}".encode())
        return digest.hexdigest()
    code = folder.rglob("*.py") if checkpoint.trust_remote_code else ()
    then = {mark[0]: mark for mark in stamps or ()}
    for path in (*weight_files(folder), *sorted(code)):
        mark = stamp(path)
        if then.get(mark[0], mark)[1:3] != mark[1:3]:
            raise ModelError(
                f"{str(path)!r} was changed while it was in use: start the command again", code="file-changed"
            )
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    with suppress(OSError, ValueError, AttributeError):  # whoever loads the model says what is wrong with its config
        digest.update(config_digest(json.loads((folder / "config.json").read_bytes())).encode())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights that transformers would load from a folder, by name."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        with suppress(OSError, ValueError, KeyError):
            index = json.loads((folder / f"{name}.index.json").read_bytes())
            return _there(folder / shard for shard in set(index["weight_map"].values()))
    return next((found for kind in LOOSE if (found := _there(folder.glob(kind)))), [])


def _there(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file())


def _folder(checkpoint: Checkpoint, commit: str | None) -> Path | None:
    """Where the files are: the folder itself, or that of the hub's cache."""
    if (folder := Path(checkpoint.source)).is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name of the hub's
        found = try_to_load_from_cache(checkpoint.source, "config.json", revision=commit or checkpoint.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None
