"""The losses of the task "preference" are those of TRL's trainers, on the same rows and models, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config import OpenTable
from fedlora.tasks import Table, load_task

pytestmark = pytest.mark.nightly  # importing TRL takes longer than all that is computed
trl = pytest.importorskip("trl")

ROWS: list[dict[str, Any]] = [
    {"prompt": "cat", "chosen": " red red dog", "rejected": " old"},
    {"prompt": "new bird", "chosen": " blue", "rejected": " green old old cat"},
    {"prompt": "dog", "chosen": " old cat", "rejected": " new bird"},
]


def model(folder: Path, seed: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return loaded.eval()


def ours(folder: Path, policy: torch.nn.Module, reference: torch.nn.Module | None, **fields: Any) -> torch.Tensor:
    task = load_task(OpenTable(name="preference", **fields))  # type: ignore[call-arg]
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    examples = task.prepare(Table(columns), folder, {name: name for name in columns}, keep=())
    batch = task.collate(examples, range(len(ROWS)))
    with torch.no_grad():
        if reference is not None:
            batch["reference"] = task.reference(reference, batch)
        return task.losses(policy, batch)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(("mine", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo(mine: str, theirs: str, beta: float, tiny_llama: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    policy, reference = model(tiny_llama, 1), model(tiny_llama, 2)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path), loss_type=[theirs], beta=beta, per_device_train_batch_size=len(ROWS),
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=64,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(len(ROWS))])
    policy.eval()
    with torch.no_grad():
        wanted = float(trainer.compute_loss(policy, batch))
    # TRL rounds log-probabilities to float32, whose last digit of a loss of 40 is 4e-6.
    found = float(ours(tiny_llama, policy, reference, loss_type=mine, beta=beta).mean())
    assert found == pytest.approx(wanted, rel=1e-6)


def test_orpos_odds_ratio(tiny_llama: Path) -> None:
    """The ratio alone: TRL's cross entropy beside it is that of the prompt too, and of the batch's tokens together."""
    from types import SimpleNamespace

    from trl.experimental.orpo import ORPOTrainer

    policy = model(tiny_llama, 1)
    task = load_task(OpenTable(name="preference", loss_type="orpo", beta=0.3))  # type: ignore[call-arg]
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    examples = task.prepare(Table(columns), tiny_llama, {name: name for name in columns}, keep=())
    batch = task.collate(examples, range(len(ROWS)))
    with torch.no_grad():
        measured = task.measure(policy, batch)
        sizes = torch.stack([(batch[f"{side}labels"] != -100).sum(1) for side in ("", "rejected_")], dim=1)
        chosen, rejected = (task.reference(policy, batch) / sizes).unbind(1)
    itself = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    ratio = ORPOTrainer.odds_ratio_loss(itself, chosen, rejected)[0]
    torch.testing.assert_close((measured["chosen_loss"] - measured["loss"]).float(), ratio.float(), atol=1e-6, rtol=0)
