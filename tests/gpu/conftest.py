"""The GPU that these tests compute on; with --dry-run the CPU, to see that they run."""

from __future__ import annotations

import contextlib

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # it is there already
        parser.addoption("--dry-run", action="store_true", help="tests/gpu: compute on the CPU what a GPU would")


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> str:
    """The name of the device."""
    if request.config.getoption("--dry-run", default=False):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return "cuda:0"
