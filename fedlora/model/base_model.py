"""One loaded base model with an injected adapter, whose values are swapped in place.

Module names are the base model's own ("bert.encoder.layer.0.attention.self.query"), and dense tensors have their
parameter's name there ("classifier.weight"): no PEFT prefix leaves this file.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedlora.adapter import ALL_PARTS, AdapterState, LoraPair, PairShape, Part
from fedlora.aggregators import BaseUpdate
from fedlora.config import AdapterConfig, ModelConfig
from fedlora.errors import ModelError
from fedlora.hashing import tensors_digest
from fedlora.model.base_weights import BaseWeights
from fedlora.model.lora_init import STARTS, residual
from fedlora.model.new_weights import draw_anew
from fedlora.model.pair_shapes import alpha_of, pair_shape, require_fit
from fedlora.model.peft_methods import Method
from fedlora.model.peft_tuners import ADAPTER, frozen_digest, magnitudes, trained_tensors
from fedlora.model.plain import Recipe
from fedlora.model.targets import check_patterns, ends_with, is_transposed, linear_shape, suffixes
from fedlora.rng import derive


class Cache(Protocol):
    """Keeps results of a base's frozen weights."""

    def aside(self) -> AbstractContextManager[None]:
        """While it lasts, the model computes everything anew, and nothing of it is kept."""

    def rebased(self, changed: Set[str]) -> None:
        """Hear of the layers whose weights are not the pristine ones; may raise `ModelError`."""


