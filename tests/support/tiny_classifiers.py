"""Tiny random models of the families that the project works with, for tests that run over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 40
TEXT = ("Bert", "Roberta", "DistilBert", "GPT2", "Llama", "Qwen2")
PIXELS = 8


def config_of(kind: str, layers: int = 2, **more: Any) -> Any:
    """transformers' config of a family at hidden size 16, without dropout."""
    import transformers

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": 0}
    heads = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": layers}
    groups = {**heads, "num_key_value_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    own: dict[str, dict[str, Any]] = {
        "Bert": {**heads, **still},
        "Roberta": {**heads, **still},
        "DistilBert": {
            "dim": 16,
            "n_layers": layers,
            "n_heads": 4,
            "hidden_dim": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
        "GPT2": {
            "n_embd": 16,
            "n_layer": layers,
            "n_head": 4,
            "scale_attn_by_inverse_layer_idx": True,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "classifier_dropout": 0.0,
        },
        "Llama": groups,
        "Qwen2": {**groups, "use_sliding_window": True, "sliding_window": 3},
        "Gemma2": {**groups, "head_dim": 4},
        "ViT": {**heads, **still, "image_size": PIXELS, "patch_size": 4, "num_labels": 3},
    }
    return getattr(transformers, f"{kind}Config")(**({} if kind == "ViT" else common), **{**own[kind], **more})


def classifier(kind: str, layers: int = 2, **more: Any) -> nn.Module:
    """A classifier of a family in float64, with weights large enough that every layer shows; in evaluation mode."""
    import transformers

    what = "Image" if kind == "ViT" else "Sequence"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}For{what}Classification")(config_of(kind, layers, **more)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs_of(kind: str, padding: str = "none", rows: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    """A batch for it; padded "right" or "left", its first row is whole."""
    generator = torch.Generator().manual_seed(1)
    if kind == "ViT":
        return {"pixel_values": torch.randn(rows, 3, PIXELS, PIXELS, dtype=torch.float64, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 4:] = mask[2, 6:] = 0
    elif padding == "left":
        mask[1, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def everything(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter that trains."""
    model.zero_grad()
    logits = model(**inputs).logits
    if logits.dim() == 3:  # of tokens: those of padding have no label
        logits = logits[inputs["attention_mask"] == 1]
    logits.pow(2).sum().backward()
    return {"": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(found: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """The same logits and gradients, up to rounding in float64."""
    assert list(found) == list(whole)
    for name, value in found.items():
        assert torch.allclose(value, whole[name], rtol=1e-12, atol=1e-12), name
