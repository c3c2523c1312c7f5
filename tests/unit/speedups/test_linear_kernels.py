"""The laws of the fast kernel: it computes what torch computes, changes nothing else, and can always be undone."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.errors import raises
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fedlora import probes
from fedlora.errors import ModelError
from fedlora.speedups import linear_kernels as kernels
from fedlora.speedups.linear_kernels import KernelReport, OneDnnLinear, ShapeTiming, accelerate, frozen_linear, restore

pytestmark = pytest.mark.skipif(kernels._linear_op() is None, reason="this torch has no oneDNN linear kernel")

FLOAT32_ROUNDING = 1e-5  # relative to the norm, for sums of some hundred products through a few layers


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def frozen(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The input shapes of the calls that reached oneDNN."""
    seen: list[tuple[int, ...]] = []
    op = kernels._linear_op()
    assert op is not None

    def spy(x: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return op(x, *args)

    monkeypatch.setattr(kernels, "_linear_op", lambda: spy)
    return seen


# ---- one layer ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(16, 24),
        lambda: torch.randn(4, 5, 24),
        lambda: torch.randn(24, 16).t(),
        lambda: torch.randn(5, 4, 24).transpose(0, 1),
        lambda: torch.randn(16, 48)[:, ::2],
        lambda: torch.randn(1, 24).expand(16, 24),
    ],
    ids=["matrix", "batch", "transposed", "swapped", "strided", "expanded"],
)
def test_one_layer_equals_float64_in_value_and_gradient(
    make: Callable[[], Tensor], bias: bool, calls: list[tuple[int, ...]]
) -> None:
    model = frozen(nn.Linear(24, 40, bias=bias))
    x = make()
    exact = copy.deepcopy(model).double()
    assert accelerate(model, "onednn").layers == 1

    def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = model(x)
        (gradient,) = torch.autograd.grad((y**3).sum(), x)
        return y, gradient

    for value, reference in zip(run(model, x), run(exact, x.double()), strict=True):
        assert value.dtype == torch.float32
        assert value.shape == reference.shape
        assert relative_error(value, reference) < FLOAT32_ROUNDING
    assert len(calls) == 2  # forward, and backward in x; no third product for the weight
    assert model[0].weight.grad is None