@final
class Base:
    """A base model, its adapter's current values, and the version of its weights. Made by `load_base`.

    Args:
        peft_model: PEFT's wrapper around the transformers model with its layers injected.
        method: of the adapter.
        plain: the base's own linear layers by name.
        targets: names of the modules with a pair, in order.
        heads: names of the modules that are trained in full.
        drawn: names of the heads' parameters that are not the checkpoint's, so that the seed draws them.
        frozen: names of the modules outside the heads with weights that the checkpoint does not hold.
        notes: what is to be said once of weights that are not the checkpoint's.
        plain_names: of the tensors of the model before anything was injected.
        seed: by which PEFT drew the adapter of a method that is no LoRA; None for a LoRA variant.
        recipe: how the plain base is loaded without us.
        fingerprint: a function that hashes the pristine weights' identity; called at most once.

    Attributes:
        peft_model: PEFT's wrapper, for exports.
        method: of the adapter.
        model: to be called by a task; its dropout is on or off by `train_mode`.
        device: where it computes: of several, the first.
        devices: all of them.
        dtype: of the frozen weights.
        adapter_dtype: of all that is trained: float64 for a float64 base, float32 for any other.
        weights: the versions of the frozen weights.
        history: the last version that `fedlora.model.base_history` made, and its digest.
        cache: keeps results of the frozen weights, if whoever opened the base has given it one.
        attention: transformers' name of the attention that the model was loaded with.
        coupled: why an example's result depends on the examples beside it, if whoever opened the base has found so.
        needs_padding: why its layers must compute padding too, if they were tried without in vain.
        alone: why clients cannot train side by side, if they were tried together in vain.
        pass_tokens: the most tokens of a training pass, where memory was found to allow no more.
        checked: trained parts with which the model passed the check before private training.
        drops_out: whether anything may be dropped out in training, once a training has looked; it is not asked again.
        config: the model's table of the run's config.
        adapter_config: the adapter's table.
        task_type: PEFT's name of the task, for exports.
        key: `fedlora.model.loading.base_key` of what was loaded.
        recipe: how the plain base is loaded without us.
        targets: modules with a pair, in order.
        heads: modules trained in full, in order.
        random: modules outside the heads whose frozen weights the checkpoint does not hold; exports carry them.
        notes: one line each on weights that are not the checkpoint's, to be said once a run.
    """

    def __init__(
        self,
        peft_model: Any,
        *,
        method: Method,
        plain: Mapping[str, nn.Module],
        targets: Sequence[str],
        heads: Sequence[str],
        drawn: Iterable[str],
        frozen: Sequence[str],
        notes: Sequence[str],
        plain_names: Iterable[str],
        seed: int | None,
        config: ModelConfig,
        adapter_config: AdapterConfig,
        task_type: str | None,
        key: str,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        fingerprint: Callable[[], str],
    ) -> None:
        model: nn.Module = peft_model.base_model.model
        self.peft_model, self.method, self.model = peft_model, method, model
        self.config, self.adapter_config, self.task_type, self.recipe = config, adapter_config, task_type, recipe
        self.device, self.dtype, self.key = device, dtype, key
        self.devices = tuple(dict.fromkeys((device, *(value.device for value in model.parameters()))))
        self.adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.targets, self.heads = tuple(targets), tuple(heads)
        self.random, self.notes = tuple(frozen), tuple(notes)
        self.weights = BaseWeights(plain)
        self.history: tuple[int, str] = (0, "")
        self.cache: Cache | None = None
        self.attention: str | None = getattr(getattr(model, "config", None), "_attn_implementation", None)
        self.coupled: str | None = None
        self.needs_padding: str | None = None
        self.alone: str | None = None
        self.pass_tokens: int | None = None
        self.checked: set[frozenset[Part]] = set()
        self.drops_out: bool | None = None
        self._drawn, self._fingerprint = frozenset(drawn), fingerprint
        self._plain_names, self._seed = frozenset(plain_names), seed
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets} if method.pairs else {}
        self._wrappers: dict[str, Any] = {name: model.get_submodule(name) for name in heads}
        self._shapes = {name: linear_shape(plain[name]) for name in targets}
        self._layouts: dict[int, dict[str, PairShape]] = {}
        check_patterns(adapter_config, self.targets)
        for layer in self._layers.values():
            layer.lora_A.to(self.adapter_dtype), layer.lora_B.to(self.adapter_dtype)
        for wrapper in self._wrappers.values():
            wrapper.modules_to_save.to(self.adapter_dtype)
            if self.dtype != self.adapter_dtype:
                wrapper.modules_to_save[ADAPTER].register_forward_pre_hook(self._widen, with_kwargs=True)
        beside = magnitudes(self._layers, self.adapter_dtype) if method.magnitudes else {}
        if not method.pairs:
            beside = trained_tensors(model, self.adapter_dtype)
        self._beside = {name: _copy(parameter) for name, parameter in beside.items()}
        self._dense: dict[str, Parameter] = beside | {
            f"{name}.{inner}": parameter
            for name, wrapper in self._wrappers.items()
            for inner, parameter in wrapper.modules_to_save[ADAPTER].named_parameters()
        }
        digests = [] if method.pairs else [frozen_digest(model, self.targets)]
        digests += [tensors_digest(self.random_tensors())] if self.random else []
        self._frozen = " ".join(digests)
        model.requires_grad_(False)
        model.eval()

    # ------------------------------------------------------------------------------------------ the adapter

    def layout(self, rank: int | None = None) -> dict[str, PairShape]:
        """Shape and scale of each pair for a client of a given rank; empty for a method without pairs.

        A rank from `rank_pattern` is scaled by rank / adapter.rank, rounded, and at least 1. With alpha_scaling =
        "proportional" alpha grows with the rank, so that alpha / rank is the same for all clients.

        Args:
            rank: the client's; None for adapter.rank.
        """
        config = self.adapter_config
        wanted = config.rank if rank is None else rank
        if wanted < 1:
            raise ModelError(f"a client's rank must be 1 or more, not {wanted}", code="out-of-range")
        if wanted != config.rank and (self.method.whole_rank or not self.method.pairs):
            raise ModelError(
                f"method {self.method.name!r} cannot train a client at rank {wanted}, its adapters all have "
                f"adapter.rank {config.rank}: remove clients.ranks and the ranks of profiles, or use method 'lora'",
                code="mixed-ranks",
            )
        if wanted not in self._layouts:
            self._layouts[wanted] = {
                name: pair_shape(config, self.method, name, self._shapes[name], wanted) for name in self._layers
            }
        return dict(self._layouts[wanted])

    def initial_adapter(self, seed: int) -> AdapterState:
        """The adapter that training starts from: pairs as the method draws them, and the head as its model class does.

        A function of the seed and of the pristine weights. Head parameters that the checkpoint holds keep its values.
        What is no pair (a magnitude, another tuner's tensors) is as PEFT drew it when the base was loaded.

        Raises:
            ModelError: the base was loaded for another seed, or is quantised and the method starts from its weights.
        """
        if self._seed not in (None, seed):
            raise ModelError(
                f"the base was loaded with the adapter of seed {self._seed}, not of seed {seed}: load it for that seed",
                code="seed-mismatch",
            )
        dense: dict[str, Tensor] = dict(self._beside)
        for name, wrapper in self._wrappers.items():
            module = copy.deepcopy(wrapper.original_module).to("cpu", self.adapter_dtype)
            known = {inner: value.detach().clone() for inner, value in module.named_parameters()}
            draw_anew(module, derive(seed, "head", name), getattr(self.model, "_init_weights", None))
            for inner, value in module.named_parameters():
                full = f"{name}.{inner}"
                dense[full] = value.detach().clone() if full in self._drawn else known[inner]
        start, key = STARTS[self.method.start], derive(seed, "init")
        pairs = {
            name: start(shape, derive(key, "fresh", name), self.adapter_dtype, partial(self.weights.pristine, name))
            for name, shape in self.layout().items()
        }
        return AdapterState(pairs, dense)

    def initial_base_updates(self, adapter: AdapterState) -> tuple[BaseUpdate, ...]:
        """What the base gives up when training starts from `initial_adapter`; see `fedlora.model.lora_init`."""
        return residual(adapter) if self.method.bilinear else ()

    def write(self, state: AdapterState, trains: frozenset[Part] = ALL_PARTS) -> list[Parameter]:
        """Put an adapter's values into the model; pairs of another rank than the present one are resized.

        Args:
            state: is copied, never aliased. A core goes into B.
            trains: the parts that shall receive gradients; everything else in the model is frozen.

        Returns:
            The parameters that train, in an order that depends on the model alone.

        Raises:
            ModelError: if the adapter does not fit the model.
        """
        self.require_fit(state)
        state = _sent(state, self.device, self.adapter_dtype)
        trained: list[Parameter] = []
        train_A, train_B, train_core, train_dense = (part in trains for part in ("A", "B", "R", "dense"))
        with torch.no_grad():
            for name, layer in self._layers.items():
                pair = state.pairs[name]
                down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
                if layer.r[ADAPTER] != pair.rank:
                    layer.r[ADAPTER] = down.out_features = up.in_features = pair.rank
                    down.weight, up.weight = self._new(pair.A, down), self._new(pair.up, up)
                else:
                    down.weight.copy_(pair.A)
                    up.weight.copy_(pair.up)
                layer.scaling[ADAPTER] = pair.scale
                layer.lora_alpha[ADAPTER] = alpha_of(pair.scale, pair.rank, self.method.root_scale)
                _set_trained(down.weight, train_A, trained)
                _set_trained(up.weight, train_B or (train_core and pair.core is not None), trained)
            for name, parameter in self._dense.items():
                parameter.copy_(state.dense[name])
                _set_trained(parameter, train_dense, trained)
        return trained

    def read(self) -> AdapterState:
        """Copies of the adapter's present values, on the CPU, in `adapter_dtype`."""
        pairs = {
            name: LoraPair(
                _copy(layer.lora_A[ADAPTER].weight), _copy(layer.lora_B[ADAPTER].weight), layer.scaling[ADAPTER]
            )
            for name, layer in self._layers.items()
        }
        return AdapterState(pairs, {name: _copy(parameter) for name, parameter in self._dense.items()})

    def require_fit(self, state: AdapterState) -> None:
        """Raise `ModelError` unless an adapter has this model's modules, parameters and shapes, of any ranks."""
        require_fit(state, {name: self._shapes[name] for name in self._layers}, self._dense)

    @property
    def pair_layers(self) -> Mapping[str, nn.Module]:
        """PEFT's layers around the adapted modules, by the modules' names, in order."""
        return self._layers

    @property
    def head_modules(self) -> Mapping[str, nn.Module]:
        """The trained copies of the modules that are trained in full, by name, in order."""
        return {name: wrapper.modules_to_save[ADAPTER] for name, wrapper in self._wrappers.items()}

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters of the adapter, by the names of `AdapterState.tensors`."""
        pairs = {
            f"{name}:{part}": matrices[ADAPTER].weight
            for name, layer in self._layers.items()
            for part, matrices in (("A", layer.lora_A), ("B", layer.lora_B))
        }
        return {**pairs, **self._dense}

    def tensor_names(self, parts: Iterable[Part] = ALL_PARTS) -> list[str]:
        """Names of an adapter's tensors of some parts, as in `AdapterState.tensors`, in the order of `write`."""
        chosen = set(parts)
        names = [f"{name}:{part}" for name in self._layers for part in ("A", "B", "R") if part in chosen]
        return names + (list(self._dense) if "dense" in chosen else [])

    def train_mode(self, training: bool) -> None:
        """Dropout on, as the model's config says, or off. Layers with running statistics stay as in evaluation."""
        if self.model.training == training:
            return
        self.model.train(training)
        if training:
            for module in self._with_statistics:
                module.eval()

    # ------------------------------------------------------------------------------------------ the frozen weights

    @property
    def transposed(self) -> bool:
        """Whether the adapted layers store their weights as [d_in, d_out]: PEFT's fan_in_fan_out."""
        return is_transposed(self.model.get_submodule(self.targets[0]).get_base_layer())  # type: ignore[operator]

    @property
    def target_names(self) -> list[str]:
        """The shortest names that mean the adapted modules and no others: their last parts if these are clear."""
        short = suffixes(self.targets)
        inner = tuple(f"{name}." for name in (*self.targets, *self.heads))
        others = [n for n, _ in self.model.named_modules() if n not in self.targets and not n.startswith(inner)]
        clear = not any(ends_with(name, ending) for name in others for ending in short)
        return sorted(short if clear else self.targets)

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The model's tensors as they are now, without any pair, by the names of the plain base model."""
        out: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            if f".modules_to_save.{ADAPTER}." in name:
                out[name.replace(f".modules_to_save.{ADAPTER}.", ".")] = value.to(self.dtype)
            elif (plain := name.replace(".base_layer.", ".")) in self._plain_names:
                out[plain] = value
        return out

    def random_tensors(self) -> dict[str, Tensor]:
        """The tensors of the `random` modules, by name."""
        return {
            f"{name}.{inner}": value
            for name in self.random
            for inner, value in self.model.get_submodule(name).state_dict().items()
        }

    @property
    def base_version(self) -> int:
        """Version of the frozen weights; 0 for the pristine ones."""
        return self.weights.version

    def rebase(self, base_version: int, base_updates: Sequence[BaseUpdate]) -> None:
        """Bring the frozen weights to a version; see `BaseWeights.rebase`."""
        self.weights.rebase(base_version, base_updates)
        if self.cache is not None:
            self.cache.rebased(self.weights.changed)

    def uncached(self) -> AbstractContextManager[None]:
        """While it lasts, the model computes everything anew, and nothing of it is kept."""
        return nullcontext() if self.cache is None else self.cache.aside()

    def discard(self) -> None:
        """Free the memory of all weights. The base is of no use afterwards; let go of what keeps it, too."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.new_empty(0)
        self.weights.discard()
        self.cache = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the pristine weights' identity, and of what was drawn and frozen beside them.

        Equal on two machines that loaded the same base."""
        weights = self.weights_digest
        return hashlib.sha256(f"{weights} {self._frozen}".encode()).hexdigest() if self._frozen else weights

    @cached_property
    def weights_digest(self) -> str:
        """Hash of the pristine weights' identity alone, the same for every seed."""
        return self._fingerprint()

    # ------------------------------------------------------------------------------------------ inside

    def _new(self, value: Tensor, layer: nn.Linear) -> Parameter:
        device = layer.weight.device
        return Parameter(value.detach().to(device, self.adapter_dtype).clone(memory_format=torch.contiguous_format))

    def _widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dtype = next((p.dtype for p in module.parameters()), self.adapter_dtype)

        def wide(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return tuple(map(wide, args)), {key: wide(value) for key, value in kwargs.items()}

    @cached_property
    def _with_statistics(self) -> tuple[nn.Module, ...]:
        return tuple(m for m in self.model.modules() if getattr(m, "running_mean", None) is not None)


def _set_trained(parameter: Parameter, train: bool, trained: list[Parameter]) -> None:
    parameter.requires_grad = train
    parameter.grad = None
    if train:
        trained.append(parameter)


def _sent(state: AdapterState, device: torch.device, dtype: torch.dtype) -> AdapterState:
    """An adapter on a GPU, in one copy for all of its tensors, since each is waited for; elsewhere as it is."""
    tensors = state.tensors()
    if device.type != "cuda" or not tensors:
        return state
    flat = torch.cat([value.reshape(-1).to(dtype) for value in tensors.values()]).to(device)
    parts = flat.split([value.numel() for value in tensors.values()])
    named = zip(tensors.items(), parts, strict=True)
    return state.with_tensors({name: part.view(value.shape) for (name, value), part in named})


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
