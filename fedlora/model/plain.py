"""What was exported, loaded as anybody would: by transformers and PEFT alone, and compared with what was trained.

Nothing of ours touches the loaded model: no kernels, no attention function, no hooks that leave rows out. A base of its
own is loaded for it, whose absent weights are drawn from another seed than ours: what an export forgot differs.

The comparison is of logits, as the largest difference over the largest logit. Two correct computations of the same
network differ by the order of their sums: about 1e-6 in float32 and 1e-2 in bfloat16, a few units of the last place.
A lost pooler, scale or label order makes a difference of the order of 1; TOLERANCE lies between. Where logits are small
differences of large terms, as with a head that has hardly been trained, rounding is larger than that. What is above
TOLERANCE is therefore compared with the same loaded model in a wider dtype, which also says how large its rounding is.

Shapes: b = examples, t = tokens, c = classes or vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.assets import ASSETS, Checkpoint
from fedlora.errors import ExportError, in_words
from fedlora.memory import widest
from fedlora.model.device import seeded
from fedlora.model.quantize import keep_layout
from fedlora.passed_in import last_part
from fedlora.rng import derive

Inputs = Mapping[str, Tensor]
"""Arguments of a model's forward: "input_ids" and "attention_mask" [b, t], or "pixel_values"."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Dtype of the base -> a difference of logits that is taken for rounding, as a share of the largest logit."""
WIDER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
ROUNDINGS = 4.0
"""So many times the loaded model's own rounding the trained model may be from it: kernels and base updates round."""
LARGEST = 0.5
"""No difference above it is rounding."""


@dataclass(frozen=True)
class Recipe:
    """How a base model is loaded without us.

    Args:
        auto_class: name of the transformers class.
        checkpoint: where its files are.
        dtype: of its weights.
        options: other arguments of `from_pretrained`, such as `num_labels`.
        quantized: those by which weights are quantised; empty: they are not.
        placed: those by which weights go to where they stay; empty: they can be moved.
    """

    auto_class: str
    checkpoint: Checkpoint
    dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)
    quantized: Mapping[str, Any] = field(default_factory=dict)
    placed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """All keyword arguments of `from_pretrained` that are not its defaults."""
        given: dict[str, Any] = {"revision": self.checkpoint.revision} if self.checkpoint.revision else {}
        if self.checkpoint.trust_remote_code:
            given["trust_remote_code"] = True
        return {**given, "dtype": self.dtype, **self.options}

    def snippet_merged(self, gguf: str | None = None) -> str:
        """Python that loads the whole model in the folder beside it, or in a GGUF file there."""
        more = ", trust_remote_code=True" if self.checkpoint.trust_remote_code else ""
        more += "" if gguf is None else f', gguf_file="{gguf}"'
        return (
            f"import torch\nfrom transformers import {self.auto_class}\n\n"
            f'model = {self.auto_class}.from_pretrained("this folder", dtype={self.dtype}{more}).eval()\n'
        )

    def snippet(self, name: str, revision: str | None) -> str:
        """Python that loads the base, a folder by its last part alone, and the adapter in the folder beside it.

        Args:
            name: by which others find the base: on the hub, of an asset, or a folder's path.
            revision: of a hub name.
        """
        arguments = {**({"revision": revision} if revision else {}), **self.arguments}
        words = "".join(f", {key}={value!r}" for key, value in arguments.items())
        names = self.auto_class
        if self.quantized:
            how = self.quantized["quantization_config"].to_diff_dict()
            names += ", BitsAndBytesConfig"
            words += f", quantization_config=BitsAndBytesConfig(**{how!r})"
        if name in ASSETS:
            note = f"# the base model's folder: fedlora assets {name} puts it into ~/.cache/fedlora/assets\n"
        else:
            note = "" if name == last_part(name) else "# the base model's folder: write where yours is\n"
        return (
            "import torch\n"
            "from peft import PeftModel\n"
            f"from transformers import {names}\n\n"
            f"{note}base = {self.auto_class}.from_pretrained({last_part(name)!r}{words})\n"
            'model = PeftModel.from_pretrained(base, "this folder").eval()\n'
        )

    def load(self, folder: Path | None = None, gguf: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """The base, or a whole model from a folder or a GGUF file in it, and transformers' report on its weights."""
        import transformers

        auto = getattr(transformers, self.auto_class)
        given: dict[str, Any] = {**self.arguments, **self.quantized} if folder is None else {"dtype": self.dtype}
        if folder is not None and self.checkpoint.trust_remote_code:
            given["trust_remote_code"] = True
        if gguf is not None:
            given["gguf_file"] = gguf
        given |= self.placed
        with quiet_transformers():
            model, info = auto.from_pretrained(folder or self.checkpoint.source, output_loading_info=True, **given)
        return model.eval(), dict(info)


@dataclass(frozen=True)
class Reference:
    """What the trained model says to some inputs.

    Args:
        inputs: batches, on the CPU.
        logits: for each, of the tokens that are no padding, [b, c] or [tokens, c], on the CPU.
    """

    inputs: tuple[Inputs, ...]
    logits: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, inputs: Sequence[Inputs], device: torch.device) -> Reference:
        """What a model says as it is now."""
        return cls(tuple(inputs), tuple(_logits(model, batch, device) for batch in inputs))

    def difference(self, model: nn.Module, device: torch.device) -> float:
        """The largest difference of another model's logits; see `apart`."""
        return self.apart(Reference.of(model, self.inputs, device))

    def apart(self, other: Reference) -> float:
        """The largest difference of logits, as a share of the largest logit; infinite where one is no number."""
        worst = 0.0
        for wanted, found in zip(self.logits, other.logits, strict=True):
            if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
                return float("inf")
            scale = max(float(wanted.abs().max()), torch.finfo(wanted.dtype).tiny)
            worst = max(worst, float((found - wanted).abs().max()) / scale)
        return worst


