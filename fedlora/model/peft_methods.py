"""Which of PEFT's methods can be federated, and how: `adapter.method`, as data.

A LoRA variant trains pairs, dW = s B A. It differs in the scale, in where A and B start, or in what is trained beside
them. Every other method is a tuner of PEFT's: what it trains is no pair, but tensors that are averaged as themselves.

What is left out is listed with its reason in `REFUSED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.config import AdapterConfig
from fedlora.errors import ConfigError, nearest

Start = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]

PAIR_KEYS = ("rank", "alpha", "alpha_scaling", "dropout", "rank_pattern", "alpha_pattern", "export_rank")
"""Keys of the `[adapter]` table that a LoRA variant takes; a tuner takes those of `Method.keys`."""
OURS = frozenset((
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision",
    "target_modules", "task_type",
))  # fmt: skip
"""Fields of PEFT's configs that follow from the other keys."""


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: in the config.
        peft_type: PEFT's name of the tuner.
        trains: what, in words.
        paper: where it is from.
        start: of a LoRA variant: how A and B are drawn; see `fedlora.model.lora_init`.
        root_scale: of a LoRA variant: the scale is alpha / sqrt(rank) instead of alpha / rank.
        magnitudes: of a LoRA variant: a magnitude for each output is trained beside the pairs (DoRA).
        keys: of a tuner: key of the `[adapter]` table -> field of PEFT's config.
        values: of a tuner: fields that shall not have PEFT's default.
    """

    name: str
    peft_type: str
    trains: str
    paper: str
    start: Start = "kaiming"
    root_scale: bool = False
    magnitudes: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pairs(self) -> bool:
        """Whether pairs (A, B) are trained, rather than other tensors."""
        return self.peft_type == "LORA"

    @property
    def bilinear(self) -> bool:
        """Whether the weights change by exactly s B A, so that a rule's aggregation error can be told."""
        return self.pairs and not self.magnitudes

    @property
    def whole_rank(self) -> bool:
        """Whether a part of the pair's rank is no adapter: s B A is not zero at the start, or only as a whole."""
        return self.start in ("orthogonal", "pissa", "olora")


def _tuner(name: str, trains: str, paper: str, *, values: Mapping[str, Any] | None = None, **keys: str) -> Method:
    return Method(name, name.upper(), trains, paper, keys=keys, values=values or {})


_LORA = "A and B"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "LORA", _LORA, "Hu et al. 2021, arXiv 2106.09685"),
        Method("rslora", "LORA", f"{_LORA}, scaled by alpha / sqrt(rank)", "Kalajdzievski 2023, arXiv 2312.03732",
               root_scale=True),
        Method("gaussian", "LORA", f"{_LORA}; A starts from N(0, 1/rank²)", "Hu et al. 2021, arXiv 2106.09685",
               start="gaussian"),
        Method("orthogonal", "LORA", f"{_LORA}, both from orthogonal draws with B A = 0",
               "PEFT's init_lora_weights = 'orthogonal'", start="orthogonal"),
        Method("pissa", "LORA", f"{_LORA}, from the largest singular values of the weight",
               "Meng et al. 2024, arXiv 2404.02948", start="pissa"),
        Method("olora", "LORA", f"{_LORA}, from the QR decomposition of the weight",
               "Büyükakyüz 2024, arXiv 2406.01775", start="olora"),
        Method("dora", "LORA", f"{_LORA}, and a magnitude for each output", "Liu et al. 2024, arXiv 2402.09353",
               magnitudes=True),
        _tuner("ia3", "a factor for each output", "Liu et al. 2022, arXiv 2205.05638",
               values={"feedforward_modules": ()}),
        _tuner("vera", "two vectors beside frozen random matrices", "Kopiczko et al. 2023, arXiv 2310.11454",
               rank="r", dropout="vera_dropout"),
        _tuner("randlora", "scales of many frozen random pairs", "Albert et al. 2025, arXiv 2502.00987",
               rank="r", alpha="randlora_alpha", dropout="randlora_dropout"),
        _tuner("miss", "one block of rank rows, repeated over the weight", "Kang & Yin 2024, arXiv 2409.15371",
               rank="r", dropout="miss_dropout"),
        _tuner("fourierft", "some Fourier coefficients of the change", "Gao et al. 2024, arXiv 2405.03003",
               values={"init_weights": True}),
        _tuner("loha", "two pairs, multiplied entry by entry", "Hyeon-Woo et al. 2021, arXiv 2108.06098",
               rank="r", alpha="alpha"),
        _tuner("lokr", "two factors of a Kronecker product", "Yeh et al. 2023, arXiv 2309.14859",
               rank="r", alpha="alpha"),
        _tuner("hra", "the vectors of a chain of reflections", "Yuan et al. 2024, arXiv 2405.17484", rank="r"),
        _tuner("oft", "generators of a rotation in blocks", "Qiu et al. 2023, arXiv 2306.07280"),
        _tuner("boft", "generators of a rotation by butterflies", "Liu et al. 2023, arXiv 2311.06243",
               dropout="boft_dropout"),
        _tuner("vblora", "a bank of vectors for all layers, and its logits", "Li et al. 2024, arXiv 2405.15179",
               rank="r", dropout="vblora_dropout"),
        _tuner("c3a", "the kernel of a circular convolution", "Chen et al. 2024, arXiv 2407.19342"),
        _tuner("road", "angles and lengths of rotations in the plane", "Liao & Monz 2024, arXiv 2409.00119"),
        _tuner("shira", "a random choice of as many entries as a pair has", "Bhardwaj et al. 2024, arXiv 2406.13175",
               rank="r", values={"random_seed": 0}),
        _tuner("hira", "a pair, multiplied entry by entry with the weight", "Huang et al. 2025, ICLR",
               rank="r", dropout="hira_dropout"),
        _tuner("gralora", "pairs in blocks of the weight", "Jung et al. 2025, arXiv 2505.20355",
               rank="r", alpha="alpha", dropout="gralora_dropout"),
    )
}  # fmt: skip

