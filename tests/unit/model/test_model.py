"""A base is loaded once, its adapter is swapped in place, its weights follow merges, and its exports load elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.errors import raises
from torch import Tensor, nn

from fedlora import model as models
from fedlora.adapter import AdapterState, LoraPair, fresh_pairs
from fedlora.aggregators import BaseUpdate
from fedlora.config import AdapterConfig, ModelConfig, RunConfig, RuntimeConfig
from fedlora.errors import ConfigError, FedloraError, ModelError
from fedlora.model import Base, BaseWeights, load_base, loading, save_adapter, save_merged
from fedlora.model.base_weights import absorbs
from fedlora.model.pair_shapes import alpha_of
from fedlora.speedups.last_layer import restore_unread

HEAD = ("classifier", "score")
QUERY = "bert.encoder.layer.0.attention.self.query"
CLASSIFIER = "AutoModelForSequenceClassification"
IDS = torch.tensor([[2, 9, 30, 41, 3, 0], [2, 50, 51, 52, 53, 3]])
MASK = (IDS != 0).long()


def load(path: Path, dtype: str = "float32", auto_class: str = CLASSIFIER, **adapter: Any) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(path), dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(**{"rank": 4, **adapter}),
        runtime=RuntimeConfig(device="cpu"),
    )
    if auto_class == CLASSIFIER:
        return load_base(config, auto_class, HEAD, {"num_labels": 3, "pad_token_id": 0}, "SEQ_CLS")
    return load_base(config, auto_class, (), {}, "CAUSAL_LM")


def logits(module: nn.Module) -> Tensor:
    module.eval()
    with torch.no_grad():
        found: Tensor = module(input_ids=IDS, attention_mask=MASK).logits
    return found


def filled(base: Base, seed: int = 0, rank: int | None = None, size: float = 0.3) -> AdapterState:
    """An adapter with no zeros in it."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoraPair(
            torch.randn(s.rank, s.d_in, generator=generator, dtype=base.adapter_dtype) * size,
            torch.randn(s.d_out, s.rank, generator=generator, dtype=base.adapter_dtype) * size,
            s.scale,
        )
        for name, s in base.layout(rank).items()
    }
    dense = {
        name: torch.randn(value.shape, generator=generator, dtype=base.adapter_dtype)
        for name, value in base.initial_adapter(0).dense.items()
    }
    return AdapterState(pairs, dense)


def without_pairs(state: AdapterState) -> AdapterState:
    return state.with_tensors({f"{name}:B": torch.zeros_like(pair.B) for name, pair in state.pairs.items()})


def same(first: AdapterState, second: AdapterState) -> bool:
    one, two = first.tensors(), second.tensors()
    return (
        list(one) == list(two)
        and first.layout == second.layout
        and all(torch.equal(value, two[name]) for name, value in one.items())
    )


