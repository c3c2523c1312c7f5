"""What a test's process does not do, or does not know, unless the test asks for it; a plugin of pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedlora.flower import mailbox
from fedlora.report.figures import Chart
from fedlora.training import export, kept_evaluation

torch.set_num_threads(1)

DRAW, VERIFY = Chart.svg, export.verify_adapter


@pytest.fixture(scope="session", autouse=True)
def _in_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server looks often, so that nobody waits for half a second in vain.

    What is kept of base models is this session's: what a test patches is no part of its key.
    """
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mailbox, "POLL_S", (0.001, 0.002))
        patch.setattr(kept_evaluation, "cache_dir", lambda: folder)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what most of a tiny run's time goes into and no test looks at: a report's charts, the adapter's check.

    Tests that look at them have the mark "charts" or "verified"; nightly ones, and runs in processes of their own,
    always draw and check.
    """

    def has(mark: str) -> bool:
        return any(item.get_closest_marker(name) for name in (mark, "nightly"))

    Chart.svg = DRAW if has("charts") else _undrawn  # type: ignore[method-assign]
    export.verify_adapter = VERIFY if has("verified") else _unverified  # type: ignore[attr-defined]


def _undrawn(chart: Chart, width: float) -> str:
    return f'<svg viewBox="0 0 {width} 1" role="img"></svg>'


def _unverified(*_: object) -> float:
    return 0.0
