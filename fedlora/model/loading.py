"""Loads a base model and injects an adapter; `fedlora.training.workspace` keeps it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fedlora.assets import Checkpoint
from fedlora.config import AdapterConfig, RunConfig
from fedlora.errors import ModelError
from fedlora.model.base_model import Base
from fedlora.model.base_weights import plain_linears
from fedlora.model.classes import are_numbers, in_trained_order, trained_classes
from fedlora.model.device import resolve_device, seeded
from fedlora.model.dropout import set_dropout
from fedlora.model.dtype import choose_dtype, warning_of
from fedlora.model.fingerprint import fingerprint
from fedlora.model.new_weights import MISSING, draw_absent, frozen_modules, require_apart, require_whole
from fedlora.model.peft_methods import Method, find_method, peft_type, tuner_fields
from fedlora.model.peft_tuners import ADAPTER
from fedlora.model.placement import first_device, placement
from fedlora.model.plain import Recipe, quiet_transformers
from fedlora.model.quantize import keep_layout, keep_whole, note_of, own_dtype, quantization, require_whole_heads
from fedlora.model.targets import (
    beyond_layers,
    in_any,
    is_linear,
    is_transposed,
    linear_shape,
    resolve_heads,
    resolve_targets,
)
from fedlora.rng import derive


def base_key(
    config: RunConfig,
    auto_class: str,
    head: Sequence[str],
    model_kwargs: Mapping[str, Any] | None,
    peft_task_type: str | None,
) -> str:
    """What decides which base `load_base` gives, of its arguments and of the checkpoint's files, as one string."""
    return json.dumps(
        [
            config.digest("model", "adapter"),
            None if find_method(config.adapter).pairs else config.seed,  # by which PEFT draws what is no pair
            [auto_class, list(head), dict(model_kwargs or {}), peft_task_type],
            [str(resolve_device(config.runtime.device)), config.runtime.device_map],
            Checkpoint.of(config.model).stamps(),  # a folder that was changed since is another base
        ],
        sort_keys=True,
        default=str,
    )


def load_base(
    config: RunConfig,
    auto_class: str,
    head: Sequence[str] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    peft_task_type: str | None = None,
    *,
    only_shapes: bool = False,
) -> Base:
    """The base model of a config with an adapter injected.

    Args:
        config: of which the model, adapter and runtime.device matter; and the seed, for a method that is no LoRA.
        auto_class: name of the transformers class, such as "AutoModelForSequenceClassification".
        head: candidates for the modules that are trained in full, unless adapter.modules_to_save names some.
        model_kwargs: for `from_pretrained`, such as `num_labels`.
        peft_task_type: PEFT's name of the task, such as "SEQ_CLS", written into exports.
        only_shapes: whether to leave out the weights: a base on torch's meta device, from the model's config alone.

    Raises:
        ConfigError: an unknown device, method or pattern.
        ModelError: the model cannot be loaded, or the adapter cannot be put on it.
    """
    key = base_key(config, auto_class, head, model_kwargs, peft_task_type)
    device, model_kwargs = resolve_device(config.runtime.device), dict(model_kwargs or {})
    if only_shapes:
        device = torch.device("meta")
    method = find_method(config.adapter)
    dtype = choose_dtype(config)
    checkpoint = Checkpoint.of(config.model)
    stamps = checkpoint.stamps()
    # Parameters that the checkpoint lacks are drawn while loading: the same ones in every process.
    with seeded(derive(0, "base"), torch.device("cpu")), device if only_shapes else nullcontext():
        load = _from_config if only_shapes else _from_pretrained
        model, absent = load(config, auto_class, model_kwargs, dtype, device)
        dtype = own_dtype(model, dtype)
        quantized, said = {}, None if only_shapes else note_of(config, model)
        if config.model.quantize is not None and not only_shapes:
            how = model.config.quantization_config  # type: ignore[union-attr]
            quantized = {"quantization_config": how}
        model.requires_grad_(False)
        if config.model.dropout is not None:
            set_dropout(model, config.model.dropout)
        device, spread = first_device(config, model, device)
        experts = beyond_layers(model)
        stays = spread or getattr(model, "is_quantized", False)
        if not stays:
            model.to(device)
        heads = resolve_heads(model, config.adapter, head)
        require_whole_heads(model, heads, config.model.name)
        if not config.model.ignore_mismatched_sizes:
            require_whole(model, absent, heads, bool(head), config.model.name)
        frozen = frozen_modules(model, absent, heads)
        targets = resolve_targets(model, config.adapter, heads, without=frozen)
        require_apart(frozen, (*heads, *targets))
        options = {key: value for key, value in model_kwargs.items() if key not in ("id2label", "label2id")}
        if any(matter != MISSING for matter in absent.values()):
            options["ignore_mismatched_sizes"] = True
        names = list((model_kwargs.get("id2label") or {}).values())
        trained = trained_classes(checkpoint)
        new = absent.keys() | _other_classes(model, heads, names, trained)
        drawn = [name for name, _ in model.named_parameters() if name in new and in_any(name, heads)]
        plain = plain_linears(model)
        plain_names = frozenset(model.state_dict())
        with seeded(derive(config.seed, "tuner"), torch.device("cpu")):
            peft_model = _inject(model, method, config.adapter, targets, heads)
    for name in targets:  # PEFT wrapped these; what follows base updates is the layer inside
        plain[name] = model.get_submodule(name).get_base_layer()  # type: ignore[operator]
    commit = getattr(model.config, "_commit_hash", None)
    return Base(
        peft_model,
        method=method,
        plain={name: module for name, module in plain.items() if not in_any(name, heads)},
        targets=targets,
        heads=heads,
        drawn=drawn,
        frozen=frozen,
        recipe=Recipe(auto_class, checkpoint, dtype, options, quantized, placement(config, device) if stays else {}),
        notes=[*_notes(drawn, frozen, trained, names), *filter(None, [experts, said, warning_of(config)])],
        plain_names=plain_names,
        seed=None if method.pairs else config.seed,
        config=config.model,
        adapter_config=config.adapter,
        task_type=peft_task_type,
        key=key,
        device=device,
        dtype=dtype,
        fingerprint=lambda: fingerprint(checkpoint, commit, stamps, config.model.quantize),
    )


