"""What a GPU does with fedlora, in ten minutes: whether it is right, whether it repeats itself, what it is worth.

    python benchmarks/gpu.py                          # on the first CUDA device
    python benchmarks/gpu.py --only right same_bits   # some sections
    python benchmarks/gpu.py --dry-run                # tiny shapes on the CPU: whether the script itself runs

All weights are random and made where they are used: nothing is downloaded. Sections go one after the other, those first
that answer most; each has a time box after which it measures no more, and one that fails is a row of the table. The
table comes last, and goes as JSON to --json. Times are medians of steps after a warm-up: (6 steps - 2 steps) / 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.cohorts import client, random_base, random_examples
from support.states import gap

from fedlora.adapter import ALL_PARTS
from fedlora.assets import Checkpoint
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.model import Base, load_base
from fedlora.model.dropout import set_dropout
from fedlora.privacy.calibrate import Schedule
from fedlora.runs.environment import processor
from fedlora.speedups.attention import choose_attention
from fedlora.tasks import Examples, Task, load_task
from fedlora.tasks._text import Tokens
from fedlora.training.cohort import train_cohort
from fedlora.training.dp_loop import PrivateTrainingLoop, train_private_cohort
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.evaluate import measure_batches
from fedlora.training.job import TrainJob, TrainResult, batches
from fedlora.training.opacus_loop import train_by_opacus
from fedlora.training.row_groups import pass_tokens

MIB, GIB = 1 << 20, 1 << 30
BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
QWEN = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN |= {"intermediate_size": 4864, "vocab_size": 151_936}
LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"intermediate_size": 14_336, "vocab_size": 128_256}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT-base": ("BertConfig", {**BERT, "vocab_size": 30_522}),
    "Qwen2.5-0.5B": ("Qwen2Config", {**QWEN, "tie_word_embeddings": True}),
    "Llama-3.1-8B": ("LlamaConfig", LLAMA),
}


@dataclass
class Row:
    """One line of the table: what was measured, and what was expected before it was."""

    section: str
    what: str
    found: str
    expected: str = ""


@dataclass
class Check:
    """The device, what was found on it, and the time that is left.

    Args:
        device: that computes.
        dry: tiny shapes, to see that the script runs.
        folder: for configs of models.
    """

    device: torch.device
    dry: bool
    folder: Path
    rows: list[Row] = field(default_factory=list)
    section: str = ""
    ends: float = 0.0

    @property
    def in_time(self) -> bool:
        """Whether the section's time box has room for another measurement; a dry run takes them all."""
        return self.dry or time.monotonic() < self.ends

    def add(self, what: str, found: str, expected: str = "") -> None:
        """A line of the table, printed at once."""
        self.rows.append(Row(self.section, what, found, expected))
        print(f"{self.section:10} {what}: {found}" + (f" (expected: {expected})" if expected else ""), flush=True)

    def wait(self) -> None:
        """Until all kernels have ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], repeats: int = 3) -> float:
        """Median seconds of a call, after one to warm up."""
        taken = []
        for number in range(2 if self.dry else repeats + 1):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            if number:
                taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def step_seconds(self, run: Callable[..., object], *args: Any, **how: Any) -> float:
        """Seconds of one step of a training whose last argument is its number of steps."""
        first, second = (1, 2) if self.dry else (2, 6)
        few, many = (self.seconds(lambda n=n: run(*args, n, **how)) for n in (first, second))  # type: ignore[misc]
        return max(1e-9, many - few) / (second - first)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """The largest number of bytes on the GPU above those at the start; 0 on a CPU."""
        found = [0]
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        yield found
        if cuda:
            found[0] = torch.cuda.max_memory_allocated(self.device) - before

    def base(
        self, shape: str, dtype: str, targets: tuple[str, ...], rank: int, quantize: bool = False, dropout: float = 0.0
    ) -> tuple[Base, Task]:
        """A model of random weights that are made on the device, with its task."""
        import transformers

        kind, options = SHAPES[shape]
        small = {**TINY, "vocab_size": 600, **({"num_key_value_heads": 1} if kind != "BertConfig" else {})}
        options = {**options, **(small if self.dry else {}), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        folder = self.folder / shape
        getattr(transformers, kind)(**options, num_labels=4).save_pretrained(folder)
        causal = kind != "BertConfig"
        config = RunConfig(
            model=ModelConfig(name=str(folder), dtype=dtype),  # type: ignore[arg-type]
            adapter=AdapterConfig(rank=rank, targets=targets),
            runtime=RuntimeConfig(device=str(self.device)),
        )
        auto = f"AutoModelFor{'CausalLM' if causal else 'SequenceClassification'}"

        def made(config: RunConfig, auto: str, more: Any, dtype: torch.dtype, device: torch.device) -> Any:
            shape = transformers.AutoConfig.from_pretrained(Checkpoint.of(config.model).source, **more)
            with device:
                model = getattr(transformers, auto).from_config(shape, dtype=dtype)
            return (in_four_bits(model, device) if quantize else model), {}

        with patch("fedlora.model.loading._from_pretrained", made):
            base = load_base(config, auto, () if causal else ("classifier",), {})
        set_dropout(base.model, dropout)
        choose_attention(base.model)
        return base, load_task(OpenTable(name="causal-lm" if causal else "text-classification"))


def in_four_bits(model: nn.Module, device: torch.device) -> nn.Module:
    """A model whose linear layers but the output's are in NF4, layer by layer."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():  # type: ignore[operator]
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            weight = layer.weight.data.cpu()
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            new.bias = layer.bias
            owner, _, own = name.rpartition(".")
            layer.weight = None
            setattr(model.get_submodule(owner), own, new.to(device))
    model.is_quantized = model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


