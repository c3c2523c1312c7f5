"""LoRA-FAIR with A corrected in the place of B."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import Aggregator, ClientUpdate, GlobalState, load_aggregator


@dataclass(frozen=True)
class FairOfA(Aggregator):
    """B <- sum_k p_k B_k, A <- sum_k p_k A_k + R, with R = argmin_R |D*/s - B (A + R)|_F^2 + lambda |R|_F^2.

    LoRA-FAIR of the transposed problem, D*^T = sum_k p_k s_k A_k^T B_k^T. Of the correction along a direction of B with
    squared singular value h the part h / (h + lambda) is made; its metrics are LoRA-FAIR's, "fair/correction" being
    |R|_F / |A|_F.

    Args:
        regularisation: lambda >= 0.
    """

    regularisation: float = 0.01

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """See the class."""
        fair = load_aggregator("fair", {"regularisation": self.regularisation})
        turned = (replace(update, adapter=transposed(update.adapter)) for update in updates)
        found = fair.aggregate(replace(state, adapter=transposed(state.adapter)), turned)
        return replace(found, adapter=transposed(found.adapter))


def transposed(adapter: AdapterState) -> AdapterState:
    """The adapter of the transposed changes of weights, (s B A)^T = s A^T B^T."""
    pairs = {
        name: LoraPair(pair.B.T.contiguous(), pair.A.T.contiguous(), pair.scale) for name, pair in adapter.pairs.items()
    }
    return AdapterState(pairs, adapter.dense)
