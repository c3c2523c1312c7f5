"""RunConfig <-> TOML: frozen, typed, unknown keys raise with the nearest valid name.

The tables `[strategy]`, `[partition]` and `[task]` are open: their `name` chooses an entry of a registry and the other
keys are that entry's dataclass fields. They are checked against it when the part is built, before anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedlora.errors import ConfigError, PrivacyError, nearest
from fedlora.privacy.accounting import require_accountant
from fedlora.registry import first_problem

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


class Section(BaseModel):
    """Base of all tables: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


OPEN_TABLES = ("strategy", "partition", "task")


class OpenTable(BaseModel):
    """A table whose `name` chooses an entry of a registry; the other keys are that entry's fields."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def fields(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class ModelConfig(Section):
    """The base model."""

    name: str = "all-MiniLM-L6-v2"
    """A named asset, a Hugging Face hub name, or a local folder."""
    revision: str | None = None
    """A commit or tag of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the frozen base; adapters are always trained in float32 (float64 with a float64 base)."""
    trust_remote_code: bool = False


class AdapterConfig(Section):
    """The low-rank adapter that PEFT injects."""

    method: str = "lora"
    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    alpha_scaling: Literal["fixed", "proportional"] = "fixed"
    """For clients with a rank of their own: the same alpha for all, or alpha * rank / adapter.rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Names = ()
    """Module names (suffixes) to adapt; empty: PEFT's default for the architecture."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Module name (suffix or regular expression, as in PEFT) -> rank at adapter.rank; scaled for other client ranks."""
    alpha_pattern: dict[str, float] = {}
    export_rank: PositiveInt | None = None
    """Largest rank of the final adapter of rules that change the base; None: as large as it takes to be exact."""
    modules_to_save: Names | None = None
    """Dense modules trained beside the adapter; None: the task's head."""


class DataConfig(Section):
    """Where examples come from and which columns matter."""

    source: str = "vader"
    """A named corpus, a Hugging Face hub name, or a local .csv, .tsv, .jsonl or .parquet file."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    train_split: str = "train"
    test: str | None = None
    """A second file, or the name of a split, with the test examples; None: cut from the source by `test_fraction`."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    text: str = "text"
    label: str = "label"
    columns: dict[str, str] = {}
    """Role -> column of what a task needs besides text and label: prompt, answer, messages, image. A role that is not
    here is a column of its own name."""
    domain: str | None = None
    """Column with each example's domain (site, user), for figures per domain and for domain partitions."""
    group: str | None = None
    """Column whose groups are never split between training and test (document, patient)."""
    limit: PositiveInt | None = None
    """Use at most this many examples, drawn with the seed."""


class ProfileConfig(Section):
    """One kind of device. What is left out is the run's own value, or takes no simulated time."""

    name: str
    share: Annotated[float, Field(gt=0)] = 1.0
    """Clients of this kind, relative to the other profiles' shares; dealt evenly along the clients' numbers."""
    rank: PositiveInt | None = None
    """Of its adapter; None: clients.ranks or adapter.rank."""
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: PositiveInt | None = None
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability of being there when a round begins."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of never answering, once asked."""
    examples_per_s: Annotated[float, Field(gt=0)] | None = None
    """Training speed."""
    download_mbit_s: Annotated[float, Field(gt=0)] | None = None
    upload_mbit_s: Annotated[float, Field(gt=0)] | None = None
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    """Of the link, one way."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> ProfileConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either steps or epochs, not both")
        return self


class ClientsConfig(Section):
    """What the clients are like."""

    ranks: tuple[PositiveInt, ...] | None = None
    """A rank for each client, repeated cyclically; None: adapter.rank for all."""
    profiles: tuple[ProfileConfig, ...] = ()
    """Kinds of devices, each client one of them; empty: all the same, always there, no simulated time."""

    @model_validator(mode="after")
    def _one_source_of_ranks(self) -> ClientsConfig:
        if self.ranks is not None and any(profile.rank is not None for profile in self.profiles):
            raise ValueError("give ranks either in clients.ranks or in clients.profiles, not in both")
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


class TrainConfig(Section):
    """Local training in one round on one client."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: PositiveInt | None = None
    """Optimiser steps a round; give either this or `epochs`."""
    batch_size: PositiveInt = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up at the start of each round's local training."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest L2 norm of a step's gradient over all trained parameters."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """FedProx's mu (Li et al. 2020, arXiv 1812.06127, equation (2))."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either steps or epochs, not both")
        return self


