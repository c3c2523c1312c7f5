"""An adapter as vLLM takes it: one rank and one alpha for all layers, and nothing trained in full.

vLLM's `PEFTHelper` reads `r` and `lora_alpha` of adapter_config.json alone (rank_pattern and alpha_pattern are not
looked at), and refuses `modules_to_save` and DoRA.
"""

from __future__ import annotations

from dataclasses import replace

from torch.nn import functional

from fedlora.adapter import AdapterState, LoraPair
from fedlora.errors import ExportError
from fedlora.model.base_model import Base

INSTEAD = "export the whole model with --format merged"


def for_vllm(base: Base, state: AdapterState) -> AdapterState:
    """The same change of the weights, with all pairs at the largest rank and at one scale.

    Smaller pairs get rows and columns of zeros; B is multiplied by the ratio of the scales.

    Args:
        base: Whose adapter it is.
        state: On the pristine base.

    Raises:
        ExportError: vLLM does not serve such an adapter.
    """
    if base.recipe.auto_class != "AutoModelForCausalLM":
        raise ExportError(
            f"vLLM takes adapters of causal language models, and this is one for {base.recipe.auto_class}: {INSTEAD}",
            code="not-servable",
        )
    if not base.method.bilinear:
        raise ExportError(
            f"vLLM serves LoRA alone, and the method is {base.method.name!r}: {INSTEAD}", code="not-servable"
        )
    if full := [*base.heads, *base.random]:
        raise ExportError(
            f"vLLM takes no adapter with modules that were trained in full, and {full[0]!r} was: {INSTEAD}",
            code="not-servable",
        )
    rank = max(1, *(pair.rank for pair in state.pairs.values()))
    scales = {pair.scale for pair in state.pairs.values()}
    scale = scales.pop() if len(scales) == 1 and all(pair.rank == rank for pair in state.pairs.values()) else 1.0
    return replace(state, pairs={name: _at(pair, rank, scale) for name, pair in state.pairs.items()})


def _at(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    if (pair.rank, pair.scale) == (rank, scale):
        return pair
    more = rank - pair.rank
    B = pair.B * (pair.scale / scale)
    return LoraPair(functional.pad(pair.A, (0, 0, 0, more)), functional.pad(B, (0, more)), scale)