def test_the_second_derivative_is_right() -> None:
    model = frozen(nn.Linear(24, 40))
    x = torch.randn(16, 24, requires_grad=True)

    def curvature(model: nn.Module, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((model(x) ** 3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        return second

    reference = curvature(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
    accelerate(model, "onednn")
    assert relative_error(curvature(model, x), reference) < FLOAT32_ROUNDING


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard: Callable[[], Any], calls: list[tuple[int, ...]]) -> None:
    model = frozen(nn.Linear(24, 40))
    x = torch.randn(16, 24)
    accelerate(model, "onednn")
    with guard():
        y = model(x)
    assert not y.requires_grad
    assert calls == [(16, 24)]
    assert relative_error(y, linear(x.double(), model[0].weight.double(), model[0].bias.double())) < FLOAT32_ROUNDING


def test_frozen_linear_takes_a_weight_of_any_strides(calls: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(16, 24), torch.randn(24, 80)[:, ::2].t()
    assert relative_error(frozen_linear(x, weight, None), x.double() @ weight.double().t()) < FLOAT32_ROUNDING
    assert calls == [(16, 24)]


# ---- nothing goes stale ----


def change_in_place(layer: nn.Linear, delta: Tensor) -> None:
    with torch.no_grad():
        layer.weight.add_(delta)


def change_data(layer: nn.Linear, delta: Tensor) -> None:
    layer.weight.data += delta


def change_by_loading(layer: nn.Linear, delta: Tensor) -> None:
    layer.load_state_dict(layer.state_dict() | {"weight": layer.weight + delta})


def change_the_parameter(layer: nn.Linear, delta: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight + delta, requires_grad=False)


@pytest.mark.parametrize("change", [change_in_place, change_data, change_by_loading, change_the_parameter])
def test_a_changed_base_weight_counts_at_once(change: Callable[[nn.Linear, Tensor], None]) -> None:
    model = frozen(nn.Linear(24, 40))
    accelerate(model, "onednn")
    x = torch.randn(16, 24, requires_grad=True)
    model(x).sum().backward()  # whatever could be cached now is
    x.grad = None
    change(model[0], torch.randn(40, 24))

    y = model(x)
    y.sum().backward()
    weight = model[0].weight.double()
    assert relative_error(y, linear(x.double(), weight, model[0].bias.double())) < FLOAT32_ROUNDING
    assert x.grad is not None
    assert relative_error(x.grad, weight.sum(dim=0).expand(16, 24)) < FLOAT32_ROUNDING


def test_a_weight_changed_between_forward_and_backward_is_refused() -> None:
    model = frozen(nn.Linear(24, 40))
    accelerate(model, "onednn")
    loss = model(torch.randn(16, 24, requires_grad=True)).sum()
    model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- nothing else changes ----


def test_parameters_and_state_are_the_same_objects() -> None:
    model = frozen(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
    before = {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    accelerate(model, "onednn")
    assert {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert all(isinstance(model[k], nn.Linear) for k in (0, 2))
    assert vars(model[0]).keys() == vars(nn.Linear(1, 1)).keys()  # nothing is kept on the layer


def test_restore_gives_back_the_class_and_the_bits() -> None:
    model = frozen(nn.Linear(384, 96), nn.Linear(96, 384))
    x = torch.randn(64, 384)
    before = model(x)
    accelerate(model, "onednn")
    assert [type(layer) for layer in model] == [OneDnnLinear, OneDnnLinear]
    restore(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert torch.equal(model(x), before)
    accelerate(model, "onednn")
    assert accelerate(model, "off") == KernelReport("off", 0, "switched off")
    assert torch.equal(model(x), before)


def conv1d(i: int, o: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(o, i)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stay_fast_and_are_independent(layer: Any, clone: Callable[[nn.Module], Any]) -> None:
    model = frozen(layer(24, 40))
    accelerate(model, "onednn")
    twin = clone(model)
    assert type(twin[0]) is type(model[0]) is not layer
    x = torch.randn(16, 24)
    before = model(x)
    assert torch.equal(twin(x), before)
    twin[0].weight.zero_()
    assert torch.equal(model(x), before)
    assert torch.equal(twin(x), twin[0].bias.expand(16, 40))
    restore(twin)
    assert not isinstance(twin[0], kernels._OneDnn)


def test_conv1d_equals_float64_in_value_and_gradient(calls: list[tuple[int, ...]]) -> None:
    model = frozen(conv1d(24, 40))
    exact = copy.deepcopy(model).double()
    assert accelerate(model, "onednn").layers == 1
    x = torch.randn(2, 8, 24, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    y, y64 = model(x), exact(x64)
    (y**3).sum().backward()
    (y64**3).sum().backward()
    assert relative_error(y, y64) < FLOAT32_ROUNDING
    assert relative_error(x.grad, x64.grad) < FLOAT32_ROUNDING
    assert len(calls) == 2


def test_unknown_attributes_of_the_module_still_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'OneDnnConv2D'"):
        kernels.OneDnnConv2D  # noqa: B018


# ---- what is left alone ----


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked() -> nn.Linear:
    layer = nn.Linear(24, 40)
    layer.forward = layer.forward  # as Hugging Face's accelerate leaves it
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(24, 40).double(),
        lambda: nn.Linear(24, 40).bfloat16(),
        lambda: nn.Linear(24, 40).half(),
        lambda: nn.Linear(24, 40, device="meta"),
        lambda: OwnLinear(24, 40),
        hooked,
    ],
    ids=["float64", "bfloat16", "float16", "meta", "subclass", "hooked"],
)
def test_unsupported_layers_are_left_alone(make: Callable[[], nn.Linear]) -> None:
    model = frozen(make())
    cls = type(model[0])
    report = accelerate(model, "onednn")
    assert (report.mode, report.layers, type(model[0])) == ("off", 0, cls)
    assert "no frozen float32 linear layer" in report.reason


def test_trainable_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 8))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)  # its bias trains
    assert accelerate(model, "onednn").layers == 1
    assert [type(layer) for layer in model] == [OneDnnLinear, nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    "unfrozen", [{"weight"}, {"bias"}, {"weight", "bias"}], ids=lambda names: "+".join(sorted(names))
)
def test_a_layer_unfrozen_later_learns(unfrozen: set[str]) -> None:
    model = frozen(nn.Linear(24, 40))
    plain = copy.deepcopy(model)
    accelerate(model, "onednn")
    x = torch.randn(16, 24)
    for m in (model, plain):
        for name in unfrozen:
            m[0].get_parameter(name).requires_grad_()
        m(x).sum().backward()
    for name in unfrozen:
        assert torch.equal(model[0].get_parameter(name).grad, plain[0].get_parameter(name).grad)


def in_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


@pytest.mark.parametrize(
    "call",
    [
        in_autocast,
        lambda model, x: model.double()(x.double()),
        lambda model, x: model.bfloat16()(x.bfloat16()),
        lambda model, x: model(x[:0]),
        lambda model, x: model(x[0]),
        lambda model, x: model(x[: kernels.FEW_ROWS - 1]),
        lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
        lambda model, x: torch.func.vmap(model)(x),
        lambda model, x: torch.func.jacrev(lambda v: model(v).sum(dim=0))(x),
        lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
        lambda model, x: torch.func.functional_call(model, {"0.weight": torch.ones(40, 24).double()}, x.double()),
    ],
    ids=[
        "autocast",
        "float64",
        "bf16",
        "empty",
        "vector",
        "few rows",
        "compile",
        "vmap",
        "jacrev",
        "jvp",
        "functional",
    ],
)
def test_where_onednn_is_not_right_the_bits_are_torchs(
    call: Callable[[nn.Module, Tensor], Tensor], calls: list[tuple[int, ...]]
) -> None:
    plain = frozen(nn.Linear(24, 40))
    if "functional_call" in call.__code__.co_names:
        plain[0].bias = None
    model = copy.deepcopy(plain)
    assert accelerate(model, "onednn").layers == 1
    x = torch.randn(16, 24)
    y, expected = call(model, x), call(plain, x)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert calls == []


# ---- the choice ----


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was measured yet."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, bool]]]:
    """Let every probe take one second with torch's kernel, and `ratios` of a second, in turn, with oneDNN's."""

    def use(*ratios: float) -> list[tuple[int, bool]]:
        runs: list[tuple[int, bool]] = []

        def run(self: Any, *, backwards: bool) -> tuple[float, float]:
            runs.append((self.weight.shape[0], backwards))
            turn = sum(shape == self.weight.shape[0] for shape, _ in runs) - 2  # the first one warms up
            return 1.0, 1 / ratios[turn % len(ratios)]

        monkeypatch.setattr(kernels._Probe, "run", run)
        return runs

    return use


def three() -> nn.Sequential:
    return frozen(nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 40))


@pytest.mark.parametrize(("gain", "mode"), [(2.0, "onednn"), (1.09, "off"), (0.5, "off")])
def test_auto_takes_onednn_only_if_clearly_faster(gain: float, mode: str, pretend: Callable[..., Any]) -> None:
    pretend(gain)
    model = three()
    report = accelerate(model, "auto", rows=40)
    assert report.mode == mode
    assert report.layers == sum(type(layer) is OneDnnLinear for layer in model) == (3 if mode == "onednn" else 0)
    assert report.speedup == pytest.approx(gain)
    assert [(t.in_features, t.out_features, t.layers, t.rows) for t in report.timings] == [
        (24, 40, 2, 40),
        (40, 24, 1, 40),
    ]


def test_kernels_take_turns_and_one_disturbed_time_decides_nothing(pretend: Callable[..., Any]) -> None:
    runs = pretend(0.2, *[1.5] * 7)
    assert accelerate(three(), "auto").mode == "onednn"
    assert [shape for shape, _ in runs] == [40, 24] * (1 + kernels.PROBE_REPEATS)
    assert [backwards for _, backwards in runs[::2]] == [n % 2 == 1 for n in range(1 + kernels.PROBE_REPEATS)]
    pretend(*[9.0] * 5, *[1.0] * 3)  # and a median alone would have been taken in by this
    assert accelerate(three(), "measure").mode == "off"


def test_what_was_measured_holds_until_it_is_measured_again(pretend: Callable[..., Any], cache: Path) -> None:
    pretend(2.0)
    first = accelerate(three(), "auto")
    assert first.mode == "onednn"
    assert first.measured
    runs = pretend(0.5)
    assert accelerate(three(), "auto") == first
    assert runs == []
    assert accelerate(three(), "measure").mode == "off"
    assert accelerate(three(), "auto").mode == "off"
    (file,) = (cache / "probes").iterdir()
    written = json.loads(file.read_text())
    assert {"processor", "cores", "threads", "torch"} <= written["machine"].keys()
    assert all({"torch_gflops", "onednn_gflops"} <= timing.keys() for timing in written["found"]["timings"])


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(probes, "processor", lambda: "another"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 97),
        lambda patch: patch.setattr(probes, "version_of", lambda name: "another"),
    ],
    ids=["processor", "threads", "versions"],
)
def test_another_machine_measures_for_itself(
    change: Callable[[pytest.MonkeyPatch], None], pretend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(2.0)
    accelerate(three(), "auto")
    runs = pretend(2.0)
    accelerate(frozen(nn.Linear(24, 48)), "auto")  # as do layers of another shape
    assert runs
    change(monkeypatch)
    runs = pretend(0.5)
    assert accelerate(three(), "auto").mode == "off"
    assert runs


def test_a_cache_that_cannot_be_written_or_is_damaged_is_no_hindrance(
    pretend: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(2.0)
    accelerate(three(), "auto")
    (file,) = (cache / "probes").iterdir()
    file.write_text("{")
    assert accelerate(three(), "auto").mode == "onednn"
    assert json.loads(file.read_text())["found"]["timings"]
    (cache / "a file").write_text("")
    monkeypatch.setenv("FEDLORA_CACHE", str(cache / "a file"))
    assert accelerate(three(), "auto").mode == "onednn"


def test_the_speedup_weighs_each_shape_by_its_work() -> None:
    # Multiply-adds per row: 2 layers of 10 at speeds 1 and 2, one layer of 30 at 3 and 3: (20 + 10) / (10 + 10).
    timings = (ShapeTiming(2, 5, 2, 1, 1.0, 2.0), ShapeTiming(5, 6, 1, 1, 3.0, 3.0))
    assert KernelReport("onednn", 3, "", timings).speedup == pytest.approx(1.5)
    assert KernelReport("off", 0, "").speedup != KernelReport("off", 0, "").speedup  # NaN: nothing was measured


@pytest.fixture(params=[torch.enable_grad, torch.no_grad, torch.inference_mode])
def guard(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


@pytest.mark.usefixtures("guard")
def test_measuring_leaves_no_trace() -> None:
    model = frozen(nn.Linear(24, 40), nn.Linear(40, 24))
    bits = {name: p.clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    report = accelerate(model, "auto")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(report.timings) == 2
    assert all(t.torch_gflops > 0 and t.onednn_gflops > 0 for t in report.timings)
    assert all(torch.equal(p, bits[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_recorded_choice_is_repeated_bit_by_bit() -> None:
    model = frozen(nn.Linear(384, 96))
    twin = copy.deepcopy(model)
    report = accelerate(model, "auto")
    again = accelerate(twin, report.mode)
    assert (again.mode, again.layers) == (report.mode, report.layers)
    assert type(twin[0]) is type(model[0])
    x = torch.randn(64, 384)
    assert torch.equal(model(x), twin(x))


def test_an_unknown_mode_is_refused() -> None:
    with raises(ModelError, "unknown-name", "'onednn'"):
        accelerate(frozen(nn.Linear(2, 2)), "onednnn")  # type: ignore[arg-type]


def test_a_torch_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_linear_op", lambda: None)
    model = frozen(nn.Linear(24, 40))
    with raises(ModelError, "kernels-not-supported", "'auto'", "'off'"):
        accelerate(model, "onednn")
    assert accelerate(model, "auto").mode == "off"
    assert type(model[0]) is nn.Linear


# ---- with the libraries around it ----


def lora_bert(attention: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        attn_implementation=attention,
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0)
    model = get_peft_model(BertForSequenceClassification(config), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # with PEFT's zeros, A has no gradient
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(6, 12, dtype=torch.long)
    for row in range(6):
        mask[row, 12 - 2 * row :] = 0  # padding of 0 to 10 tokens
    return {
        "input_ids": torch.randint(1, 50, (6, 12), generator=generator) * mask,
        "attention_mask": mask,
        "labels": torch.randint(3, (6,), generator=generator),
    }


def logits_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch())
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {"logits": out.logits.detach(), **gradients}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lora_training_of_a_padded_bert_agrees_to_rounding(attention: str, calls: list[tuple[int, ...]]) -> None:
    exact = logits_and_gradients(lora_bert(attention).double())
    model = lora_bert(attention)
    report = accelerate(model, "onednn")
    # Per block: query, key, value, attention output, two of the feed-forward; the pooler; PEFT's kept copy of the head.
    assert report.layers == 2 * 6 + 2
    fast = logits_and_gradients(model)
    assert len(calls) > 2 * 6 + 4
    assert fast.keys() == exact.keys()
    for name, value in fast.items():
        assert relative_error(value, exact[name]) < 10 * FLOAT32_ROUNDING, name

    # A few steps of training end at the same adapter.
    plain = lora_bert(attention)
    optimisers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, plain)]
    for m, optimiser in zip((model, plain), optimisers, strict=True):
        for _ in range(3):
            logits_and_gradients(m)
            optimiser.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) or relative_error(ours, theirs) < 10 * FLOAT32_ROUNDING, name


def test_the_adapter_may_come_before_or_after() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return frozen(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))

    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    first, last = base(), base()
    accelerate(first, "onednn")
    for model in (first, last):
        torch.manual_seed(1)
        inject_adapter_in_model(config, model)
    assert accelerate(last, "onednn").layers == 2
    x = torch.randn(16, 24)
    assert torch.equal(first(x), last(x))
    assert type(first[0].base_layer) is type(last[0].base_layer) is OneDnnLinear


def test_merging_and_unmerging_by_peft_counts_at_once() -> None:
    model = lora_bert("eager").eval()
    with torch.no_grad():
        expected = model(**batch()).logits
        accelerate(model, "onednn")
        assert relative_error(model(**batch()).logits, expected) < FLOAT32_ROUNDING
        model.merge_adapter()
        assert relative_error(model(**batch()).logits, expected) < FLOAT32_ROUNDING
        with model.disable_adapter():
            unmerged = model(**batch()).logits
        assert relative_error(unmerged, expected) > 100 * FLOAT32_ROUNDING


def test_opacus_per_example_gradients_agree() -> None:
    from opacus import GradSampleModule

    def per_example(fast: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 48), nn.Linear(48, 3))
        model[1].requires_grad_(False)
        if fast:
            assert accelerate(model, "onednn").layers == 1
        wrapped = GradSampleModule(model)
        cross_entropy(wrapped(torch.randn(16, 24)), torch.arange(16) % 3, reduction="sum").backward()
        return model[0].weight.grad_sample, model[2].weight.grad_sample

    for fast, plain in zip(per_example(True), per_example(False), strict=True):
        assert fast.shape[0] == 16
        assert relative_error(fast, plain) < FLOAT32_ROUNDING


def test_hooks_on_the_layer_itself_still_run() -> None:
    model = frozen(nn.Linear(24, 40))
    accelerate(model, "onednn")
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model(torch.randn(16, 24, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]
