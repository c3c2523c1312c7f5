"""A client's result does not depend on the company it trains in: float64 shows it to rounding."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cohorts import (
    MODELS,
    PASSES,
    VOCABULARY,
    WIDE,
    Client,
    client,
    load,
    random_base,
    random_examples,
    texts,
    together,
)
from support.states import gap
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.config import OpenTable, TrainConfig
from fedlora.errors import ModelError, TrainingError
from fedlora.model import Base
from fedlora.model.dropout import set_dropout
from fedlora.speedups.last_layer import restore_unread, skip_unread
from fedlora.tasks import Examples, Task, load_task
from fedlora.training import TrainJob, TrainResult, train
from fedlora.training.cohort import why_alone
from fedlora.training.dropout_masks import RowDropout, _draws, _draws_on_device, row_keys
from fedlora.training.job import batches
from fedlora.training.row_groups import PassCost, cut
from fedlora.training.row_optimizer import FlatOptimizer
from fedlora.training.stacked_lora import add_pairs, blocks_of


@pytest.fixture(scope="module")
def task(tiny_bert: Path, tiny_csv: Path) -> Task:
    return texts(tiny_bert, tiny_csv)[0]


@pytest.fixture(scope="module")
def examples(tiny_bert: Path, tiny_csv: Path) -> Examples:
    return texts(tiny_bert, tiny_csv)[1]


def check_alike(base: Base, task: Task, examples: Examples, clients: list[Client], within: float = 1e-10) -> None:
    """All together and each alone, in passes of any size, come to the same."""
    alone = [together(base, task, examples, [one], cost=WIDE)[0] for one in clients]
    for cost in PASSES:
        found_together = together(base, task, examples, clients, cost=cost)
        for one, found, (job, _) in zip(alone, found_together, clients, strict=True):
            assert isinstance(found, TrainResult), found
            assert gap(one.adapter, found.adapter) < within
            assert gap(one.adapter, job.adapter) > 1e-4, "it did train"
            assert found.adapter.layout == one.adapter.layout
            assert found.loss == pytest.approx(one.loss, abs=within)
            assert (found.steps, found.examples_seen, found.num_examples) == (
                one.steps,
                one.examples_seen,
                one.num_examples,
            )


RAGGED: list[dict[str, Any]] = [
    {},
    {"rank": 2, "steps": 5, "lr": 0.003},
    {"rank": 7, "batch_size": 3, "warmup_steps": 2},
    {"size": 5, "steps": 7, "weight_decay": 0.1, "clip_norm": 0.3},
    {"batch_size": 11, "steps": 1, "proximal_mu": 0.5},
    {"rank": 3, "proximal_mu": 0.2, "tilt": -0.5},
    {"rank": 2, "proximal_mu": 0.7, "toward": True},
]
OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "sgd", "momentum"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_company_changes_nothing(
    tiny_bert: Path, task: Task, examples: Examples, optimizer: dict[str, Any], dropout: float
) -> None:
    base = load(tiny_bert, task, examples, dropout=dropout)
    check_alike(base, task, examples, [client(base, k, **{**optimizer, **one}) for k, one in enumerate(RAGGED)])


def plain(base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig) -> AdapterState:
    """The same with PEFT's own layers, torch's own optimisers, and one client."""
    parameters = base.write(job.adapter, job.trains)
    anchor, names = (job.toward or job.adapter).tensors(), base.tensor_names(job.trains)
    start = [anchor[name].to(p.dtype) for name, p in zip(names, parameters, strict=True)]
    tilt = [job.tilt.get(name, torch.zeros(())) for name in base.tensor_names(job.trains)]
    base.train_mode(True)
    decay = config.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=decay)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=decay)
    for step, chosen in enumerate(batches(job.indices, config.batch_size, config.steps or 0, job.seed)):
        optimizer.zero_grad()
        loss = task.losses(base.model, task.collate(examples, chosen)).mean()
        for parameter, origin, term in zip(parameters, start, tilt, strict=True):
            loss = loss + job.proximal_mu / 2 * ((parameter - origin) ** 2).sum() + (term * parameter).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
        optimizer.step()
    return base.read()


def parts_and_optimizers() -> list[object]:
    """Any parts with any optimiser; four, in which all of them are, are quick, the others slow."""
    parts = [("A", "B", "dense"), ("B", "dense"), ("A",), ("dense",)]
    names = ("adamw", "sgd", "momentum")
    return [
        pytest.param(trains, one, marks=pytest.mark.slow if j % 3 != k else (), id=f"{''.join(trains)}-{names[k]}")
        for (j, trains), (k, one) in product(enumerate(parts), enumerate(OPTIMIZERS))
    ]


@pytest.mark.parametrize(("trains", "optimizer"), parts_and_optimizers())
def test_a_cohort_is_torch_and_peft_client_by_client(
    tiny_bert: Path, task: Task, examples: Examples, optimizer: dict[str, Any], trains: tuple[Any, ...]
) -> None:
    base = load(tiny_bert, task, examples)
    clients = [client(base, k, **{**optimizer, **one, "trains": frozenset(trains)}) for k, one in enumerate(RAGGED)]
    restore_unread(base.model)  # the whole model is the reference
    wanted = [plain(base, task, examples, *one) for one in clients]
    skip_unread(base.model)
    for one, found, (job, _) in zip(wanted, together(base, task, examples, clients), clients, strict=True):
        assert gap(one, found.adapter) < 1e-10
        for name, value in found.adapter.tensors().items():
            part = name.rpartition(":")[2] if ":" in name else "dense"
            assert torch.equal(value, job.adapter.tensors()[name]) == (part not in trains), name


@pytest.mark.parametrize(
    ("base_dtype", "dtype", "within"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.01),
        (torch.float16, torch.float32, 0.01),
    ],
    ids=["float64", "float32", "bfloat16", "float16"],
)
def test_the_pairs_products_are_exact_up_to_their_dtypes_rounding(
    base_dtype: torch.dtype, dtype: torch.dtype, within: float
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)

    sizes, tokens = [3, 3, 1], 5
    x, out, g = draw(7, tokens, 12, like=base_dtype), draw(7, tokens, 20, like=base_dtype), draw(7, tokens, 20)
    A, B, scales = draw(3, 4, 12), draw(3, 20, 4), draw(3, 1, 1)
    leaves = [value.requires_grad_() for value in (x, A, B)]
    found = add_pairs(out.clone(), *leaves, scales, blocks_of(sizes))
    gradients = torch.autograd.grad(found, leaves, g.to(base_dtype))
    exact = [value.detach().double().requires_grad_() for value in leaves]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    delta = scales.double() * exact[2] @ exact[1]
    wanted = out.double() + exact[0] @ delta[owner].transpose(1, 2)
    references = torch.autograd.grad(wanted, exact, g.to(base_dtype).double())
    assert [value.dtype for value in gradients] == [value.dtype for value in leaves]
    for value, reference in zip([found.detach(), *gradients], [wanted.detach(), *references], strict=True):
        assert float((value.double() - reference).norm() / reference.norm()) < within


# ---------------------------------------------------------------------------------------------- models and tasks


OFTEN = [("bert", False), ("gpt2", True), ("llama", True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "causal"),
    [
        pytest.param(
            *case, id=f"{case[0]}-{('classes', 'causal')[case[1]]}", marks=() if case in OFTEN else pytest.mark.slow
        )
        for case in product(MODELS, [False, True])
    ],
)
def test_every_architecture_trains_in_company(name: str, causal: bool, tmp_path: Path) -> None:
    if causal and name not in ("gpt2", "llama", "qwen2"):
        pytest.skip("no causal model here")
    targets = {"distilbert": ("q_lin", "v_lin"), "vit": ("q_proj", "v_proj")}.get(name, ())
    base = random_base(name, tmp_path, causal, dropout=0.1, targets=targets)
    task = load_task(OpenTable(name="causal-lm" if causal else "text-classification"))
    if name == "vit":
        task = load_task(OpenTable(name="image-classification"))
    examples = random_examples(causal, name == "vit")
    clients = [client(base, k, **one) for k, one in enumerate(RAGGED)]
    check_alike(base, task, examples, clients)
    assert why_alone(base) is None


@pytest.mark.slow
def test_packed_rows_keep_their_clients_apart(tmp_path: Path) -> None:
    base = random_base("llama", tmp_path, causal=True)
    task = load_task(OpenTable(name="causal-lm", packing=True, max_length=32))  # type: ignore[call-arg]
    clients = [client(base, k, **one) for k, one in enumerate(RAGGED)]
    check_alike(base, task, random_examples(causal=True, vit=False), clients)


@pytest.mark.slow
def test_an_adapted_output_layer_goes_in_company(tmp_path: Path) -> None:
    base = random_base("llama", tmp_path, causal=True, targets=("q_proj", "lm_head"))
    task = load_task(OpenTable(name="causal-lm"))
    clients = [client(base, k, **one) for k, one in enumerate(RAGGED)]
    check_alike(base, task, random_examples(causal=True, vit=False), clients)
    assert why_alone(base) is None


# ---------------------------------------------------------------------------------------------- what cannot go together


@pytest.mark.slow
@pytest.mark.parametrize("form", ["embedding", "dora", "ia3"])
def test_what_has_no_stacked_form_goes_one_by_one(form: str, tmp_path: Path) -> None:
    options: dict[str, Any] = (
        {"method": form} if form != "embedding" else {"modules_to_save": ("classifier", "word_embeddings")}
    )
    base = random_base("bert", tmp_path, causal=False, **options)
    assert "has no stacked form" in str(why_alone(base))
    task = load_task(OpenTable(name="text-classification"))
    examples = random_examples(causal=False, vit=False)
    set_dropout(base.model, 0.0)
    rows = [one | {"rank": None} for one in RAGGED] if form != "embedding" else RAGGED
    clients = [client(base, k, **one) for k, one in enumerate(rows)]
    check_alike(base, task, examples, clients)
    wanted = [plain(base, task, examples, *one) for one in clients]
    for one, found in zip(wanted, together(base, task, examples, clients), strict=True):
        assert gap(one, found.adapter) < 1e-10


class Noisy(torch.nn.Module):
    """Draws random numbers that no client's stream can give."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * torch.randn_like(x)


