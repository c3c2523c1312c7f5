"""Processes that work for this one: started anew, told what to do through a pipe, and gone when it is gone.

`Channel` and `Helper` are what others know of them: what helps may be somewhere else than in a process of this machine.

They are spawned, since a fork would copy OpenMP's threads without their bodies. The program's main module is not run
again in them, so that a script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import copyreg
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from types import ModuleType
from typing import Any, Protocol, final

import torch
from torch import Tensor


def with_threads(number: int) -> dict[str, str]:
    """Variables for a process of so many threads; OpenMP reads them when it starts."""
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number), "OMP_WAIT_POLICY": "PASSIVE"}


ONE_THREAD = with_threads(1)
"""Small matrices gain little from a second thread and much from a second process."""


def _flat(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor as its bytes; torch's own way is for files, and thirty times as slow for small ones."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = plain.view(torch.uint8).numpy()
    return _whole, (pickle.PickleBuffer(data), tensor.dtype, tuple(tensor.shape))


def _whole(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


class _Pickler(pickle.Pickler):
    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.dispatch_table = copyreg.dispatch_table | {Tensor: _flat}


def pack(value: Any) -> bytes:
    """An object as bytes, for `pickle.loads`; tensors arrive on the CPU, with memory of their own."""
    buffer = BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class Channel(Protocol):
    """One end of a way between two that talk, on which whole objects travel; tensors arrive on the CPU."""

    def tell(self, value: Any) -> None:
        """Send an object.

        Raises:
            OSError: nobody is at the other end.
        """

    def hear(self) -> Any:
        """Wait for the next object.

        Raises:
            EOFError: nobody is at the other end.
        """


def listen(channel: Channel) -> SimpleQueue[Any]:
    """Take objects out of a channel as they come: whoever sends need not wait until they are wanted.

    Returns:
        The objects; last of all None, or what was raised where one cannot be read (no memory for it, say).
    """
    heard: SimpleQueue[Any] = SimpleQueue()

    def hear() -> None:
        try:
            while True:
                heard.put(channel.hear())
        except EOFError:
            heard.put(None)
        except Exception as error:
            heard.put(error)

    threading.Thread(target=hear, daemon=True).start()
    return heard


class Helper(Protocol):
    """Somebody elsewhere who does what is told through a channel.

    Attributes:
        host: Name of its machine, as far as is known.
    """

    host: str

    @property
    def pipe(self) -> Channel:
        """This end of the channel."""

    def wait(self) -> str:
        """Wait until it has ended: how, as in "ended with status 0"."""

    def end(self) -> None:
        """End it, whatever it is doing."""


@final
class Pipe:
    """One end of a pipe between two processes, on which whole objects travel; tensors arrive on the CPU."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def tell(self, value: Any) -> None:
        """Send an object; waits while the pipe is full.

        Raises:
            OSError: nobody is at the other end.
        """
        # Not `Connection.send`: with torch's reductions it would share tensors instead of sending them.
        self.connection.send_bytes(pack(value))

    def hear(self) -> Any:
        """Wait for the next object.

        Raises:
            EOFError: nobody is at the other end, or the other end died in the middle of a word.
        """
        try:
            return pickle.loads(self.connection.recv_bytes())
        except OSError as error:
            raise EOFError(str(error)) from None


@final
class Child:
    """A process that does `work(pipe)`.

    Args:
        work: a function of a module; what it is given is the child's end of the pipe.
        environment: variables that the process has besides this one's.
    """

    def __init__(self, work: Callable[[Pipe], None], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self._process = context.Process(target=_begin, args=(work, there))
        with variables(environment), _without_main():
            self._process.start()
        there.close()  # so that the pipe ends when the process does
        self.host = socket.gethostname()
        self.pipe = Pipe(here)

    def wait(self) -> str:
        """Wait until it has ended: with what exit status, the signal that killed it as a negative number."""
        self._process.join()
        return f"ended with status {self._process.exitcode}"

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.terminate()
        self._process.join()


def _begin(work: Callable[[Pipe], None], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(Pipe(connection))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Inside, the environment has these variables, for processes that are started there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _without_main() -> Iterator[None]:
    """Inside, a spawned process finds no main module to run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
