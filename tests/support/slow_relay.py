"""A TCP relay that is a slow line whose connections break: no root and no kernel module needed."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress

CHUNK = 1 << 14


class SlowRelay:
    """Hands connections on to a server; a context manager, with its own thread.

    Args:
        listen: Host and port on which it listens; port 0: any.
        server: Host and port of the server.
        delay_s: Of whatever is sent, in each direction, in seconds.
        rate: Bytes a second of a connection, in each direction.
        breaks: Share of the connections that break, each after a number of bytes drawn up to `longest`.
        longest: See `breaks`.
        seed: Of these draws.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        server: tuple[str, int],
        *,
        delay_s: float,
        rate: float,
        breaks: float,
        longest: int = 20_000,
        seed: int = 0,
    ) -> None:
        self._listen, self._server, self._delay_s, self._rate = listen, server, delay_s, rate
        self._breaks, self._longest, self._draw = breaks, longest, random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.connections = self.broken = self.bytes = self.port = 0

    def __enter__(self) -> SlowRelay:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        served = self._loop.run_until_complete(asyncio.start_server(self._connect, *self._listen))
        self.port = served.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        served.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        breaks = self._draw.random() < self._breaks
        left = [self._draw.randrange(self._longest) if breaks else 1 << 62]
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._server)
        except OSError:
            writer.close()
            return
        ends = (writer, far_writer)
        ways = (self._hand_on(reader, far_writer, left, ends), self._hand_on(far_reader, writer, left, ends))
        await asyncio.gather(*ways)
        for end in ends:
            end.close()

    async def _hand_on(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        left: list[int],
        ends: tuple[asyncio.StreamWriter, ...],
    ) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK):
                await asyncio.sleep(self._delay_s + len(data) / self._rate)
                self.bytes += len(data)
                left[0] -= len(data)
                if left[0] < 0:
                    self.broken += 1
                    for end in ends:
                        end.transport.abort()
                    return
                target.write(data)
                await target.drain()
            if target.can_write_eof():
                target.write_eof()
