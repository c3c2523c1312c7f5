"""The processes of a worker pool as actors of a Ray cluster, on as many machines and GPUs as it has.

An actor does what a process does, `fedlora.simulation.pool_worker.serve`, and is talked to by two calls that carry
bytes. Of Ray nothing else is used: no object outlives a call, and Ray does not start an actor that dies again.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, final

import torch

from fedlora import __version__
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, PoolError, PrivacyError
from fedlora.simulation.machines import Machine, room
from fedlora.simulation.processes import Channel, pack, variables

PATIENCE_S = 180.0
"""Until all actors are there: libraries are read from a disk, and others may hold the CPUs for a while."""
REPLACED_WITHIN_S = 60.0
"""Until an actor that takes a dead one's place is there; after that another stands in."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning of what Ray will do one day
    "RAY_worker_niceness": "0",  # Ray's own choice is 15: behind everybody else on the machine
}
"""For a Ray that is started here; what the environment says itself stays."""


def require_ray(config: RunConfig) -> None:
    """Raise if a config asks for Ray where there is none.

    Raises:
        ConfigError: naming what to install.
    """
    if config.runtime.backend == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "runtime.backend = 'ray' needs Ray, which is not installed: pip install 'fedlora[ray]', or set it "
            "to 'processes'",
            code="ray-missing",
        )


@final
class Actor:
    """What lives in the cluster: `serve` in a thread, and two ends of its channel.

    Args:
        folders: in which the driver looks for modules; rules and tasks may be a user's own.
        here: the driver's working folder, from which a config's paths may start.
    """

    def __init__(self, folders: Sequence[str], here: str) -> None:
        sys.path.extend(folder for folder in folders if folder not in sys.path)
        if Path(here).is_dir():
            os.chdir(here)
        self._jobs: SimpleQueue[bytes] = SimpleQueue()
        self._answers: SimpleQueue[bytes | None] = SimpleQueue()

    def begin(self, file: Path | None) -> tuple[str, str, bytes | None, str]:
        """Begin to serve: versions of fedlora and torch, what a file holds here, if any, and the machine's name."""
        threading.Thread(target=self._serve, daemon=True).start()
        return __version__, torch.__version__, _content(file), socket.gethostname()

    def tell(self, data: bytes) -> None:
        """A job for `serve`."""
        self._jobs.put(data)

    def hear(self) -> bytes | None:
        """Wait for an answer; None: there is none to come."""
        return self._answers.get()

    def _serve(self) -> None:
        from fedlora.simulation.pool_worker import serve

        try:
            serve(_Inside(self._jobs, self._answers))
        finally:
            self._answers.put(None)


@dataclass(frozen=True)
class _Inside:
    """The actor's end of the channel. It never ends: the actor does."""

    jobs: SimpleQueue[bytes]
    answers: SimpleQueue[bytes | None]

    def tell(self, value: Any) -> None:
        self.answers.put(pack(value))

    def hear(self) -> Any:
        return pickle.loads(self.jobs.get())


