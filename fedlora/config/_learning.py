"""What is learnt, and how: the model, its adapter, the data, and a client's local training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedlora.config._base import Names, PositiveInt, Section
from fedlora.errors import ConfigError
from fedlora.registry import OWN_CLASS


class ModelConfig(Section):
    """The base model."""

    name: str = "all-MiniLM-L6-v2"
    """A named asset, a Hugging Face hub name, or a local folder."""
    revision: str | None = None
    """A commit or tag of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Data type of the frozen base; adapters are always trained in float32 (float64 with a float64 base). "auto" is
    bfloat16 on a GPU that computes in it, and on a CPU where it was found clearly faster on this machine, else float32.
    A run keeps its choice when it goes on. Where nodes train on machines of their own, "auto" is float32."""
    quantize: Literal["nf4", "int8"] | None = None
    """Whether the frozen linear layers are held in 4 or 8 bits by bitsandbytes (fedlora[quantize]); heads and output
    layer never are. `dtype` is then what they compute in."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout probability of the base in training, the same in all its layers. 0 turns it off, which rarely hurts
    adapters of low rank and is needed by `runtime.prefix_cache`. None: as the checkpoint's config says."""
    trust_remote_code: bool = False
    """Whether Python code that comes with a hub model may run here."""
    ignore_mismatched_sizes: bool = False
    """Whether weights outside the head that the checkpoint holds in another shape, or not at all, may be drawn at
    random instead of being refused. A new head, and the pooler below it, need no permission."""

    @model_validator(mode="after")
    def _may_be_quantized(self) -> ModelConfig:
        if self.quantize is not None and self.dtype == "float64":
            raise ConfigError(
                f"model.quantize = {self.quantize!r} computes in 32 or 16 bits: set model.dtype = 'auto'",
                code="dtype-too-wide",
            )
        return self


class AdapterConfig(Section):
    """The adapter that PEFT injects."""

    method: str = "lora"
    """A LoRA variant or another of PEFT's methods; docs/methods.md says which goes with which rule."""
    rank: PositiveInt = 8
    """Number of columns of B and of rows of A. A larger rank can learn more, and each client sends more."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapter changes a weight by (alpha / rank) B A."""
    alpha_scaling: Literal["fixed", "proportional"] = "fixed"
    """Alpha of clients with a rank of their own: "fixed" is adapter.alpha, "proportional" adapter.alpha times the
    client's rank / adapter.rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    start: Annotated[str, Field(min_length=1)] | None = None
    """Folder of an adapter in PEFT's format, or of a finished run, whose values the first round begins with: of the
    same base, classes, method, modules, rank and alpha. The server reads it before the first round. None: as the method
    draws one."""
    options: dict[str, Any] = Field(default={})
    """Other fields of PEFT's config, for methods other than LoRA."""
    targets: Names = ()
    """Module names (suffixes) to adapt; empty: PEFT's default for the architecture."""
    layers: Annotated[str, Field(pattern=r"^top:[1-9][0-9]*$")] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Layers whose targets are adapted: their numbers, counted from 0, or the uppermost ones as "top:2". What lies
    below the lowest of them need not be computed again in each step (`runtime.prefix_cache`). None: all layers."""
    rank_pattern: dict[str, PositiveInt] = Field(default={})
    """Module name (suffix or regular expression, as in PEFT) -> rank at adapter.rank; scaled for other client ranks."""
    alpha_pattern: dict[str, float] = Field(default={})
    """Module name (suffix or regular expression, as in PEFT) -> alpha."""
    export_rank: PositiveInt | None = None
    """Largest rank of the exported adapter, for rules that change the base. None: as large as an exact export needs."""
    modules_to_save: Names | None = None
    """Dense modules trained beside the adapter; None: the task's head."""


NODES = "nodes"
"""Source of the data, and name of the partition, where each node brings its own."""


class DataConfig(Section):
    """Where examples come from and which columns matter."""

    source: str = "vader"
    """A named corpus, a Hugging Face hub name, a local .csv, .tsv, .jsonl or .parquet file, a class of your own as
    "my_module:MySource", or "nodes" where each node brings its own (with partition.name = "nodes")."""
    options: dict[str, Any] = Field(default={})
    """Fields of a source of your own."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    train_split: str = "train"
    """Name of the split that is trained on, of a hub data set or a source of your own."""
    test: str | None = None
    """A second file, or the name of a split, with the test examples; None: cut from the source by `test_fraction`."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the source that becomes the test set, where `test` names none; with `evaluation.on` = "clients" or
    "both" also the share of its examples that each client keeps apart."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """With `[selection]`: share of the examples that is set apart for it; of the clients' own or, where the server
    selects, of the source (of `test`, where each node brings its own data)."""
    text: str = "text"
    """Name of the column with the text."""
    label: str = "label"
    """Name of the column with the class."""
    columns: dict[str, str] = Field(default={})
    """Role -> column of what a task needs besides text and label: image; messages; prompt, completion; instruction,
    output. A role that is not here is a column of its own name."""
    domain: str | None = None
    """Column with each example's domain (site, user), for figures per domain and for domain partitions."""
    group: str | None = None
    """Column whose groups are never split between training and test (document, patient)."""
    group_names: dict[str, dict[str, str]] = Field(default={})
    """Column of domains, groups or natural clients -> value -> name to show in its place:
    { hospital = { 7 = "St. Mary's" } }."""
    limit: PositiveInt | None = None
    """Use at most this many examples, drawn with the seed."""
    own: str | None = None
    """Set on nodes only: the file that the node's own config names (`--node-config 'data="..."'`). Never set it in a
    run's config."""
    own_test: str | None = None
    """Set on nodes only: a second file, of examples to be tested on (`--node-config 'test="..."'`), where the node does
    not keep a part of the first. Never set it in a run's config."""