def _from_pretrained(
    config: RunConfig, auto_class: str, model_kwargs: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, dict[str, str]]:
    """The model, and the tensors that are not the checkpoint's, with what is the matter with each."""
    import transformers

    checkpoint = Checkpoint.of(config.model)
    auto = getattr(transformers, auto_class)
    _require_pad_row(checkpoint, model_kwargs.get("pad_token_id"))
    where = placement(config, device)
    if config.model.quantize is not None:
        with torch.device("meta"):
            shapes, _ = _from_config(config, auto_class, model_kwargs, dtype, device)
        where |= quantization(config, shapes, dtype)
    try:
        with quiet_transformers():  # its report on absent weights is replaced by ours
            model, info = auto.from_pretrained(
                checkpoint.source,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # `new_weights` says which may be, and knows the head
                output_loading_info=True,
                **{**checkpoint.options, "revision": config.model.revision},
                **model_kwargs,
                **where,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from files of others, by readers of many kinds
        why = checkpoint.why_not_loaded(error)
        raise ModelError(
            f"the model {config.model.name!r} cannot be loaded with {auto_class}: {why}", code="model-not-loadable"
        ) from error
    keep_layout(model)
    absent = dict.fromkeys(info.get("missing_keys", ()), MISSING)
    for name, found, wanted in info.get("mismatched_keys", ()):
        absent[name] = f"has shape {list(found)} there and {list(wanted)} in the model"
    if config.model.quantize is not None:
        keep_whole(model, absent)
    draw_absent(model, absent)
    return model, absent


def _from_config(
    config: RunConfig, auto_class: str, model_kwargs: Mapping[str, Any], dtype: torch.dtype, _device: torch.device
) -> tuple[nn.Module, dict[str, str]]:
    """A model with the shapes and none of the weights that `_from_pretrained` gives."""
    import transformers

    checkpoint = Checkpoint.of(config.model)
    try:
        shape = transformers.AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options, **model_kwargs)
        return getattr(transformers, auto_class).from_config(shape, dtype=dtype), {}
    except Exception as error:
        raise ModelError(
            f"the config of the model {config.model.name!r} cannot be read with {auto_class}: "
            f"{checkpoint.why_not_loaded(error)}",
            code="model-not-loadable",
        ) from error


