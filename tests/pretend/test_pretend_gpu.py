"""The pretended GPU finds the faults that are planted for it: one that misses them proves nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.pretend_gpu import PretendError, pretend_gpu
from torch import Tensor, nn

GPU = torch.device("cuda", 0)


class Forgetful(nn.Module):
    """A module that makes a mask where it is called and not where its input is."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.ones(x.shape[-1])


MIXED: dict[str, Callable[[], object]] = {
    "sum": lambda: torch.ones(2, device=GPU) + torch.ones(2),
    "product": lambda: torch.ones(2, 2).to(GPU) @ torch.ones(2, 2),
    "forgetful module": lambda: Forgetful()(torch.ones(3).to(GPU)),
    "layer left behind": lambda: nn.Linear(2, 2)(torch.ones(2, 2, device=GPU)),
    "number there": lambda: torch.ones(2) * torch.ones((), device=GPU),
    "index there": lambda: torch.ones(2)[torch.zeros(1, dtype=torch.long, device=GPU)],
    "in place": lambda: torch.ones(2, device=GPU).add_(torch.ones(2)),
    "numpy": lambda: torch.ones(2, device=GPU).numpy(),
}
ALLOWED: dict[str, Callable[[], object]] = {
    "both there": lambda: torch.ones(2, device=GPU) + torch.ones(2, device=GPU),
    "number here": lambda: torch.ones(2, device=GPU) * torch.tensor(2.0),
    "index here": lambda: torch.ones(2, device=GPU)[torch.zeros(1, dtype=torch.long)],
    "copy": lambda: torch.ones(2).copy_(torch.ones(2, device=GPU)),
    "module": lambda: nn.Linear(2, 2).to(GPU)(torch.ones(2, 2, device=GPU)).sum().backward(),  # type: ignore[no-untyped-call]
    "back": lambda: torch.ones(2, device=GPU).cpu().numpy(),
}


@pytest.mark.parametrize("fault", MIXED)
def test_mixed_devices_fail(fault: str) -> None:
    with pretend_gpu(), pytest.raises(PretendError):
        MIXED[fault]()


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_goes(name: str) -> None:
    with pretend_gpu():
        ALLOWED[name]()


WAITING: dict[str, tuple[int, Callable[[Tensor], object]]] = {
    "item": (1, lambda x: x[0].item()),
    "list": (1, lambda x: x.tolist()),
    "truth": (1, lambda x: bool((x > 0).all())),
    "boolean index": (1, lambda x: x[x > 0]),
    "equal": (1, lambda x: torch.equal(x, x)),
    "numbers": (1, lambda x: x * x.new_tensor([1.0, 2.0])),
    "copy": (1, lambda x: torch.ones(2).to(GPU)),
    "copy that does not wait": (0, lambda x: torch.ones(2).to(GPU, non_blocking=True)),
    "sum": (0, lambda x: x + x),
    "made there": (0, lambda x: torch.zeros(2, device=GPU)),
}


@pytest.mark.parametrize("name", WAITING)
def test_waits_are_counted(name: str) -> None:
    wanted, call = WAITING[name]
    with pretend_gpu() as log:
        x = torch.ones(2, device=GPU)
        log.reset()
        call(x)
        assert sum(log.waits.values()) == wanted, log.waits


def test_launches_are_counted() -> None:
    with pretend_gpu() as log:
        x = torch.ones(4, 4, device=GPU)
        log.reset()
        _ = (x.t() @ x[:4]).view(16).relu()
        assert dict(log.launches) == {"mm": 1, "relu": 1}
        _ = torch.ones(3) + 1
        assert sum(log.launches.values()) == 2


def test_mps_has_neither_doubles_nor_copies_that_do_not_wait() -> None:
    faults: list[Callable[[Tensor], object]] = [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: torch.linalg.vector_norm(x, dtype=torch.float64),
        lambda x: x.to("cpu", torch.float64),
        lambda _: torch.ones(2).to("mps", non_blocking=True),
        lambda x: x + torch.ones(2),
    ]
    with pretend_gpu("mps"):
        x = torch.ones(2, device="mps")
        for fault in faults:
            with pytest.raises(PretendError):
                fault(x)
        assert x.cpu().double().dtype == torch.float64


def test_nothing_is_left_behind() -> None:
    with pretend_gpu():
        assert torch.cuda.is_available()
        assert torch.ones(1, device=GPU).device == GPU
    assert not torch.cuda.is_available()
    assert torch.ones(1).device.type == "cpu"
