"""A small vision transformer, pre-trained here because no package carries one that pip could bring.

It takes well under a minute on one core and is the same on each call on the same machine and torch. On another machine
the last digits may differ, and with them the fingerprint of the base: nodes of one federation copy the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.assets._pretraining import pretrained

MEAN, STD = 0.13, 0.31  # of the grey values, where black is 0 and white is 1
EPOCHS, BATCH, LR = 60, 50, 2e-3


def pretrain(images: Sequence[Any], labels: Sequence[int], folder: Path, *, seed: int = 0) -> float:
    """Train a classifier from nothing and save it, with its image processor, as a model folder.

    Pictures are shifted by up to two pixels at random, and the learning rate falls to 0 along a cosine.

    Args:
        images: grey values from 0 to 255, [n, 28, 28].
        labels: from 0 to the number of classes - 1, [n].
        folder: gets the model, preprocessor_config.json, and recipe.json, which says how it was made.
        seed: of the initial weights, the order and the shifts.

    Returns:
        The mean loss of the last pass, in nats.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import ViTConfig, ViTForImageClassification

    pixels = torch.from_numpy((np.asarray(images, dtype=np.float32) / 255 - MEAN) / STD)[:, None]
    targets = torch.as_tensor(labels, dtype=torch.int64)
    config: Any = ViTConfig(  # type: ignore[call-arg]
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=int(targets.max()) + 1,
    )

    def loss_of(model: Any, rows: Any) -> Any:
        down, right = (int(d) for d in torch.randint(-2, 3, (2,)))
        shifted = torch.roll(pixels[rows], (down, right), (2, 3))
        return cross_entropy(model(pixel_values=shifted).logits, targets[rows])

    model, loss = pretrained(
        lambda: ViTForImageClassification(config),
        loss_of,
        len(targets),
        epochs=EPOCHS,
        batch=BATCH,
        lr=LR,
        weight_decay=0.05,
        seed=seed,
    )
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 28, "width": 28},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN],
        "image_std": [STD],
    }
    recipe = {"epochs": EPOCHS, "batch": BATCH, "lr": LR, "seed": seed, "pictures": len(targets), "version": 1}
    (folder / "recipe.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    return loss
