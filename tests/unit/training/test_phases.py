"""Training in two phases is two trainings, one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.states import gap

from fedlora.adapter import ALL_PARTS
from fedlora.config import TrainConfig
from fedlora.errors import TrainingError
from fedlora.model import Base
from fedlora.rng import derive
from fedlora.training import TrainJob, TrainResult, cohort, train, train_cohort

CONFIG = TrainConfig(steps=3, batch_size=4, lr=0.05)
HEAD, REST = frozenset({"dense"}), frozenset({"A", "B"})


@pytest.fixture
def setting(tiny_config: Any) -> tuple[Base, Any, Any, TrainJob]:
    from fedlora.training import open_workspace

    workspace = open_workspace(tiny_config("runtime.prefix_cache=off"))
    start = workspace.base.initial_adapter(0)
    job = TrainJob(start, ALL_PARTS, np.arange(12), seed=5, first=HEAD, first_times=2)
    return workspace.base, workspace.task, workspace.data.train, job


def test_the_head_is_trained_alone_and_then_the_rest_on_it(setting: tuple[Any, ...]) -> None:
    base, task, examples, job = setting
    (found,) = train_cohort(base, task, examples, [job], [CONFIG])
    assert isinstance(found, TrainResult)
    longer = CONFIG.model_copy(update={"steps": 6})
    head = train(base, task, examples, replace(job, trains=HEAD, seed=derive(5, "first"), first=frozenset()), longer)
    assert gap(head.adapter, job.adapter, HEAD) > 1e-3
    assert gap(head.adapter, job.adapter, REST) == 0
    rest = train(base, task, examples, replace(job, adapter=head.adapter, trains=REST, first=frozenset()), CONFIG)
    assert gap(found.adapter, rest.adapter) == 0
    assert gap(found.adapter, head.adapter, HEAD) == 0
    assert gap(found.adapter, job.adapter, REST) > 1e-3
    assert (found.steps, found.examples_seen, found.loss) == (9, 24 + 12, rest.loss)


def test_the_proximal_term_draws_to_the_start_in_both_phases(setting: tuple[Any, ...]) -> None:
    """So strong a term holds both at the start, and not the adapter at itself."""
    base, task, examples, job = setting
    sgd = TrainConfig(steps=10, batch_size=4, optimizer="sgd", lr=1e-4, proximal_mu=5e3)
    (held,) = train_cohort(base, task, examples, [job], [sgd])
    (free,) = train_cohort(base, task, examples, [job], [sgd.model_copy(update={"proximal_mu": 0.0})])
    assert isinstance(held, TrainResult)
    assert isinstance(free, TrainResult)
    for parts in (HEAD, REST):
        assert 0 < gap(held.adapter, job.adapter, parts) < 0.7 * gap(free.adapter, job.adapter, parts)


def test_who_fails_in_the_first_phase_leaves_and_others_go_on_in_any_mixture(
    setting: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, task, examples, job = setting
    jobs = [job, replace(job, first=frozenset()), replace(job, seed=7)]
    each = [train_cohort(base, task, examples, [one], [CONFIG])[0] for one in jobs]
    real = cohort._in_one_phase

    def failing(base: Any, task: Any, examples: Any, jobs: Any, *rest: Any) -> Any:
        found = real(base, task, examples, jobs, *rest)
        broken = TrainingError("broken", code="broken")
        return [broken if one.seed == derive(7, "first") else done for one, done in zip(jobs, found, strict=True)]

    monkeypatch.setattr(cohort, "_in_one_phase", failing)
    first, second, third = train_cohort(base, task, examples, jobs, [CONFIG] * 3)
    assert isinstance(third, TrainingError)
    for one, alone in zip((first, second), each, strict=False):
        assert isinstance(one, TrainResult)
        assert isinstance(alone, TrainResult)
        for name, value in one.adapter.tensors().items():
            torch.testing.assert_close(value, alone.adapter.tensors()[name], rtol=1e-4, atol=1e-6)
