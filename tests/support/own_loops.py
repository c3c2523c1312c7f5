"""Training loops of one's own, by name for `train.loop`; `SEEN` has what they were given."""

from __future__ import annotations

from typing import Any

import torch

from fedlora.client import LocalWork, from_trainer

SEEN: list[LocalWork] = []
DRAWN: list[list[torch.Tensor]] = []
"""What `referring` got as the references of its batches."""


def sgd(work: LocalWork, *, lr: float = 0.1) -> dict[str, float]:
    """Plain SGD on the batches of fedlora's own loop."""
    SEEN.append(work)
    parameters = [parameter for parameter in work.model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=lr), []
    for batch in work.batches():
        loss = work.loss(batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": sum(losses) / len(losses)}


def counting(work: LocalWork) -> dict[str, float]:
    """Trains nothing, and counts the rounds in what it keeps."""
    SEEN.append(work)
    work.kept["rounds"] = work.kept.get("rounds", torch.tensor(0)) + 1
    return {"loss": float(work.kept["rounds"]), "steps": 0, "examples_seen": 0}


def messing(work: LocalWork) -> dict[str, float]:
    """Leaves a model that nobody else can use, but for its weights."""
    from peft import LoraConfig

    model: Any = work.model
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["query"]))
    inner = model.get_base_model()
    inner.forward = lambda *_args, **_kwargs: None
    inner.config.use_cache = not inner.config.use_cache
    model.register_forward_hook(lambda *_: None)
    model.requires_grad_(True)
    return {"loss": 0.0}


def unfreezing(work: LocalWork) -> dict[str, float]:
    with torch.no_grad():
        next(value for name, value in work.model.named_parameters() if "LayerNorm.bias" in name)[0] += 1e-3
    return {"loss": 0.0}


def changing_A(work: LocalWork) -> dict[str, float]:
    with torch.no_grad():
        for name, parameter in work.model.named_parameters():
            if "lora_A" in name:
                parameter[0, 0] += 1.0
    return {"loss": 0.0}


def referring(work: LocalWork, *, late: bool) -> dict[str, float]:
    """Draws the batches before and after a change of the adapter; `late`: afterwards alone."""
    if not late:
        DRAWN.append([batch["reference"] for batch in work.batches()])
    mine = [parameter for parameter in work.model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in mine:
            parameter += 0.3
    changed = [parameter.detach().clone() for parameter in mine]
    DRAWN.append([batch["reference"] for batch in work.batches()])
    assert all(map(torch.equal, mine, changed))
    return {"loss": 0.0}


def in_place(work: LocalWork) -> dict[str, float]:
    """Writes into the tensors that it is to start from."""
    for value in work.start.values():
        value += 1.0
    return {"loss": 0.0}


def returning(work: LocalWork, *, what: str) -> dict[str, Any]:
    """Returns, or keeps, what is no number and no tensor."""
    work.kept.update({"tensor": torch.ones(1)} | ({"number": 3} if what == "kept" else {}))  # type: ignore[dict-item]
    found: dict[str, dict[Any, Any]] = {
        "none": {"loss": None},
        "words": {"loss": "0.5"},
        "many": {"loss": torch.ones(2)},
        "seen": {"loss": 0.0, "examples_seen": float("nan")},
        "steps": {"loss": 0.0, "steps": float("inf")},
        "keys": {"loss": 0.0, 1: 2.0, "more": 3.0},
    }
    return found.get(what, {"loss": torch.tensor(0.0)})


def silent(work: LocalWork) -> None:
    return None


def greedy(work: LocalWork) -> dict[str, float]:
    return {"loss": 0.0, "steps": work.steps + 1}


def diverging(work: LocalWork) -> dict[str, float]:
    return {"loss": float("nan")}


@from_trainer
def trainer(work: LocalWork, **options: Any) -> Any:
    """A transformers Trainer on the batches of fedlora's own loop."""
    from transformers import Trainer, TrainingArguments

    class OnBatches(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(torch.utils.data.DataLoader(list(work.batches()), batch_size=None))

    SEEN.append(work)
    args = TrainingArguments(
        per_device_train_batch_size=work.batch_size,
        use_cpu=True,
        max_grad_norm=0.0,
        report_to="none",
        **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", **options},
    )
    return OnBatches(model=work.model, args=args, train_dataset=work.dataset)


@from_trainer
def sft(work: LocalWork) -> Any:
    from trl import SFTConfig, SFTTrainer

    SEEN.append(work)
    rows = work.dataset.rename_columns({"instruction": "prompt", "output": "completion"})
    args = SFTConfig(
        per_device_train_batch_size=work.batch_size, learning_rate=0.05, use_cpu=True, bf16=False, report_to="none"
    )
    return SFTTrainer(work.model, args, train_dataset=rows, processing_class=work.tokenizer)


@from_trainer
def dpo(work: LocalWork) -> Any:
    from trl import DPOConfig, DPOTrainer

    SEEN.append(work)
    args = DPOConfig(
        per_device_train_batch_size=work.batch_size,
        learning_rate=0.05,
        beta=1.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return DPOTrainer(work.model, args=args, train_dataset=work.dataset, processing_class=work.tokenizer)