class Flat(torch.nn.Module):
    """Hands its layer all rows and tokens in one dimension, in two halves."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return torch.cat([self.layer(half) for half in rows.chunk(2)]).view(*x.shape[:-1], -1)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["noise", "rows"])
def test_a_model_that_mixes_clients_is_noticed(
    tiny_bert: Path, task: Task, examples: Examples, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(tiny_bert, task, examples)
    clients = [client(base, k, **one) for k, one in enumerate(RAGGED)]
    layer = base.model.get_submodule("bert.encoder.layer.1")
    if trouble == "noise":
        monkeypatch.setitem(layer.output._modules, "dropout", Noisy())  # type: ignore[union-attr]
    else:
        attention = layer.attention.self  # type: ignore[union-attr]
        monkeypatch.setitem(attention._modules, "query", Flat(attention.query))  # type: ignore[union-attr, arg-type]
    assert why_alone(base) is None
    alone = [train(base, task, examples, *one) for one in clients]
    found = together(base, task, examples, clients)
    assert why_alone(base) is not None
    assert all(gap(one.adapter, other.adapter) == 0 for one, other in zip(alone, found, strict=True))
    base.alone = None


# ---------------------------------------------------------------------------------------------- failures


def test_one_client_fails_and_the_others_do_not_notice(tiny_bert: Path, task: Task, examples: Examples) -> None:
    base = load(tiny_bert, task, examples, dropout=0.2)
    good = [client(base, k, **one) for k, one in enumerate(RAGGED)]
    alone = [train(base, task, examples, *one) for one in good]
    wild = client(base, 1, optimizer="sgd", lr=1e200, steps=6)
    beyond = (replace(good[0][0], indices=np.array([3, 10**6])), good[0][1])
    narrow = (replace(good[0][0], adapter=AdapterState({}, {})), good[0][1])
    none = (replace(good[0][0], indices=np.arange(0)), good[0][1])
    nothing = (replace(good[0][0], trains=frozenset()), good[0][1])
    steep = client(base, 2, lr=math.inf, steps=1)
    found = together(base, task, examples, [wild, beyond, narrow, *good, none, nothing, steep])
    for one, other in zip(alone, found[3:-3], strict=True):
        assert gap(one.adapter, other.adapter) < 1e-10
    refused = [*found[:3], *found[-3:]]
    assert [(type(error), getattr(error, "code", None)) for error in refused] == [
        (TrainingError, "loss-not-finite"),
        (IndexError, None),
        (ModelError, "tensors-differ"),
        (TrainingError, "no-examples"),
        (TrainingError, "nothing-to-train"),
        (TrainingError, "adapter-not-finite"),
    ], refused
    assert re.search(r"step [2-6]: lower train.lr \(now 1e\+200\)", str(refused[0]))
    assert "step 1" in str(refused[-1])


class Refuses(torch.nn.Module):
    """Cannot take one of the tokens."""

    def __init__(self, embedding: torch.nn.Module, token: int) -> None:
        super().__init__()
        self.embedding, self.token = embedding, token

    def forward(self, ids: Tensor) -> Tensor:
        if bool((ids == self.token).any()):
            raise ValueError("this token is too much")
        return self.embedding(ids)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_step_that_fails_is_found_to_be_one_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, task = random_base("bert", tmp_path, causal=False), load_task(OpenTable(name="text-classification"))
    examples = random_examples(causal=False, vit=False)
    clients = [client(base, k, **{"steps": 9, **one}) for k, one in enumerate(RAGGED)]
    odd = VOCABULARY - 1
    tokens: Any = examples.inputs["input_ids"]
    tokens.flat[tokens.flat == odd] = 3
    alone = [train(base, task, examples, *one) for one in clients]
    mine = min(set(clients[2][0].indices) - set(clients[1][0].indices) - set(clients[3][0].indices))
    tokens[int(mine)][1] = odd
    embeddings = base.model.get_submodule("bert.embeddings")
    refuses = Refuses(embeddings.word_embeddings, odd)  # type: ignore[arg-type]
    monkeypatch.setitem(embeddings._modules, "word_embeddings", refuses)
    found = together(base, task, examples, clients, cost=WIDE)
    assert str(found[2]) == "this token is too much"
    for k in (0, 1, 3, 4):
        assert gap(alone[k].adapter, found[k].adapter) < 1e-10


def test_the_base_is_given_back_whatever_happens(
    tiny_bert: Path, task: Task, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(tiny_bert, task, examples, dropout=0.2)
    clients = [client(base, k) for k in range(3)]

    def state() -> list[Any]:
        values = [(name, value.clone()) for name, value in base.plain_state_dict().items() if "classifier" not in name]
        return [values, [type(module) for module in base.model.modules()], [set(vars(m)) for m in base.model.modules()]]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    together(base, task, examples, clients)
    before = state()
    random = torch.random.get_rng_state()
    monkeypatch.setattr(FlatOptimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together(base, task, examples, clients)
    after = state()
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert torch.equal(torch.random.get_rng_state(), random)
    base.write(clients[0][0].adapter)
    assert gap(base.read(), clients[0][0].adapter) == 0


# ---------------------------------------------------------------------------------------------- rows and passes


def price(tokens: np.ndarray, passes: list[np.ndarray], cost: PassCost) -> float:
    longest = [int(tokens[places].max()) for places in passes]
    real = [int(tokens[places].sum()) for places in passes]
    return sum(
        cost.fixed + n + cost.padding * (len(p) * t - n) + len(p) * t * t / cost.attention
        for p, t, n in zip(passes, longest, real, strict=True)
    )


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40), st.floats(0, 100), st.floats(1, 1000), st.integers(1, 800)
)
def test_a_cut_holds_every_row_once_within_its_limit(
    lengths: list[int], fixed: float, attention: float, most: int
) -> None:
    tokens, cost = np.array(lengths), PassCost(fixed, attention, most)
    passes = cut(tokens, cost)
    assert sorted(np.concatenate(passes).tolist()) == list(range(len(tokens)))
    assert all(len(places) == 1 or len(places) * tokens[places].max() <= most for places in passes)
    in_order = [int(tokens[place]) for places in passes for place in places]
    assert in_order == sorted(in_order)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.floats(0, 30), st.floats(1, 100), st.floats(0, 1))
def test_no_cut_is_cheaper(lengths: list[int], fixed: float, attention: float, padding: float) -> None:
    tokens, cost = np.array(lengths), PassCost(fixed, attention, 10**6, padding=padding)
    ascending = np.argsort(tokens, kind="stable")
    every = [
        np.split(ascending, [k + 1 for k in range(len(tokens) - 1) if choice >> k & 1])
        for choice in range(1 << (len(tokens) - 1))
    ]
    best = min(price(tokens, passes, cost) for passes in every)
    assert price(tokens, cut(tokens, cost), cost) == pytest.approx(best, rel=1e-12)


def test_a_device_draws_the_bits_that_a_cpu_draws() -> None:
    keys = row_keys(5, 3, np.arange(7))
    for sizes in ((7, 9, 13), (7, 4, 9, 9), (7, 5), (7, 1), (7, 2, 3, 4, 5)):
        assert np.array_equal(
            _draws(keys, sizes), _draws_on_device(torch.from_numpy(keys.view(np.int64)), sizes).numpy()
        )


def test_a_rows_masks_do_not_depend_on_its_padding_nor_on_its_company() -> None:
    keys = row_keys(5, 3, np.arange(7))
    assert np.array_equal(_draws(keys, (7, 9, 16))[2:4, :5], _draws(keys[2:4], (2, 5, 16)))
    assert np.array_equal(_draws(keys, (7, 4, 9, 9))[3:, :, :5, :5], _draws(keys[3:], (4, 4, 5, 5)))


def test_masks_are_fair_and_no_two_are_alike() -> None:
    """Of rows, steps, clients and dropouts: 16 bits a draw, each of them as often 0 as 1, and in no two masks alike."""
    masks = []
    for seed, step in product(range(3), range(3)):
        dropout = RowDropout()
        dropout.begin(row_keys(seed, step, np.arange(4)))
        masks += [dropout.noise(torch.Size([4, 64, 64]), 0.5, torch.empty(0)) for _ in range(3)]
    kept = torch.cat(masks).flatten(1) > 0
    assert kept.float().mean(1).sub(0.5).abs().max() < 0.04, "five deviations"
    agree = (kept[:, None] == kept[None]).float().mean(2)
    assert agree.sub(torch.eye(len(kept)) / 2).sub(0.5).abs().max() < 0.05
    bits = np.unpackbits(_draws(row_keys(1, 0, np.arange(4)), (4, 100, 100)).reshape(-1, 1).view(np.uint8), axis=1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9999999])
def test_a_dropout_keeps_the_mean(p: float) -> None:
    dropout = RowDropout()
    dropout.begin(row_keys(0, 0, np.arange(4)))
    noise = dropout.noise(torch.Size([4, 400, 400]), p, torch.empty(0, dtype=torch.float64))
    assert len(noise.unique()) == 2
    cut_off = min(round(p * 65536), 65535) / 65536
    assert float((noise == 0).double().mean()) == pytest.approx(cut_off, abs=0.004)
    assert float(noise.max()) == pytest.approx(1 / (1 - cut_off))
