"""What is learnt, and how: the model, its adapter, the data, and a client's local training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedlora.config._base import Names, PositiveInt, Section


class ModelConfig(Section):
    """The base model."""

    name: str = "all-MiniLM-L6-v2"
    """A named asset, a Hugging Face hub name, or a local folder."""
    revision: str | None = None
    """A commit or tag of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the frozen base; adapters are always trained in float32 (float64 with a float64 base)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the base in training, everywhere the same; 0 turns it off, which adapters of low rank seldom miss and
    `runtime.prefix_cache` needs. None: as the checkpoint says."""
    trust_remote_code: bool = False
    """Whether Python code that comes with a hub model may run here."""
    ignore_mismatched_sizes: bool = False
    """Whether weights outside the head that the checkpoint holds in another shape, or not at all, may be drawn at
    random instead of being refused. A new head, and the pooler below it, need no permission."""


class AdapterConfig(Section):
    """The adapter that PEFT injects."""

    method: str = "lora"
    """A LoRA variant or another of PEFT's methods; docs/methods.md says which goes with which rule."""
    rank: PositiveInt = 8
    """Columns of B and rows of A: the larger, the more it can learn, and the more a client sends."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The change of the base is alpha / rank times B A."""
    alpha_scaling: Literal["fixed", "proportional"] = "fixed"
    """For clients with a rank of their own: the same alpha for all, or alpha * rank / adapter.rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    options: dict[str, Any] = Field(default={})
    """Other fields of PEFT's config, for a method that is no LoRA."""
    targets: Names = ()
    """Module names (suffixes) to adapt; empty: PEFT's default for the architecture."""
    layers: Annotated[str, Field(pattern=r"^top:[1-9][0-9]*$")] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Of the targets those in some layers alone: their numbers from 0, or the uppermost as "top:2". What lies below
    the lowest of them need not be computed again and again (`runtime.prefix_cache`). None: all."""
    rank_pattern: dict[str, PositiveInt] = Field(default={})
    """Module name (suffix or regular expression, as in PEFT) -> rank at adapter.rank; scaled for other client ranks."""
    alpha_pattern: dict[str, float] = Field(default={})
    """The same for alpha."""
    export_rank: PositiveInt | None = None
    """Largest rank of the final adapter of rules that change the base; None: as large as it takes to be exact."""
    modules_to_save: Names | None = None
    """Dense modules trained beside the adapter; None: the task's head."""


NODES = "nodes"
"""Source of the data, and name of the partition, where each node brings its own."""


class DataConfig(Section):
    """Where examples come from and which columns matter."""

    source: str = "vader"
    """A named corpus, a Hugging Face hub name, a local .csv, .tsv, .jsonl or .parquet file, or "nodes" where each node
    brings its own (with partition.name = "nodes")."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    train_split: str = "train"
    """Name of the split of a hub data set that is trained on."""
    test: str | None = None
    """A second file, or the name of a split, with the test examples; None: cut from the source by `test_fraction`."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the source that becomes the test set, where `test` names none."""
    text: str = "text"
    """Column with the text."""
    label: str = "label"
    """Column with the class."""
    columns: dict[str, str] = Field(default={})
    """Role -> column of what a task needs besides text and label: prompt, answer, messages, image. A role that is not
    here is a column of its own name."""
    domain: str | None = None
    """Column with each example's domain (site, user), for figures per domain and for domain partitions."""
    group: str | None = None
    """Column whose groups are never split between training and test (document, patient)."""
    group_names: dict[str, str] = Field(default={})
    """Value -> name for people, of the columns of domains, groups and natural clients: {"7" = "St. Mary's"}."""
    limit: PositiveInt | None = None
    """Use at most this many examples, drawn with the seed."""
    own: str | None = None
    """On a node: the file that its own config names (`--node-config 'data="..."'`); never set in a run's config."""


class TrainConfig(Section):
    """Local training in one round on one client."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the client's examples a round; neither this nor `steps`: one."""
    steps: PositiveInt | None = None
    """Optimiser steps a round; give either this or `epochs`."""
    batch_size: PositiveInt = 16
    """Examples of one step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Fresh on every client in every round."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the adapter and the head."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the optimiser, on all that is trained."""
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
            raise ValueError("give either steps or epochs, not both (--set train.steps= removes one)")
        return self
