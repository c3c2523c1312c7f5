"""An adapter that somebody trained: what a run begins with computes what the adapter computed, or is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.errors import raises
from support.peft_adapters import logits, train_by_peft
from support.tiny_federations import MakeConfig
from torch import Tensor

from fedlora.aggregators import ClientSpec, load_aggregator
from fedlora.aggregators._base import rules
from fedlora.assets import Checkpoint
from fedlora.config import ModelConfig
from fedlora.errors import AssetError, ModelError, RuleError, RunDirError
from fedlora.federation.given_adapter import read_start
from fedlora.federation.initial_state import first_state
from fedlora.federation.planner import plan_for
from fedlora.model.export import save_adapter
from fedlora.provenance import MODEL
from fedlora.training.workspace import Workspace, open_workspace

LOST = ("fedsb", "ravan")
"""Rules that train cores between factors of their own."""


@pytest.fixture(scope="session")
def trained(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An adapter that plain PEFT trained in double precision, and its logits."""
    folder = tmp_path_factory.mktemp("by-peft")
    return folder, train_by_peft(tiny_bert, folder, dtype=torch.float64)


def opened(make: MakeConfig, folder: Path, *keys: str) -> Workspace:
    return open_workspace(make(f"adapter.start='{folder}'", *keys))


def computed(workspace: Workspace, rule: str, *, causal: bool = False) -> list[Tensor]:
    """Logits of the global model before the first round, and of what a client begins with."""
    base, found = workspace.base, load_aggregator(rule)
    state = first_state(found, base, 0, read_start(workspace))
    plan = plan_for(found, state, ClientSpec(0, base.layout()))
    base.rebase(0, ())
    base.rebase(state.base_version, state.base_updates)
    try:
        out = []
        for adapter in (state.adapter, plan.adapter):
            base.write(adapter)
            out.append(logits(base.model, causal=causal))
    finally:
        base.rebase(0, ())
    return out


@pytest.mark.parametrize("rule", [name for name, _ in rules.items()])
def test_every_rule_begins_with_what_the_adapter_computes(
    rule: str, trained: tuple[Path, Tensor], tiny_config: MakeConfig
) -> None:
    workspace = opened(tiny_config, trained[0], "model.dtype=float64")
    if rule in LOST:
        with raises(RuleError, "start-lost", "adapter.start", "fedavg"):
            computed(workspace, rule)
        return
    for found in computed(workspace, rule):
        torch.testing.assert_close(found, trained[1], rtol=1e-6, atol=1e-6)
    workspace.base.write(workspace.base.initial_adapter(0))
    assert not torch.allclose(logits(workspace.base.model), trained[1], atol=1e-2), "or the adapter had learnt nothing"


@pytest.mark.parametrize("rule", ["fedavg", "flora"])
def test_an_adapter_of_mixed_ranks_is_taken_with_its_patterns(
    rule: str, tiny_bert: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    patterns = {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"value": 3}}
    wanted = train_by_peft(tiny_bert, tmp_path / "a", dtype=torch.float64, **patterns)
    config = tiny_config(
        f"adapter.start='{tmp_path / 'a'}'",
        "model.dtype=float64",
        *(f"adapter.{key}={json.dumps(value).replace(':', '=')}" for key, value in patterns.items()),
    )
    for found in computed(open_workspace(config), rule):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    with raises(ModelError, "shape-mismatch", "rank 2 and alpha 16", "rank 4 and alpha 16", "rank_pattern"):
        read_start(opened(tiny_config, tmp_path / "a", "model.dtype=float64"))


# ------------------------------------------------------------------------------------------ what is refused


OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "rank": ({"r": 8}, (), ("shape-mismatch", "rank 8 and alpha 16", "rank 4", "adapter.rank = 8")),
    "alpha": ({"lora_alpha": 5}, (), ("shape-mismatch", "alpha 5", "alpha 16", "adapter.alpha = 5")),
    "dora": ({"use_dora": True}, (), ("method-differs", "use_dora = True", "False", "adapter.method = 'dora'")),
    "rslora": ({"use_rslora": True}, (), ("method-differs", "use_rslora = True", "adapter.method = 'rslora'")),
    "no dora": ({}, ("adapter.method=dora",), ("method-differs", "use_dora = False", "True")),
    "bias": ({"bias": "all"}, (), ("method-differs", "bias = 'all'", "'none'", "biases stay frozen")),
    "lora_bias": ({"lora_bias": True}, (), ("method-differs", "lora_bias = True", "False", "without it")),
    "fewer modules": ({"target_modules": ["query"]}, (), ("tensors-missing", "on query ", "query, value", "targets")),
    "more modules": (
        {"target_modules": ["query", "key", "value"]}, (), ("tensors-differ", "key.lora_A", "adapter.targets = ['key'")
    ),
    "other layers": ({"layers_to_transform": [1]}, (), ("tensors-missing", "layer.0", "adapter.layers")),
    "a module in full": ({"modules_to_save": ["pooler"]}, (), ("tensors-differ", "pooler", "adapter.modules_to_save")),
    "no head": ({"task_type": None}, (), ("tensors-missing", "classifier", "adapter.modules_to_save")),
    "labels": ({"labels": 3}, (), ("shape-mismatch", "classifier.weight", "[3, 32]", "[2, 32]")),
    "pissa": ({"init_lora_weights": "pissa"}, (), ("base-changed", "'pissa'", "path_initial_model_for_weight")),
    "pissa by iteration": ({"init_lora_weights": "pissa_niter_4"}, (), ("base-changed", "'pissa_niter_4'")),
    "olora": ({"init_lora_weights": "olora"}, (), ("base-changed", "'olora'", "path_initial_model_for_weight")),
    "two starts": ({}, ("adapter.method=pissa",), ("two-starts", "'pissa'", "remove adapter.start")),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_another_adapter_than_the_configs_is_refused_with_both_values_and_the_cure(
    what: str, tiny_bert: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    fields, keys, (code, *named) = OTHERS[what]
    train_by_peft(tiny_bert, tmp_path / "a", **fields)
    with raises(ModelError, code, *named):
        read_start(opened(tiny_config, tmp_path / "a", *keys))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_language_models_adapter_that_peft_converted_is_taken(
    kind: str, tiny_llama: Path, tasks: dict[str, list[str]], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    wanted = train_by_peft(tiny_llama, tmp_path / "a", causal=True, initial=True, init_lora_weights=kind)
    keys = (*tasks["causal-lm"], "adapter.rank=8", "adapter.alpha=32")  # as PEFT wrote them: twice the rank
    for found in computed(opened(tiny_config, tmp_path / "a", *keys), "fedavg", causal=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def edited(folder: Path, to: Path, **facts: Any) -> Path:
    """A copy of an adapter with another adapter_config.json."""
    shutil.copytree(folder, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    return to


@pytest.mark.parametrize("kind", ["loftq", "corda", "lora_ga", "PiSSA_niter_16"])
def test_every_start_that_changed_the_base_is_refused(
    kind: str, trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = edited(trained[0], tmp_path / "a", init_lora_weights=kind)
    with raises(ModelError, "base-changed", repr(kind)):
        read_start(opened(tiny_config, folder))


WITHOUT_EFFECT: dict[str, Any] = {
    "peft_version": "9.9.9",
    "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers"},
    "lora_dropout": 0.3,
    "init_lora_weights": "gaussian",
    "inference_mode": False,
    "layers_to_transform": [0, 1],
    "megatron_core": "megatron.core",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "a_field_of_tomorrow": None,
    "alpha_pattern": {},
    "revision": "main",
    "fan_in_fan_out": True,
}


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_fields_that_say_nothing_of_what_is_computed_are_passed_over(
    key: str, trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = edited(trained[0], tmp_path / "a", **{key: WITHOUT_EFFECT[key]})
    own, other = (read_start(opened(tiny_config, one)) for one in (trained[0], folder))
    assert own is not None
    assert other is not None
    assert own.digest == other.digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a_field_of_tomorrow", "on"),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["x"]),
        ("use_qalora", True),
    ],
)
def test_fields_that_may_change_what_is_computed_are_refused_by_name(
    key: str, value: Any, trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with raises(ModelError, "method-differs", key):
        read_start(opened(tiny_config, edited(trained[0], tmp_path / "a", **{key: value})))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "classifier.bias"])
def test_values_that_are_not_finite_are_refused_by_name(
    value: float, part: str, trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if part in name)
    tensors[name].view(-1)[1] = value
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with raises(ModelError, "adapter-not-finite", name.removeprefix("base_model.model.")):
        read_start(opened(tiny_config, folder))


def test_values_that_the_federations_dtype_cannot_hold_are_refused(
    trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.full_like(tensors[name], 1e300)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with raises(ModelError, "adapter-not-finite", name.removeprefix("base_model.model."), "finite in float32"):
        read_start(opened(tiny_config, folder))


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha of null": ({"lora_alpha": None}, "lora_alpha = None"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha = '8'"),
    "alpha of NaN": ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    "alpha of infinity": ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
    "alpha of 0": ({"lora_alpha": 0}, "lora_alpha = 0"),
    "alpha of a truth": ({"lora_alpha": True}, "lora_alpha = True"),
    "alpha beyond a float": ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
    "a pattern's text": ({"alpha_pattern": {"query": "x"}}, "alpha_pattern['query'] = 'x'"),
    "a list of patterns": ({"alpha_pattern": ["query"]}, "alpha_pattern = ['query']"),
    "no pattern": ({"alpha_pattern": {"(": 4}}, "alpha_pattern = '('"),
    "an unknown type": ({"peft_type": "OF_TOMORROW"}, "peft_type = 'OF_TOMORROW'"),
    "no type": ({"peft_type": None}, "peft_type = None"),
    "types": ({"peft_type": ["LORA"]}, "peft_type = ['LORA']"),
    "A of rank 0": ({"A": (0, 32), "B": (32, 0)}, "lora_A [0, 32]"),
    "A of no dimension": ({"A": ()}, "lora_A []"),
    "A of three dimensions": ({"A": (4, 32, 1)}, "lora_A [4, 32, 1]"),
    "B of another rank": ({"B": (32, 3)}, "lora_B [32, 3]"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_peft_would_not_write_is_refused_with_its_folder_and_field(
    what: str, trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    facts, named = MALFORMED[what]
    shapes = {f"lora_{key}": value for key, value in facts.items() if len(key) == 1}
    folder = edited(trained[0], tmp_path / "a", **{key: value for key, value in facts.items() if len(key) > 1})
    tensors = load_file(folder / "adapter_model.safetensors")
    for part, shape in shapes.items():
        tensors[next(name for name in tensors if part in name)] = torch.zeros(shape)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with raises(ModelError, "adapter-not-loadable", folder, named):
        read_start(opened(tiny_config, folder))


def test_no_adapter_a_pickle_and_a_damaged_one(
    trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with raises(RunDirError, "not-an-adapter", tmp_path / "nothing", "adapter_config.json"):
        read_start(opened(tiny_config, tmp_path / "nothing"))
    folder = shutil.copytree(trained[0], tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    with raises(ModelError, "adapter-not-loadable", folder):
        read_start(opened(tiny_config, folder))
    with raises(AssetError, "adapter-as-model", "adapter.start"):
        Checkpoint.of(ModelConfig(name=str(folder)))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with raises(ModelError, "adapter-not-loadable", "safe_serialization=True"):
        read_start(opened(tiny_config, folder))


# ------------------------------------------------------------------------------------------ what it was trained with


def exported(workspace: Workspace, folder: Path) -> Path:
    """An adapter with what a run says of it."""
    facts = {"provenance": workspace.pins.only(MODEL).known}
    save_adapter(workspace.base, workspace.base.initial_adapter(0), folder, facts)
    return folder


@pytest.mark.parametrize("labels", [["positive", "negative"], ["negative", "neutral", "positive"]])
def test_an_adapter_of_a_run_begins_with_the_same_classes_in_their_order_alone(
    labels: list[str], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = exported(open_workspace(tiny_config()), tmp_path / "a")
    again = read_start(opened(tiny_config, folder))
    assert again is not None
    assert len(again.notes) == 1, "all of it is known"
    with raises(RunDirError, "provenance-mismatch", "the class names", folder):
        read_start(opened(tiny_config, folder, f"task.labels={labels}"))


def test_an_adapter_of_a_run_on_another_base_is_refused(
    tiny_bert: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = exported(open_workspace(tiny_config()), tmp_path / "a")
    moved, changed = (Path(shutil.copytree(tiny_bert, tmp_path / name)) for name in ("moved", "changed"))
    assert read_start(opened(tiny_config, folder, f"model.name='{moved}'")) is not None
    path = changed / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.word_embeddings.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    with raises(RunDirError, "provenance-mismatch", "the base model", "model.name"):
        read_start(opened(tiny_config, folder, f"model.name='{changed}'"))
    by_peft = tmp_path / "by-peft"  # of which PEFT says no more than the path
    train_by_peft(tiny_bert, by_peft)
    assert read_start(opened(tiny_config, by_peft, f"model.name='{moved}'")) is not None
    with raises(ModelError, "other-base", tiny_bert, changed, "base_model_name_or_path"):
        read_start(opened(tiny_config, by_peft, f"model.name='{changed}'"))


def test_weights_that_neither_the_checkpoint_nor_the_adapter_holds_are_missed(
    tiny_bert: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    headless = shutil.copytree(tiny_bert, tmp_path / "headless")
    path = headless / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "pooler" not in name}
    save_file(kept, path, {"format": "pt"})
    train_by_peft(headless, tmp_path / "a")
    keys = (f"model.name='{headless}'",)
    with raises(ModelError, "tensors-missing", "pooler.dense", "modules_to_save"):
        read_start(opened(tiny_config, tmp_path / "a", *keys))
    ours = exported(open_workspace(tiny_config(*keys)), tmp_path / "b")
    assert read_start(opened(tiny_config, ours, *keys)) is not None


BASES: dict[str, tuple[str | None, str, str]] = {
    "the hub's name of an asset": ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", ""),
    "the asset's own": ("all-minilm-l6-v2", "all-MiniLM-L6-v2", ""),
    "a mirror": ("mirror/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", "not known"),
    "another": ("bert-base-uncased", "all-MiniLM-L6-v2", "other"),
    "a path that is not here": ("/nowhere/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", "not known"),
    "a name, for a folder": ("google/bert", "FOLDER", "not known"),
    "none": (None, "FOLDER", "does not name its base"),
}


@pytest.mark.parametrize("what", BASES)
def test_without_hashes_the_bases_name_is_compared_as_far_as_it_goes(
    what: str, trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, own, outcome = BASES[what]
    folder = edited(trained[0], tmp_path / "a", base_model_name_or_path=theirs)
    workspace = opened(tiny_config, folder)
    if own != "FOLDER":
        known = workspace.pins
        model = workspace.config.model.model_copy(update={"name": own})
        workspace = replace(workspace, config=workspace.config.model_copy(update={"model": model}))
        monkeypatch.setattr(Workspace, "pins", known)
    if outcome == "other":
        with raises(ModelError, "other-base", theirs, own, "base_model_name_or_path"):
            read_start(workspace)
        return
    start = read_start(workspace)
    assert start is not None
    of_base, notes = [note for note in start.notes if "its base:" in note], " ".join(start.notes)
    assert bool(of_base) == bool(outcome)
    assert all(outcome in note for note in of_base)
    assert "whether the tokenizer and the class names are the same is not known, nor how its base was" in notes


@pytest.mark.parametrize(
    ("theirs", "own", "outcome"),
    [
        ("abc", "abc", ""),
        ("abc", "def", "other"),
        ("abc", None, "unknown"),
        (None, "def", "unknown"),
        (None, None, "unknown"),
        ("main", "def", "unknown"),
    ],
)
def test_revisions_of_one_name_are_compared_where_both_sides_have_one(
    theirs: str | None,
    own: str | None,
    outcome: str,
    trained: tuple[Path, Tensor],
    tiny_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = edited(trained[0], tmp_path / "a", base_model_name_or_path="google/bert", revision=theirs)
    workspace = opened(tiny_config, folder)
    known = workspace.pins
    model = workspace.config.model.model_copy(update={"name": "google/bert", "revision": own})
    workspace = replace(workspace, config=workspace.config.model_copy(update={"model": model}))
    monkeypatch.setattr(Workspace, "pins", known)
    if outcome == "other":
        with raises(ModelError, "other-base", "revision 'abc'", "'def'", "adapter_config.json"):
            read_start(workspace)
        return
    start = read_start(workspace)
    assert start is not None
    assert any("on this revision of 'google/bert' is not known" in note for note in start.notes) == bool(outcome)


def test_another_task_is_said_and_not_refused(
    trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = edited(trained[0], tmp_path / "a", task_type="FEATURE_EXTRACTION")
    said = [
        [note for note in start.notes if "task_type" in note]
        for one in (folder, trained[0])
        if (start := read_start(opened(tiny_config, one))) is not None
    ]
    assert said[0][0].endswith("its task_type is 'FEATURE_EXTRACTION', and here it is 'SEQ_CLS'")
    assert (len(said[0]), said[1]) == (1, [])


def test_the_hash_is_of_the_values_and_not_of_the_place(
    trained: tuple[Path, Tensor], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    moved = shutil.copytree(trained[0], tmp_path / "moved")
    digests = []
    for folder in (trained[0], moved):
        start = read_start(opened(tiny_config, folder))
        assert start is not None
        digests.append(start.digest)
    assert digests[0] == digests[1]
    tensors = load_file(moved / "adapter_model.safetensors")
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, moved / "adapter_model.safetensors", {"format": "pt"})
    start = read_start(opened(tiny_config, moved))
    assert start is not None
    assert start.digest != digests[0]
