"""A node's own model: the adapter that the coordinator handed out, with what this node keeps in its place."""

from __future__ import annotations

import json
from pathlib import Path

from fedlora.adapter import times_core
from fedlora.errors import ExportError
from fedlora.federation.client_ledger import LedgerPlace
from fedlora.federation.client_store import divided
from fedlora.model.export import save_with
from fedlora.site import node_facts


def write_own_adapter(site: Path, adapter: Path, out: Path, run: str | None = None) -> int:
    """Write a node's own adapter, in PEFT's format.

    The values are those of the last round, of those that the adapter has seen, in which the node trained. Nothing is
    loaded or measured: of a folder that was verified some tensors get other values.

    Args:
        site: The site's folder.
        adapter: The run's `adapter/`, as the coordinator exported it.
        out: A new or empty folder.
        run: Id of the run; None: the only one of which the node keeps anything.

    Returns:
        The round.

    Raises:
        ConfigError: the node's own facts cannot be read, or name no ledger, beside which it would keep.
        ExportError: nothing is kept of the run, or it does not fit the adapter.
    """
    facts, rounds = node_facts(site, "ledger", "partition-id"), _rounds(adapter)
    ledger, client_id = Path(str(facts["ledger"])), int(facts["partition-id"])
    kept = LedgerPlace(own=ledger).kept
    assert kept is not None
    runs = sorted(folder.name for folder in kept.glob("*") if (folder / f"client-{client_id}").is_dir())
    if (run is None and len(runs) != 1) or (run is not None and run not in runs):
        there = f"there are {', '.join(runs)}: name one with --run" if runs else "there is none"
        raise ExportError(f"{str(kept)!r} is asked for one run's own model, and {there}", code="no-such-run")
    store = LedgerPlace(own=ledger).store(run or runs[0])
    number = max((number for number in store.rounds(client_id) if number <= rounds), default=0)
    if not number:
        raise ExportError(
            f"this node keeps nothing of the run's first {rounds} rounds, which {str(adapter)!r} is of: name the "
            "adapter of the run's end",
            code="no-such-round",
        )
    own, *_ = divided(store.load(client_id, number))
    if not own:
        raise ExportError(
            "by the run's rule this node keeps no part of the model: use the run's adapter", code="nothing-kept"
        )
    for name in [name for name in own if name.endswith(":R")]:  # what is exported has no cores
        module, core = name.removesuffix(":R"), own.pop(name)
        own[f"{module}:B"] = times_core(own[f"{module}:B"], core)
    save_with(adapter, own, out)
    return number


def _rounds(adapter: Path) -> int:
    try:
        return int(json.loads((adapter / "fedlora.json").read_bytes())["rounds"])
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"{str(adapter)!r} is no adapter of a run ({type(error).__name__}: {error}): name the run's adapter/",
            code="no-adapter",
        ) from None
