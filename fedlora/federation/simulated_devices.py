"""What the clients' devices and links would do to a run, in simulated time: nobody waits for it.

A client's profile says what it trains, whether it is there, whether it drops out, and how fast it computes and sends.
A round then takes as long as its slowest reply would have, or until the simulated deadline, and a client that would
have been late is not trained at all. Every draw has a key of its own, so that engines and resumed runs agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.config import ClientsConfig, ProfileConfig, RunConfig
from fedlora.rng import derive
from fedlora.training.dp_settings import private_settings
from fedlora.training.job import examples_of
from fedlora.training.workspace import Workspace

BITS = 8e-6
"""Megabits in a byte."""


@dataclass(frozen=True)
class SimulatedDevices:
    """The devices of a run's clients.

    Args:
        clients: the config's table.
        seed: the run's.
        deadline_s: simulated seconds after which a round goes on; None: it waits for everyone.
    """

    clients: ClientsConfig
    seed: int
    deadline_s: float | None = None

    @classmethod
    def of(cls, config: RunConfig) -> SimulatedDevices:
        """The fleet of a config."""
        return cls(config.clients, config.seed, config.server.simulated_deadline_s)

    @property
    def simulated(self) -> bool:
        """Whether any client has a profile."""
        return bool(self.clients.profiles)

    def profile(self, client_id: int) -> ProfileConfig:
        """The profile of a client; one that says nothing where the config has none."""
        return self.clients.profile_of(client_id) or ProfileConfig(name="none")

    def available(self, round_number: int, client_id: int) -> bool:
        """Whether the client can be asked in this round: a draw with its profile's `availability`."""
        chance = self.profile(client_id).availability
        return chance >= 1.0 or self._draw("available", round_number, client_id) < chance

    def drops_out(self, round_number: int, client_id: int) -> bool:
        """Whether the client, once asked, never answers: a draw with its profile's `dropout`."""
        return self._draw("dropout", round_number, client_id) < self.profile(client_id).dropout

    def seconds(self, client_id: int, *, bytes_down: int, examples: int, bytes_up: int) -> float:
        """Simulated seconds from the server's push to the reply's arrival.

        latency + bytes_down / download + examples / speed + bytes_up / upload + latency; what the profile leaves out
        takes no time.
        """
        profile = self.profile(client_id)
        time = 2.0 * profile.latency_s
        for amount, rate in (
            (bytes_down * BITS, profile.download_mbit_s),
            (float(examples), profile.examples_per_s),
            (bytes_up * BITS, profile.upload_mbit_s),
        ):
            time += amount / rate if rate is not None else 0.0
        return time

    def too_late(self, seconds: float) -> bool:
        """Whether a reply after so many simulated seconds misses the deadline."""
        return self.deadline_s is not None and seconds > self.deadline_s

    def _draw(self, what: str, round_number: int, client_id: int) -> float:
        return float(np.random.default_rng(derive(self.seed, what, round_number, client_id)).random())


def examples_to_tell(workspace: Workspace, client_id: int) -> int:
    """Examples that a client trains on in a round, where something that is written down goes by them.

    A private run goes by what is public: its plan, or the number of examples where weights go by that.
    """
    config = workspace.config
    if config.example_privacy is not None:
        plan = private_settings(config, client_id).schedule
        return round(plan.steps * plan.expected_batch_size)
    train = config.train_of(client_id)
    if config.client_privacy is not None and config.server.weighting == "uniform":
        return (train.steps or 1) * train.batch_size
    return examples_of(len(workspace.data.clients[client_id]), train)
