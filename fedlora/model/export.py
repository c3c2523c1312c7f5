"""What a run leaves behind: an adapter in PEFT's own format, or a whole merged model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import BaseUpdate
from fedlora.assets import public_name
from fedlora.errors import ExportError, ModelError
from fedlora.model.base_model import Base
from fedlora.model.gguf_file import GGUF, to_gguf
from fedlora.model.model_card import NOTHING_SAID, Origin, card
from fedlora.model.pair_shapes import alpha_of
from fedlora.model.peft_tuners import ADAPTER, merged_weights, saved_tensors
from fedlora.model.plain import quiet_transformers
from fedlora.model.targets import in_any
from fedlora.passed_in import last_part, shown

PREFIX = "base_model.model."  # of every tensor in PEFT's files
PEFT_HEADS = ("classifier", "score")  # which PEFT's classes for classification train in full, unasked
READER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "bpe.codes",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
)
"""Files of a model's folder by which texts and pictures become its inputs."""


def save_adapter(
    base: Base, state: AdapterState, folder: Path, metadata: Mapping[str, Any], origin: Origin = NOTHING_SAID
) -> None:
    """Write an adapter that plain `PeftModel.from_pretrained(plain_base, folder)` loads.

    Ranks and alphas that differ by module become `rank_pattern` and `alpha_pattern`. The folder appears complete or not
    at all; an older one is replaced.

    Args:
        base: whose model the adapter is for.
        state: the adapter; trained on the pristine base (fold base updates in first, see `equivalent_adapter`).
        folder: gets adapter_config.json, adapter_model.safetensors, fedlora.json, the base's tokenizer or image
            processor, and a README.md with the Python that loads it.
        metadata: facts for fedlora.json.
        origin: for the README.md.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    from safetensors.torch import save_file

    base.require_fit(state)
    config, tensors = _lora_files(base, state) if base.method.pairs else _tuner_files(base, state)
    name, revision = named = _name(base, origin)
    config.base_model_name_or_path, config.revision = name, revision
    with _replaced(folder) as fresh:
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            fresh / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        _write_json(fresh / "adapter_config.json", _sorted(config.to_dict()))
        quantized = {} if base.config.quantize is None else {"quantize": base.config.quantize}
        _write_json(fresh / "fedlora.json", quantized | dict(metadata))
        _copy_reader(base, fresh)
        _write_card(base, fresh, base.recipe.snippet(*named), origin)


def _name(base: Base, origin: Origin) -> tuple[str, str | None]:
    """By what name and revision others find the base."""
    return (origin.base, base.config.revision) if origin.base else public_name(base.config)


def _write_card(base: Base, folder: Path, snippet: str, origin: Origin) -> None:
    names = getattr(base.model.config, "id2label", None) if "num_labels" in base.recipe.options else None
    name, recipe = last_part(shown(_name(base, origin)[0])), base.recipe
    text = card(name, recipe.checkpoint, recipe.auto_class, snippet, names or {}, origin)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _lora_files(base: Base, state: AdapterState) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's config and tensors of a LoRA variant."""
    from peft import LoraConfig

    pairs = {name: _at_least_one(pair) for name, pair in state.pairs.items()}
    rslora = base.method.root_scale
    ranks = {name: pair.rank for name, pair in pairs.items()}
    alphas = {name: _plain(alpha_of(pair.scale, pair.rank, rslora)) for name, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        task_type=_task_type(base),
        r=int(rank),
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=base.adapter_config.dropout,
        use_rslora=rslora,
        use_dora=base.method.magnitudes,
        target_modules=base.target_names,
        modules_to_save=[*base.heads, *base.random] or None,
        rank_pattern={f"^{name}": r for name, r in ranks.items() if r != rank},
        alpha_pattern={f"^{name}": a for name, a in alphas.items() if a != alpha},
        fan_in_fan_out=base.transposed,
        inference_mode=True,
    )
    tensors = {f"{PREFIX}{name}.lora_A.weight": pair.A for name, pair in pairs.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": pair.B for name, pair in pairs.items()}
    return config, tensors | _dense({**state.dense, **base.random_tensors()})


def _tuner_files(base: Base, state: AdapterState) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's config and tensors of any other method, frozen projections included."""
    base.write(state, frozenset())
    config = copy.deepcopy(base.peft_model.peft_config[ADAPTER])
    config.task_type = _task_type(base)
    config.target_modules, config.inference_mode = base.target_names, True
    config.modules_to_save = [*base.heads, *base.random] or None
    return config, saved_tensors(base.peft_model) | _dense(base.random_tensors())


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}": value for name, value in tensors.items()}


def peft_name(own: str) -> str:
    """The name in PEFT's files of one of `AdapterState.tensors`."""
    module, mark, factor = own.rpartition(":")
    return f"{PREFIX}{module}.lora_{factor}.weight" if mark else f"{PREFIX}{own}"


