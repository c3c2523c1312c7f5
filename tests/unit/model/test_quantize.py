"""Bases in 4 and 8 bits, by bitsandbytes on the CPU: what is trained on them is what plain PEFT would train."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import MODELS, client, random_base, random_examples, together
from support.errors import raises
from support.interrupted import cut_and_resumed
from support.states import gap
from torch import nn

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators import BaseUpdate
from fedlora.callbacks import Callback
from fedlora.config import OpenTable, RunConfig, TrainConfig, parse_config
from fedlora.errors import ConfigError, ModelError, PrivacyError
from fedlora.evaluation.pretrained_adapter import find_adapter
from fedlora.federation import client_training
from fedlora.model import Base, load_base, save_adapter, save_merged, seeded
from fedlora.model import quantize as quantize_module
from fedlora.privacy import dpsgd
from fedlora.privacy.calibrate import Schedule
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.tasks import Examples, Task, load_task
from fedlora.training import TrainJob, TrainResult, close_workspace, dropout_masks, opacus_loop, train
from fedlora.training.cohort import why_alone
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings

pytest.importorskip("bitsandbytes")
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
ROWS = np.arange(6)
SGD = TrainConfig(steps=1, batch_size=8, optimizer="sgd", lr=0.1)


@pytest.fixture(scope="module", params=[("llama", "nf4"), ("llama", "int8"), ("bert", "nf4")], ids="-".join)
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Task, Examples]:
    name, quantize = request.param
    causal, folder = name == "llama", tmp_path_factory.mktemp(f"{name}-{quantize}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, (MODELS[name][0], {**MODELS[name][1], "hidden_size": 64, "intermediate_size": 128}))
        base = random_base(name, folder, causal, "float32", quantize=quantize)
    base.model.config.hidden_dropout_prob = 0.0  # type: ignore[union-attr]
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    task = load_task(OpenTable(name="causal-lm" if causal else "text-classification"))
    return base, task, random_examples(causal, vit=False)


def test_frozen_layers_are_quantised_and_heads_are_not(held: tuple[Base, Task, Examples]) -> None:
    base = held[0]
    kind = KINDS[str(base.config.quantize)]
    assert {type(layer.get_base_layer()).__name__ for layer in base.pair_layers.values()} == {kind}  # type: ignore[operator]
    heads = [m for head in base.head_modules.values() for m in head.modules() if isinstance(m, nn.Linear)]
    output = base.model.get_output_embeddings() if not base.heads else None  # type: ignore[operator]
    whole = [module for module in (*heads, output) if module is not None]
    assert whole
    assert all(type(module) is nn.Linear for module in whole)
    assert base.dtype == torch.float32


def test_a_step_is_that_of_plain_peft(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    job = TrainJob(client(base, 0)[0].adapter, ALL_PARTS, ROWS, 0)
    found = train(base, task, examples, job, SGD).adapter
    parameters = base.write(job.adapter)  # PEFT's own layers, on the same quantised base
    base.train_mode(True)
    loss = task.losses(base.model, task.collate(examples, ROWS)).mean()
    gradients = torch.autograd.grad(loss, parameters)
    names = base.tensor_names()
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        wanted = parameter.detach() - SGD.lr * gradient
        assert float((found.tensors()[name] - wanted).norm() / wanted.norm().clamp_min(1.0)) < 2e-4, name


def test_clients_train_side_by_side(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    assert why_alone(base) is None
    clients = [client(base, k, rank=(4, 2)[k], optimizer="sgd", lr=0.05) for k in range(2)]
    for one, other in zip(together(base, task, examples, clients), clients, strict=True):
        assert isinstance(one, TrainResult), one
        (alone,) = together(base, task, examples, [other])
        assert gap(one.adapter, alone.adapter) < 1e-3
        assert gap(one.adapter, other[0].adapter) > 1e-3, "it did train"


def test_private_training_sums_the_clipped_gradients_of_each_example(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    job = TrainJob(client(base, 0)[0].adapter, ALL_PARTS, ROWS, 0)
    check_model(base, task, examples, job)
    settings = PrivateSettings(Schedule(1.0, 1, 1, float(len(ROWS))), 1e-9, 0.05)
    found = train_private(base, task, examples, job, SGD.model_copy(update={"lr": 1.0}), settings).adapter
    parameters = base.write(job.adapter)
    base.train_mode(True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    clip = settings.clipping_norm(base.dtype)
    for row in ROWS:
        loss = task.losses(base.model, task.collate(examples, [row])).sum()
        gradients = torch.autograd.grad(loss, parameters)
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        total = [held + one * min(1.0, clip / norm) for held, one in zip(total, gradients, strict=True)]
    for name, parameter, gradient in zip(base.tensor_names(), parameters, total, strict=True):
        wanted = parameter.detach() - gradient / len(ROWS)
        assert float((found.tensors()[name] - wanted).abs().max()) < 1e-4, name


@pytest.mark.parametrize("saving", [{"gradient_checkpointing": True}, {"micro_batch_size": 2}], ids=str)
def test_what_saves_memory_changes_no_client(held: tuple[Base, Task, Examples], saving: dict[str, Any]) -> None:
    base, task, examples = held
    plain, saved = (
        [client(base, k, rank=(4, 2)[k], size=9, optimizer="sgd", lr=0.05, steps=2, **more) for k in range(2)]
        for more in ({}, saving)
    )
    found, wanted = (together(base, task, examples, clients) for clients in (saved, plain))
    for one, other, (job, _) in zip(found, wanted, plain, strict=True):
        assert isinstance(one, TrainResult), one
        assert gap(one.adapter, other.adapter) < 1e-4
        assert gap(one.adapter, job.adapter) > 1e-3, "it did train"


def test_int8_is_known_by_its_layers(held: tuple[Base, Task, Examples]) -> None:
    """A checkpoint can be held so without model.quantize."""
    base, _, _ = held
    assert quantize_module.holds_int8(base.model) == (base.config.quantize == "int8")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_layers_that_the_checkpoint_lacks_stay_whole(quantize: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes))
    model.save_pretrained(tmp_path / "model")
    given = [f"model.name='{tmp_path / 'model'}'", "model.dtype=float32", f"model.quantize={quantize}"]
    task = load_task(OpenTable(name="text-classification"))
    base = load_base(parse_config("", given), task.auto_class, task.head, {"num_labels": 3}, task.peft_task_type)
    assert base.random == ("bert.pooler.dense",)
    assert type(base.model.get_submodule("bert.pooler.dense")) is nn.Linear
    state, inputs = client(base, 0)[0].adapter, {"input_ids": torch.arange(3, 15)[None]}
    base.write(state, frozenset())
    base.train_mode(False)
    save_adapter(base, state, tmp_path / "adapter", {})
    with torch.no_grad():
        wanted = base.model(**inputs).logits
        plain, _ = base.recipe.load()
        quantize_module.keep_layout(plain)
        found = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**inputs).logits
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_the_output_layer_stays_whole_by_any_name(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    transformers.BioGptForCausalLM(transformers.BioGptConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path)
    base = load_base(
        parse_config("", [f"model.name='{tmp_path}'", "model.quantize=nf4", "adapter.targets=['all-linear']"]),
        "AutoModelForCausalLM",
    )
    assert type(base.model.get_submodule("output_projection")) is nn.Linear


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    run = parse_config("", [f"model.name='{tmp_path}'", "model.quantize=nf4", "model.dtype=float32"])
    with raises(ModelError, "nothing-to-quantise", "remove it"):
        load_base(run, "AutoModelForImageClassification", ("classifier",))


@pytest.fixture
def quantised_before(tmp_path: Path) -> Callable[[str], Path]:
    """Saves a classifier in bfloat16 as transformers quantises it to 4 bits by itself."""

    def save(kind: str) -> Path:
        import transformers

        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
        config = getattr(transformers, f"{kind}Config")(vocab_size=40, pad_token_id=1, **sizes)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "whole")
        how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        arguments = {"quantization_config": how, "device_map": {"": "cpu"}}
        type(model).from_pretrained(tmp_path / "whole", **arguments).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_in_four_bits_is_trained_in_the_dtype_that_its_whole_layers_have(
    dtype: str, quantised_before: Callable[[str], Path]
) -> None:
    run = parse_config("", [f"model.name='{quantised_before('Llama')}'", f"model.dtype={dtype}"])
    base = load_base(run, "AutoModelForSequenceClassification", ("score",))
    parameters = base.write(base.initial_adapter(0))
    logits = base.model(input_ids=torch.arange(8).reshape(2, 4)).logits
    logits.float().square().sum().backward()
    norms = {value.dtype for name, value in base.model.named_parameters() if "norm" in name}
    assert norms == {base.dtype}
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in parameters)


def test_modules_that_are_trained_by_an_ending_of_their_name_stay_whole(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **sizes)).save_pretrained(
        tmp_path
    )
    saved = "adapter.modules_to_save=['classifier', 'pooler', 'layer.1.output']"
    run = parse_config("", [f"model.name='{tmp_path}'", "model.quantize=nf4", "model.dtype=float32", saved])
    base = load_base(run, "AutoModelForSequenceClassification", ("classifier",))
    small = [name for name, module in base.model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert any("layer.0.output" in name for name in small)
    assert not any("pooler" in name or "layer.1.output" in name for name in small)


def test_a_checkpoint_whose_head_is_in_four_bits_is_refused(quantised_before: Callable[[str], Path]) -> None:
    run = parse_config("", [f"model.name='{quantised_before('Bert')}'"])
    with raises(ModelError, "head-quantised", "classifier.weight", "model.quantize = 'nf4'"):
        load_base(run, "AutoModelForSequenceClassification", ("classifier",))


def test_experts_that_stay_whole_are_named(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.MixtralConfig(vocab_size=40, num_key_value_heads=1, num_local_experts=4, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    run = parse_config("", [f"model.name='{tmp_path}'", "model.quantize=nf4", "model.dtype=float32"])
    whole, quantised = load_base(run, "AutoModelForCausalLM").notes
    assert "model.quantize = 'nf4' reaches" in quantised
    (alone,) = load_base(parse_config("", [f"model.name='{tmp_path}'"]), "AutoModelForCausalLM").notes
    assert alone == whole
    for note in (whole, quantised):
        assert "model.layers.0.mlp.experts.gate_up_proj" in note


def test_changes_of_the_base_are_carried_beside_and_taken_back(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    state = client(base, 0)[0].adapter
    nothing, batch = base.initial_adapter(0), task.collate(examples, ROWS)
    pairs = AdapterState(state.pairs, {})

    def losses(adapter: AdapterState) -> torch.Tensor:
        base.write(adapter, frozenset())
        base.train_mode(False)
        with torch.no_grad():
            return task.losses(base.model, batch)

    before, wanted = losses(nothing), losses(AdapterState(state.pairs, nothing.dense))
    base.rebase(1, [BaseUpdate(0, 1, pairs)])
    changed = losses(nothing)
    base.rebase(0, ())
    assert float((changed - wanted).abs().max()) < 1e-3
    assert float((changed - before).abs().max()) > 1e-2
    assert torch.equal(losses(nothing), before)


def test_rows_that_are_computed_by_their_company_keep_apart(
    held: tuple[Base, Task, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLM.int8() on a GPU: Dettmers et al. 2022, section 3.2, a column is whole for all rows if it is large in one."""
    base = held[0]
    monkeypatch.setattr(base, "device", torch.device("cuda"))
    assert (why_alone(base) is not None) == (base.config.quantize == "int8")
    units = ("unit='example', max_grad_norm=1.0, public_examples=[100]", "unit='client', clip_norm=1.0")
    for unit in units:
        private = [f"model.quantize={base.config.quantize}", "server.aggregation_error=false"]
        private += ["server.weighting=uniform", f"privacy={{{unit}, epsilon=8.0, delta=1e-5}}"]
        if base.config.quantize == "int8":
            with raises(PrivacyError, "examples-coupled", "model.quantize = 'nf4'"):
                parse_config("", private)
        else:
            parse_config("", private)


