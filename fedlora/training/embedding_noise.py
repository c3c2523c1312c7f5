"""NEFTune: uniform noise on the embeddings of training texts (Jain et al. 2023, arXiv 2310.05914, Algorithm 1).

A row of L tokens, without padding, is trained on  X + alpha / sqrt(L d) U,  X its embeddings [L, d] and U uniform from
-1 to 1. U is drawn as dropout masks are (`fedlora.training.dropout_masks`): it belongs to client, step and row, whoever
is computed beside it; in private training to the example, and comes from the operating system's randomness.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedlora.errors import ConfigError, TrainingError
from fedlora.tasks._base import Examples
from fedlora.training.dropout_masks import RowDropout

WITHOUT_ROWS = "embeddings-without-rows"
"""Code of the error of a model whose embeddings the noise does not fit."""


class EmbeddingNoise:
    """While it is entered, a model's embeddings are noisy in training; call `begin` before each such forward pass.

    Args:
        model: a transformers model, with PEFT's layers in it.
        dropout: draws the noise, by the keys of the pass's rows.
    """

    def __init__(self, model: nn.Module, dropout: RowDropout) -> None:
        self._model, self._dropout = model, dropout
        self._scales = torch.empty(0)
        self._handle: Any = None

    def begin(self, scales: Float[Tensor, "b"]) -> None:
        """The next pass's rows: alpha / sqrt(L) of each, where the model is."""
        self._scales = scales

    def __enter__(self) -> EmbeddingNoise:
        self._handle = self._model.get_input_embeddings().register_forward_hook(self._noisy)  # type: ignore[operator]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _noisy(self, _module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        if not self._model.training:  # what a task's reference says
            return embedded
        if embedded.ndim != 3 or len(embedded) != len(self._scales):
            raise TrainingError(
                f"train.neftune_noise_alpha: {type(self._model).__name__} embeds tokens in another form than rows of "
                "them: remove it, or use another model",
                code=WITHOUT_ROWS,
            )
        scale = (self._scales / math.sqrt(embedded.shape[-1]))[:, None, None]
        return embedded + (self._dropout.uniform(embedded.shape, self._scales) * scale).to(embedded.dtype)


def require_noisy(model: nn.Module, examples: Examples) -> None:
    """Raise `ConfigError` for examples without tokens, on whose embeddings the noise is, for pairs of texts, and for a
    model whose encoder and decoder embed tokens by modules of their own, which share a weight."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not embeddings)
    if any(table.weight is embeddings.weight for table in tables):
        raise ConfigError(
            f"train.neftune_noise_alpha: {type(model).__name__} embeds tokens in several places: remove it, or use "
            "another model",
            code=WITHOUT_ROWS,
        )
    if "rejected_input_ids" in examples.inputs:
        raise ConfigError(
            "train.neftune_noise_alpha adds noise to one text an example, and these are pairs of them: remove it",
            code="noise-on-pairs",
        )
    if "input_ids" not in examples.inputs:
        raise ConfigError(
            "train.neftune_noise_alpha adds noise to the embeddings of tokens, and these examples have none: remove it",
            code="noise-without-tokens",
        )
