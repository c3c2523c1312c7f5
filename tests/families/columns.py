"""What is asked of each family: one function a column, against plain transformers and PEFT.

A function gives "yes", or the reason why the feature is refused for this family; it fails where a result is wrong.

Shapes: b = examples, t = tokens, c = classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from families.table import AUTO, MAX_LENGTH, SIZE, Family, learnt, texts, toml, write
from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import TrainConfig, parse_config
from fedlora.errors import ModelError, PrivacyError
from fedlora.model.export import save_adapter, save_merged
from fedlora.model.quantize import READ_BY_NAME
from fedlora.privacy.calibrate import Schedule
from fedlora.tasks import Examples, Table
from fedlora.training import TrainJob, open_workspace, train
from fedlora.training.cohort import train_cohort, why_alone
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.workspace import Workspace, close_workspace

YES = "yes"
SGD = TrainConfig(steps=1, batch_size=8, optimizer="sgd", lr=0.1)
ROWS = np.arange(6)
CLIP = 0.05
SPEAKING = ("causal", "seq2seq")
"""Kinds of models that have an output layer for a vocabulary and no head."""


@dataclass
class Case:
    """A family with its run opened.

    Args:
        family: that is looked at.
        folder: of its model.
        bench: of its run.
        raw: texts or pictures of the examples.
        more: what else each of them has, by column.
        examples: as the task prepares them.
        state: an adapter that changes what the model computes.
    """

    family: Family
    folder: Path
    workspace: Workspace
    raw: list[Any]
    more: list[dict[str, Any]]
    examples: Examples
    state: AdapterState

    @property
    def tolerance(self) -> float:
        """Of what is computed twice: of gradients and steps, relative to 1."""
        if self.workspace.base.config.quantize is not None:
            return 1e-3  # in float32, in which MobileBert's own layers round by 6e-4 unquantised
        if self.workspace.base.dtype == torch.float32 or self.family.kind == "image":
            return 2e-4  # pictures are normalised in float32
        return 1e-9 if self.family.exact else 2e-5  # transformers' own code rounds to float32 on the way

    def batch(self, rows: np.ndarray = ROWS) -> dict[str, Tensor]:
        """As the task collates it."""
        return self.workspace.task.collate(self.examples, rows)


@contextmanager
def opened(family: Family, folder: Path, *overrides: str) -> Iterator[Case]:
    """A family's run on its random model.

    Raises:
        ModelError: the model is refused for this task.
    """
    write(family, folder)
    close_workspace()
    workspace = open_workspace(parse_config(toml(family, folder), overrides))
    raw: list[Any]
    if family.kind == "image":
        draw = np.random.default_rng(1)
        raw = [draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(8)]
    else:
        raw = list(texts(8, seed=1))
    more = [learnt(family.kind, number, raw[number]) for number in range(8)]
    columns = {"text": raw, "image": raw, **{name: [row[name] for row in more] for name in more[0]}}
    roles = {role: role for role in workspace.task.roles if role in columns}
    examples = workspace.task.prepare(Table({r: columns[r] for r in roles}), folder, roles, keep=())
    try:
        yield Case(family, folder, workspace, raw, more, examples, filled(workspace))
    finally:
        close_workspace()


def filled(workspace: Workspace) -> AdapterState:
    """The first adapter with B away from zero."""
    state = workspace.base.initial_adapter(0)
    generator = torch.Generator().manual_seed(3)
    moved = {
        f"{name}:B": torch.randn(pair.B.shape, generator=generator, dtype=pair.B.dtype) * 0.1
        for name, pair in state.pairs.items()
    }
    return state.with_tensors(moved)


# ------------------------------------------------------------------------------------------------ plain transformers


def plain_model(case: Case, folder: Path | None = None) -> nn.Module:
    """What somebody without fedlora loads; in evaluation mode, without dropout."""
    import transformers

    kwargs: dict[str, Any] = {}
    if case.family.kind == "pairs":
        kwargs = {"num_labels": 1}
    elif case.family.kind not in SPEAKING:
        names = case.workspace.data.label_names
        kwargs = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    if case.workspace.base.config.quantize == "nf4":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=whole_layers(case),
        )
    model: nn.Module = getattr(transformers, AUTO[case.family.kind]).from_pretrained(
        folder or case.folder, dtype=case.workspace.base.dtype, **kwargs
    )
    for module in model.modules():  # whose backward pass is lost in the form for AVX512
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def whole_layers(case: Case) -> list[str]:
    """The layers that nobody quantises: heads, whether they are trained in full or not, and the output layer."""
    model: Any = case.workspace.base.model
    output = model.get_output_embeddings() if case.family.kind in SPEAKING else None
    names = [*case.workspace.base.heads, *(name for name, module in model.named_modules() if module is output)]
    return [*names, *(("classifier", "score") if case.family.kind not in SPEAKING else ()), "cls", *READ_BY_NAME]


def plain_peft(case: Case, folder: Path) -> nn.Module:
    """A plain model with the adapter of a folder, ready to be trained."""
    from peft import PeftModel

    found: nn.Module = PeftModel.from_pretrained(
        plain_model(case), folder, is_trainable=True, autocast_adapter_dtype=case.workspace.base.dtype == torch.bfloat16
    )
    return found.eval()


def plain_batch(case: Case, rows: np.ndarray) -> dict[str, Tensor]:
    """The examples as transformers' own tokeniser or processor batches them."""
    from transformers import AutoImageProcessor, AutoTokenizer

    raw = [case.raw[row] for row in rows]
    if case.family.kind == "image":
        processor = AutoImageProcessor.from_pretrained(case.folder, backend="pil")
        pixels = processor(raw, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(case.workspace.base.dtype)}
    tokenizer = AutoTokenizer.from_pretrained(case.folder)
    if case.family.kind != "causal":
        pairs = [[case.more[row]["text_pair"] for row in rows]] if case.family.kind == "pairs" else []
        batch = dict(tokenizer(raw, *pairs, padding=True, truncation=True, max_length=64, return_tensors="pt"))
        if case.family.kind == "seq2seq":  # the decoder's own input is the model's affair
            targets = tokenizer(
                text_target=[case.more[row]["target"] for row in rows], padding=True, return_tensors="pt"
            )
            batch["labels"] = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        return batch
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in raw]
    ids = [row[:MAX_LENGTH] if row[-2] != row[-1] else row[:-1][:MAX_LENGTH] for row in ids]
    return dict(tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt"))


def plain_losses(case: Case, model: nn.Module, rows: np.ndarray) -> Tensor:
    """The loss of each example, written out anew."""
    batch = plain_batch(case, rows)
    logits = model(**batch, **({"use_cache": False} if case.family.kind in SPEAKING else {})).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if case.family.kind == "seq2seq":
        each = functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        return each.sum(dim=1) / (batch["labels"] != -100).sum(dim=1)
    if case.family.kind != "causal":
        names = list(case.workspace.data.label_names)
        if case.family.kind == "tags":
            return tag_losses(case, logits, rows, names)
        wanted = [case.more[row]["label"] for row in rows]
        if case.family.kind == "pairs":
            return functional.mse_loss(logits[:, 0], torch.tensor(wanted).to(logits), reduction="none")
        if case.family.kind == "labels":
            has = torch.tensor([[name in some for name in names] for some in wanted]).to(logits)
            return functional.binary_cross_entropy_with_logits(logits, has, reduction="none").mean(dim=1)
        return functional.cross_entropy(logits, torch.tensor([names.index(name) for name in wanted]), reduction="none")
    out = []
    for one, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
        size = int(mask.sum())
        out.append(functional.cross_entropy(one[: size - 1], ids[1:size]))
    return torch.stack(out)


def tag_losses(case: Case, logits: Tensor, rows: np.ndarray, names: list[str]) -> Tensor:
    """The mean cross entropy of each example's words, looked for in the text by their last characters."""
    from transformers import AutoTokenizer

    tokenizer, out = AutoTokenizer.from_pretrained(case.folder), []
    for one, row in zip(logits, rows, strict=True):
        how = {"truncation": True, "max_length": 64, "return_offsets_mapping": True}
        spans = tokenizer(case.raw[row], **how)["offset_mapping"]
        places, tags, at = [], [], 0
        for word, tag in zip(case.more[row]["tokens"], case.more[row]["tags"], strict=True):
            found = [k for k, (_, end) in enumerate(spans) if at < end <= at + len(word)]
            places += found[:1]
            tags += [names.index(tag)] * len(found[:1])  # none of a word that was cut away
            at += len(word) + 1
        out.append(functional.cross_entropy(one[places], torch.tensor(tags)))
    return torch.stack(out)


def trained(case: Case, model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a plain PEFT model, by our names."""
    found = {}
    for name in case.workspace.base.targets:
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        found[f"{name}:A"], found[f"{name}:B"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for head in case.workspace.base.heads:
        wrapper: Any = model.get_submodule(f"base_model.model.{head}")
        for inner, parameter in wrapper.modules_to_save["default"].named_parameters():
            found[f"{head}.{inner}"] = parameter
    return found


def gap(one: Tensor, other: Tensor) -> float:
    """Relative to the larger of 1 and the second one's norm."""
    return float((one.double() - other.double()).norm() / max(1.0, float(other.double().norm())))


def between(one: AdapterState, other: AdapterState) -> float:
    """The largest gap of two adapters' tensors."""
    others = other.tensors()
    return max(gap(value, others[name]) for name, value in one.tensors().items())


# ------------------------------------------------------------------------------------------------ the columns


def step(case: Case, folder: Path) -> str:
    """One step of SGD moves the adapter as plain PEFT does."""
    base = case.workspace.base
    save_adapter(base, case.state, folder / "start", {})
    model = plain_peft(case, folder / "start")
    parameters = trained(case, model)
    losses = plain_losses(case, model, ROWS)
    gradients = torch.autograd.grad(losses.mean(), list(parameters.values()), allow_unused=True)
    ours = train(base, case.workspace.task, case.examples, TrainJob(case.state, ALL_PARTS, ROWS, 0), SGD)
    assert gap(torch.tensor(ours.loss, dtype=torch.float64), losses.mean().detach()) <= 10 * case.tolerance
    for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
        moved = value.detach() if gradient is None else value.detach() - SGD.lr * gradient
        assert gap(ours.adapter.tensors()[name], moved) <= case.tolerance, name
    return YES


def alone(case: Case, folder: Path) -> str:
    """An example gives alone what it gives in a padded batch, or the model is known to look at its padding."""
    base, task = case.workspace.base, case.workspace.task
    base.write(case.state)
    base.train_mode(False)
    with torch.no_grad():
        together = task.losses(base.model, case.batch())
        single = torch.cat([task.losses(base.model, case.batch(ROWS[i : i + 1])) for i in range(len(ROWS))])
    same = gap(together, single) <= max(case.tolerance, 2e-5)
    if base.coupled is None:
        assert same
        return YES
    return f"looks at padding: {base.coupled}"


def cohort(case: Case, folder: Path) -> str:
    """A client's result in company is its result alone, or clients are known to train one by one."""
    base, task = case.workspace.base, case.workspace.task
    jobs = [TrainJob(case.state, ALL_PARTS, rows, 0) for rows in (np.array([0, 2]), np.array([1, 3, 4]))]
    single = [train(base, task, case.examples, job, SGD).adapter for job in jobs]
    together = train_cohort(base, task, case.examples, jobs, [SGD, SGD])
    for one, other in zip(single, together, strict=True):
        assert not isinstance(other, Exception), other
        assert between(one, other.adapter) <= case.tolerance
    reason = why_alone(base)
    return YES if reason is None else f"one by one: {reason}"


def export(case: Case, folder: Path) -> str:
    """The exported adapter gives, on the plain model, the run's losses."""
    base, task = case.workspace.base, case.workspace.task
    base.write(case.state)
    base.train_mode(False)
    with torch.no_grad():
        ours = task.losses(base.model, case.batch())
        save_adapter(base, case.state, folder / "adapter", {})
        theirs = plain_losses(case, plain_peft(case, folder / "adapter"), ROWS)
    assert gap(ours, theirs) <= case.tolerance
    return YES


def merge(case: Case, folder: Path) -> str:
    """The merged model gives, without PEFT, the run's losses."""
    base, task = case.workspace.base, case.workspace.task
    base.write(case.state)
    base.train_mode(False)
    with torch.no_grad():
        ours = task.losses(base.model, case.batch())
        save_merged(base, case.state, [], folder / "merged")
        theirs = plain_losses(case, plain_model(case, folder / "merged"), ROWS)
    # Its sums are rounded to float32.
    assert gap(ours, theirs) <= max(case.tolerance, 1e-5)
    return YES


def private(case: Case, folder: Path) -> str:
    """A private step without its noise is the sum of each example's clipped gradient, taken alone by plain PEFT."""
    base, task = case.workspace.base, case.workspace.task
    job = TrainJob(case.state, ALL_PARTS, ROWS, 0)
    try:
        check_model(base, task, case.examples, job)
    except PrivacyError as error:
        return f"refused: {error}"
    noise = 1e-4 if base.dtype == torch.float32 else 1e-9  # less would move no float32
    settings = PrivateSettings(Schedule(1.0, 1, 1, float(len(ROWS))), noise, CLIP)
    ours = train_private(base, task, case.examples, job, SGD.model_copy(update={"lr": 1.0}), settings).adapter
    save_adapter(base, case.state, folder / "private", {})
    model = plain_peft(case, folder / "private")
    parameters = trained(case, model)
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for row in ROWS:
        loss = plain_losses(case, model, np.array([row])).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        norm = float(torch.cat([g.flatten().double() for g in found]).norm())
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += gradient * min(1.0, CLIP / max(norm, 1e-30))
    for name, value in parameters.items():
        wanted = value.detach() - total[name] / len(ROWS)
        assert gap(ours.tensors()[name], wanted) <= max(case.tolerance, 1e-6), name
    return YES


def packing(case: Case, folder: Path) -> str:
    """A packed batch gives the losses of a padded one, or packing is refused at the start."""
    if case.family.kind != "causal":
        return ""
    base = case.workspace.base
    task = replace(case.workspace.task, packing=True)  # type: ignore[type-var]
    base.write(case.state)
    try:
        task.check(base.model, [case.examples])
    except ModelError as error:
        return f"refused: {error}"
    base.train_mode(False)
    with torch.no_grad():
        packed = task.losses(base.model, task.collate(case.examples, ROWS))
        padded = case.workspace.task.losses(base.model, case.batch())
    assert gap(packed, padded) <= max(case.tolerance, 2e-5)
    return YES


def prefix(case: Case, folder: Path) -> str:
    """With the lower layers' states kept, a client's result is the same; or the cache is refused."""
    results = []
    for mode in ("off", "on"):
        close_workspace()
        try:
            workspace = open_workspace(
                parse_config(toml(case.family, case.folder), ["adapter.layers=top:1", f"runtime.prefix_cache={mode}"])
            )
        except ModelError as error:
            return f"refused: {error}"
        results.append(
            train(workspace.base, workspace.task, case.examples, TrainJob(filled(workspace), ALL_PARTS, ROWS, 0), SGD)
        )
    assert between(results[0].adapter, results[1].adapter) <= case.tolerance
    return YES


COLUMNS: dict[str, Callable[[Case, Path], str]] = {
    "step": step,
    "alone": alone,
    "cohort": cohort,
    "export": export,
    "merge": merge,
    "private": private,
    "packing": packing,
    "prefix": prefix,  # last: it opens other runs
}

IN_FOUR_BITS = ("step", "alone", "cohort", "export", "private")
"""The columns that are asked of a family on a base in NF4."""


def quantised(case: Case) -> None:
    """Every linear layer of a base in NF4 is held so, but for those that nobody quantises: transformers passes over
    subclasses, and over what a model asks to be kept in float32."""
    from transformers.pytorch_utils import Conv1D

    model: Any = case.workspace.base.model
    whole = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and "lora_" not in name
    }
    kept = [*whole_layers(case), *(model._keep_in_fp32_modules or ())]
    left = {name for name in whole if not any(f".{part}." in f".{name}." for part in kept)}
    left -= {name for name in left if any(name.startswith(head) for head in whole_layers(case))}
    assert not left, f"not quantised: {sorted(left)}"
