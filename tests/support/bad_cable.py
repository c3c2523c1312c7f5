"""A network of hosts on one machine, each in a namespace of its own, on cables that are slow and lose frames.

The cables lead to a switch in this process: Linux's own emulator (tc netem) is not in every kernel, TAP devices are.
Needs root, iproute2 and /dev/net/tun. Address 10.99.7.1 is this machine's own end.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
PREFIX = "fedlora-"
"""Of the namespaces' names."""


class NetworkError(Exception):
    """This machine does not let us make one; the text says why."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Switch:
    """Hosts on bad cables; a context manager.

    Args:
        hosts: their names; host k has address 10.99.7.(2 + k).
        delay_s: of each frame, in seconds; two cables lie between two hosts.
        loss: share of the frames that each cable loses.
        seed: of the losses.

    Raises:
        NetworkError: this machine allows none.
    """

    def __init__(self, hosts: Sequence[str], *, delay_s: float, loss: float, seed: int = 0) -> None:
        self._delay_s, self._loss, self._draw = delay_s, loss, random.Random(seed)
        self._hosts, self._files = ["", *hosts], list[int]()
        self._pulled: set[int] = set()
        self._over = threading.Event()
        self.frames = self.lost = 0

    @staticmethod
    def namespace(host: str) -> list[str]:
        """What a command begins with that runs on the host."""
        return ["ip", "netns", "exec", PREFIX + host]

    def pull(self, host: str) -> None:
        """Pull a host's cable out."""
        self._pulled.add(self._hosts.index(host))

    def plug(self, host: str) -> None:
        """Plug it in again."""
        self._pulled.discard(self._hosts.index(host))

    def __enter__(self) -> Switch:
        try:
            for place, host in enumerate(self._hosts):
                self._lay(place, host)
        except (OSError, subprocess.CalledProcessError) as error:
            self._clear()
            raise NetworkError(str(getattr(error, "stderr", None) or error)) from None
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._clear()

    def _lay(self, place: int, host: str) -> None:
        """A TAP device whose other end is this process, in the host's namespace."""
        name = f"fedlora{place}"
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._files.append(file)
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        inside: list[str] = []
        if host:
            subprocess.run(["ip", "netns", "delete", PREFIX + host], check=False, capture_output=True)  # a killed run's
            ip("netns", "add", PREFIX + host)
            ip("link", "set", name, "netns", PREFIX + host)
            inside = ["-n", PREFIX + host]
            ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "address", "add", f"10.99.7.{1 + place}/24", "dev", name)
        ip(*inside, "link", "set", name, "up")

    def _clear(self) -> None:
        for file in self._files:
            os.close(file)  # the device goes with it
        for host in filter(None, self._hosts):
            subprocess.run(["ip", "netns", "delete", PREFIX + host], check=False, capture_output=True)

    def _forward(self) -> None:
        """Each frame goes, a moment later and if it is not lost, to everybody but its sender."""
        queue: list[tuple[float, int, int, bytes]] = []
        while not self._over.is_set():
            wait = min(0.2, max(0.0, queue[0][0] - time.monotonic())) if queue else 0.2
            for file in select.select(self._files, [], [], wait)[0]:
                frame, sender = os.read(file, 65536), self._files.index(file)
                for place in range(len(self._files)):
                    if place == sender or self._pulled & {place, sender}:
                        continue
                    self.frames += 1
                    if self._draw.random() < self._loss:
                        self.lost += 1
                        continue
                    heapq.heappush(queue, (time.monotonic() + self._delay_s, self.frames, place, frame))
            while queue and queue[0][0] <= time.monotonic():
                _, _, place, frame = heapq.heappop(queue)
                with suppress(OSError):  # a full queue loses frames as well
                    os.write(self._files[place], frame)
