"""Kernels that a training step launches on a GPU, and how often the host waits for it, counted on a pretended one.

    python benchmarks/launches.py
    python benchmarks/launches.py private Llama    # the rows whose names have one of these words

No GPU is needed and nothing is timed: tests/support/pretend_gpu.py counts. Models have random weights and are narrow,
which changes neither count: both go by layers and clients. BERT has 12 layers with adapters of rank 8 on query and
value, and a trained head; Llama has 28 with adapters of rank 16 on all linear layers, in bfloat16. A step's figures are
those of 6 steps less those of 2, divided by 4. Rows of one length make one pass, those of four lengths up to four.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.pretend_gpu import Log, pretend_gpu

from fedlora.adapter import ALL_PARTS
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.model import Base, load_base
from fedlora.privacy.calibrate import Schedule
from fedlora.tasks import Examples, Task, load_task
from fedlora.tasks._text import Tokens
from fedlora.training.cohort import train_cohort
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.job import TrainJob, TrainResult

VOCABULARY = 50
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
ROWS = 4
"""Of a client's batch."""


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        name: what it is called.
        clients: in a step.
        causal: Llama, not BERT.
        dropout: of the base.
        private: with DP-SGD.
        ragged: texts of four lengths.
        most: launches and waits that a step may take; None: not said.
    """

    name: str
    clients: int
    causal: bool = False
    dropout: float = 0.0
    private: bool = False
    ragged: bool = False
    most: tuple[int | None, int | None] = (None, None)


CASES = (
    Case("BERT-12", 1),
    Case("BERT-12", 8),
    Case("BERT-12", 32),
    Case("BERT-12, texts of four lengths", 8, ragged=True),
    Case("BERT-12, dropout 0.1", 1, dropout=0.1),
    Case("BERT-12, dropout 0.1", 8, dropout=0.1),
    Case("BERT-12, private", 1, private=True),
    Case("BERT-12, private", 8, private=True, most=(900, None)),
    Case("BERT-12, private", 32, private=True),
    Case("Llama-28", 1, causal=True, most=(None, 10)),
    Case("Llama-28", 8, causal=True, most=(None, 10)),
    Case("Llama-28, private", 1, causal=True, private=True),
)


def build(case: Case, folder: Path) -> tuple[Base, Task, Examples]:
    """A base of random weights on the GPU, its task, and texts of random tokens."""
    import transformers

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if case.causal:
        shape: Any = transformers.LlamaConfig(**SIZE, **special, num_hidden_layers=28, num_key_value_heads=1)
        auto, targets, rank = "AutoModelForCausalLM", ("q_proj", "k_proj", "v_proj", "o_proj"), 16
        targets += ("gate_proj", "up_proj", "down_proj")
    else:
        rates = {"hidden_dropout_prob": case.dropout, "attention_probs_dropout_prob": case.dropout}
        shape = transformers.BertConfig(**SIZE, **special, **rates, num_hidden_layers=12, num_labels=3)
        auto, targets, rank = "AutoModelForSequenceClassification", ("query", "value"), 8
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    getattr(transformers, auto).from_config(shape).save_pretrained(folder)
    config = RunConfig(
        model=ModelConfig(name=str(folder), dtype="bfloat16" if case.causal else "float32"),
        adapter=AdapterConfig(rank=rank, targets=targets),
        runtime=RuntimeConfig(device="cuda"),
    )
    base = load_base(config, auto, () if case.causal else ("classifier",), {})
    draw = np.random.default_rng(0)
    lengths = [(8, 40, 150, 500)[n % ROWS] if case.ragged else 16 for n in range(case.clients * ROWS)]
    rows = Tokens.join([draw.integers(3, VOCABULARY, length) for length in lengths], 0)
    if case.causal:
        labels = Tokens.join([np.where(np.arange(len(row)) < 2, -100, row) for row in rows], -100)
        return (
            base,
            load_task(OpenTable(name="causal-lm")),
            Examples({"input_ids": rows, "labels": labels}, None, rows.lengths),
        )
    task = load_task(OpenTable(name="text-classification"))
    return base, task, Examples({"input_ids": rows}, draw.integers(0, 3, len(rows)), rows.lengths)


def counts(case: Case, base: Base, task: Task, examples: Examples, log: Log, steps: int) -> np.ndarray:
    """Launches and waits of a training of so many steps."""
    start = base.initial_adapter(0)
    jobs = [TrainJob(start, ALL_PARTS, np.arange(ROWS * k, ROWS * k + ROWS), k) for k in range(case.clients)]
    configs = [TrainConfig(steps=steps, batch_size=ROWS, lr=1e-3)] * len(jobs)
    log.reset()
    if case.private:
        settings = [PrivateSettings(Schedule(1.0, steps, 1, float(ROWS)), 1.0, 1.0)] * len(jobs)
        found = PrivateTrainingLoop(base, task, examples, list(zip(jobs, configs, strict=True)), settings).run()
    else:
        found = train_cohort(base, task, examples, jobs, configs)
    failed = next((outcome for outcome in found if not isinstance(outcome, TrainResult)), None)
    if failed is not None:
        raise failed
    return np.array([sum(log.launches.values()), sum(log.waits.values())])


def main() -> None:
    """Print a table; ends with 1 where a step takes more than it may."""
    print("| step | clients | launches | waits of the host | at most |\n|---|---|---|---|---|")
    over = False
    for case in CASES:
        if sys.argv[1:] and not any(word in case.name for word in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as folder, pretend_gpu() as log:
            made = build(case, Path(folder))
            few, many = (counts(case, *made, log, steps) for steps in (2, 6))
            waits = ", ".join(f"{name} {number}" for name, number in log.waits.most_common(3))
        found = (many - few) / 4
        over |= any(most is not None and value > most for value, most in zip(found, case.most, strict=True))
        said = [
            "" if most is None else f"{most} {what}"
            for most, what in zip(case.most, ("launches", "waits"), strict=True)
        ]
        print(f"| {case.name} | {case.clients} | {found[0]:.0f} | {found[1]:.1f} | {''.join(said)} |", flush=True)
        print(waits, file=sys.stderr)
    sys.exit(over)


if __name__ == "__main__":
    main()