def texts(task: Task, count: int, length: int, vocabulary: int, *, ragged: bool = False) -> Examples:
    """Random tokens and classes."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(max(4, length // 4), length + 1, count) if ragged else [length] * count
    rows = Tokens.join([draw.integers(3, vocabulary, size) for size in lengths], 0)
    if task.auto_class == "AutoModelForCausalLM":
        return Examples({"input_ids": rows, "labels": replace(rows, pad_id=-100)}, None, rows.lengths)
    return Examples({"input_ids": rows}, draw.integers(0, 4, count), rows.lengths)


def work(base: Base, clients: int, batch: int, steps: int, **how: Any) -> tuple[list[TrainJob], list[TrainConfig]]:
    """As many clients, whose batches follow each other in the training set."""
    start = base.initial_adapter(0)
    jobs = [TrainJob(start, ALL_PARTS, np.arange(batch * k, batch * (k + 1)), k) for k in range(clients)]
    return jobs, [TrainConfig(steps=steps, batch_size=batch, lr=1e-3, **how)] * clients


def trained(base: Base, task: Task, examples: Examples, clients: int, batch: int, steps: int, **how: Any) -> list[Any]:
    """The clients' adapters; raises what the first that failed raised."""
    found = train_cohort(base, task, examples, *work(base, clients, batch, steps, **how))
    for outcome in found:
        if not isinstance(outcome, TrainResult):
            raise outcome
    return [outcome.adapter for outcome in found if isinstance(outcome, TrainResult)]


def plain_loop(base: Base, task: Task, examples: Examples, batch: int, steps: int) -> None:
    """PEFT's layers and torch's fused optimiser: what a lean program does with one client."""
    (job,), (config,) = work(base, 1, batch, steps)
    parameters = base.write(job.adapter, job.trains)
    base.train_mode(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, fused=True)
    for chosen in batches(job.indices, batch, steps, job.seed):
        on_device = {name: value.to(base.device) for name, value in task.collate(examples, chosen).items()}
        task.losses(base.model, on_device).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------ sections


