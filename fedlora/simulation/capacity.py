"""How much to train at once: processes, and clients in the cohort of each.

Both are functions of the config, the data and the machine's size, never of a timing or of the memory that is free at
the moment: other company for a client means other roundings, and a run that is started again must come to the same
bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedlora.aggregators import rules
from fedlora.config import NODES, RunConfig
from fedlora.data.source import own_source
from fedlora.errors import ConfigError
from fedlora.federation.simulated_devices import examples_to_tell
from fedlora.memory import total_bytes
from fedlora.model import Base
from fedlora.partition import partitioners
from fedlora.simulation.machines import Machine, most_threads, room
from fedlora.simulation.processes import with_threads
from fedlora.training.cohort import why_alone
from fedlora.training.job import examples_of
from fedlora.training.row_groups import pass_cost
from fedlora.training.runtime import own_cores, usable_cores
from fedlora.training.workspace import Workspace

VARIETY = 4
"""Passes' worth of rows in a step, so that those of like length find each other."""
MOST = 64
COPIES = 8
"""Adapters' worth of memory for a client: values, optimiser's states, gradients, anchor, plan and reply."""
MEMORY_SHARE = 1 / 8
WORTH_PROCESSES = 5e12
"""Multiplications and additions of a run's training that make up for starting more processes: 100 s of one core, where
libraries, model and data take a process about 5 s."""
PROCESS_BYTES = 3 << 28  # of libraries and activations, besides the base: what `benchmarks/many_clients.py` found


@dataclass(frozen=True)
class CohortChoice:
    """How many clients train at once.

    Attributes:
        clients: K; 1 means one after the other.
        reason: One line, why.
    """

    clients: int
    reason: str


@dataclass(frozen=True)
class ProcessChoice:
    """How many processes train clients.

    Attributes:
        processes: P; 1 means the server's own, and no other.
        threads: of each.
        reason: One line, why.
    """

    processes: int
    threads: int
    reason: str

    def environment(self, place: int, *, spread: bool = True) -> dict[str, str]:
        """Variables for process `place` from 0: its threads, which OpenMP reads when it starts, and its GPU.

        Args:
            place: number of the process.
            spread: whether the GPUs are shared out; not where the config names one, which all have then.
        """
        variables = with_threads(self.threads)
        if spread and torch.cuda.is_available() and (number := torch.cuda.device_count()) > 1:
            names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            variables["CUDA_VISIBLE_DEVICES"] = names[place % number] if len(names) == number else str(place % number)
        return variables