@pytest.fixture
def tiny_gpt2(tmp_path: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


# ---------------------------------------------------------------------------------------------- loading


def test_a_base_is_known_by_what_it_was_loaded_from(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    key = load(copy).key
    assert load(copy).key == key
    assert load(copy, dropout=0.5).key != key
    (copy / "model.safetensors").touch()
    assert load(copy).key != key, "the folder was written to since"


def test_loading_leaves_the_random_numbers_alone(tiny_bert: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    load(tiny_bert).initial_adapter(5)
    assert torch.equal(torch.rand(4), wanted)


def test_names_are_the_base_models_own(tiny_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    state = load(tiny_bert).initial_adapter(0)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    assert QUERY in state.pairs
    assert len(state.pairs) == 4, "query and value of two layers are PEFT's default for BERT"
    assert set(state.pairs) < {name for name, _ in plain.named_modules()}
    assert list(state.dense) == ["classifier.weight", "classifier.bias"]


def test_frozen_parameters_that_the_checkpoint_lacks_are_the_same_everywhere(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(tmp_path / "no_pooler")
    base = load(tmp_path / "no_pooler")
    first, fingerprint = base.model.state_dict()["bert.pooler.dense.weight"].clone(), base.fingerprint
    torch.rand(17)
    again = load(tmp_path / "no_pooler")
    assert torch.equal(first, again.model.state_dict()["bert.pooler.dense.weight"])
    assert again.fingerprint == fingerprint
    (note,) = (note for note in again.notes if "bert.pooler.dense" in note)
    assert "modules_to_save" in note


def test_the_fingerprint_is_of_the_weights_not_of_the_place(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "copy")
    first = load(tiny_bert).fingerprint
    assert load(tmp_path / "copy").fingerprint == first
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert load(tmp_path / "copy").fingerprint != first


@pytest.mark.parametrize(
    ("adapter", "code", "named"),
    [
        ({"targets": ("qeury",)}, "no-such-module", "'query'"),
        ({"targets": ("word_embeddings",)}, "target-not-linear", "word_embeddings"),
        ({"targets": ("LayerNorm",)}, "target-not-linear", "LayerNorm"),
        ({"method": "eva"}, "method-not-federable", "'eva'"),
        ({"method": "lorra"}, "unknown-name", "'lora'"),
        ({"modules_to_save": ("clasifier",)}, "no-such-module", "'classifier'"),
        ({"modules_to_save": ("dropout",)}, "nothing-to-train", "dropout"),
        ({"rank_pattern": {"qery": 2}}, "pattern-without-match", "'query'"),
        ({"rank_pattern": {"(": 2}}, "bad-pattern", "'('"),
        ({"alpha_pattern": {"query": -1.0}}, "out-of-range", "-1.0"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(tiny_bert: Path, adapter: dict[str, Any], code: str, named: str) -> None:
    with raises(FedloraError, code, named):
        load(tiny_bert, **adapter)


def test_tied_weights_are_not_untied(tiny_gpt2: Path) -> None:
    with raises(ModelError, "tied-weights", "lm_head"):
        load(tiny_gpt2, auto_class="AutoModelForCausalLM", targets=("c_attn", "lm_head"))
    with raises(ModelError, "tied-weights", "wte"):
        load(tiny_gpt2, auto_class="AutoModelForCausalLM", modules_to_save=("wte",))


def test_a_model_without_the_tasks_head_is_refused(tiny_bert: Path) -> None:
    config = RunConfig(model=ModelConfig(name=str(tiny_bert)), runtime=RuntimeConfig(device="cpu"))
    with raises(ModelError, "no-head", "'score'", "modules_to_save"):
        load_base(config, CLASSIFIER, ("score",), {"num_labels": 3})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with raises(ModelError, "model-not-loadable", tmp_path):
        load(tmp_path)


def test_all_linear_leaves_head_and_embeddings_out(tiny_bert: Path) -> None:
    base = load(tiny_bert, targets="all-linear")
    assert "classifier" not in base.targets
    assert len(base.targets) == 2 * 6 + 1  # four of attention, two of the feed-forward part; the pooler


@pytest.mark.parametrize(
    ("layers", "numbers"), [("top:1", [1]), ("top:2", [0, 1]), ([0], [0]), ([1, 0], [0, 1]), (None, [0, 1])]
)
def test_layers_choose_among_the_targets(layers: Any, numbers: list[int], tiny_bert: Path) -> None:
    base = load(tiny_bert, targets=("query",), layers=layers)
    assert base.targets == tuple(f"bert.encoder.layer.{number}.attention.self.query" for number in numbers)
    assert (base.target_names == ["query"]) == (numbers == [0, 1])


def test_layers_leave_out_what_is_in_none(tiny_bert: Path) -> None:
    assert "bert.pooler.dense" in load(tiny_bert, targets=("dense",)).targets
    assert "bert.pooler.dense" not in load(tiny_bert, targets=("dense",), layers="top:2").targets


@pytest.mark.parametrize("layers", ["top:3", [2]])
def test_a_layer_that_is_not_there_is_refused(layers: Any, tiny_bert: Path) -> None:
    with raises(ModelError, "no-such-layer", "'bert.encoder.layer'", "0 to 1"):
        load(tiny_bert, targets=("query",), layers=layers)
    with raises(ModelError, "no-layer-list"):
        load(tiny_bert, targets=("pooler.dense",), layers=layers)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("gpu", "unknown-name"),
        ("cuda:99", "no-such-device"),
        ("cpu:3", "no-such-device"),
        ("cuda:x", "unknown-name"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, code: str) -> None:
    with raises(ConfigError, code, repr(name)):
        models.resolve_device(name)


# ---------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_what_was_written_is_read(tiny_bert: Path, dtype: str) -> None:
    base = load(tiny_bert, dtype)
    state = filled(base)
    base.write(state)
    assert same(base.read(), state)
    assert base.read().pairs[QUERY].A.dtype == (torch.float64 if dtype == "float64" else torch.float32)


def test_write_and_read_copy(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    for rank in (None, 2):  # in place, and resized
        state = filled(base, rank=rank)
        kept = state.clone()
        for parameter in base.write(state):
            parameter.data.add_(1.0)
        assert same(state, kept)
        found = base.read()
        base.write(kept)
        assert not same(found, kept)


def test_parts_decide_what_trains(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    state = filled(base)

    def trained(*parts: Any) -> list[str]:
        parameters = base.write(state, frozenset(parts))
        names = {id(p): name for name, p in base.model.named_parameters() if p.requires_grad}
        assert len(names) == len(parameters), "nothing else may train"
        return [names[id(p)] for p in parameters]

    everything = trained("A", "B", "dense")
    assert len(everything) == 2 * 4 + 2
    frozen_A = trained("B", "dense")
    assert not any("lora_A" in name for name in frozen_A)
    assert [n for n in frozen_A if "classifier" in n] == [n for n in everything if "classifier" in n]
    assert all("lora_A" in name for name in trained("A"))
    assert trained() == []
    assert trained("A", "B", "dense") == everything


def test_clients_of_other_ranks_compute_their_own_product(tiny_bert: Path) -> None:
    """An adapter acts as its merge into the base does, whichever rank was there before."""
    base = load(tiny_bert, "float64")
    for seed, rank in enumerate((4, 1, 7, 4, 2)):
        state = filled(base, seed, rank)
        base.rebase(0, ())
        base.write(state)
        beside = logits(base.model)
        base.rebase(1, [BaseUpdate(0, 1, AdapterState(state.pairs))])
        base.write(without_pairs(state))
        assert torch.allclose(logits(base.model), beside, rtol=1e-12, atol=1e-12)


def test_an_empty_pair_changes_nothing(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    state = filled(base)
    base.write(without_pairs(state))
    wanted = logits(base.model)
    empty = {n: LoraPair(p.A[:0], p.B[:, :0], p.scale) for n, p in state.pairs.items()}
    base.write(AdapterState(empty, state.dense))
    assert torch.equal(logits(base.model), wanted)


def test_layouts_follow_patterns_and_scaling(tiny_bert: Path) -> None:
    patterns = {"rank_pattern": {"layer.0.*query": 8}, "alpha_pattern": {"value": 6.0}, "alpha": 16.0}
    fixed = load(tiny_bert, **patterns).layout
    value = QUERY.replace("query", "value")
    assert (fixed()[QUERY].rank, fixed()[QUERY].scale) == (8, 2.0)
    assert (fixed()[value].rank, fixed()[value].scale) == (4, 1.5)
    assert (fixed(2)[QUERY].rank, fixed(2)[QUERY].scale) == (4, 4.0)
    assert (fixed(1)[value].rank, fixed(1)[value].scale) == (1, 6.0)
    proportional = load(tiny_bert, alpha_scaling="proportional", **patterns).layout
    assert {proportional(rank)[QUERY].scale for rank in (1, 2, 4, 16)} == {2.0}
    root = load(tiny_bert, method="rslora", alpha=16.0).layout
    assert root(4)[QUERY].scale == 8.0
    assert root(16)[QUERY].scale == 4.0
    with raises(ModelError, "out-of-range", 0):
        fixed(0)


def test_the_initial_adapter_is_a_function_of_the_seed(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    first = base.initial_adapter(7)
    torch.rand(100)
    base.write(filled(base, rank=2))
    assert same(base.initial_adapter(7), first)
    other = base.initial_adapter(8)
    assert not torch.equal(other.pairs[QUERY].A, first.pairs[QUERY].A)
    assert not torch.equal(other.dense["classifier.weight"], first.dense["classifier.weight"])
    assert not any(pair.B.any() for pair in first.pairs.values())
    # BERT draws a head from a normal distribution with its initializer_range (0.2 here) and zero bias.
    assert 0.1 < float(first.dense["classifier.weight"].std()) < 0.3
    assert not first.dense["classifier.bias"].any()


def test_a_head_that_the_checkpoint_holds_is_kept(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    trained = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    trained.save_pretrained(tmp_path / "trained")
    base = load(tmp_path / "trained")
    assert torch.equal(base.initial_adapter(1).dense["classifier.weight"], trained.classifier.weight)
    other = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=5)
    other.save_pretrained(tmp_path / "other")
    assert load(tmp_path / "other").initial_adapter(1).dense["classifier.weight"].shape[0] == 3


def test_an_adapter_that_does_not_fit_is_refused(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    state = filled(base)
    pairs, dense = dict(state.pairs), dict(state.dense)
    wrong = LoraPair(torch.zeros(4, 5), torch.zeros(32, 4), 1.0)
    misfits = {
        ("tensors-differ", QUERY): AdapterState({n: p for n, p in pairs.items() if n != QUERY}, dense),
        ("tensors-differ", "bert.quary"): AdapterState({**pairs, "bert.quary": pairs[QUERY]}, dense),
        ("shape-mismatch", QUERY): AdapterState({**pairs, QUERY: wrong}, dense),
        ("shape-mismatch", "classifier.bias"): AdapterState(pairs, {**dense, "classifier.bias": torch.zeros(2)}),
        ("tensors-differ", "classifier.bias"): AdapterState(pairs, {"classifier.weight": dense["classifier.weight"]}),
    }
    base.write(state)
    for (code, name), misfit in misfits.items():
        with raises(ModelError, code, name):
            base.write(misfit)
        assert same(base.read(), state), "a refused adapter must leave nothing behind"


def test_a_bfloat16_base_has_a_float32_head(tiny_bert: Path) -> None:
    base = load(tiny_bert, "bfloat16")
    assert base.model.get_submodule("bert.pooler.dense").weight.dtype == torch.bfloat16
    parameters = base.write(filled(base))
    assert {p.dtype for p in parameters} == {torch.float32}
    found = base.model(input_ids=IDS, attention_mask=MASK).logits
    assert found.dtype == torch.float32
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)


def test_layers_with_running_statistics_stay_frozen(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    norm = nn.BatchNorm1d(3)
    base.model.add_module("norm", norm)
    base.train_mode(True)
    assert base.model.training
    assert not norm.training
    base.train_mode(False)
    assert not any(module.training for module in base.model.modules())


# ---------------------------------------------------------------------------------------------- versions of the base


def base_updates_of(base: Base, count: int, size: float = 0.1) -> list[BaseUpdate]:
    return [BaseUpdate(v, v + 1, AdapterState(filled(base, v, 1 + v % 3, size).pairs)) for v in range(count)]


def dense_sum(base: Base, base_updates: list[BaseUpdate]) -> BaseUpdate:
    """What a server sends to a client that lacks a lot: the sum, from a float32 NumPy-style running total."""
    acc: dict[str, Tensor] = {}
    for base_update in base_updates:
        for name, pair in base_update.change.pairs.items():
            delta = pair.delta().to(torch.float32)
            acc[name] = acc[name] + delta if name in acc else delta
    return BaseUpdate(0, base_updates[-1].version, AdapterState(dense=acc))


def frozen(base: Base) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in base.plain_state_dict().items() if not n.startswith("classifier")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_following_every_merge_and_catching_up_end_with_the_same_bits(tiny_bert: Path, dtype: str) -> None:
    base = load(tiny_bert, dtype)
    pristine = frozen(base)
    log = base_updates_of(base, 5)
    for version in range(1, 6):
        base.rebase(version, log)
        assert base.base_version == version
    followed = frozen(base)
    assert any(not torch.equal(followed[n], pristine[n]) for n in pristine)

    base.rebase(0, ())
    assert all(torch.equal(value, pristine[n]) for n, value in frozen(base).items())
    base.rebase(5, [dense_sum(base, log)])
    assert all(torch.equal(value, followed[n]) for n, value in frozen(base).items())

    base.rebase(0, ())
    base.rebase(4, [dense_sum(base, log[:4])])
    base.rebase(5, log)
    assert all(torch.equal(value, followed[n]) for n, value in frozen(base).items())


def test_a_bfloat16_base_keeps_small_merges(tiny_bert: Path) -> None:
    """Merges of 1e-5 are far below bfloat16's step at these weights: added one by one most would vanish."""
    base = load(tiny_bert, "bfloat16")
    shape = base.layout(1)[QUERY]
    step = LoraPair(torch.full((1, shape.d_in), 1e-5), torch.ones(shape.d_out, 1), 1.0)
    before = base.plain_state_dict()[f"{QUERY}.weight"].clone()
    log = [BaseUpdate(v, v + 1, AdapterState({QUERY: step})) for v in range(400)]
    for version in range(1, 401):
        base.rebase(version, log[:version])
    wanted = (before.float() + 400 * 1e-5).to(torch.bfloat16)
    found = base.plain_state_dict()[f"{QUERY}.weight"]
    assert torch.allclose(found.float(), wanted.float(), rtol=2**-8, atol=1e-6)
    assert float((found.float() - before.float()).mean()) == pytest.approx(4e-3, rel=0.02)


def test_merges_that_do_not_lead_there_are_refused(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    log = base_updates_of(base, 4)
    for version, base_updates, code in [
        (3, log[1:3], "base-update-gap"),
        (3, [], "base-update-gap"),
        (4, [log[0], log[2], log[3]], "base-update-gap"),
        (4, log[:3], "base-update-gap"),
        (1, [BaseUpdate(0, 1, AdapterState({"bert.nowhere": log[0].change.pairs[QUERY]}))], "no-such-module"),
        (1, [BaseUpdate(0, 1, AdapterState(dense={QUERY: torch.zeros(2, 2)}))], "shape-mismatch"),
    ]:
        with raises(ModelError, code):
            base.rebase(version, base_updates)
        assert base.base_version == 0
    base.rebase(2, log[:2])
    before = frozen(base)
    base.rebase(2, [])  # there already
    assert all(torch.equal(value, before[n]) for n, value in frozen(base).items())
    base.rebase(1, log)  # back, and by a part of the log
    assert base.base_version == 1


def test_transposed_layers_merge_too(tiny_gpt2: Path) -> None:
    base = load(tiny_gpt2, "float64", "AutoModelForCausalLM", targets=("c_attn", "c_proj"))
    state = filled(base)
    shape = base.layout()["transformer.h.0.attn.c_attn"]
    assert (shape.d_out, shape.d_in) == (48, 16)
    base.write(state)
    beside = logits(base.model)
    base.rebase(1, [BaseUpdate(0, 1, AdapterState(state.pairs))])
    base.write(without_pairs(state))
    assert torch.allclose(logits(base.model), beside, rtol=1e-12, atol=1e-12)


class Int8Linear(nn.Linear):
    """A weight-only quantised layer, as the quantisation libraries make them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / step).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.register_buffer("step", step)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.step, self.bias)


def test_a_quantised_layer_carries_what_it_cannot_absorb() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(6, 5))
    weights = BaseWeights({"q": layer})
    x = torch.randn(3, 6, requires_grad=True)
    before, bits = layer(x), layer.weight.clone()
    pairs = [LoraPair(torch.randn(2, 6), torch.randn(5, 2), 0.5) for _ in range(9)]
    dense = torch.randn(5, 6)
    log = [BaseUpdate(v, v + 1, AdapterState({"q": pair})) for v, pair in enumerate(pairs)]
    log.append(BaseUpdate(9, 10, AdapterState(dense={"q": dense})))
    for version in (1, 4, 10):
        weights.rebase(version, log)
    with torch.inference_mode():
        layer(x)
    change = sum((pair.delta() for pair in pairs), dense.double())
    wanted = before + x @ change.float().T
    assert torch.allclose(layer(x), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.weight, bits)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    (reference,) = torch.autograd.grad(wanted.sum(), x)
    assert torch.allclose(gradient, reference, rtol=1e-4, atol=1e-4)
    with raises(ModelError, "weight-quantised", "'q'"):
        weights.merged("q")
    weights.rebase(0, ())
    assert torch.equal(layer(x), before)


def test_packed_bits_take_no_addition() -> None:
    """Though their dtype is a floating one: 8 bits a weight, and 4-bit pairs that are stored as bfloat16."""
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 64)
    assert absorbs(plain)
    packed = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_storage=torch.bfloat16).to("cpu")
    assert packed.dtype == torch.bfloat16
    plain.weight = packed
    assert not absorbs(plain)
    plain.weight = nn.Parameter(torch.zeros(64, 64).to(torch.float8_e4m3fn), requires_grad=False)
    assert not absorbs(plain)


def test_a_quantised_base_trains_and_follows_merges(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loading._from_pretrained

    def quantised(*args: Any) -> Any:
        model, absent = original(*args)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and "encoder" in name:
                model.set_submodule(name, Int8Linear(module))
        return model, absent

    monkeypatch.setattr(loading, "_from_pretrained", quantised)
    base = load(tiny_bert)
    state = filled(base)
    base.write(state)
    beside = logits(base.model)
    base.rebase(1, [BaseUpdate(0, 1, AdapterState(state.pairs))])
    parameters = base.write(without_pairs(state))
    assert torch.allclose(logits(base.model), beside, rtol=1e-4, atol=1e-4)
    base.model(input_ids=IDS, attention_mask=MASK).logits.sum().backward()
    assert all(p.grad is not None for p in parameters)


# ---------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"alpha": 5.0, "rank_pattern": {"layer.0.*query": 3}, "alpha_pattern": {"value": 7.0}},
        {"method": "rslora", "alpha": 3.3},
        {"targets": ("query", "dense"), "modules_to_save": ("classifier", "pooler")},
        {"modules_to_save": ()},
        {"modules_to_save": ("pooler",)},
        {"layers": "top:1"},
    ],
)
def test_peft_loads_the_adapter_and_gives_the_same_logits(
    tiny_bert: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = load(tiny_bert, **adapter)
    state = AdapterState(filled(base, rank=3).pairs, filled(base).dense)
    base.write(state)
    restore_unread(base.model)  # plain PEFT computes what no head reads, and rounds in its company
    wanted = logits(base.model)
    save_adapter(base, state, tmp_path / "adapter", {"rounds": "3"})
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    found = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(found), wanted)
    assert json.loads((tmp_path / "adapter" / "fedlora.json").read_text()) == {"rounds": "3"}
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tiny_bert)
    assert written["task_type"] == "SEQ_CLS"


def test_transposed_layers_export_too(tiny_gpt2: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load(tiny_gpt2, auto_class="AutoModelForCausalLM")
    state = filled(base)
    base.write(state)
    wanted = logits(base.model)
    save_adapter(base, state, tmp_path / "adapter", {})
    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), wanted)
    save_merged(base, state, (), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert torch.allclose(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def test_exports_replace_an_older_one_whole_or_not_at_all(tiny_bert: Path, tmp_path: Path) -> None:
    base = load(tiny_bert)
    first, second = filled(base, 1), filled(base, 2)
    folder = tmp_path / "adapter"
    save_adapter(base, first, folder, {})
    (folder / "old").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError):
        save_adapter(base, second, folder, {"not json": object()})  # type: ignore[dict-item]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_adapter(base, second, folder, {})
    assert not (folder / "old").exists()
    assert (folder / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    save_adapter(base, first, folder, {})
    assert (folder / "adapter_model.safetensors").read_bytes() == before["adapter_model.safetensors"]
    assert (folder / "adapter_config.json").read_bytes() == before["adapter_config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_needs_neither_peft_nor_us(tiny_bert: Path, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = load(tiny_bert, dtype)
    state, log = filled(base), base_updates_of(base, 3)
    base.rebase(3, base_updates_of(base, 3, size=0.5))  # another run's, that must not be believed
    save_merged(base, state, log, tmp_path / "merged")
    assert base.base_version == 0
    base.rebase(3, log)
    wanted = logits(base.model)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.dtype == base.dtype
    close = 1e-4 if dtype == "float32" else 0.1
    assert torch.allclose(logits(merged).float(), wanted.float(), rtol=close, atol=close)
    wide = merged.state_dict()[f"{QUERY}.weight"].double()
    pristine = AutoModelForSequenceClassification.from_pretrained(tiny_bert).state_dict()[f"{QUERY}.weight"].double()
    change = sum(base_update.change.pairs[QUERY].delta() for base_update in log) + state.pairs[QUERY].delta()
    rounding = 2**-23 if dtype == "float32" else 2**-8
    start = pristine.to(base.dtype).double()
    assert torch.allclose(wide, start + change, rtol=rounding, atol=4 * rounding)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("happy film")["input_ids"][0] == 2


def test_an_exported_empty_pair_has_a_rank(tiny_bert: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = load(tiny_bert)
    state = filled(base)
    empty = {n: LoraPair(p.A[:0], p.B[:, :0], p.scale) for n, p in state.pairs.items()}
    state = AdapterState(empty, state.dense)
    base.write(state)
    restore_unread(base.model)  # plain PEFT computes what no head reads, and rounds in its company
    wanted = logits(base.model)
    save_adapter(base, state, tmp_path / "adapter", {})
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), wanted)


@given(st.floats(1e-3, 1e4), st.integers(1, 512), st.booleans())
def test_the_exported_alpha_gives_the_same_scale(alpha: float, rank: int, rslora: bool) -> None:
    divisor = math.sqrt(rank) if rslora else rank
    scale = alpha / divisor
    assert alpha_of(scale, rank, rslora) / divisor == scale


def test_fresh_pairs_do_nothing(tiny_bert: Path) -> None:
    base = load(tiny_bert)
    state = filled(base)
    base.write(without_pairs(state))
    wanted = logits(base.model)
    base.write(AdapterState(fresh_pairs(base.layout(6), 3), state.dense))
    assert torch.equal(logits(base.model), wanted)
