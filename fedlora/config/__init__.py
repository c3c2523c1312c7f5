"""RunConfig <-> TOML: frozen, typed, unknown keys raise with the nearest valid name.

The tables `[strategy]`, `[partition]` and `[task]` are open: their `name` chooses an entry of a registry and the other
keys are that entry's dataclass fields. They are checked against it when the part is built, before anything is trained.
"""

from fedlora.config._base import OPEN_TABLES, OpenTable, Section
from fedlora.config._effect import overruled
from fedlora.config._evaluation import EvaluationConfig, SelectionConfig
from fedlora.config._federation import ClientsConfig, ProfileConfig, ServerConfig, WireConfig
from fedlora.config._flat import different_keys, flat_keys, flatten
from fedlora.config._learning import NODES, AdapterConfig, DataConfig, ModelConfig, TrainConfig
from fedlora.config._overrides import Keys, Overrides, changed_keys, dotted, split_override
from fedlora.config._privacy import ClientPrivacyConfig, ExamplePrivacyConfig
from fedlora.config._reading import find_config, load_config, load_section, parse_config
from fedlora.config._run import RunConfig, RuntimeConfig, TrackingConfig
from fedlora.config._settled import settle

__all__ = [
    "NODES",
    "OPEN_TABLES",
    "AdapterConfig",
    "ClientPrivacyConfig",
    "ClientsConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExamplePrivacyConfig",
    "Keys",
    "ModelConfig",
    "OpenTable",
    "Overrides",
    "ProfileConfig",
    "RunConfig",
    "RuntimeConfig",
    "Section",
    "SelectionConfig",
    "ServerConfig",
    "TrackingConfig",
    "TrainConfig",
    "WireConfig",
    "changed_keys",
    "different_keys",
    "dotted",
    "find_config",
    "flat_keys",
    "flatten",
    "load_config",
    "load_section",
    "overruled",
    "parse_config",
    "settle",
    "split_override",
]
