"""A factor for each block of a core, trained beside the block and multiplied in when training ends.

RAVAN (Raje et al., NeurIPS 2025, arXiv 2506.05568) trains  dW = s sum_h f_h B_h R_h A_h  by the R_h [r/h, r/h] and the
numbers f_h. These start at 1 in each round, and a client sends the products f_h R_h, so that nobody else knows of them.
While a client trains they are tensors of its adapter, "<module>:F" [h, 1, 1].
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.adapter import AdapterState, LoraPair
from fedlora.training.job import TrainJob


def opened(job: TrainJob) -> TrainJob:
    """A job that trains cores, and the factors of those in blocks."""
    toward = None if job.toward is None else _with_ones(job.toward)
    return replace(job, adapter=_with_ones(job.adapter), toward=toward)


def factor_names(adapter: AdapterState) -> list[str]:
    """Names of the factors of an opened job's adapter."""
    return [f"{name}:F" for name in adapter.pairs if f"{name}:F" in adapter.dense]


def closed(adapter: AdapterState) -> AdapterState:
    """An adapter without factors, each multiplied into its block."""
    names = factor_names(adapter)
    if not names:
        return adapter
    pairs = {
        name: LoraPair(pair.A, pair.B, pair.scale, pair.core * adapter.dense[f"{name}:F"])
        if pair.core is not None and f"{name}:F" in adapter.dense
        else pair
        for name, pair in adapter.pairs.items()
    }
    return AdapterState(pairs, {name: value for name, value in adapter.dense.items() if name not in names})


def _with_ones(adapter: AdapterState) -> AdapterState:
    ones = {
        f"{name}:F": pair.core.new_ones(len(pair.core), 1, 1)
        for name, pair in adapter.pairs.items()
        if pair.core is not None and pair.in_blocks
    }
    return AdapterState(adapter.pairs, {**adapter.dense, **ones}) if ones else adapter
