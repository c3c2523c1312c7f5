"""One example more moves the noise-free sum of a private step by no more than C, whatever a user switches on.

Everything random is on: dropout of the base, of its attention and of the adapter, stochastic depth where the family has
it. An example has the same masks in every company, by streams that the tests give; production takes fresh ones.
The example is put first, so that masks by place in the batch would move everybody.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from random_models import loaded
from torch import Tensor

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.attention import choose_attention
from fedlora.config import TrainConfig
from fedlora.model import Base
from fedlora.privacy.calibrate import Schedule
from fedlora.tasks import Examples, Task
from fedlora.training import TrainJob, TrainResult
from fedlora.training.dropout import Masks, Stream, secret_masks
from fedlora.training.private import PrivateSettings, check_model, train_by_opacus
from fedlora.training.private_cohort import PrivateTogether

C = 0.01
OTHERS = 8
ADDED = 200


def moved(base: Base) -> AdapterState:
    """An adapter that has come a way from its start, where A's gradients are zero."""
    state = base.initial_adapter(0)
    generator = torch.Generator().manual_seed(1)
    return state.with_tensors(
        {
            name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype)
            for name, value in state.tensors().items()
        }
    )


def own_masks(indices: np.ndarray) -> list[Stream]:
    return [Stream(int(index) + 1000, torch.device("cpu")) for index in indices]


def noise_free_sums(
    base: Base,
    task: Task,
    examples: Examples,
    batches: Sequence[np.ndarray],
    path: str,
    masks: Masks | None = own_masks,
) -> list[Tensor]:
    """What a private step adds up for each batch: one step of plain descent with next to no noise, taken back."""
    start = moved(base)
    config = TrainConfig(optimizer="sgd", lr=1.0)
    how = PrivateSettings(Schedule(1.0, 1, 1, 1.0), 1e-13, C)
    jobs = [TrainJob(start, ALL_PARTS, batch, 7) for batch in batches]
    if path == "cohort":
        outcomes = PrivateTogether(
            base, task, examples, [(job, config) for job in jobs], [how] * len(jobs), masks=masks
        ).run()
    elif path == "alone":
        outcomes = [PrivateTogether(base, task, examples, [(job, config)], [how], masks=masks).run()[0] for job in jobs]
    else:
        outcomes = [train_by_opacus(base, task, examples, job, config, how, masks=masks) for job in jobs]
    before = start.tensors()
    sums = []
    for outcome in outcomes:
        assert isinstance(outcome, TrainResult), outcome
        after = outcome.adapter.tensors()
        sums.append(torch.cat([(before[name] - after[name]).double().flatten() for name in sorted(before)]))
    return sums


def largest_movement(
    base: Base,
    task: Task,
    examples: Examples,
    path: str,
    added: int = ADDED,
    others: int = OTHERS,
    masks: Masks = own_masks,
) -> float:
    """max over x of |S(D + x) - S(D)| / C."""
    D = np.arange(others)
    batches = [np.concatenate([[others + number], D]) for number in range(added)]
    without, *with_one = noise_free_sums(base, task, examples, [D, *batches], path, masks)
    return max(float((found - without).norm()) for found in with_one) / C


def checked(base: Base, task: Task, examples: Examples) -> None:
    choose_attention(base.model)  # as in a run
    check_model(base, task, examples, TrainJob(moved(base), ALL_PARTS, np.empty(0, np.int64), 0))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Task, Examples]:
    """With dropout of its states, its attention and its adapter."""
    return loaded(tmp_path_factory.mktemp("bert"), "Bert", num_hidden_layers=1)


@pytest.mark.parametrize(("path", "added", "others"), [("cohort", 200, 3), ("alone", 20, 8), ("opacus", 20, 8)])
def test_one_example_more_moves_berts_sum_by_c(
    bert: tuple[Base, Task, Examples], path: str, added: int, others: int
) -> None:
    checked(*bert)
    assert 0.99 < largest_movement(*bert, path, added, others) <= 1.001


@pytest.mark.parametrize("path", ["alone", "opacus"])
def test_masks_by_place_in_the_batch_move_everybody(bert: tuple[Base, Task, Examples], path: str) -> None:
    def by_place(indices: np.ndarray) -> list[Stream]:
        return [Stream(place, torch.device("cpu")) for place in range(len(indices))]

    def by_place_in_one(indices: np.ndarray) -> list[Stream]:
        return [Stream(0, torch.device("cpu"))] * len(indices)

    assert largest_movement(*bert, path, 3, masks=by_place) > 1.2, "the law sees it"
    assert largest_movement(*bert, path, 3, masks=by_place_in_one) > 1.2


def test_production_draws_each_examples_masks_from_the_operating_system() -> None:
    draw = secret_masks(torch.device("cpu"))
    drawn = []
    for stream in (*draw(np.arange(40)), *draw(np.arange(40))):
        drawn.append(torch.empty(64))
        stream.fill(drawn[-1], 0.5)
    bits = torch.stack(drawn) > 0
    assert len({tuple(row.tolist()) for row in bits}) == 80, "no two are the same, of another step neither"
    agree = (bits[:, None] == bits[None]).float().mean(2)[~torch.eye(80, dtype=torch.bool)]
    assert 0.49 < float(agree.mean()) < 0.51
    assert float(agree.max()) < 0.9


@pytest.mark.parametrize("path", ["alone", "opacus"])
def test_no_two_private_steps_have_the_same_masks(bert: tuple[Base, Task, Examples], path: str) -> None:
    """The run's seed is public and the same in both; noise is next to none."""
    batches = [np.arange(12)] * 2
    secret, again = noise_free_sums(*bert, batches, path, secret_masks(torch.device("cpu")))
    assert float((secret - again).norm()) > 0.1 * C
    given, same = noise_free_sums(*bert, batches, path, own_masks)
    assert float((given - same).norm()) < 1e-6 * C
    production = noise_free_sums(*bert, batches, path, None)
    assert float((production[0] - production[1]).norm()) > 0.1 * C