class TrainConfig(Section):
    """Local training in one round on one client."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the client's examples in each round; 1 if neither this nor `steps` is given."""
    steps: PositiveInt | None = None
    """Optimiser steps in each round; give either this or `epochs`."""
    batch_size: PositiveInt = 16
    """Number of examples in one optimiser step."""
    micro_batch_size: PositiveInt | None = None
    """Most rows of one forward and backward pass, whoever's they are, where memory is short: a step's gradients are
    added up over its passes, and are the same but for rounding (but for dropout masks of a whole pass, such as
    DeBERTa's, which each pass draws anew). None: as many as are fast on the machine."""
    gradient_checkpointing: bool = False
    """Whether each layer's activations are computed again in the backward pass instead of being kept: a third more
    work, and a fraction of the memory. The gradients are the same, dropout included."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser of local training."""
    keep_optimizer: bool = False
    """Whether each client goes on from its optimiser's state of the last round in which its update was used. The state
    stays with the client: in the run's folder, or beside a node's ledger. Otherwise it starts anew in every round."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the adapter and the head."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the optimiser, on all trained parameters."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of SGD."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the whole run, from step to step: not at all, or to `lr_end` along a line or
    half a cosine."""
    lr_end: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at which a linear or cosine schedule ends."""
    warmup_rounds: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up over the first rounds of the run; the schedule begins after them."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up at the start of each round's local training."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest L2 norm of a step's gradient over all trained parameters."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune (Jain et al. 2023, arXiv 2310.05914): uniform noise of at most alpha / sqrt(tokens x width) on the
    embeddings of each row in training, tokens without padding; 5 is usual. None: none."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """Weight mu of FedProx's proximal term (Li et al. 2020, arXiv 1812.06127, equation (2)); 0: none."""
    loop: Annotated[str, Field(pattern=OWN_CLASS)] | None = None
    """A training loop of your own in the place of fedlora's, as "my_module:train" (`fedlora.client`): clients train one
    at a time, and the loop has its own optimiser. None: fedlora's."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of a loop of your own."""

    personal: Annotated[float, Field(ge=0)] | None = None
    """Weight lambda of Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1): beside the shared model w each client
    trains one of its own, v, on its loss plus lambda / 2 |v - w|^2, which stays with it; 0.1 to 2 are usual. 0: a model
    that is trained alone. None: no models of their own."""

    def longer(self, times: int) -> TrainConfig:
        """The same training, so many times as long."""
        if self.steps is not None:
            return self.model_copy(update={"steps": self.steps * times})
        return self.model_copy(update={"epochs": (self.epochs or 1.0) * times})

    @model_validator(mode="after")
    def _may_be_personal(self) -> TrainConfig:
        if self.personal is not None and self.keep_optimizer:
            raise ConfigError(
                "train.keep_optimizer keeps one optimiser's state for each client, and with train.personal each trains "
                "two models: remove one of them",
                code="two-optimisers",
            )
        most = 2 * (1 + self.momentum)  # of a quadratic's curvature times the rate (Polyak 1964)
        if self.personal and self.optimizer == "sgd" and self.lr * self.personal >= most:
            raise ConfigError(
                f"train.personal = {self.personal:g} times train.lr = {self.lr:g} is {most:g} or more, so that the "
                "steps would lead away from the shared model: lower one of them",
                code="personal-diverges",
            )
        return self

    @model_validator(mode="after")
    def _has_a_state(self) -> TrainConfig:
        if self.keep_optimizer and self.optimizer == "sgd" and not self.momentum:
            raise ConfigError(
                "train.keep_optimizer: SGD without momentum has no state: set train.momentum, or remove it",
                code="key-without-effect",
            )
        return self

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                "give either train.steps or train.epochs, not both (train.steps= on the command line or None in "
                "Python removes one)",
                code="steps-and-epochs",
            )
        return self
