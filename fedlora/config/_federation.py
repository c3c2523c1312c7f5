"""Who takes part: the clients and their devices, and the server's round."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedlora.config._base import Fraction, Names, PositiveInt, Section
from fedlora.errors import ConfigError


class ProfileConfig(Section):
    """One kind of device. What is left out is the run's own value, or takes no simulated time."""

    name: str
    """A name for the reader; it has no effect."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Share of the clients with this profile, relative to the other profiles' shares; profiles are spread evenly over
    the client numbers."""
    rank: PositiveInt | None = None
    """Rank of the adapters of these clients. None: clients.ranks or adapter.rank."""
    steps: PositiveInt | None = None
    """Optimiser steps of these clients in each round, instead of train.steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes of these clients over their examples in each round, instead of train.epochs."""
    batch_size: PositiveInt | None = None
    """Batch size of these clients, instead of train.batch_size."""
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that such a client is available when a round begins."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that such a client never replies after it was sampled."""
    examples_per_s: Annotated[float, Field(gt=0)] | None = None
    """Training speed, in examples per second."""
    download_mbit_s: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth of the link to the client, in Mbit/s."""
    upload_mbit_s: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth of the link to the server, in Mbit/s."""
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    """One-way latency of the link, in seconds."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> ProfileConfig:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("clients.profiles: give either steps or epochs, not both", code="steps-and-epochs")
        return self


class ClientsConfig(Section):
    """What the clients are like."""

    ranks: tuple[PositiveInt, ...] | None = None
    """Rank of each client's adapter; the list is repeated cyclically. None: adapter.rank for all."""
    profiles: tuple[ProfileConfig, ...] = ()
    """Kinds of devices; each client has one of them. Empty: all clients are alike and always available, and no time is
    simulated."""

    @model_validator(mode="after")
    def _one_source_of_ranks(self) -> ClientsConfig:
        if self.ranks is not None and any(profile.rank is not None for profile in self.profiles):
            raise ConfigError(
                "give ranks in either clients.ranks or clients.profiles, not both", code="ranks-given-twice"
            )
        return self

    def profile_of(self, client_id: int) -> ProfileConfig | None:
        """The profile of a client, None where there are none.

        Each client in turn gets the profile that is furthest behind its share, so that any first n clients hold the
        shares as well as n clients can.
        """
        if not self.profiles:
            return None
        total = sum(profile.share for profile in self.profiles)
        return self.profiles[_deal(tuple(profile.share / total for profile in self.profiles), client_id)]

    def rank_of(self, client_id: int) -> int | None:
        """The rank of a client, None for adapter.rank."""
        profile = self.profile_of(client_id)
        if profile is not None and profile.rank is not None:
            return profile.rank
        return self.ranks[client_id % len(self.ranks)] if self.ranks else None


class ServerConfig(Section):
    """The round."""

    fraction: Fraction = 1.0
    """Share of the clients that are sampled in each round."""
    clients_per_round: PositiveInt | None = None
    """Number of clients that are sampled in each round, instead of `fraction`."""
    quorum: Fraction = 0.5
    """Share of the sampled clients whose replies a round needs."""
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which a round goes on without the replies that are missing; also the longest that a
    node may take to say hello. In a local simulation no client is ever late."""
    simulated_deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Simulated seconds after which a round goes on without its stragglers (see clients.profiles)."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client's update in the mean: its number of examples, or the same for all."""
    max_examples: PositiveInt = 10_000_000
    """Largest number of examples that a reply may claim."""
    max_weight_ratio: Annotated[float, Field(ge=1)] | Literal["off"] = 10.0
    """Where nodes bring their own data, no client weighs more than so many times the median client, or than a third of
    all others together if that is more; it counts with that weight then. Elsewhere the partition says who has what."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest L2 norm of a reply's tensors together; a larger one is refused."""
    max_norm_ratio: Annotated[float, Field(gt=1)] | Literal["off"] = 100.0
    """A reply is refused that changes what the client was sent by more than so many times the median change (L2 norm)
    of the round before; in the first round, and in private ones, by more than ten times so many times the norm of what
    it was sent. "off" in runs with privacy.unit = "client", which clip every change."""
    max_rank: PositiveInt | None = None
    """Largest rank that a node may ask for in its own config; None: eight times the largest that the run's config gives
    to any client."""
    nodes: Names = ()
    """Over a SuperLink: for each client, in their order, the name under which its node's key is registered, or the
    key's fingerprint (SHA256:..., as ssh-keygen -lf shows it); no other node can be that client. Empty: the first who
    says so stays it for the run. `fedlora deploy init` writes it."""
    aggregation_error: bool = True
    """Measure the aggregation error each round (keeps the round's factors in memory)."""
    node_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds to wait at the start for all nodes to be there and say hello (then a quorum is enough), before a round
    for a quorum of them, and for a reply before its node is asked whether it still has the message."""
    max_failed_rounds: Annotated[int, Field(ge=0)] = 3
    """How many rounds in a row may miss the quorum. Such a round changes nothing, and the next one tries again."""


class WireConfig(Section):
    """What travels."""

    up: Literal["float32", "bfloat16", "int8", "topk"] = "float32"
    """Format of what a client sends: its tensors in float32, their changes in bfloat16 or int8, or of each tensor's
    change the largest entries alone ("topk")."""
    down: Literal["float32", "bfloat16", "int8"] = "float32"
    """Format of the adapter that the server sends: as it is, or rounded to the nearest in bfloat16 or int8. Clients
    train from the rounded values; the server keeps its own, and adds what a client changed to them."""
    fraction: Fraction = 0.1
    """Of each tensor's entries, with up = "topk": at 0.1 a client sends a fifth of the bytes of float32."""
    error_feedback: bool = True
    """With up = "topk": what a client did not send it keeps, and adds to its next change."""

    @property
    def keeps_residual(self) -> bool:
        """Whether clients keep what they did not send."""
        return self.up == "topk" and self.error_feedback


@lru_cache(maxsize=1 << 16)
def _deal(shares: tuple[float, ...], place: int) -> int:
    """Which of `shares` (their sum is 1) the `place`-th card goes to, if each goes to the one furthest behind."""
    counts = [0] * len(shares)
    for card in range(place + 1):
        behind = [(card + 1) * share - count for share, count in zip(shares, counts, strict=True)]
        chosen = max(range(len(shares)), key=behind.__getitem__)
        counts[chosen] += 1
    return chosen
