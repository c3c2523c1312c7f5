"""What a virtual client costs in fedlora, and in the field's peers: Flower on Ray, and pfl-research.

    python benchmarks/peers.py --pfl ~/.cache/fedlora/pfl            # the encoder, float32
    python benchmarks/peers.py --shape tiny --pfl ~/.cache/fedlora/pfl
    python benchmarks/peers.py --texts corpus --batch-size 16 --pfl ~/.cache/fedlora/pfl
    python benchmarks/peers.py --shape llama --dtype float32 bfloat16 --peers flower-ray

Random weights, random texts of one length or of the quickstart's lengths (--texts corpus: each arm then batches as its
own users do, and the peers pad each client's batch to its longest text), LoRA of rank 8 on query and value with a
trained head, AdamW, federated averaging of 32 clients a round. Each arm has two cores: two processes of one
thread, or one process of two threads.

- fedlora: whole rounds of a run, checks, merge and checkpoint included, in one process of two threads
  (`runtime.processes = 1`), and by a server that has two processes of one thread train. With torch's kernels and
  attention, and with the chosen ones.
- Flower's simulation on Ray, two actors, PEFT and a plain torch loop: the base kept in an imported module, or built
  for each message, as most examples have it. The server polls without Flower's pauses and only takes a mean.
- pfl-research 0.6, two processes: its FederatedAveraging on its SimulatedBackend, with pfl's own sum over processes.

First all arms train round 1 from the same adapter on the same batches, and their merged adapters are compared. Then
they take turns; the tables give medians (least - most) over the turns, and medians of the ratios within a turn. CPU
time is that of all processes of an arm, read from the system. Needs the extra for Ray: pip install "flwr[simulation]".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from _shapes import CLASSES, SHAPES, TEXTS, VOCABULARY, auto_class, causal, lengths, machine, targets, write_model
from peer.peer_arms import Arm, fedlora_processes, flower_processes, pfl_processes, pfl_python
from peer.peer_client import RATE

from fedlora.config import RunConfig, load_config, parse_config
from fedlora.model import save_adapter
from fedlora.rng import derive
from fedlora.training.job import batches
from fedlora.training.workspace import close_workspace, open_workspace

ROUNDS = 3  # with batches of their own; then they come again
SIZE = 64  # examples of a client
OURS = ("fedlora, 1 process", "fedlora, 2 processes")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="encoder")
    parser.add_argument("--texts", choices=TEXTS, default="fixed", help="their lengths")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="of the base")
    parser.add_argument("--peers", nargs="*", choices=["flower-ray", "pfl"], default=["flower-ray", "pfl"])
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, help="of a turn; by the shape if not given")
    parser.add_argument("--pfl", type=Path, help="folder of pfl's own virtual environment; made if it is not there")
    return parser.parse_args()


def federation(shape: str, clients: int, folder: Path, texts: str = "fixed", batch_size: int = 4) -> RunConfig:
    """Write a model, its tokeniser, texts and the config of a run."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_model(shape, folder / "model")
    words = {"[PAD]": 0, **{f"w{k}": k for k in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder / "model")
    draw, size = np.random.default_rng(0), SHAPES[shape]
    rows = [draw.integers(1, VOCABULARY, length) for length in lengths(texts, shape, clients * SIZE + 8)]
    lines = ["text,label", *(f"{' '.join(f'w{k}' for k in row)},{draw.integers(CLASSES)}" for row in rows)]
    (folder / "texts.csv").write_text("\n".join(lines) + "\n")
    task = "name='causal-lm',format='text'" if causal(shape) else "name='text-classification'"
    config = parse_config(
        "",
        [
            "rounds=1000000",
            f"model.name='{folder / 'model'}'",
            "model.dtype='float32'",  # an arm's own is set over it
            f"adapter.targets={list(targets(shape))}",
            "adapter.rank=8",
            f"task={{{task},max_length={size['tokens']}}}",
            f"data.source='{folder / 'texts.csv'}'",
            f"data.test_fraction={8 / len(rows)}",
            f"partition={{name='iid',clients={clients}}}",
            f"train.steps={size['steps']}",
            f"train.batch_size={batch_size}",
            f"train.lr={RATE}",
            "evaluation.every=1000000",
            "server.aggregation_error=false",  # the peers know nothing of the kind
            "server.weighting='uniform'",
            "runtime.device='cpu'",
        ],
        name="peers",
    )
    (folder / "federation.toml").write_text(config.to_toml())
    return load_config(folder / "federation.toml")


def export(shape: str, config: RunConfig, folder: Path) -> None:
    """What the peers need of it: the first adapter in PEFT's form, tokens, and each client's batches."""
    workspace = open_workspace(config)
    save_adapter(workspace.base, workspace.base.initial_adapter(config.seed), folder / "adapter", {})
    train, steps = workspace.data.train, config.train.steps or 1
    ids, _ = train.inputs["input_ids"].pad(np.arange(len(train)))
    labels = train.inputs["labels"].pad(np.arange(len(train)))[0] if causal(shape) else torch.from_numpy(train.labels)
    drawn = [
        [
            list(batches(rows, config.train.batch_size, steps, derive(config.seed, "train", number, client)))
            for client, rows in enumerate(workspace.data.clients)
        ]
        for number in range(1, ROUNDS + 1)
    ]
    np.savez(folder / "schedule.npz", ids=ids.numpy(), labels=labels.numpy().astype(np.int64), rows=np.array(drawn))
    facts = {"auto_class": auto_class(shape), "model": str(folder / "model"), "adapter": str(folder / "adapter")}
    (folder / "peer.json").write_text(json.dumps(facts))
    close_workspace()


def arms_of(args: argparse.Namespace, folder: Path, ray: str) -> list[Arm]:
    """All arms that can run here; what is missing is said."""
    arms = []
    if "flower-ray" in args.peers:
        if importlib.util.find_spec("ray") is None:
            print("Flower on Ray is left out: there is no Ray here; pip install 'flwr[simulation]'")
        else:
            flower = flower_processes(folder, args.clients, ray)
            for dtype in args.dtype:
                for name, cached in (("base built for each message", False), ("base kept", True)):
                    arms.append(Arm(f"Flower on Ray, {name}", dtype, flower, {"cached": cached, "dtype": dtype}))
    if "pfl" in args.peers:
        if args.pfl is None:
            print("pfl-research is left out: name a folder for its own environment, as in --pfl ~/.cache/fedlora/pfl")
        else:
            python = pfl_python(args.pfl.expanduser().absolute())
            arms += [Arm("pfl-research 0.6", d, pfl_processes(folder, args.clients, d, python), {}) for d in args.dtype]
    for dtype in args.dtype:
        for number, name in enumerate(OURS, 1):
            for kernels in ("chosen", "torch's"):
                group = fedlora_processes(folder, number, kernels, dtype)
                arms.append(Arm(f"{name}, {kernels} kernels", dtype, group, {}))
    return arms


def merged(arm: Arm, number: int, folder: Path) -> dict[str, torch.Tensor]:
    """Play round 1 and read the merged adapter."""
    from safetensors.torch import load_file

    place = folder / f"merged-{number}"
    arm.group.play({**arm.turn, "rounds": 1, "save": str(place)})
    return load_file(place / "adapter_model.safetensors" if place.is_dir() else place)


def compare(arms: Sequence[Arm], folder: Path) -> None:
    """Warm all arms up with round 1, and print how far their merged adapters are from the first's of their dtype."""
    from safetensors.torch import load_file

    start = load_file(folder / "adapter" / "adapter_model.safetensors")
    reference: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
    print("\nround 1, the merged adapter of all clients: its distance over the change in the round; and the start")
    met = set()
    for number, arm in enumerate(arms):
        result = merged(arm, number, folder)
        name, first = reference.setdefault(arm.dtype, (arm.label, result))
        gap = distance(result, first) / distance(first, start)
        begun = "" if id(arm.group) in met else f"; ready after {arm.group.start_seconds:.1f} s"
        met.add(id(arm.group))
        far = "the first of its dtype" if arm.label == name else f"{gap:.1e} from {name}"
        print(f"- {arm.label}: {far}{begun}", flush=True)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The L2 norm of the difference of all entries."""
    return sum(float((one[key] - other[key]).double().square().sum()) for key in one) ** 0.5


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (least - most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def main() -> None:
    """Print the tables."""
    args = arguments()
    rounds = args.rounds or {"tiny": 5}.get(args.shape, 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        ray = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        export(args.shape, federation(args.shape, args.clients, folder, args.texts, args.batch_size), folder)
        arms = arms_of(args, folder, ray)
        for group in {id(arm.group): arm.group for arm in arms}.values():
            stack.callback(group.stop)
            group.start()
        compare(arms, folder)
        wall: dict[str, list[float]] = {arm.label: [] for arm in arms}
        cpu: dict[str, list[float]] = {arm.label: [] for arm in arms}
        for _ in range(args.repeats):
            for arm in arms:
                taken = arm.group.play({**arm.turn, "rounds": rounds})
                for table, seconds in zip((wall, cpu), taken, strict=True):
                    table[arm.label].append(1e3 * seconds / rounds / args.clients)
    size = SHAPES[args.shape]
    print(
        f"\n{args.shape}: {size['layers']} layers of {size['hidden']}, {size['tokens']} tokens ({args.texts}), "
        f"{args.clients} clients of {size['steps']} steps of batch {args.batch_size}; "
        f"{args.repeats} turns of {rounds} rounds; {machine()}"
    )
    print("\n| arm | wall ms a client | CPU ms a client |\n|---|---|---|")
    for arm in arms:
        print(f"| {arm.label} | {spread(wall[arm.label])} | {spread(cpu[arm.label])} |")
    ours = [arm.label for arm in arms if "fedlora" in arm.name]
    peers = [arm.label for arm in arms if "fedlora" not in arm.name]
    if peers:
        print(f"\n| times as long, wall / CPU | {' | '.join(ours)} |\n|---|{'---|' * len(ours)}")
    for peer in peers:
        cells = []
        for one in ours:
            ratios = [[a / b for a, b in zip(t[peer], t[one], strict=True)] for t in (wall, cpu)]
            cells.append(f"{spread(ratios[0])} / {spread(ratios[1])}")
        print(f"| {peer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