class ServerConfig(Section):
    """The round."""

    fraction: Fraction = 1.0
    """Share of the clients that are asked in a round."""
    clients_per_round: PositiveInt | None = None
    """How many clients are asked; instead of `fraction`."""
    quorum: Fraction = 0.5
    """Share of the asked clients whose replies a round needs."""
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which a round goes on without the replies that are missing; also how long a node may take to say
    hello. Clients in this process are computed when they are asked, and are never late."""
    simulated_deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Simulated seconds after which a round goes on without its stragglers (see clients.profiles)."""
    weighting: Literal["examples", "uniform"] = "examples"
    max_examples: PositiveInt = 10_000_000
    """Largest number of examples that a reply may claim."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest L2 norm of a reply's tensors together; a larger one is refused."""
    aggregation_error: bool = True
    """Measure the aggregation error each round (keeps the round's factors in memory)."""
    evaluate_every: PositiveInt = 1
    """Evaluate the global model after each so many rounds, and always after the last."""
    node_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds to wait for nodes at the start."""


class PrivacyConfig(Section):
    """Example-level differential privacy: each client trains with DP-SGD, whoever reads what it sends.

    What is protected is one example of one client, not all that a client (a person, a hospital) holds.
    """

    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Upper end after all rounds, for which the noise is calibrated; or
    `noise_multiplier`: the noise, whatever it adds up to."""
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the noise in units of `max_grad_norm`."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Well below 1 / public_examples."""
    accountant: str = "prv"
    """How steps are added up: prv (tight) or rdp (quick, a little more)."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Each example's gradient is clipped to this L2 norm."""
    physical_batch_size: PositiveInt | None = None
    """Most examples at once in memory; None: the whole batch."""
    public_examples: Counts
    """What each client declares in public as its number of examples (one for all, or several, dealt cyclically): rates
    and noise follow from it, never from the true number, which is secret. The claim holds whatever the true one is."""

    @model_validator(mode="after")
    def _is_a_claim(self) -> PrivacyConfig:
        require_accountant(self.accountant)
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise PrivacyError("give exactly one of privacy.epsilon and privacy.noise_multiplier")
        if self.delta * (most := max(self.public_examples)) >= 1:
            raise PrivacyError(
                f"privacy.delta {self.delta:g} protects nobody among {most} examples: choose one far below 1 / {most}"
            )
        return self

    def public_examples_of(self, client_id: int) -> int:
        """What a client declares."""
        return self.public_examples[client_id % len(self.public_examples)]


class RuntimeConfig(Section):
    """The machine. Nothing here changes what is computed, only where and how fast (up to rounding)."""

    device: str = "auto"
    """One of: auto (CUDA, Apple's MPS, CPU, in this order), cpu, cuda, cuda:1, mps."""
    threads: PositiveInt | None = None
    """Torch threads; None: the cores. Results are bit-for-bit the same only for the same number."""
    kernels: Literal["auto", "off", "onednn"] = "auto"
    """Kernels for the frozen base on a CPU; "auto" measures at the start and records its choice."""