def ceilings(check: Check) -> None:
    """What the card's products and memory reach."""
    size = 64 if check.dry else 8192
    kinds = {"bfloat16": (torch.bfloat16, 790), "float32": (torch.float32, 50), "TF32": (torch.float32, 400)}
    for name, (dtype, expected) in kinds.items():
        with tf32_allowed(name == "TF32"):
            one = torch.randn(size, size, device=check.device, dtype=dtype)
            rate = 2 * size**3 / check.seconds(lambda one=one: one @ one)  # type: ignore[misc]
        check.add(f"product of {size} in {name}", f"{rate / 1e12:.1f} TFLOP/s", f"{expected} on an H100")
    held = torch.empty((1 << 20) if check.dry else 4 * GIB, dtype=torch.uint8, device=check.device)
    check.add("copy", f"{2 * len(held) / check.seconds(held.clone) / 1e12:.2f} TB/s", "H100 2.5, H200 4")


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Inside, products in float32 may be rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def right(check: Check) -> None:
    """float64: the device against the CPU, together against alone, plain and private."""
    for name in ("bert", "gpt2", "llama", "vit"):
        causal, found = name in ("gpt2", "llama"), []
        for device in ("cpu", str(check.device)):
            targets = ("q_proj", "v_proj") if name == "vit" else ()
            base = random_base(name, check.folder / name, causal, device=device, dropout=0.1, targets=targets)
            kind = "causal-lm" if causal else "image-classification" if name == "vit" else "text-classification"
            task, examples = load_task(OpenTable(name=kind)), random_examples(causal, name == "vit")
            clients = [client(base, k, rank=(4, 2, 6)[k]) for k in range(3)]
            slow = [client(base, k, rank=(4, 2, 6)[k], optimizer="sgd", lr=0.1) for k in range(3)]
            both = [train_cohort(base, task, examples, *zip(*part, strict=True)) for part in (clients, clients[2:])]
            loop = PrivateTrainingLoop(
                base, task, examples, slow, [PrivateSettings(Schedule(0.3, 2, 1, 8.0), 1e-9, 0.05)] * 3,
                samples=[iter([np.arange(9), np.arange(3, 7)]) for _ in range(3)],
                masks=lambda rows: rows.astype(np.uint64),
            )  # fmt: skip
            found.append([[outcome.adapter for outcome in part] for part in (*both, loop.run())])
        (wanted, _, dp), (together, alone, private) = found
        gaps = [max(map(gap, one, other)) for one, other in ((wanted, together), (together[2:], alone), (dp, private))]
        check.add(
            f"{name}, float64", "{:.0e} plain, {:.0e} alone, {:.0e} private".format(*gaps), "<= 1e-9, private <= 1e-7"
        )


def same_bits(check: Check) -> None:
    """The same cohort twice in bfloat16, with and without padding."""
    base, task = check.base("Qwen2.5-0.5B", "bfloat16", ("q_proj", "v_proj"), 8)
    for ragged in (False, True):
        examples = texts(task, 16, 24 if check.dry else 512, 500, ragged=ragged)
        for strict in (True, False):
            torch.use_deterministic_algorithms(strict)
            try:
                one, other = (trained(base, task, examples, 4, 4, 3) for _ in range(2))
            finally:
                torch.use_deterministic_algorithms(False)
            same = all(gap(a, b) == 0.0 for a, b in zip(one, other, strict=True))
            what = f"{'padded' if ragged else 'of one length'}, deterministic {strict}"
            check.add(what, "the same bits" if same else "DIFFERENT", "the same bits" if strict else "")


def waits(check: Check) -> None:
    """Where the host waits for the device in a step."""
    if check.device.type != "cuda":
        check.add("a step", "cannot be seen on a CPU; benchmarks/launches.py counts on a pretended GPU")
        return
    for shape, targets in (("BERT-base", ("query", "value")), ("Qwen2.5-0.5B", ("q_proj", "v_proj"))):
        base, task = check.base(shape, "bfloat16", targets, 8)
        examples, found = texts(task, 16, 64, 500), []
        for steps in (2, 6):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                trained(base, task, examples, 4, 4, steps)
            torch.cuda.set_sync_debug_mode("default")
            found.append(sum("synchronizing" in str(warning.message) for warning in seen))
        check.add(f"{shape}, a step", f"{(found[1] - found[0]) / 4:.1f} waits", "benchmarks/launches.py")


