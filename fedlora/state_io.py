"""States as flat named tensors and JSON, and back, exactly: what checkpoints and messages are made of.

Tensor names are `A/<module>`, `B/<module>`, `R/<module>` where there is a core, and `dense/<name>`, so that no module
can be called like a dense parameter. Order, scales and numbers are in the JSON part. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import BaseUpdate, GlobalState
from fedlora.errors import RunDirError

Meta = dict[str, Any]
"""What JSON can hold."""


# ---------------------------------------------------------------------------------------------- flat and back


def flatten_adapter(state: AdapterState, prefix: str = "") -> tuple[dict[str, Tensor], Meta]:
    """An adapter as tensors by name and a JSON part with its modules' order and scales.

    Args:
        state: is not copied: the tensors are its own.
        prefix: goes before every tensor's name.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in state.pairs.items():
        tensors[f"{prefix}A/{name}"] = pair.A
        tensors[f"{prefix}B/{name}"] = pair.B
        if pair.core is not None:
            tensors[f"{prefix}R/{name}"] = pair.core
    tensors.update({f"{prefix}dense/{name}": value for name, value in state.dense.items()})
    return tensors, {"scales": {name: pair.scale for name, pair in state.pairs.items()}, "dense": list(state.dense)}


def unflatten_adapter(tensors: Mapping[str, Tensor], meta: Meta, prefix: str = "") -> AdapterState:
    """The inverse of `flatten_adapter`.

    Raises:
        KeyError: a tensor that the JSON part names is missing.
    """
    pairs = {
        name: LoraPair(
            tensors[f"{prefix}A/{name}"], tensors[f"{prefix}B/{name}"], scale, tensors.get(f"{prefix}R/{name}")
        )
        for name, scale in meta["scales"].items()
    }
    return AdapterState(pairs, {name: tensors[f"{prefix}dense/{name}"] for name in meta["dense"]})


def flatten_base_update(base_update: BaseUpdate, prefix: str = "") -> tuple[dict[str, Tensor], Meta]:
    """One base update, as `flatten_adapter`."""
    tensors, meta = flatten_adapter(base_update.change, prefix)
    return tensors, {"since": base_update.since, "version": base_update.version, "change": meta}


def unflatten_base_update(tensors: Mapping[str, Tensor], meta: Meta, prefix: str = "") -> BaseUpdate:
    """The inverse of `flatten_base_update`."""
    return BaseUpdate(meta["since"], meta["version"], unflatten_adapter(tensors, meta["change"], prefix))


def flatten_state(state: GlobalState, *, base_updates: bool = True) -> tuple[dict[str, Tensor], Meta]:
    """A whole global state.

    Args:
        state: is not copied.
        base_updates: False leaves their tensors out and only says which there are (a checkpoint keeps them in files of
            their own, since they are written once and the state is written each round).
    """
    tensors, adapter = flatten_adapter(state.adapter, "adapter/")
    tensors.update({f"memory/{name}": value for name, value in state.memory.items()})
    chain: list[Any] = []
    for base_update in state.base_updates:
        if base_updates:
            more, meta = flatten_base_update(base_update, f"merge/{base_update.version}/")
            tensors.update(more)
            chain.append(meta)
        else:
            chain.append({"since": base_update.since, "version": base_update.version})
    return tensors, {
        "adapter": adapter,
        "seed": state.seed,
        "round": state.round,
        "memory": list(state.memory),
        "metrics": dict(state.metrics),
        "merges": chain,
    }


def unflatten_state(
    tensors: Mapping[str, Tensor], meta: Meta, read_base_update: Callable[[int, int], BaseUpdate] | None = None
) -> GlobalState:
    """The inverse of `flatten_state`.

    Args:
        tensors: by name.
        meta: the JSON part.
        read_base_update: called with `since` and `version` for a base update whose tensors were left out.
    """
    chain: list[BaseUpdate] = []
    for entry in meta["merges"]:
        if "change" in entry:
            chain.append(unflatten_base_update(tensors, entry, f"merge/{entry['version']}/"))
        elif read_base_update is not None:
            chain.append(read_base_update(entry["since"], entry["version"]))
        else:
            raise RunDirError(
                f"the base update from version {entry['since']} to {entry['version']} is not stored with the state: "
                "put it back, or start the run again",
                code="file-missing",
            )
    return GlobalState(
        adapter=unflatten_adapter(tensors, meta["adapter"], "adapter/"),
        seed=meta["seed"],
        round=meta["round"],
        base_updates=tuple(chain),
        memory={name: tensors[f"memory/{name}"] for name in meta["memory"]},
        metrics=meta["metrics"],
    )


# ---------------------------------------------------------------------------------------------- bytes


def pack(tensors: Mapping[str, Tensor], meta: Meta) -> bytes:
    """Tensors and JSON as the bytes of a safetensors file; the JSON is in the header under "fedlora".

    Tensors may be views, share memory or be on any device: each is stored on its own. A hash of all of them stands
    in the header, so that a flipped bit is found.
    """
    from safetensors.torch import save

    plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    text = json.dumps(meta)
    # One key: safetensors writes several in any order, and equal states shall be equal bytes.
    return save(plain, {"fedlora": json.dumps({"sha256": _digest(plain, text), "state": text})})


def unpack(data: bytes) -> tuple[dict[str, Tensor], Meta]:
    """The inverse of `pack`.

    Raises:
        RunDirError: the bytes are no file of ours, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedlora"])
        if _digest(tensors, header["state"]) != header["sha256"]:
            raise ValueError("their hash is another than that which was written")
        return tensors, json.loads(header["state"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(
            f"these bytes are not a state of fedlora, or they are damaged ({error}): read another file",
            code="file-damaged",
        ) from None


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)  # bfloat16 has no numpy of its own
    return found.hexdigest()
