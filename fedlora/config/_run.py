"""One run: all tables together."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, model_validator

from fedlora.config._base import OpenTable, PositiveInt, Section
from fedlora.config._effect import without_effect
from fedlora.config._evaluation import EvaluationConfig, SelectionConfig
from fedlora.config._federation import ClientsConfig, ServerConfig, WireConfig
from fedlora.config._learning import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from fedlora.config._paths import with_absolute_paths
from fedlora.config._privacy import ClientPrivacyConfig, ExamplePrivacyConfig, PrivacyConfig
from fedlora.errors import ConfigError, PrivacyError


class RuntimeConfig(Section):
    """The machine. Nothing here changes what is computed, only where and how fast (up to rounding).

    Dropout masks, too, are the same on every device."""

    device: str = "auto"
    """One of: auto (CUDA, Apple's MPS, CPU, in this order), cpu, cuda, cuda:1, mps."""
    device_map: Literal["auto"] | None = None
    """"auto" spreads the layers of a base over all CUDA devices of a machine, where one cannot hold it; one process
    trains then. None: it lies whole on `device`."""
    cohort: Literal["auto"] | PositiveInt = "auto"
    """How many clients train at once in a process; "auto" goes by memory, batches and the model's width."""
    processes: Literal["auto"] | PositiveInt = "auto"
    """How many processes share the clients of a simulated round, each with a base of its own; 1: the server's own and
    no other. "auto" starts one for each core or GPU where the run is long enough for it."""
    backend: Literal["processes", "ray"] = "processes"
    """Where several processes run: as processes of this machine, or actors on the machines of a Ray cluster
    (fedlora[ray]): the one that RAY_ADDRESS names or that runs here, else one of this machine for this run."""
    threads: PositiveInt | None = None
    """Torch threads of each process. None: all cores, divided equally among the processes. Results are bit-for-bit the
    same only for the same number."""
    deterministic: bool = True
    """Whether a CUDA device may use such kernels alone as give the same bits each time; a model that needs another one
    is refused. False is a little faster. On a CPU it is always so."""
    kernels: Literal["auto", "measure", "off", "onednn"] = "auto"
    """Kernels for the frozen base on a CPU: torch's own ("off") or oneDNN's. "auto" takes what was found faster on this
    machine, which is measured once and kept in the cache folder; "measure" measures again. A run keeps its choice when
    it goes on. Where nodes train on machines of their own, "auto" is "off" for all of them."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """"auto" goes by device, dtype and length: plain products for short sequences where they are faster, torch's fused
    kernel for all others. "sdpa" is that kernel always, "eager" the model's own plain code."""
    prefix_cache: Literal["auto", "on", "off"] = "auto"
    """What the layers below the lowest adapter give is computed once for each example and kept. "auto" does so where
    adapters sit in the upper layers alone (`adapter.layers`), nothing below is random in training
    (`model.dropout = 0`), and all examples fit into an eighth of the machine's memory; "on" fails where that is not so.
    Where nodes train on machines of their own, "auto" is "off"."""


class TrackingConfig(Section):
    """Where the figures of each round go besides the run's folder."""

    name: Literal["tensorboard", "wandb", "mlflow", "trackio"]
    """Which tracker to use; each needs an extra of its own, such as fedlora[wandb]."""
    project: Annotated[str, Field(min_length=1)] = "fedlora"
    """Project under which the tracker files the run (the experiment, in MLflow; not used by TensorBoard)."""


class RunConfig(Section):
    """One run, complete: with the same versions and machine it gives the same bytes."""

    name: str = "run"
    """Name of the run's folder. Default: the config file's name without ".toml"."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every random draw except the noise of private runs."""
    rounds: PositiveInt = 10
    """Number of rounds: clients train, the server aggregates."""
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
    evaluation: EvaluationConfig = EvaluationConfig()
    selection: SelectionConfig | None = None
    """None: the last round's model is kept, and no validation part is set apart."""
    wire: WireConfig = WireConfig()
    strategy: OpenTable = OpenTable(name="fedavg")
    privacy: PrivacyConfig | None = None
    """None: no privacy."""
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig | None = None
    """None: in the run's folder alone."""

    @model_validator(mode="after")
    def _simulated_time(self) -> RunConfig:
        profiles, deadline = self.clients.profiles, self.server.simulated_deadline_s
        if deadline is not None and not profiles:
            raise ConfigError(
                "server.simulated_deadline_s needs clients.profiles, which say how fast the devices are: add them, or "
                "remove it",
                code="deadline-without-profiles",
            )
        if deadline is None and any(profile.dropout for profile in profiles):
            raise ConfigError(
                "clients.profiles.dropout needs a deadline at which a dropped client is noticed: set "
                "server.simulated_deadline_s",
                code="dropout-without-deadline",
            )
        return self

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> RunConfig:
        problem = next(without_effect(self), None)
        if problem is not None:
            raise ConfigError(problem, code="key-without-effect")
        return self

    @model_validator(mode="after")
    def _evaluation(self) -> RunConfig:
        on = self.evaluation.on
        if self.privacy is not None and self.evaluation.at_clients:
            raise PrivacyError(
                f"evaluation.on = {on!r} lets clients send counts of their own examples, which [privacy] protects: set "
                "evaluation.on = 'server' (test data that are public) or 'off'",
                code="evaluation-not-private",
            )
        own = (self.evaluation.metric or "").partition(":")[2]
        if own and self.selection is not None and (self.selection.metric, self.selection.mode) == (own, "auto"):
            raise ConfigError(
                f"nobody knows whether more or less of {own!r} is better: set selection.mode to 'max' or 'min'",
                code="mode-unknown",
            )
        if self.selection is not None and on == "off":
            raise ConfigError(
                "[selection] compares rounds, and evaluation.on = 'off' measures none: remove one of them",
                code="selection-without-evaluation",
            )
        return self

    @model_validator(mode="after")
    def _spread(self) -> RunConfig:
        beside = {
            "[privacy]": self.privacy is not None,
            "train.loop": self.train.loop is not None,
            "runtime.processes": self.runtime.processes not in ("auto", 1),
            "runtime.backend": self.runtime.backend != "processes",
        }
        if self.runtime.device_map is not None and (key := next((key for key, is_set in beside.items() if is_set), "")):
            raise ConfigError(
                f"runtime.device_map = 'auto' does not go with {key}: one process takes all GPUs, in plain training; "
                "remove one of them",
                code="base-on-several-gpus",
            )
        return self

    @model_validator(mode="after")
    def _noisy(self) -> RunConfig:
        if self.train.neftune_noise_alpha is not None and self.runtime.prefix_cache == "on":
            raise ConfigError(
                "train.neftune_noise_alpha gives the frozen layers other inputs in each step, so that training keeps "
                "nothing of them: set runtime.prefix_cache = 'auto', or remove the noise",
                code="noise-below-cache",
            )
        return self

    @model_validator(mode="after")
    def _private(self) -> RunConfig:
        if self.privacy is not None and self.train.loop is not None:
            raise PrivacyError(
                "nothing can be claimed of the privacy of train.loop: remove [privacy], or train.loop",
                code="loop-not-private",
            )
        if self.privacy is not None and self.model.quantize == "int8":
            raise PrivacyError(
                "model.quantize = 'int8' computes a column in another way for all rows of a batch where one of them is "
                "large, so that what an example adds depends on the others: set model.quantize = 'nf4'",
                code="examples-coupled",
            )
        if self.example_privacy is not None:
            self._example_private()
        elif self.client_privacy is not None:
            self._client_private()
        return self

    def _example_private(self) -> None:
        # server.aggregation_error may stay: it is computed from updates that are noised already (post-processing).
        if self.train.clip_norm is not None:
            raise PrivacyError(
                "train.clip_norm clips the gradient of the whole batch, which protects no example: remove it, "
                "privacy.max_grad_norm clips each example's gradient",
                code="batch-clipping",
            )
        if self.server.weighting != "uniform":
            raise PrivacyError(
                "server.weighting = 'examples' needs the true numbers of examples, which [privacy] keeps secret: "
                "set server.weighting = 'uniform'",
                code="weights-tell-sizes",
            )

    def _client_private(self) -> None:
        if self.server.max_norm is not None:
            raise PrivacyError(
                "server.max_norm leaves out clients with large updates, which changes the weights of the others: "
                "remove it, privacy.clip_norm clips each update",
                code="norm-limit-couples-clients",
            )
        if self.server.aggregation_error:
            raise PrivacyError(
                "server.aggregation_error writes a figure computed from updates without noise to the run's files: set "
                "it to false",
                code="aggregation-error-tells",
            )
        if self.server.weighting == "uniform":
            for profile in self.clients.profiles:
                if profile.examples_per_s is not None and (profile.steps or self.train.steps) is None:
                    raise PrivacyError(
                        "the simulated time of a client that trains in epochs reveals its number of examples, which "
                        "server.weighting = 'uniform' keeps secret: set train.steps, or remove examples_per_s from "
                        "clients.profiles",
                        code="time-tells-sizes",
                    )

    def train_of(self, client_id: int) -> TrainConfig:
        """What one client trains: `[train]`, with its profile's steps, epochs and batch size."""
        profile = self.clients.profile_of(client_id)
        if profile is None:
            return self.train
        changes: dict[str, object] = {}
        if profile.steps is not None or profile.epochs is not None:
            changes |= {"steps": profile.steps, "epochs": profile.epochs}
        if profile.batch_size is not None:
            changes["batch_size"] = profile.batch_size
        return self.train.model_copy(update=changes)

    @property
    def clients_keep(self) -> tuple[str, ...]:
        """The keys by which clients keep something from round to round, beside what the rule lets them keep."""
        keys = {
            "train.keep_optimizer": self.train.keep_optimizer,
            "wire.up = 'topk'": self.wire.keeps_residual,
            "train.personal": self.train.personal is not None,
        }
        return tuple(key for key, is_set in keys.items() if is_set)

    @property
    def max_rank(self) -> int:
        """The largest rank that a node may ask for."""
        profiles = (profile.rank or 1 for profile in self.clients.profiles)
        return self.server.max_rank or 8 * max(self.adapter.rank, *(self.clients.ranks or (1,)), *profiles)

    @property
    def example_privacy(self) -> ExamplePrivacyConfig | None:
        """The table [privacy] of a run whose clients train with DP-SGD."""
        return self.privacy if isinstance(self.privacy, ExamplePrivacyConfig) else None

    @property
    def client_privacy(self) -> ClientPrivacyConfig | None:
        """The table [privacy] of a run whose server adds noise."""
        return self.privacy if isinstance(self.privacy, ClientPrivacyConfig) else None

    def to_toml(self) -> str:
        """The resolved config, every key written out (keys whose value is None are left out: TOML has no null)."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    def with_absolute_paths(self) -> RunConfig:
        """With paths that are the same from any folder: relative ones are taken to be the current folder's."""
        return RunConfig.model_validate(with_absolute_paths(self.model_dump()))

    def digest(self, *sections: str) -> str:
        """A hash of some sections (all without names): a cache's key.

        `adapter.start` is not in it: its values are in the first state, and nobody but the server reads the folder.
        """
        dump = self.model_dump(mode="json", exclude={"adapter": {"start"}})
        chosen = {key: dump[key] for key in (sections or sorted(dump))}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(value) for value in tree] if isinstance(tree, list) else tree
