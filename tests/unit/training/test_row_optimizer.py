"""Adapters go into the rows of a matrix and come out of them again, to the bit."""

from __future__ import annotations

import pytest
import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.training.row_optimizer import Columns, add

NAMES = ["m:A", "m:B", "n:A", "n:B", "head"]


def adapter(seed: int, rank: int = 3, dtype: torch.dtype = torch.float32) -> AdapterState:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(seed)
    pairs = {name: LoraPair(draw(rank, 5), draw(4, rank), 2.0) for name in ("m", "n")}
    return AdapterState(pairs, {"head": draw(2, 4), "norm": draw(4)})


@pytest.mark.parametrize("names", [NAMES, ["n:B", "norm"], ["m:A"], []])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 1, 2), (2,)])
def test_an_adapter_is_read_as_it_was_written(ranks: tuple[int, ...], names: list[str]) -> None:
    adapters = [adapter(seed, rank) for seed, rank in enumerate(ranks)]
    columns = Columns(adapters, names)
    rows = columns.rows(adapters, torch.empty(0))
    assert rows.count_nonzero() == sum(a.tensors()[name].numel() for a in adapters for name in names)  # zeros around
    for row, one in zip(rows, adapters, strict=True):
        found = columns.read(row, one)
        assert found.layout == one.layout
        assert list(found.tensors()) == list(one.tensors())
        assert all(torch.equal(found.tensors()[name], value) for name, value in one.tensors().items())


def test_a_stacked_column_is_every_clients_own_tensor() -> None:
    adapters = [adapter(seed) for seed in range(4)]
    columns = Columns(adapters, NAMES)
    rows = columns.rows(adapters, torch.empty(0, dtype=torch.float64))
    for column in columns.columns:
        assert torch.equal(column.of(rows), torch.stack([a.tensors()[column.name] for a in adapters]).double())


def test_what_was_read_stays_when_training_goes_on() -> None:
    start = adapter(0)
    columns = Columns([start], ["m:B", "head"])
    rows = columns.rows([start], torch.empty(0))
    before = start.clone().tensors()
    found = columns.read(rows[0], start).tensors()
    rows.fill_(7.0)
    for value in start.tensors().values():
        value.fill_(8.0)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_a_half_precision_adapter_is_trained_in_the_rows_dtype() -> None:
    start = adapter(0, dtype=torch.bfloat16)
    columns = Columns([start], ["m:A"])
    found = columns.read(columns.rows([start], torch.empty(0))[0], start)
    assert all(value.dtype == torch.float32 for value in found.tensors().values())
    assert all(torch.equal(found.tensors()[name], value.float()) for name, value in start.tensors().items())


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [2], [2, 0], [0, 2]])
def test_rows_are_added_where_they_belong(rows: list[int]) -> None:
    held, more = torch.arange(6.0).reshape(3, 2), torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])[: len(rows)]
    wanted = held.clone()
    for row, value in zip(rows, more, strict=True):
        wanted[row] += value
    add(held, rows, more)
    assert torch.equal(held, wanted)