def save_with(adapter: Path, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a saved adapter again, with other values for some of its tensors.

    Args:
        adapter: A folder that `save_adapter` wrote.
        tensors: By the names of `AdapterState.tensors`.
        folder: Gets the files.

    Raises:
        ExportError: it has no such tensor, or one of another shape.
    """
    from safetensors.torch import load_file, save_file

    stored = load_file(adapter / "adapter_model.safetensors")
    for name, value in tensors.items():
        theirs = peft_name(name)
        if theirs not in stored or stored[theirs].shape != value.shape:
            raise ExportError(
                f"{str(adapter)!r} has no tensor {theirs!r} of shape {tuple(value.shape)}: name the adapter of the "
                "same run",
                code="other-adapter",
            )
        stored[theirs] = value
    with _replaced(folder) as fresh:
        shutil.copytree(adapter, fresh, dirs_exist_ok=True)
        save_file(stored, fresh / "adapter_model.safetensors", metadata={"format": "pt"})


def save_merged(
    base: Base,
    state: AdapterState,
    base_updates: Sequence[BaseUpdate],
    folder: Path,
    origin: Origin = NOTHING_SAID,
    *,
    gguf: bool = False,
) -> None:
    """Write a whole model, base and adapter in one, that the transformers class loads without PEFT.

    W = W0 + base updates + s B A is summed in float32 and rounded once. Tokenizer, chat templates, image processor and
    generation settings are the base's.

    Args:
        base: left pristine (version 0), with the adapter written.
        state: the adapter on top of them.
        base_updates: the whole log, from version 0.
        folder: appears complete or not at all; an older one is replaced.
        origin: for the README.md.
        gguf: whether it is one GGUF file instead of transformers' files.

    Raises:
        ExportError: no GGUF can be written of such a model.
        ModelError: the base is quantised, or adapter or base updates do not fit it.
    """
    base.rebase(0, ())  # the version held may come from another log
    base.rebase(base_updates[-1].version if base_updates else 0, base_updates)
    try:
        base.write(state, frozenset())  # the head's values are then among the model's tensors
        plain = _merged(base, state)
        with _replaced(folder) as fresh:
            with quiet_transformers():
                plain.save_pretrained(fresh)
            if (generation := getattr(base.model, "generation_config", None)) is not None:
                generation.to_json_file(fresh / "generation_config.json")
            _copy_reader(base, fresh, (*READER, "generation_config.json"))
            if gguf:
                to_gguf(fresh)
            _write_card(base, fresh, base.recipe.snippet_merged(GGUF if gguf else None), origin)
    finally:
        base.rebase(0, ())


def _merged(base: Base, state: AdapterState) -> Any:
    """A model of the base's class without any PEFT layer; it shares memory with the base where nothing was added."""
    values = {name: value.detach().cpu() for name, value in base.plain_state_dict().items()}
    if base.method.bilinear:
        for name, pair in state.pairs.items():
            values[f"{name}.weight"] = base.weights.merged(name, pair.delta().to(torch.float32)).cpu()
    else:
        values |= merged_weights(base.model, base.targets)
    model: Any = base.model
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        plain: Any = type(model)(config)
    plain.load_state_dict(values, strict=False, assign=True)
    plain.tie_weights()
    left = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if left:
        raise ModelError(f"the merged model lacks {left[0]!r}: export an adapter instead", code="not-mergeable")
    return plain


def _task_type(base: Base) -> str | None:
    """PEFT's class for a task wants the values of every module that it takes for a head; else name none."""
    taken = [name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in PEFT_HEADS]
    return base.task_type if all(in_any(name, (*base.heads, *base.random)) for name in taken) else None


def _at_least_one(pair: LoraPair) -> LoraPair:
    """PEFT knows no rank 0: an empty change becomes a pair of one zero unit."""
    if pair.rank:
        return pair
    return LoraPair(pair.A.new_zeros(1, pair.A.shape[1]), pair.B.new_zeros(pair.B.shape[0], 1), pair.scale)


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() else alpha


def _sorted(value: Any) -> Any:
    """PEFT keeps names in sets, whose order changes with each process: the same adapter shall give the same bytes."""
    if isinstance(value, Mapping):
        return {str(getattr(key, "value", key)): _sorted(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_reader(base: Base, folder: Path, files: Sequence[str] = READER) -> None:
    """Tokenizer, chat templates and processors: a local folder's files as they are, a hub model's written anew."""
    checkpoint = base.recipe.checkpoint
    source = Path(checkpoint.source)
    if source.is_dir():
        for path in (path for pattern in files for path in source.glob(pattern)):
            if path.is_file():
                to = folder / path.relative_to(source)
                to.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, to)
        return
    import transformers

    for auto in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        with suppress(OSError, ValueError, KeyError, ImportError):  # a model of text has no image processor
            auto.from_pretrained(checkpoint.source, **checkpoint.options).save_pretrained(folder)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Rename a folder, in place of an older one."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old)
    else:
        os.replace(fresh, folder)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends without an error."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())  # mkdtemp's are private
        put_in_place(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
