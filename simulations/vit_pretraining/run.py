"""What does a base know that was pre-trained on half the classes? See README.md.

Shapes: n = pictures, d = hidden units.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedlora.assets import fetch
from fedlora.tasks import Table
from fedlora.tasks.image_classification import ImageClassification


def main() -> None:
    """Print the accuracy on unseen pictures of the seen digits, and that of a linear probe on all ten."""
    path = fetch("digits-vit", report=lambda line: print(line, file=sys.stderr))
    corpus = fetch("digits", report=lambda line: print(line, file=sys.stderr))
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    task = ImageClassification()
    table = Table({name: [row[name] for row in rows] for name in ("image", "label")})
    batch = task.collate(task.prepare(table, path, {"image": "image", "label": "label"}, keep=()), range(len(rows)))
    labels = batch["labels"]
    from transformers import AutoModelForImageClassification

    with torch.inference_mode():
        model: Any = AutoModelForImageClassification.from_pretrained(path).eval()
        torch.manual_seed(0)
        drawn: Any = type(model)(model.config).eval()  # the same architecture, never trained
        guesses = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        seen = labels < model.config.num_labels
        print(f"digits 0 to 4, unseen pictures: {accuracy(guesses[seen], labels[seen]):.1%}")
        features = {name: m.vit(batch["pixel_values"])[0][:, 0] for name, m in (("base", model), ("random", drawn))}
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    for name, values in features.items():
        guesses = probe(values.clone(), labels, train)[test]
        new = labels[test] >= model.config.num_labels
        whole, part = accuracy(guesses, labels[test]), accuracy(guesses[new], labels[test][new])
        print(f"linear probe on the {name} model's features: all ten digits {whole:.1%}, the digits 5 to 9 {part:.1%}")


def probe(features: torch.Tensor, labels: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """The guesses [n] of a linear classifier on features [n, d], trained on some rows."""
    torch.manual_seed(0)
    features = (features - features[train].mean(0)) / features[train].std(0)
    linear = torch.nn.Linear(features.shape[1], 10)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(500):
        loss = functional.cross_entropy(linear(features[train]), labels[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return linear(features).argmax(-1)


def accuracy(guesses: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of right guesses."""
    return float((guesses == labels).double().mean())


if __name__ == "__main__":
    main()