def kernels(check: Check) -> None:
    """Launches of a step, and the share of it in which the device is busy."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.device.type == "cuda" else [])]
    for shape, targets in (("BERT-base", ("query", "value")), ("Qwen2.5-0.5B", ("q_proj", "v_proj"))):
        base, task = check.base(shape, "bfloat16", targets, 8)
        examples = texts(task, 32, 64, 500)
        for clients in (1, 8):
            trained(base, task, examples, clients, 4, 1)
            with profile(activities=kinds) as profiled:
                begin = time.perf_counter()
                trained(base, task, examples, clients, 4, 4)
                check.wait()
                taken = time.perf_counter() - begin
            events = profiled.key_averages()
            launches = sum(
                event.count for event in events if "cudaLaunchKernel" in event.key or "cuLaunchKernel" in event.key
            )
            busy = sum(event.self_device_time_total for event in events) / 1e6 / taken
            check.add(
                f"{shape}, K = {clients}", f"{launches / 4:.0f} launches, busy {busy:.0%}", "BERT 612; K = 1 host-bound"
            )


def rows(check: Check) -> None:
    """A client's step: PEFT with fused AdamW against 1, 8 and 32 clients side by side."""
    for shape, targets, length in (("BERT-base", ("query", "value"), 64), ("Qwen2.5-0.5B", ("q_proj", "v_proj"), 256)):
        for dtype, tf32, dropout in (
            ("bfloat16", False, 0.0),
            ("float32", False, 0.0),
            ("float32", True, 0.0),
            ("bfloat16", False, 0.1),
        ):
            base, task = check.base(shape, dtype, targets, 8, dropout=dropout)
            examples = texts(task, 4 * 32, 16 if check.dry else length, 500)
            own = pass_tokens(base, base.device.type if base.device.type == "cuda" else "cpu")
            with tf32_allowed(tf32):
                plain = check.step_seconds(plain_loop, base, task, examples, 4)
                said = [f"PEFT {1e3 * plain:.2f} ms"]
                for clients, factor in ((1, 1), (8, 1), (32, 1), (32, 4), (32, 16)):
                    if not check.in_time or (factor > 1 and (dropout or dtype == "float32")):
                        continue
                    base.pass_tokens = own * factor
                    with check.peak() as most:
                        each = check.step_seconds(trained, base, task, examples, clients, 4) / clients
                    more = f" at {factor} x the tokens" if factor > 1 else ""
                    said.append(
                        f"K = {clients}{more} {1e3 * each:.2f} ms ({plain / each:.1f}x, {most[0] / GIB:.1f} GiB)"
                    )
            check.add(
                f"{shape}, {'TF32' if tf32 else dtype}, dropout {dropout:g}", "; ".join(said), "K = 8, bfloat16: >= 5x"
            )


