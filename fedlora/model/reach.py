"""How far a model reaches: the token ids and positions that it has rows for."""

from __future__ import annotations

from typing import Any

from torch import nn


def embedding_rows(model: nn.Module) -> int | None:
    """Number of token ids that the model can look up; None for a model that takes none."""
    try:
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return int(found.num_embeddings) if hasattr(found, "num_embeddings") else None


def position_limit(model: nn.Module) -> int | None:
    """Largest number of tokens for which the model has learnt positions; None where positions are computed.

    RoBERTa and its descendants number positions from behind the padding's, OPT and BART from their `offset`.
    """
    limits = [
        module.num_embeddings - int(getattr(module, "offset", 1 + (-1 if (pad := module.padding_idx) is None else pad)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _is_positions(name.rpartition(".")[2])
    ]
    return min(limits, default=None)


def longest_text(model: nn.Module) -> int | None:
    """Most tokens that the model should be given: of its learnt positions, else as its config says; None: any."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = [position_limit(model), getattr(text, "max_position_embeddings", None)]
    return min((int(limit) for limit in known if isinstance(limit, int) and limit > 0), default=None)


def _is_positions(name: str) -> bool:
    return name == "wpe" or ("pos" in name and not any(word in name for word in ("rel", "bias", "dist")))
