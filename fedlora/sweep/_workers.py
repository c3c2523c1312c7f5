"""Runs one after the other here, or several at once in processes that work through them.

A process does many runs, so that libraries, model and data are loaded once. It ends when the process that started it
does, however that ended: nobody is left to write into a run's folder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fedlora.callbacks import Callback
from fedlora.config import RunConfig, parse_config
from fedlora.errors import FedloraError
from fedlora.runs.rundir import Keep, RunDir
from fedlora.simulation.processes import ONE_THREAD, Child, Pipe
from fedlora.unexpected import describe_exception

OnRound = Callable[[str, int], None]
"""Told a run's name and the number of the round that ended."""
OnRun = Callable[[str, str | None], None]
"""Told a run's name, and why it failed or None."""


def run_all(
    configs: Sequence[RunConfig], keep: Keep, processes: int, on_round: OnRound, on_run: OnRun
) -> dict[str, str]:
    """Bring runs to their end: begin them, go on with them, or see that they are finished.

    Args:
        configs: `output` and `name` say where each is written.
        keep: how much of a finished run stays.
        processes: how many at once; 1: in this process.
        on_round: told of each round.
        on_run: told of each run that ended.

    Returns:
        The runs that failed: name -> why. The others are finished.
    """
    failed: dict[str, str] = {}

    def ended(name: str, why: str | None) -> None:
        if why is not None:
            failed[name] = why
        on_run(name, why)

    if processes == 1:
        for config in configs:
            ended(config.name, attempt(config, keep, lambda number, name=config.name: on_round(name, number)))  # type: ignore[misc]
    else:
        _share_out(configs, keep, min(processes, len(configs)), on_round, ended)
    return failed


def attempt(config: RunConfig, keep: Keep, on_round: Callable[[int], None]) -> str | None:
    """One run to its end; why it failed, or None."""
    try:
        complete(config, keep, on_round)
    except FedloraError as error:
        return " ".join(str(error).split())
    except Exception as error:
        return describe_exception(error)
    return None


def complete(config: RunConfig, keep: Keep, on_round: Callable[[int], None]) -> None:
    """One run to its end: from the beginning, or from where it was stopped."""
    from fedlora.simulation.run import refuse_early, run_simulation
    from fedlora.training import open_workspace

    path = Path(config.output) / config.name
    there = (path / "config.toml").is_file()
    if there and (run := RunDir.open(path, config, same=True)).finished:
        run.slim(keep)
        return
    refuse_early(config, open_workspace(config), begun=there and run.begun)
    run = RunDir.open(path, config, same=True) if there else RunDir.create(config)
    try:
        run_simulation(config, run, _Rounds(on_round), resume=there)
    except Exception:
        run.discard_if_untrained()
        raise
    run.slim(keep)


class _Rounds(Callback):
    """Tells of rounds and of nothing else."""

    def __init__(self, on_round: Callable[[int], None]) -> None:
        self._on_round = on_round

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """Pass the number on."""
        self._on_round(int(record["round"]))


# ---------------------------------------------------------------------------------------------- processes


@dataclass
class _Worker:
    child: Child
    doing: str = ""

    @property
    def connection(self) -> Connection:
        return self.child.pipe.connection


def _share_out(configs: Sequence[RunConfig], keep: Keep, processes: int, on_round: OnRound, ended: OnRun) -> None:
    todo = deque(configs)
    workers: list[_Worker] = []
    try:
        while todo or workers:
            while todo and len(workers) < processes:
                workers.append(_Worker(Child(_work, ONE_THREAD)))
                _give(workers[-1], todo.popleft(), keep)
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                try:
                    kind, value = worker.child.pipe.hear()
                except EOFError:  # it is gone, and its run with it; the others go on
                    workers.remove(worker)
                    why = f"its process {worker.child.wait()}, as it does when memory runs out"
                    ended(worker.doing, why)
                    continue
                if kind == "round":
                    on_round(worker.doing, value)
                    continue
                ended(worker.doing, value)
                if todo:
                    _give(worker, todo.popleft(), keep)
                else:
                    with suppress(OSError):
                        worker.child.pipe.tell(None)
                    worker.child.wait()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.child.end()


def _give(worker: _Worker, config: RunConfig, keep: Keep) -> None:
    worker.doing = config.name
    with suppress(OSError):  # it is gone, which is noticed when it is listened to
        worker.child.pipe.tell((config.to_toml(), keep))


def _work(pipe: Pipe) -> None:
    """What a process does: runs, until there are no more."""
    while (job := pipe.hear()) is not None:
        toml, keep = job
        pipe.tell(("ended", attempt(parse_config(toml), keep, lambda number: pipe.tell(("round", number)))))
