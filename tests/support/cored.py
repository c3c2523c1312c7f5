"""Rules with cores, on cores that are not zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedlora.adapter import AdapterState
from fedlora.aggregators import Aggregator, ClientSpec
from fedlora.config import RunConfig
from fedlora.training.job import TrainJob
from fedlora.training.workspace import Workspace, open_workspace


def drawn(adapter: AdapterState, seed: int, size: float = 1.0) -> AdapterState:
    """With cores that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    cores = adapter.tensors(("R",)).items()
    return adapter.with_tensors(
        {name: (size * torch.randn(value.shape, generator=generator)).to(value.dtype) for name, value in cores}
    )


def work_of(rule: Aggregator, config: RunConfig, size: float) -> tuple[Workspace, TrainJob]:
    """A workspace, and a client's job on eight examples from the rule's start with drawn cores."""
    workspace = open_workspace(config)
    state = rule.init(workspace.base.initial_adapter(0), seed=1)
    state = replace(state, adapter=drawn(state.adapter, 3, size))
    plan = rule.plan(state, ClientSpec(0, state.adapter.layout))
    return workspace, TrainJob(state.adapter, plan.trains, np.arange(8), seed=2)