def private(check: Check) -> None:
    """A client's private step: the engine at 1, 8 and 32 clients, and Opacus."""
    base, task = check.base("BERT-base", "float32", ("query", "value"), 8)
    examples = texts(task, 8 * 32, 16 if check.dry else 64, 500)

    def settings(steps: int) -> PrivateSettings:
        return PrivateSettings(Schedule(1.0, steps, 1, 8.0), 1.0, 1.0)

    def engine(clients: int, steps: int) -> None:
        train_private_cohort(base, task, examples, *work(base, clients, 8, steps), [settings(steps)] * clients)

    for clients in (1, 8, 32):
        if check.in_time:
            taken = check.step_seconds(engine, clients)
            check.add(f"K = {clients}", f"{1e3 * taken:.1f} ms a step of all", "K = 8: 4 ms of launches")

    def opacus(steps: int) -> None:
        (job,), (config,) = work(base, 1, 8, steps)
        train_by_opacus(base, task, examples, job, config, settings(steps))

    if check.in_time:
        check.add("Opacus, one client", f"{1e3 * check.step_seconds(opacus):.1f} ms a step")


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def large(check: Check, *, quantize: bool = False) -> None:
    """A step of the 8B shape, and its memory."""
    with check.peak() as most:
        base, task = check.base("Llama-3.1-8B", "bfloat16", ALL_LINEAR, 16, quantize=quantize)
        held = torch.cuda.memory_allocated(check.device) if check.device.type == "cuda" else 0
    check.add("base", f"{held / GIB:.1f} GiB (peak {most[0] / GIB:.1f})", "6" if quantize else "15")
    peaks: dict[int, int] = {}
    sizes = (16, 32) if check.dry else (512, 2048) if quantize else (512, 1024, 2048)
    for tokens in sizes:
        for how in ({}, {"gradient_checkpointing": True}):
            if not check.in_time:
                return
            examples = texts(task, 8, tokens // 2, 500)
            base.pass_tokens = tokens
            with check.peak() as most:
                taken = check.step_seconds(trained, base, task, examples, 1, 2, **how)
            if not how:
                peaks[tokens] = most[0]
            word = "checkpointed" if how else "all kept"
            check.add(f"{tokens} tokens, {word}", f"{1e3 * taken:.0f} ms, {most[0] / GIB:.2f} GiB above the base")
    if len(peaks) > 1:
        (few, low), *_, (many, high) = peaks.items()
        check.add("kept", f"{(high - low) / (many - few) / MIB:.2f} MiB a token", "5.8 +- 15%")
    if quantize and check.in_time:
        taken = check.step_seconds(trained, base, task, texts(task, 8, sizes[0] // 2, 500), 4, 2)
        check.add("K = 4", f"{1e3 * taken:.0f} ms a step of all")
    elif check.in_time:
        examples = texts(task, 32, 16 if check.dry else 512, 500)
        base.write(base.initial_adapter(0))
        with check.peak() as most:
            taken = check.seconds(lambda: measure_batches(base, task, examples, [np.arange(32)]), 1)
        check.add(
            "evaluation of 16,384 tokens", f"{1e3 * taken:.0f} ms, {most[0] / GIB:.2f} GiB above the base", "< 3 GiB"
        )


def qlora(check: Check) -> None:
    """The same in NF4."""
    large(check, quantize=True)


def no_memory(check: Check) -> None:
    """A step that does not fit at once is taken in smaller passes, and every client ends."""
    base, task = check.base("Qwen2.5-0.5B", "bfloat16", ("q_proj", "v_proj"), 8)
    examples = texts(task, 128, 16 if check.dry else 512, 500)
    base.pass_tokens = 10**6
    cuda = check.device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(check.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(check.device) + 8 * GIB) / total)
    try:
        ended = len(trained(base, task, examples, 32, 4, 2))
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    check.add("32 clients in 8 GiB", f"{ended} end, {base.pass_tokens} tokens a pass", "32, far fewer than 1,000,000")


SECTIONS: dict[str, tuple[int, Callable[[Check], None]]] = {
    "ceilings": (10, ceilings),
    "right": (60, right),
    "same_bits": (20, same_bits),
    "waits": (15, waits),
    "kernels": (20, kernels),
    "rows": (120, rows),
    "private": (50, private),
    "large": (70, large),
    "qlora": (50, qlora),
    "no_memory": (20, no_memory),
}
"""Seconds of each section's time box, and the section."""


def main() -> None:
    """Run the sections and print a table; ends with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--json", type=Path, help="file for the table")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device is here: see that the script runs with --dry-run")
    device = torch.device("cpu" if args.dry_run else "cuda:0")
    name = processor() if args.dry_run else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}{', dry run' if args.dry_run else ''}")
    failed = run(device, args.dry_run, args.only, args.json, name)
    sys.exit(failed)


def run(device: torch.device, dry: bool, only: Sequence[str], file: Path | None, name: str) -> bool:
    """Whether a section failed."""
    with tempfile.TemporaryDirectory() as folder:
        check = Check(device, dry, Path(folder))
        failed = False
        for section in only:
            box, measure = SECTIONS[section]
            check.section, check.ends = section, time.monotonic() + box
            try:
                measure(check)
            except Exception as error:  # the other sections have something to say, too
                failed = True
                check.add("FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print("\n| section | what | found | expected |\n|---|---|---|---|")
    for row in check.rows:
        print(f"| {row.section} | {row.what} | {row.found} | {row.expected} |")
    if file is not None:
        table = [asdict(row) for row in check.rows]
        file.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "rows": table}, indent=1), encoding="utf-8"
        )
    return failed


if __name__ == "__main__":
    main()