def test_what_cannot_be_done_is_refused(held: tuple[Base, Task, Examples], tmp_path: Path) -> None:
    base = held[0]
    with raises(ModelError, "weight-quantised", "float32"):
        save_merged(base, base.initial_adapter(0), [], tmp_path / "merged")
    with raises(ConfigError, "dtype-too-wide", "model.dtype = 'auto'"):
        parse_config("", ["model.quantize=nf4", "model.dtype=float64"])


def test_another_quantisation_is_another_base(held: tuple[Base, Task, Examples]) -> None:
    base = held[0]
    config = RunConfig(model=base.config.model_copy(update={"quantize": None}))
    whole = load_base(config, base.recipe.auto_class, base.heads, {"num_labels": 3} if base.heads else {})
    assert whole.weights_digest != base.weights_digest


def test_an_adapter_goes_on_the_base_that_its_readme_loads(
    held: tuple[Base, Task, Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    base, task, examples = held
    state, batch = client(base, 0)[0].adapter, task.plain_inputs(examples, ROWS)
    base.write(state, frozenset())
    base.train_mode(False)
    save_adapter(base, state, tmp_path / "adapter", {})
    found = find_adapter(tmp_path / "adapter", ["task.name=causal-lm", f"model.name='{base.config.name}'"]).config.model
    assert found.quantize == base.config.quantize, "as fedlora evaluate loads it"
    said = base.recipe.snippet(base.config.name, None).replace("this folder", str(tmp_path / "adapter"))
    assert "BitsAndBytesConfig(" in said
    names: dict[str, Any] = {}
    monkeypatch.chdir(Path(base.config.name).parent)
    exec(said, names)
    assert isinstance(names["model"], PeftModel)
    with torch.no_grad():
        ours, theirs = (model(**batch).logits.float() for model in (base.model, names["model"]))
    mask = batch["attention_mask"].bool()
    kept = mask if ours.dim() == 3 else slice(None)
    # On CPUs with AVX512-BF16 bitsandbytes computes in bfloat16 in evaluation, whatever the base's dtype.
    within = 2e-2 if base.config.quantize == "nf4" else 1e-3
    assert float((ours[kept] - theirs[kept]).abs().max()) < within * float(ours.abs().max())


def test_evaluation_leaves_a_base_that_can_be_trained(held: tuple[Base, Task, Examples]) -> None:
    base, task, examples = held
    base.train_mode(False)
    batch = task.collate(examples, ROWS)
    parameters = base.write(client(base, 0)[0].adapter)
    with torch.inference_mode():
        before = task.losses(base.model, batch)
    gradients = torch.autograd.grad(task.losses(base.model, batch).sum(), parameters)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert float((task.losses(base.model, batch) - before).abs().max()) < 1e-5


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "find_spec", lambda _name: None)
    config = parse_config("", ["model.quantize=nf4"])
    with raises(ConfigError, "extra-missing", "pip install 'fedlora[quantize]'"):
        quantize_module.quantization(config, nn.Linear(1, 1), torch.float32)


@pytest.fixture
def on_4_bits(
    tiny_bert: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path, no_workspace: None
) -> Callable[..., RunConfig]:
    """A run on a base whose rows are as long as bitsandbytes' blocks."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    with seeded(0, torch.device("cpu")):
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        BertModel(BertConfig.from_pretrained(tiny_bert, **sizes)).save_pretrained(folder)
    return lambda name, rounds, rule, *more: tiny_config(
        f"model.name='{folder}'",
        "model.quantize=nf4",
        f"strategy.name={rule}",
        "runtime.processes=1",
        f"rounds={rounds}",
        f"name={name}",
        *more,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", "flora"])
def test_a_run_resumes_to_the_same_bytes(rule: str, on_4_bits: Callable[..., RunConfig]) -> None:
    whole = run_simulation(*begun(on_4_bits("whole", 3, rule)), Callback())
    resumed = cut_and_resumed(on_4_bits("cut", 3, rule), 2)
    for name, value in whole.adapter.tensors().items():
        assert torch.equal(resumed.adapter.tensors()[name], value), name
    assert whole.records[-1]["loss"] < whole.records[0]["loss"]


class Drawn:
    """The operating system's randomness, which begins anew with each cohort: from the seeds of its jobs."""

    def __init__(self) -> None:
        self.key, self.calls = b"", 0

    def begin(self, jobs: Sequence[TrainJob]) -> None:
        self.key, self.calls = repr([job.seed for job in jobs]).encode(), 0

    def urandom(self, size: int) -> bytes:
        self.calls += 1
        return hashlib.shake_256(self.key + self.calls.to_bytes(8, "big")).digest(size)


@pytest.mark.nightly
def test_a_private_run_resumes_to_the_same_bytes_and_the_same_epsilon(
    on_4_bits: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the secret draws of each cohort given; by themselves no two private runs are alike."""
    drawn, real = Drawn(), client_training.train_private_cohort

    def trained(base: Base, task: Task, examples: Examples, jobs: Sequence[TrainJob], *rest: Any) -> Any:
        drawn.begin(jobs)
        return real(base, task, examples, jobs, *rest)

    for module in (dpsgd, dropout_masks, opacus_loop):
        monkeypatch.setattr(module, "os", drawn)
    monkeypatch.setattr(client_training, "train_private_cohort", trained)
    private = (
        "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}",
        "server.weighting=uniform",
    )
    whole = run_simulation(*begun(on_4_bits("whole", 3, "fedavg", *private)), Callback())
    resumed = cut_and_resumed(on_4_bits("cut", 3, "fedavg", *private), 2)
    for name, value in whole.adapter.tensors().items():
        assert torch.equal(resumed.adapter.tensors()[name], value), name
    claims = [outcome.rundir.read_json("result.json")["privacy"] for outcome in (whole, resumed)]
    assert claims[0] == claims[1]
    assert claims[0]["epsilon"] > 0
    other = run_simulation(*begun(on_4_bits("other", 1, "fedavg", *private)), Callback()).adapter
    assert any(not torch.equal(other.tensors()[name], value) for name, value in whole.adapter.tensors().items())


def begun(config: RunConfig) -> tuple[RunConfig, RunDir]:
    return config, RunDir.create(config)


@pytest.mark.slow
@pytest.mark.verified
def test_what_a_run_leaves_can_be_evaluated_merged_and_looked_at(
    on_4_bits: Callable[..., RunConfig], tmp_path: Path
) -> None:
    from support.command_line import succeeds
    from transformers import AutoModelForSequenceClassification

    outcome = run_simulation(*begun(on_4_bits("left", 2, "flora")), Callback())
    run, merged = str(outcome.rundir.path), tmp_path / "merged"
    close_workspace()

    def cli(*words: str) -> str:
        result = succeeds(*words)
        return result.output

    said = cli("export", run, str(merged), "--format", "merged")
    assert "merged into the whole weights" in said
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert not getattr(model, "is_quantized", False)
    change = outcome.adapter.pairs["bert.encoder.layer.1.attention.self.query"].delta()
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").state_dict()
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert float((model.state_dict()[name] - before[name] - change).abs().max()) < 1e-5, "W + s B A, of the whole W"
    accuracy = f" {100 * outcome.records[-1]['accuracy']:.1f}"
    assert accuracy in cli("evaluate", run)
    assert "attention.self.query" in cli("spectrum", run)
