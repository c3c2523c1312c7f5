"""Programs that run beside this process: started again when they end, and gone when it is gone, however it went.

A `Guard` starts this file as a process of its own and holds a pipe to it, which nobody else has: it closes when its
owner ends, `kill -9` included, and whatever is watched then is ended, with all that it started. The file imports
nothing of fedlora's, so that the process is small. (Processes that share Python objects are those of
`fedlora.simulation.processes`.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

GRACE_S = 10.0
"""Between asking programs to end and ending them."""
LIVED_S = 60.0
"""After a life of so many seconds a program's pauses begin anew."""


@final
class Guard:
    """Watches programs on behalf of the process that makes it.

    Args:
        grace_s: between SIGTERM and SIGKILL, in seconds.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._watched: dict[int, subprocess.Popen[bytes]] = {}
        self._begin()

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """From now on end a program, which leads a process group, and its group, with this process."""
        self._watched[process.pid] = process
        self._tell(f"+{process.pid}")

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """The program has ended, and its number may become another's."""
        self._watched.pop(process.pid, None)
        self._tell(f"-{process.pid}")

    def close(self) -> None:
        """End all that is still watched, and the guard."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        while self._process.poll() is None:
            for process in self._watched.values():
                process.poll()  # buries it: to the guard a dead one counts as somebody
            time.sleep(0.02)

    def _begin(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self._grace_s)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of what a terminal sends its processes
        )
        for pid in self._watched:
            self._tell(f"+{pid}")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:  # somebody killed the guard: a new one is told of all
            self._process.wait()
            self._begin()


def end_groups(pids: Iterable[int], grace_s: float = GRACE_S, reap: Callable[[], object] = lambda: None) -> None:
    """End process groups: first with SIGTERM, then with SIGKILL.

    Args:
        pids: of their leaders.
        grace_s: how long to wait after each.
        reap: buries those that are the caller's children: a dead leader would count as somebody.
    """
    left = list(pids)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            _signal_group(pid, number)
        end = time.monotonic() + grace_s
        while left and time.monotonic() < end:
            reap()
            left = [pid for pid in left if _signal_group(pid, 0)]
            time.sleep(0.05 if left else 0.0)


def _signal_group(pid: int, number: int) -> bool:
    """Send a signal to a process group; whether anybody is left in it."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def keep_running(
    starts: Mapping[str, Callable[[], subprocess.Popen[bytes]]],
    say: Callable[[str], object],
    *,
    pause_s: tuple[float, float],
    final: Collection[int] = (),
    grace_s: float = GRACE_S,
    look: Callable[[], object] = lambda: None,
) -> int:
    """Run programs, each started again whenever it ends, until Ctrl-C or SIGTERM; then end them in reverse order.

    Args:
        starts: name -> starts the program, as the leader of a process group.
        say: told in a line of what ended.
        pause_s: the first and the longest pause before a program is started again; it doubles.
        final: statuses with which a program ends for good, and all the others with it.
        grace_s: between asking the programs to end and ending them.
        look: called a few times a second.

    Returns:
        0, or the status of `final` with which one ended.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    due, born, pauses = dict.fromkeys(starts, 0.0), dict.fromkeys(starts, 0.0), dict.fromkeys(starts, pause_s[0])
    guard = Guard(min(grace_s, GRACE_S))
    with _until_interrupted() as over:
        try:
            while not over.is_set():
                look()
                for name, start in starts.items():
                    process, now = running.get(name), time.monotonic()
                    if process is None:
                        if now >= due[name] and not over.is_set():
                            running[name], born[name] = start(), now
                            guard.watch(running[name])
                    elif (status := process.poll()) is not None:
                        del running[name]
                        end_groups([process.pid], 1.0)  # what it started and left behind
                        guard.forget(process)
                        if status in final:
                            return status
                        pause = pause_s[0] if now - born[name] > LIVED_S else pauses[name]
                        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                        say(f"{name} {how}; starting it again in {pause:g} s")
                        due[name], pauses[name] = now + pause, min(2 * pause, pause_s[1])
                over.wait(min(0.2, pause_s[0]))
        finally:
            left = list(reversed(running.values()))
            end_groups([process.pid for process in left], grace_s, lambda: [process.poll() for process in left])
            guard.close()
    return 0


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    over = threading.Event()
    before = {number: signal.signal(number, lambda *_: over.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Read who is watched until the owner is gone; then end them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it goes when its owner goes, and not before
    watched: set[int] = set()
    for line in sys.stdin:
        (watched.add if line.startswith("+") else watched.discard)(int(line[1:]))
    end_groups(watched, float(sys.argv[1]))


if __name__ == "__main__":
    main()