@final
class RayHelper:
    """One actor as the driver sees it: a `fedlora.simulation.processes.Helper`, and the driver's end of its channel."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.host = "a machine of the cluster"
        self._hearing = threading.Lock()
        self._over = False
        self._why = "for a reason that Ray does not tell"

    @property
    def pipe(self) -> Channel:
        """The driver's end of the channel."""
        return self

    def tell(self, value: Any) -> None:
        """See `Channel`; waits until it has arrived: Ray promises no order of calls that are under way at once."""
        try:
            self._call(self.actor.tell, pack(value))
        except EOFError as error:
            raise BrokenPipeError(str(error)) from None

    def hear(self) -> Any:
        """See `Channel`."""
        with self._hearing:
            if self._over:  # and perhaps Ray too, which would start itself again
                raise EOFError("it was ended")
            data = self._call(self.actor.hear)
        if data is None:
            raise EOFError("it has nothing more to say")
        return pickle.loads(data)

    def wait(self) -> str:
        """How it ended; an actor of which nothing is known any more has."""
        return f"ended on Ray {self._why}"

    def end(self) -> None:
        """End it, whatever it is doing, and wait until nobody listens to it."""
        import ray

        self._over = True
        ray.kill(self.actor)
        with self._hearing:
            pass

    def _call(self, method: Any, *values: Any) -> Any:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(method.remote(*values))
        except RayError as error:
            self._why = _reason(error)
            raise EOFError(self._why) from None


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster.

    Args:
        machines: of it, with what all have, whoever uses it now.
    """

    machines: Sequence[Machine]

    @contextmanager
    def actors(
        self, environments: Sequence[Mapping[str, str]], threads: int, *, gpu: bool, file: Path | None
    ) -> Iterator[Callable[[int], RayHelper]]:
        """Inside, the result gives the actor of a place, or starts another in its stead; all end with the context.

        Args:
            environments: Variables of each place's actor besides its machine's.
            threads: Of each: so many CPUs of the cluster.
            gpu: Whether each has a GPU of its own, too.
            file: By which a machine shows that it sees the run's folder; None: it need not.

        Raises:
            ConfigError: the cluster is too small.
            PoolError: an actor did not start, or has other versions.
            PrivacyError: a machine does not see the run's folder.
        """
        if (most := room(self.machines, threads, gpus=gpu)) < len(environments):
            each = f"{threads} CPUs" + " and a GPU" * gpu
            raise ConfigError(
                f"Ray has room for {most} actors of {each}, and the run wants {len(environments)}: lower "
                "runtime.processes or runtime.threads, or add machines to the cluster",
                code="cluster-too-small",
            )
        helpers: list[RayHelper] = []
        unused: dict[int, RayHelper] = {}

        def started(place: int) -> RayHelper:
            helpers.append(_started(environments[place], threads, gpu=gpu))
            return helpers[-1]

        def hire(place: int) -> RayHelper:
            if place in unused:
                return unused.pop(place)
            helper = started(place)
            try:
                _meet([helper], file, REPLACED_WITHIN_S)
            except PoolError:
                helper.end()
                raise
            return helper

        try:
            unused |= {place: started(place) for place in range(len(environments))}
            _meet(helpers, file, PATIENCE_S)
            yield hire
        finally:
            for helper in helpers:
                helper.end()


def _started(environment: Mapping[str, str], threads: int, *, gpu: bool) -> RayHelper:
    """An actor that is on its way."""
    import ray

    theirs = {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}
    options: dict[str, Any] = {
        "num_cpus": threads,
        "num_gpus": int(gpu),
        "max_concurrency": 2,  # one call of tell beside one of hear
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": theirs},  # which GPU, Ray says itself
    }
    return RayHelper(ray.remote(Actor).options(**options).remote(sys.path, str(Path.cwd())))


def _meet(helpers: Sequence[RayHelper], file: Path | None, patience_s: float) -> None:
    """Wait until all are there, and see that they are what the driver is."""
    import ray
    from ray.exceptions import RayError

    greetings = [helper.actor.begin.remote(file) for helper in helpers]
    late = ray.wait(greetings, num_returns=len(greetings), timeout=patience_s)[1]
    if late:
        raise PoolError(
            f"{len(late)} of {len(greetings)} actors found no room on Ray in {patience_s:g} s: others use it; lower "
            "runtime.processes, or resume the run later",
            code="no-room-on-ray",
        )
    for helper, greeting in zip(helpers, greetings, strict=True):
        try:
            version, torch_version, content, helper.host = ray.get(greeting)
        except RayError as error:
            raise PoolError(
                f"an actor did not start on Ray ({_reason(error)}): every machine of the cluster needs the "
                "same fedlora",
                code="actor-not-started",
            ) from None
        if (version, torch_version) != (__version__, torch.__version__):
            raise PoolError(
                f"an actor has fedlora {version} and torch {torch_version}, not {__version__} and {torch.__version__}: "
                "install the same on every machine of the cluster",
                code="other-version",
            )
        if content != _content(file):
            raise PrivacyError(
                "the clients' ledgers are in the run's folder, which a machine of the cluster does not see: put "
                "output into a folder that all machines share, or set runtime.backend = 'processes'",
                code="folder-not-shared",
            )


@contextmanager
def open_cluster() -> Iterator[Cluster]:
    """The Ray that this process uses; else that of RAY_ADDRESS or of this machine; else one that is started.

    One that is started here is ended with the context; from another this process goes away.

    Raises:
        PoolError: there is none at the address.
    """
    import ray

    mine = not ray.is_initialized()
    if mine:
        quiet = {name: value for name, value in QUIET.items() if name not in os.environ}
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            with variables(quiet):  # an address of None is just what is said above
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            raise PoolError(
                f"Ray cannot be used ({_reason(error)}): look at RAY_ADDRESS, or unset it", code="ray-unusable"
            ) from None
    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield Cluster([Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in resources])
    finally:
        if mine:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nobody is at an address of the form host:port; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _content(file: Path | None) -> bytes | None:
    try:
        return file.read_bytes() if file else None
    except OSError:
        return None


def _reason(error: BaseException) -> str:
    """Why, in one line, of what Ray says in many."""
    text = " ".join(str(error).split())
    found = re.search(r"because (.*?)(?:\. |\.?$)", text)
    return f"because {found[1]}" if found else text[:200]
