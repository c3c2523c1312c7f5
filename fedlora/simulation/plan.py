"""What a run will take, from its config alone: nothing is loaded, and the model is built without its weights.

What a token's activations take is counted in a forward pass of the stacked layers that train, on torch's meta device,
where tensors have shapes and no memory. Attention is taken to keep what a fused kernel keeps: queries, keys, values and
its result.

Shapes: b = examples, t = tokens, h = heads, d = features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapter import ALL_PARTS, AdapterState, LoraPair
from fedlora.aggregators import ClientPlan, load_aggregator
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, ModelError
from fedlora.federation.checks import clients_wanted
from fedlora.federation.protocol import ADAPTER, TrainRequest, tensors_nbytes
from fedlora.model import Base, load_base
from fedlora.model.peft_methods import find_method
from fedlora.model.reach import longest_text
from fedlora.model.targets import in_any, is_linear
from fedlora.progress import format_bytes
from fedlora.simulation.capacity import COPIES
from fedlora.tasks import Task, load_task
from fedlora.tasks._text import LONGEST
from fedlora.tasks._token_loss import CHUNK
from fedlora.training.checkpointing import checkpointed
from fedlora.training.row_groups import ENTRIES, pass_tokens
from fedlora.training.row_optimizer import Columns
from fedlora.training.stacked_lora import Stacked, cannot_stack

NAME = "fedlora_plan"
LENGTH = 128
"""Tokens of the longer one of two texts, at most, whose activations are compared."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3): 4 bits, a
scale of 8 bits for each 64 of them, and one of 32 bits for each 256 scales."""
OF_LOGITS = 16
"""Bytes for a token of a chunk and a word of the vocabulary: logits of 16 and 32 bits, log-probabilities, gradients."""


@dataclass(frozen=True)
class Plan:
    """What a run takes, in bytes where nothing else is said.

    Args:
        parameters: of the base, in number.
        trained: entries of the adapter and the head, in number.
        base: the frozen weights.
        adapter: the trained tensors.
        optimizer: all copies of them that one client needs, its optimiser's state among them.
        token: activations that a step keeps for each token.
        logits: of one chunk of tokens in a language model's loss, with what is computed from them.
        memory: of the device.
        pass_tokens: that a pass would like to have.
        row_tokens: of the longest example that there may be, both of a pair's texts together.
        clients: of a round; None: as many as the data have, which are not read.
        down: to all clients of a round, or to one.
        up: from them.
    """

    parameters: int
    trained: int
    base: int
    adapter: int
    optimizer: int
    token: int
    logits: int
    memory: int
    pass_tokens: int
    row_tokens: int
    clients: int | None
    down: int
    up: int

    @property
    def room(self) -> int:
        """Tokens of a pass for which there is memory."""
        return max(0, (self.memory - self.base - self.optimizer - self.logits) // max(1, self.token))

    def lines(self) -> Iterator[tuple[str, str]]:
        """What is planned, line by line: a name, and numbers."""
        yield "base", f"{self.parameters:,} parameters, {format_bytes(self.base)}"
        yield "adapter and head", f"{self.trained:,} parameters, {format_bytes(self.adapter)}"
        yield "a client's training", f"{format_bytes(self.optimizer)}: values, gradients, the optimiser's state"
        yield "activations", f"{format_bytes(self.token)} for each token"
        if self.logits:
            yield "logits", f"{format_bytes(self.logits)} at once"
        yield "memory", format_bytes(self.memory)
        whose = "to each client of a round, {} from it" if self.clients is None else "to clients, {} from them"
        yield "a round", f"{format_bytes(self.down)} {whose.format(format_bytes(self.up))}, at most"

    @property
    def verdict(self) -> str:
        """Whether it fits, in one line, with what to change where it does not."""
        free = f"memory for {self.room:,} tokens in a pass"
        if self.room >= max(self.pass_tokens, self.row_tokens):
            return f"fits: {free}, where {max(self.pass_tokens, self.row_tokens):,} are wanted"
        if self.room >= self.row_tokens:
            return f"fits in smaller passes: {free}, where {self.pass_tokens:,} would be faster"
        return (
            f"does not fit: {free}, and an example of {self.row_tokens:,} needs one: lower task.max_length, set "
            "train.gradient_checkpointing = true, or model.quantize = 'nf4' for a smaller base"
        )


def make_plan(config: RunConfig, memory: int, dtype: str, kind: str = "cuda") -> Plan:
    """What a run will take.

    Args:
        config: of the run.
        memory: bytes of the device that computes.
        dtype: of the base, where the config says "auto".
        kind: of the device.

    Raises:
        ConfigError: the adapter's method is one whose memory is not known.
        FedloraError: the model's config cannot be read, or the adapter does not go with it.
    """
    named = dtype if config.model.dtype == "auto" else config.model.dtype
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": named})})
    task = load_task(config.task)
    kwargs = {"num_labels": max(2, len(getattr(task, "labels", ())))} if task.head else {}
    method = find_method(config.adapter)
    if not method.pairs or method.magnitudes:
        raise ConfigError(
            f"adapter.method {method.name!r} has no plan, which is made for adapters that train side by side: plan for "
            "'lora', whose memory is much the same",
            code="no-plan",
        )
    base = load_base(config, task.auto_class, task.head, kwargs, task.peft_task_type, only_shapes=True)
    if (reason := cannot_stack(base)) is not None:
        raise ConfigError(f"a plan is made for adapters that train side by side: {reason}", code="no-plan")
    adapter = AdapterState(
        {
            name: LoraPair(_blank(base, s.rank, s.d_in), _blank(base, s.d_out, s.rank), s.scale)
            for name, s in base.layout().items()
        },
        {name: value.detach() for name, value in base.parameters.items() if ":" not in name},
    )
    trained = sum(value.numel() for value in adapter.tensors().values())
    request = TrainRequest(ClientPlan(adapter), 1, 0, wire=config.wire.up, fraction=config.wire.fraction)
    rule = load_aggregator(config.strategy.name, config.strategy.fields)
    own = {id(parameter) for parameter in base.parameters.values()}
    frozen = [parameter for parameter in base.model.parameters() if id(parameter) not in own]
    wide = base.adapter_dtype.itemsize
    partitioned = config.partition.fields.get("clients")
    a_round = config.server.clients_per_round if partitioned is None else clients_wanted(config, int(partitioned))
    clients = a_round or 1
    answer = int(getattr(task, "max_target_length", 0))
    longest = task.texts_of_an_example * _longest(base, task) + answer
    over_words = {"AutoModelForCausalLM": CHUNK, "AutoModelForSeq2SeqLM": answer * config.train.batch_size}
    wanted = [pass_tokens(base, kind if kind in ENTRIES else "cpu"), config.train.batch_size * longest * clients]
    if config.train.micro_batch_size is not None:
        wanted.append(config.train.micro_batch_size * longest)
    return Plan(
        parameters=sum(parameter.numel() for parameter in frozen),
        trained=trained,
        base=sum(_stored(base, config)),
        adapter=trained * wide,
        optimizer=COPIES * trained * wide,
        token=_kept(base, task, adapter, saved=config.train.gradient_checkpointing),
        logits=OF_LOGITS
        * min(over_words.get(task.auto_class, 0), longest * config.train.batch_size)
        * _vocabulary(base),
        memory=memory,
        pass_tokens=min(wanted),
        row_tokens=longest,
        clients=a_round,
        down=clients
        * (tensors_nbytes({ADAPTER: adapter.tensors()}, config.wire.down) + (adapter.nbytes() if rule.tilts else 0)),
        up=clients * request.reply_nbytes,
    )


def read_size(text: str) -> int:
    """Bytes that a size such as "24GB", "16GiB" or "80g" names.

    Raises:
        ConfigError: it names none.
    """
    number = text.strip().lower().removesuffix("b")
    units = {"gi": 1 << 30, "mi": 1 << 20, "g": 10**9, "m": 10**6}
    unit = next((unit for unit in units if number.endswith(unit)), "")
    try:
        found = float(number.removesuffix(unit)) * units[unit]
    except (KeyError, ValueError):
        found = 0.0
    if not 0 < found < 1 << 60:
        raise ConfigError(f"{text!r} is no size of memory: write it as 24GB or 16GiB", code="not-a-size")
    return int(found)


def _blank(base: Base, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=base.adapter_dtype, device="meta")


def _vocabulary(base: Base) -> int:
    return int(base.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


def _longest(base: Base, task: Task) -> int:
    """Tokens of the longest text; of a picture, its patches."""
    if hasattr(task, "max_length"):
        most = int(task.max_length or LONGEST)
        return min(most, longest_text(base.model) or most)
    config: Any = base.model.config
    return (int(config.image_size) // int(config.patch_size)) ** 2 + 1


def _stored(base: Base, config: RunConfig) -> Iterator[int]:
    """Bytes of each frozen tensor."""
    own = {id(parameter) for parameter in base.parameters.values()}
    output = getattr(base.model, "get_output_embeddings", lambda: None)()
    whole = {id(parameter) for parameter in base.model.parameters()} - own
    if config.model.quantize is not None:
        for name, module in base.model.named_modules():
            if is_linear(module) and module is not output and not in_any(name, base.heads) and "lora_" not in name:
                weight: Any = module.weight
                if id(weight) in whole:
                    whole.remove(id(weight))
                    rows = weight.shape[0]
                    yield round(weight.numel() * NF4) if config.model.quantize == "nf4" else weight.numel() + 4 * rows
    yield from (parameter.nbytes for parameter in base.model.parameters() if id(parameter) in whole)


def _kept(base: Base, task: Task, adapter: AdapterState, *, saved: bool) -> int:
    """Bytes that a pass keeps for each token: the slope between two lengths, or two numbers of pictures."""
    columns = Columns([adapter], base.tensor_names())
    values = columns.rows([adapter], _blank(base, 0))
    base.write(adapter, ALL_PARTS)
    base.train_mode(True)
    pictures = not hasattr(task, "max_length")
    found = []
    with ExitStack() as stack:
        stack.enter_context(_fused(base.model))
        if saved:
            stack.enter_context(checkpointed(base.model, None))
        stacked = stack.enter_context(Stacked(base, columns, [adapter]))
        length = min(LENGTH, _longest(base, task)) // 2
        for step in (1, 2):
            rows = step if pictures else 1
            stacked.bind(values, [0], [rows])
            found.append(_saved(base.model, _inputs(base, rows, step * length, pictures=pictures)))
    texts = 1 + _decodes(base)
    return (found[1] - found[0]) // (_longest(base, task) if pictures else texts * length)


def _inputs(base: Base, rows: int, length: int, *, pictures: bool) -> dict[str, Tensor]:
    config: Any = base.model.config
    if pictures:
        size = (rows, int(config.num_channels), int(config.image_size), int(config.image_size))
        return {"pixel_values": torch.empty(size, dtype=base.dtype, device="meta")}
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    if _decodes(base):
        return {"input_ids": ids, "decoder_input_ids": ids}
    # With four dimensions transformers takes it for the layers' own mask, and looks at no value of it.
    return {"input_ids": ids, "attention_mask": torch.empty(rows, 1, length, length, dtype=torch.bool, device="meta")}


def _decodes(base: Base) -> bool:
    """Whether it has an encoder, and a decoder with an input of its own."""
    return base.recipe.auto_class == "AutoModelForSeq2SeqLM"


def _saved(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    weights = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    held: dict[int, Any] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = storage  # kept, or its address would be used again
        return value

    output = getattr(model, "get_output_embeddings", lambda: None)()
    handle = None if output is None else output.register_forward_pre_hook(lambda _, args: (args[0][:, :1], *args[1:]))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            kept = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    del kept
    return sum(storage.nbytes() for storage in held.values())


@contextmanager
def _fused(model: Any) -> Iterator[None]:
    """Inside, a model attends by a function that has shapes alone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_args, **_options: None)
    try:
        model.set_attn_implementation(NAME)
    except (AttributeError, ValueError) as error:
        raise ModelError(
            f"{type(model).__name__} has attention code of its own, whose memory is not known", code="no-plan"
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out)
        return out


def _attend(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_options: Any
) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value), None
