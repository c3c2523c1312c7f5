"""How fast one thread multiplies matrices here at best, and how much multiplying a training step has to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

SHAPES = (
    (512, 512, 512),
    (2048, 384, 384),
    (2048, 384, 1536),
    (2048, 1536, 384),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
)
FLOP = 2e9  # in one timing: tens of milliseconds


@dataclass(frozen=True)
class Product:
    """One product of matrices, [rows, inner] times [inner, columns], by one library."""

    library: str
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.library}, {self.rows} x {self.inner} x {self.columns}"

    def rate(self) -> float:
        """FLOP in a CPU second."""
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(self.rows, self.inner, generator=generator).to(self.dtype)
        right = torch.randn(self.columns, self.inner, generator=generator).to(self.dtype)
        work = 2 * self.rows * self.inner * self.columns
        times = max(2, round(FLOP / work))
        run = LIBRARIES[self.library]
        run(left, right)
        begin = time.process_time()
        for _ in range(times):
            run(left, right)
        return times * work / (time.process_time() - begin)


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right, None, "none", [], "")
    return product


LIBRARIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.mm": lambda left, right: left @ right.t(),
    "oneDNN": _onednn,
}


def best_product(dtype: torch.dtype) -> Product:
    """The fastest of several shapes, by torch's own choice of a library and by oneDNN."""
    libraries = [name for name in LIBRARIES if name != "oneDNN" or hasattr(torch.ops.mkldnn, "_linear_pointwise")]
    tried = [Product(name, *shape, dtype) for name in libraries for shape in SHAPES]
    return max(tried, key=lambda product: max(product.rate() for _ in range(2)))


def flop_of(run: Callable[[], object]) -> int:
    """FLOP of all matrix products in a run, two for each multiply-add.

    With a frozen base that is forward and the gradients of inputs, as far down as there are adapters, and the adapters'
    and the head's own: no gradient of a frozen weight is computed. Attention must be by plain products to be seen.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