def process_count(workspace: Workspace, asked: int, cluster: Sequence[Machine] = ()) -> ProcessChoice:
    """How many processes share the clients of a round.

    On a CPU a core each, of one thread: cores work better on clients of their own than on the halves of one client's
    products. On GPUs one each.

    Args:
        workspace: of the run; its config may say.
        asked: clients in a round.
        cluster: machines that they may be on, each taken to have the memory that this one has; none: on this one.
    """
    config, device = workspace.config, workspace.base.device
    on_gpus = device.type == "cuda"
    cores = own_cores()
    wanted = config.runtime.processes

    def chosen(processes: int, reason: str) -> ProcessChoice:
        share = most_threads(cluster, processes, gpus=on_gpus) if cluster else max(1, cores // processes)
        return ProcessChoice(processes, config.runtime.threads or share, reason)

    if config.runtime.device_map is not None:
        return chosen(1, "the base lies on all GPUs")
    if wanted != "auto":
        if on_gpus and not cluster:
            _require_room(workspace.base, wanted, 1 if ":" in config.runtime.device else torch.cuda.device_count())
        return chosen(wanted, "asked for")
    if "__main__" in modules_of(workspace):
        return chosen(1, "another process would not know the task, rule or partition that the main program defines")
    if cluster and device.type in ("cpu", "cuda"):
        places = room(cluster, config.runtime.threads or 1, gpus=on_gpus)
        what = "GPUs of the cluster" if on_gpus else "cores of the cluster"
    elif device.type == "cpu":
        places, what = cores // (config.runtime.threads or 1), "cores"
    else:
        named = not on_gpus or ":" in config.runtime.device
        places, what = 1 if named else torch.cuda.device_count(), "GPUs"
    if places < 2 and device.type == "cpu" and not config.runtime.threads and usable_cores() > 1:
        return chosen(1, f"OMP_NUM_THREADS={cores} in the environment: unset it, or set runtime.processes, for more")
    if places < 2:
        return chosen(1, f"there is no second one of the {what}")
    if (work := _work(workspace, asked)) < WORTH_PROCESSES:
        return chosen(1, f"the training's {work:.0e} operations are done sooner than others would be ready")
    # A process keeps the prefixes of the clients that it meets: its share where all are asked, in time all otherwise.
    kept, all_asked = workspace.speedups.cache.nbytes, asked == len(workspace.data.clients)
    each = PROCESS_BYTES + _base_bytes(workspace.base) + (0 if all_asked else kept)
    held = max(1, len(cluster)) * int((total_bytes(torch.device("cpu")) / 2 - (kept if all_asked else 0)) / each)
    processes = max(1, min(places, asked, held))
    return chosen(processes, f"{places} {what}, {asked} clients a round, memory for {held}")


def cohort_size(workspace: Workspace, asked: int, processes: int = 1) -> CohortChoice:
    """How many clients of a run train at once in each process.

    Args:
        workspace: of the run; its config may say.
        asked: clients in a round.
        processes: that share them: all get about as many, in cohorts of about one size.
    """
    config, base = workspace.config, workspace.base
    if config.train.loop is not None:
        return CohortChoice(1, "one after the other: train.loop trains one client at a time")
    if (alone := why_alone(base)) is not None:
        return CohortChoice(1, f"one after the other: {alone}")
    if config.runtime.cohort != "auto":
        return CohortChoice(config.runtime.cohort, "asked for")
    pass_tokens = pass_cost(base).most
    lengths = lengths_to_tell(workspace)
    typical = float(lengths.mean()) if len(lengths) else 1.0
    clients = len(workspace.data.clients)
    rows = float(np.median([config.train_of(k).batch_size for k in range(min(clients, 1000))]))
    in_a_pass = int(pass_tokens // (rows * typical))
    alike = len(np.unique(lengths)) < 2
    if in_a_pass < 2 and alike:
        return CohortChoice(1, f"one client's {rows:g} x {typical:g} tokens fill a pass of {pass_tokens}")
    wanted = max(1, in_a_pass) * (1 if alike else VARIETY)
    share = MEMORY_SHARE if base.device.type == "cuda" else MEMORY_SHARE / processes
    room = int(share * total_bytes(base.device) / (COPIES * base.initial_adapter(config.seed).nbytes()))
    most = max(1, min(wanted, room, asked, MOST))
    turns = -(-asked // (most * processes))
    chosen = most if processes == 1 else -(-asked // (turns * processes))
    return CohortChoice(chosen, f"{rows:g} rows of {typical:.3g} tokens a client, passes of {pass_tokens} tokens")


def said_of_cohort(config: RunConfig, choice: CohortChoice) -> Iterator[str]:
    """What is to be said of a cohort that was asked for and cannot be."""
    asked = config.runtime.cohort
    if asked not in ("auto", choice.clients):
        yield f"runtime.cohort = {asked} has no effect: clients train {choice.reason}"


def modules_of(workspace: Workspace) -> list[str]:
    """Where the task, the rule, the partition, and a data source and a loop of one's own are defined: other processes
    import these to know their names."""
    config = workspace.config
    classes: list[type] = [type(workspace.task), rules.get(config.strategy.name)]
    if config.partition.name != NODES:
        classes.append(partitioners.get(config.partition.name))
    if (source := own_source(config.data)) is not None:
        classes.append(type(source))
    loop = config.train.loop
    return sorted({cls.__module__ for cls in classes} | ({loop.partition(":")[0]} if loop is not None else set()))


def lengths_to_tell(workspace: Workspace) -> np.ndarray:
    """Tokens of examples, where something that is written down goes by them: in a private run of public ones."""
    data = workspace.data
    return np.asarray(data.train.lengths if workspace.config.privacy is None else data.probes.lengths)


def expected_tokens(workspace: Workspace) -> list[float]:
    """Tokens that each client trains on in a round: what its work goes by."""
    config, lengths = workspace.config, workspace.data.train.lengths
    if config.privacy is not None:
        typical = float(lengths_to_tell(workspace).mean()) if len(lengths_to_tell(workspace)) else 1.0
        return [examples_to_tell(workspace, k) * typical for k in range(len(workspace.data.clients))]
    return [
        examples_of(len(indices), config.train_of(k)) * float(lengths[indices].mean()) if len(indices) else 0.0
        for k, indices in enumerate(workspace.data.clients)
    ]


def _work(workspace: Workspace, asked: int) -> float:
    """Multiplications and additions of a run's training: four for each weight that a token meets, there and back."""
    tables = sum(m.weight.numel() for m in workspace.base.model.modules() if isinstance(m, nn.Embedding))
    weights = sum(parameter.numel() for parameter in workspace.base.model.parameters()) - tables
    return 4.0 * weights * float(np.mean(expected_tokens(workspace))) * asked * workspace.config.rounds


def _require_room(base: Base, processes: int, gpus: int) -> None:
    """Raise `ConfigError` for more bases than a GPU holds: each process has one of its own, and so has the server."""
    held = -(-processes // gpus) + (processes > 1)
    if held * (need := _base_bytes(base)) > (room := total_bytes(base.device)):
        raise ConfigError(
            f"runtime.processes = {processes} would put {held} bases of {need / 1e9:.1f} GB on a GPU of "
            f"{room / 1e9:.1f} GB: lower it (1: the server's process trains), or choose a smaller model.dtype",
            code="gpu-too-small",
        )


def _base_bytes(base: Base) -> int:
    return sum(parameter.nbytes for parameter in base.model.parameters())