def verify_adapter(folder: Path, recipe: Recipe, reference: Reference, device: torch.device) -> float:
    """Load an adapter with plain transformers and PEFT, and compare it with what was trained.

    Args:
        folder: in PEFT's format.
        recipe: of its base.
        reference: what the trained model says.
        device: to compute on.

    Returns:
        The largest difference of the logits, as a share of the largest logit.

    Raises:
        ExportError: the adapter cannot be loaded, not all of it is used, or the logits differ.
    """
    with _as_export_error("plain PEFT cannot load it"):
        model = _with_adapter(folder, recipe)
        if recipe.placed:  # is where it was loaded, and has no wider form
            return _require_near(reference, model, device, recipe.dtype, "plain PEFT", widen=False)
        return _require_near(reference, model.to(device), device, recipe.dtype, "plain PEFT")


def verify_merged(
    folder: Path, recipe: Recipe, reference: Reference, device: torch.device, gguf: str | None = None
) -> float:
    """Load a merged model with plain transformers, and compare it with what was trained; see `verify_adapter`."""
    with _as_export_error("plain transformers cannot load it"):
        model, info = recipe.load(folder, gguf)
        model = model if recipe.placed else model.to(device)
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if found := info.get(what):
                raise ExportError(
                    f"plain transformers reports {what.replace('_', ' ')}: {min(map(str, found))}",
                    code="tensors-differ",
                )
        return _require_near(reference, model, device, recipe.dtype, "plain transformers", widen=not recipe.placed)


def _with_adapter(folder: Path, recipe: Recipe) -> nn.Module:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    base, _ = recipe.load()
    keep_layout(base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model: Any = PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
    if lacking := [str(entry.message) for entry in said if "missing adapter keys" in str(entry.message)]:
        raise ExportError(
            f"plain PEFT finds tensors missing: {lacking[0].splitlines()[0][:200]}", code="tensors-missing"
        )
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        if name not in held or not torch.equal(held[name].cpu(), value.to(held[name].dtype)):
            raise ExportError(f"plain PEFT does not use the exported tensor {name!r}", code="tensor-unused")
    return model.eval()


@torch.inference_mode()
def _logits(model: nn.Module, batch: Inputs, device: torch.device) -> Tensor:
    dtype = next(model.parameters()).dtype
    given = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in batch.items()
    }
    logits: Tensor = model(**given).logits
    mask = given.get("decoder_attention_mask", given.get("attention_mask"))
    if logits.ndim == 3 and mask is not None:  # of a language model: padding says anything
        logits = logits[mask.bool()]
    return logits.detach().to("cpu", torch.promote_types(logits.dtype, torch.float32)).clone()


def _require_near(
    reference: Reference, model: nn.Module, device: torch.device, dtype: torch.dtype, whose: str, *, widen: bool = True
) -> float:
    found = Reference.of(model, reference.inputs, device)
    difference, most = reference.apart(found), TOLERANCE[dtype]
    wider = WIDER.get(dtype) if widen else None
    if most < difference <= LARGEST and wider is not None and wider.itemsize <= widest(device).itemsize:
        exact = Reference.of(model.to(wider), reference.inputs, device)
        difference, most = reference.apart(exact), min(max(most, ROUNDINGS * found.apart(exact)), LARGEST)
    if not difference <= most:
        raise ExportError(
            f"the logits of {whose} differ from those of the trained model by {difference:.2g} of the largest one "
            f"(rounding explains at most {most:g})",
            code="logits-differ",
        )
    return difference


@contextmanager
def _as_export_error(what: str) -> Iterator[None]:
    """Whatever goes wrong in the others' code, the export is not verified, and what was trained is to be kept.

    Random draws are others than in training, and leave no trace in the process.
    """
    try:
        with seeded(derive(0, "elsewhere"), torch.device("cpu")):
            yield
    except ExportError:
        raise
    except Exception as error:
        first = next(iter(in_words(error).strip().splitlines()), "")
        raise ExportError(f"{what}: {first[:300]}", code="export-not-loadable") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers reports neither absent weights nor how far it has got."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
