"""Training a small model from nothing, for what no package carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def pretrained(
    make: Callable[[], Any],
    loss_of: Callable[[Any, Any], Any],
    size: int,
    *,
    epochs: int,
    batch: int,
    lr: float,
    weight_decay: float,
    seed: int,
) -> tuple[Any, float]:
    """Train by AdamW, whose rate falls to 0 along a cosine; the same on each call on the same machine and torch.

    Args:
        make: draws the model.
        loss_of: mean loss of the model on some rows, given by their numbers, an int64 tensor.
        size: number of rows.
        epochs: over all rows.
        batch: rows of a step.
        lr: the highest rate.
        weight_decay: of AdamW.
        seed: of the weights, the order of the rows, and what `loss_of` draws.

    Returns:
        The model in evaluation mode, and the mean loss of the last pass.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order are other sums
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make()
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
            steps = epochs * -(-size // batch)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
            loss_sum = 0.0
            for _ in range(epochs):
                loss_sum = 0.0
                for rows in torch.split(torch.randperm(size), batch):
                    loss = loss_of(model, rows)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    loss_sum += float(loss.detach()) * len(rows)
    finally:
        torch.set_num_threads(threads)
    return model.eval(), loss_sum / size