class RunConfig(Section):
    """One run, complete: with the same versions and machine it gives the same bytes."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: PositiveInt = 10
    output: str = "runs"
    """Folder in which the run directory `output/name` is made."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    task: OpenTable = OpenTable(name="text-classification")
    data: DataConfig = DataConfig()
    partition: OpenTable = OpenTable(name="iid", clients=8)  # type: ignore[call-arg]
    clients: ClientsConfig = ClientsConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    strategy: OpenTable = OpenTable(name="fedavg")
    privacy: PrivacyConfig | None = None
    """None: no privacy."""
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _simulated_time(self) -> RunConfig:
        profiles, deadline = self.clients.profiles, self.server.simulated_deadline_s
        if deadline is not None and not profiles:
            raise ValueError("server.simulated_deadline_s needs clients.profiles that say how fast the devices are")
        if deadline is None and any(profile.dropout for profile in profiles):
            raise ValueError(
                "a client that drops out is noticed at a deadline: set server.simulated_deadline_s beside dropout"
            )
        return self

    @model_validator(mode="after")
    def _private(self) -> RunConfig:
        # server.aggregation_error may stay: it is computed from updates that are noised already (post-processing).
        if self.privacy is None:
            return self
        if self.train.clip_norm is not None:
            raise PrivacyError(
                "train.clip_norm clips a whole batch and protects nobody: remove it, privacy.max_grad_norm clips each "
                "example"
            )
        if self.server.weighting != "uniform":
            raise PrivacyError(
                "server.weighting = 'examples' needs the true numbers of examples, which are secret under [privacy]: "
                "set server.weighting = 'uniform'"
            )
        return self

    def to_toml(self) -> str:
        """The resolved config, every key written out (keys whose value is None are left out: TOML has no null)."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    def digest(self, *sections: str) -> str:
        """A hash of some sections (all without names): a cache's key."""
        dump = self.model_dump(mode="json")
        chosen = {key: dump[key] for key in (sections or sorted(dump))}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1 << 16)
def _deal(shares: tuple[float, ...], place: int) -> int:
    """Which of `shares` (their sum is 1) the `place`-th card goes to, if each goes to the one furthest behind."""
    counts = [0] * len(shares)
    for card in range(place + 1):
        behind = [(card + 1) * share - count for share, count in zip(shares, counts, strict=True)]
        chosen = max(range(len(shares)), key=behind.__getitem__)
        counts[chosen] += 1
    return chosen


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `key=value` overrides.

    Args:
        path: of the file; its stem is the run's name unless the file gives one.
        overrides: such as "rounds=20" or "strategy.name=ffa"; values are TOML, a bare word is a string.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown (with the nearest valid one), a value is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no config file {str(path)!r}; {nearest(str(path), others)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    return parse_config(text, overrides, source=str(path), name=path.stem)


def parse_config(
    text: str, overrides: Sequence[str] = (), *, source: str = "config", name: str | None = None
) -> RunConfig:
    """As `load_config`, from TOML text."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from None
    if name is not None:
        tree.setdefault("name", name)
    for override in overrides:
        _override(tree, override)
    _refuse_unknown(tree, RunConfig, "")
    for table in OPEN_TABLES:
        if isinstance(given := tree.get(table), dict) and "name" not in given:
            tree[table] = {**RunConfig.model_fields[table].default.model_dump(), **given}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error)}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r} must have the form key=value, for example train.lr=0.001")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, last = key.strip().split(".")
    here = tree
    for table in tables:
        here = here.setdefault(table, {})
        if not isinstance(here, dict):
            raise ConfigError(f"--set {override!r}: {table!r} is a value, not a table")
    if last == "name" and len(tables) == 1 and tables[0] in OPEN_TABLES and here.get("name") != value:
        here.clear()  # another rule, partitioner or task: the old one's fields do not apply
    here[last] = value


def _refuse_unknown(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in section.model_fields:
            raise ConfigError(f"unknown key {prefix + key!r}; {nearest(key, section.model_fields)}")
        annotation = section.model_fields[key].annotation
        inner = next((part for part in get_args(annotation) if isinstance(part, type)), annotation)
        if isinstance(inner, type) and issubclass(inner, Section) and isinstance(value, Mapping):
            _refuse_unknown(value, inner, f"{prefix}{key}.")
        if key == "profiles" and isinstance(value, list):
            for profile in value:
                if isinstance(profile, Mapping):
                    _refuse_unknown(profile, ProfileConfig, f"{prefix}{key}.")


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(value) for value in tree] if isinstance(tree, list) else tree