_DATA = "it starts from activations or gradients of training data, and the server, which draws the adapter, has none"
_TOKENS = "it adds tokens to the input instead of tensors beside the layers"
_SVD = "it freezes a decomposition of the weights, whose signs differ from machine to machine"
_MIXTURE = "it mixes several trained adapters, and a federation trains one"
REFUSED: dict[str, str] = {
    "eva": _DATA,
    "corda": _DATA,
    "lora_ga": _DATA,
    "loftq": "it replaces the base by a quantised one; load a quantised base, and use method 'lora'",
    "mica": "it freezes B, and no rule here averages A alone",
    "adalora": "it moves ranks between layers while it trains, on each client in another way",
    "velora": "it compresses activations by an average that each client would keep for itself",
    "alora": "it is switched on by tokens of the prompt, which the tasks do not know",
    "arrow": _MIXTURE,
    "xlora": _MIXTURE,
    "poly": _MIXTURE,
    "prompt_tuning": _TOKENS,
    "multitask_prompt_tuning": _TOKENS,
    "p_tuning": _TOKENS,
    "prefix_tuning": _TOKENS,
    "adaption_prompt": _TOKENS,
    "cpt": _TOKENS,
    "cartridge": _TOKENS,
    "ln_tuning": "it trains the norms in full: name them in adapter.modules_to_save beside method 'lora'",
    "trainable_tokens": "it trains rows of the embedding: name it in adapter.modules_to_save",
    "osf": "it trains the weights themselves, as large as the model",
    "psoft": _SVD,
    "frod": _SVD,
    "tinylora": _SVD,
    "pvera": "it draws noise in every forward pass of training, beside the seeds of a run",
    "adamss": "it chooses subspaces by clustering on each machine, and moves them while it trains",
}


def find_method(adapter: AdapterConfig) -> Method:
    """The method of a config.

    Raises:
        ConfigError: there is no such method, it cannot be federated, or a key of the table does not go with it.
    """
    name = adapter.method
    if name in REFUSED:
        raise ConfigError(
            f"adapter.method {name!r} cannot be federated: {REFUSED[name]}; choose from: {_choice()}",
            code="method-not-federable",
        )
    if name not in METHODS:
        if name.upper() in _peft_types():
            raise ConfigError(
                f"adapter.method {name!r} of PEFT is not supported: choose from {_choice()}",
                code="method-not-supported",
            )
        raise ConfigError(f"unknown adapter.method {name!r}; {nearest(name.lower(), METHODS)}", code="unknown-name")
    method = METHODS[name]
    taken = PAIR_KEYS if method.pairs else tuple(method.keys)
    for key in PAIR_KEYS:
        if key not in taken and getattr(adapter, key) != AdapterConfig.model_fields[key].default:
            takes = f"takes {', '.join(taken)} and adapter.options" if taken else "takes adapter.options alone"
            raise ConfigError(
                f"adapter.{key} has no effect on method {name!r}, which {takes}: remove it", code="key-without-effect"
            )
    if method.pairs and adapter.options:
        raise ConfigError(
            f"adapter.options has no effect on LoRA methods such as {name!r}: remove {min(adapter.options)!r}",
            code="key-without-effect",
        )
    return method


def tuner_fields(method: Method, adapter: AdapterConfig) -> dict[str, Any]:
    """The fields of PEFT's config for a tuner, but for what it is put on.

    Raises:
        ConfigError: adapter.options names a field that PEFT's config does not have, or that another key decides.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type(method)]
    own = {entry.name for entry in dataclasses.fields(config_class)} - OURS
    by_keys = {inner: key for key, inner in method.keys.items()}
    for option in adapter.options:
        if option in by_keys:
            raise ConfigError(
                f"adapter.options.{option} is set by adapter.{by_keys[option]}: use that key", code="option-has-a-key"
            )
        if option not in own:
            raise ConfigError(
                f"adapter.options.{option} is not a field of PEFT's {config_class.__name__}; "
                f"{nearest(option, own - by_keys.keys())}",
                code="unknown-key",
            )
    return {
        **method.values,
        **{inner: getattr(adapter, key) for key, inner in method.keys.items()},
        **adapter.options,
    }


def peft_type(method: Method) -> Any:
    """PEFT's own value for the kind of a method."""
    return _peft_types()[method.peft_type]


def _peft_types() -> dict[str, Any]:
    from peft import PeftType

    return {kind.value: kind for kind in PeftType}


def _choice() -> str:
    return ", ".join(METHODS)
