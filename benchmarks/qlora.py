"""Whether a federation on a base in 4 bits learns what plain QLoRA does, and what the 4 bits cost.

    fedlora assets SmolLM2-135M-Instruct chitchat && python benchmarks/qlora.py
    python benchmarks/qlora.py --set rounds=1
    python benchmarks/qlora.py --without-twin

Three arms, one after the other, from the same adapter on the same batches of the same clients:

- fedlora runs configs/chat_qlora.toml, as `fedlora run` does;
- transformers, peft and bitsandbytes alone train each client in a loop that is written out here, with torch's AdamW,
  and average the clients' adapters by their numbers of examples (McMahan et al. 2017, arXiv 1602.05629, algorithm 1);
- fedlora runs the same config without model.quantize.

Of fedlora the second arm has the token ids, which example is whose, and who is asked when. The table gives the
perplexity of the test examples before and after training, and CPU seconds of each arm, evaluations included.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shapes import machine
from torch import Tensor
from torch.nn import functional

from fedlora.callbacks import Callback
from fedlora.config import RunConfig, load_config
from fedlora.model import save_adapter, unquantised
from fedlora.rng import derive
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.tasks import Examples
from fedlora.training.job import batches
from fedlora.training.workspace import close_workspace, open_workspace

IGNORED = -100


class Asked(Callback):
    """Notes who is asked in each round."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []

    def round_started(self, number: int, asked: Sequence[int]) -> None:
        self.rounds.append(list(asked))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(Path(__file__).parents[1] / "configs" / "chat_qlora.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config")
    parser.add_argument("--without-twin", action="store_true", help="leave out the unquantised run")
    return parser.parse_args()


def fedlora_run(config: RunConfig, asked: Asked) -> tuple[float, float, float]:
    """Perplexity before and after a run, and its CPU seconds."""
    close_workspace()
    begun = time.process_time()
    outcome = run_simulation(config, RunDir.create(config), asked)
    first, last = outcome.records[0], outcome.records[-1]
    return first["perplexity"], last["perplexity"], time.process_time() - begun


def padded(examples: Examples, rows: Sequence[int]) -> dict[str, Tensor]:
    """Token ids, mask and labels of some examples [rows, longest]."""
    ids = [torch.from_numpy(examples.inputs["input_ids"][int(row)].astype(np.int64)) for row in rows]
    labels = [torch.from_numpy(examples.inputs["labels"][int(row)].astype(np.int64)) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def token_losses(model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """Of each example, the cross entropies of the tokens that count."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    for row, labels in zip(logits[:, :-1], batch["labels"][:, 1:], strict=True):
        yield functional.cross_entropy(row[labels != IGNORED].float(), labels[labels != IGNORED], reduction="none")


@torch.no_grad()
def perplexity(model: Any, examples: Examples) -> float:
    """exp of the mean cross entropy of all counted tokens."""
    model.eval()
    by_length = np.argsort(examples.lengths, kind="stable")
    found = [
        each
        for rows in np.array_split(by_length, -(-len(by_length) // 8))
        for each in token_losses(model, padded(examples, rows))
    ]
    return math.exp(float(torch.cat(found).double().mean()))


def plain_run(config: RunConfig, asked: Sequence[Sequence[int]], folder: Path) -> tuple[float, float, float]:
    """The same federation by transformers, peft and bitsandbytes."""
    import transformers
    from peft import PeftModel

    workspace = open_workspace(config)
    data, path = workspace.data, workspace.base.recipe.checkpoint.source
    assert data.test is not None
    save_adapter(workspace.base, workspace.base.initial_adapter(config.seed), folder, {})
    close_workspace()
    del workspace
    begun = time.process_time()
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=how)
    for module in base.modules():  # on some CPUs bitsandbytes lays weights out anew, and then has no backward pass
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = perplexity(model, data.test)
    train = config.train
    for number, clients in enumerate(asked, 1):
        start = [parameter.detach().clone() for parameter in trained]
        total, weights = [torch.zeros_like(value) for value in start], 0
        for client in clients:
            for parameter, value in zip(trained, start, strict=True):
                parameter.data.copy_(value)
            model.train()
            optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=train.weight_decay)
            mine, seed = data.clients[client], derive(config.seed, "train", number, client)
            for rows in batches(mine, train.batch_size, train.steps, seed):
                optimizer.zero_grad()
                torch.stack([each.mean() for each in token_losses(model, padded(data.train, rows))]).mean().backward()
                torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
                optimizer.step()
            total = [held + len(mine) * parameter.detach() for held, parameter in zip(total, trained, strict=True)]
            weights += len(mine)
        for parameter, value in zip(trained, total, strict=True):
            parameter.data.copy_(value / weights)
    return before, perplexity(model, data.test), time.process_time() - begun


def main() -> None:
    """Run the arms and print the table."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        given = [*options.set, f"output='{scratch}/runs'", "runtime.processes=1"]
        config, asked = load_config(options.config, given), Asked()
        if config.train.steps is None or config.train.clip_norm is None or config.train.schedule != "constant":
            raise SystemExit("the plain loop takes train.steps, train.clip_norm and a constant rate")
        print(f"{machine()}, {torch.get_num_threads()} threads, {config.model.name}", flush=True)
        print("perplexity on the test examples     before   after   CPU s", flush=True)
        found: dict[str, tuple[float, float, float]] = {}

        def arm(name: str, result: tuple[float, float, float]) -> None:
            found[name] = result
            print(f"{name:33}  {result[0]:7.2f}  {result[1]:6.2f}  {result[2]:6.0f}", flush=True)

        arm("fedlora, nf4", fedlora_run(config.model_copy(update={"name": "nf4"}), asked))
        arm("transformers + peft, nf4", plain_run(config, asked.rounds, Path(scratch) / "start"))
        if not options.without_twin:
            arm("fedlora, not quantised", fedlora_run(unquantised(config).model_copy(update={"name": "twin"}), Asked()))
    ours, plain = found["fedlora, nf4"][1], found["transformers + peft, nf4"][1]
    print(f"fedlora over plain QLoRA: {ours / plain - 1:+.2%} (asked: within 1%)")
    if "fedlora, not quantised" in found:
        print(f"nf4 over the unquantised twin: {ours / found['fedlora, not quantised'][1] - 1:+.2%}")


if __name__ == "__main__":
    main()