def _require_pad_row(checkpoint: Checkpoint, pad_id: int | None) -> None:
    """Refuse a padding token without a row: some models fail by it while they are built, in words of torch's."""
    rows = checkpoint.config_value("vocab_size")
    if pad_id is not None and isinstance(rows, int) and pad_id >= rows:
        raise ModelError(
            f"the tokenizer of {str(checkpoint)!r} has a padding token with id {pad_id}, and the model's embeddings "
            f"have rows 0 to {rows - 1}: set another padding token in the tokenizer, or add rows with "
            "model.resize_token_embeddings(len(tokenizer)) and save both",
            code="token-without-embedding",
        )


def _notes(drawn: Sequence[str], frozen: Sequence[str], trained: Sequence[str], names: Sequence[str]) -> list[str]:
    """What a run says once about weights that are not the checkpoint's."""
    notes = []
    if drawn:
        why = ""
        if trained and names and in_trained_order(names, trained) is None:
            why = f"; its own is for {_few(trained)}, and would be kept if task.labels named these"
        new = _modules(drawn)
        verb = "is" if len(new) == 1 else "are"
        notes.append(f"the checkpoint has no head for this task: {', '.join(new)} {verb} new{why}")
    elif trained and names:
        notes.append(f"the checkpoint's head is kept, in its own order of classes: {_few(names)}")
    elif names and not are_numbers(names):
        notes.append(f"the checkpoint's head is kept, whose classes have no names: they are taken to be {_few(names)}")
    if frozen:
        notes.append(
            f"the checkpoint does not hold {_few(frozen)}: drawn at random, the same for everybody, frozen, and "
            "exported with the adapter; to train it, name it in adapter.modules_to_save"
        )
    return notes


def _other_classes(model: nn.Module, heads: Sequence[str], names: Sequence[str], trained: Sequence[str]) -> set[str]:
    """The tensors of the head's last layer if the checkpoint trained it for other classes, as many as ours."""
    if not trained or not names or are_numbers(names) or in_trained_order(names, trained) is not None:
        return set()
    layers = [
        name
        for name, module in model.named_modules()
        if in_any(name, heads) and is_linear(module) and linear_shape(module)[0] == len(names)
    ]
    return {f"{layer}.{inner}" for layer in layers[-1:] for inner, _ in model.get_submodule(layer).named_parameters()}


def _modules(tensors: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors))


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _inject(
    model: nn.Module, method: Method, adapter: AdapterConfig, targets: Sequence[str], heads: Sequence[str]
) -> Any:
    """PEFT's wrapper around the model."""
    from peft import LoraConfig, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    # Anchored full names as one expression: PEFT matches a list by endings, and would take modules of the head too.
    places: dict[str, Any] = {
        "target_modules": "|".join(re.escape(name) for name in targets),
        "modules_to_save": list(heads) or None,
    }
    config: Any
    if method.pairs:
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=adapter.dropout,
            use_rslora=method.root_scale,
            use_dora=method.magnitudes,
            fan_in_fan_out=is_transposed(model.get_submodule(targets[0])),
            **places,
        )
    try:
        with warnings.catch_warnings(), _names_of_this_version():
            warnings.simplefilter("ignore")  # on fan_in_fan_out, which it corrects for each layer
            if not method.pairs:
                kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type(method)]
                config = kind(**places, **tuner_fields(method, adapter))
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
    except (ValueError, TypeError, ImportError, RuntimeError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"PEFT cannot apply method {method.name!r} to these modules: {first}; change adapter.options or "
            "adapter.targets, or use method 'lora'",
            code="modules-refused-by-peft",
        ) from error
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    if set(adapted) != set(targets) or set(wrapped) != set(heads):
        odd = min((set(adapted) ^ set(targets)) | (set(wrapped) ^ set(heads)))
        raise ModelError(
            f"PEFT did not adapt exactly the chosen modules, {odd!r} differs: give longer names in adapter.targets "
            "and adapter.modules_to_save",
            code="targets-ambiguous",
        )
    return peft_model


@contextmanager
def _names_of_this_version() -> Iterator[None]:
    """Inside, PEFT takes target modules as they are named.

    For models with experts it takes them for names of transformers 4, and reduces an expression to the last parts of
    what it matches: modules of all layers, where some were chosen. Ours are names of the model at hand.
    """
    from peft.utils import transformers_weight_conversion as conversion

    before = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_args, **_options: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = before
