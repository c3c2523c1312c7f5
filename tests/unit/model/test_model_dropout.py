"""One number sets all of a base's dropout, whatever its family keeps it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.errors import raises
from support.tiny_classifiers import TEXT, classifier, inputs_of

from fedlora.config import parse_config
from fedlora.errors import ConfigError
from fedlora.model import load_base
from fedlora.model.dropout import dropout_in, set_dropout

SOME: dict[str, dict[str, Any]] = {
    "DistilBert": {"dropout": 0.1, "attention_dropout": 0.2, "seq_classif_dropout": 0.3},
    "GPT2": {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3, "classifier_dropout": 0.1},
    "Llama": {"attention_dropout": 0.2},
    "Qwen2": {"attention_dropout": 0.2},
}
ENCODER = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.1}


@pytest.mark.parametrize("kind", [*TEXT, "ViT"])
def test_zero_makes_training_mode_repeat_itself(kind: str) -> None:
    some = SOME.get(kind, {k: v for k, v in ENCODER.items() if kind != "ViT" or k != "classifier_dropout"})
    model, inputs = classifier(kind, **some), inputs_of(kind)
    wanted = model(**inputs).logits
    model.train()
    assert dropout_in(model.modules()) == max(some.values())
    assert not torch.equal(model(**inputs).logits, wanted)
    set_dropout(model, 0.0)
    assert dropout_in(model.modules()) == 0
    assert torch.equal(model(**inputs).logits, wanted)
    set_dropout(model, 0.5)
    probabilities = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert probabilities <= {0.5}
    assert dropout_in(model.modules()) == 0.5


def test_stochastic_depth_goes_off_but_is_no_dropout() -> None:
    module = torch.nn.Module()
    module.drop_path_prob, module.layer_norm_eps, module.dropout, module.use_dropout = 0.3, 1e-5, 0.1, True
    set_dropout(module, 0.2)
    assert (module.drop_path_prob, module.layer_norm_eps, module.dropout, module.use_dropout) == (0.3, 1e-5, 0.2, True)
    assert dropout_in([module]) == 0.3
    set_dropout(module, 0.0)
    assert dropout_in([module]) == 0
    assert module.use_dropout is True


@pytest.mark.parametrize(("given", "wanted"), [(None, 0.3), (0.0, 0.0), (0.7, 0.7)])
def test_the_config_decides_and_the_adapters_dropout_is_its_own(
    given: float | None, wanted: float, tmp_path: Path
) -> None:
    classifier("Bert", hidden_dropout_prob=0.3).float().save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    line = "" if given is None else f"dropout = {given}"
    config = parse_config(f"[model]\nname = {str(tmp_path / 'bert')!r}\n{line}\n[adapter]\ndropout = 0.25")
    base = load_base(config, "AutoModelForSequenceClassification", ("classifier",), {"num_labels": 3}, "SEQ_CLS")
    modules = dict(base.model.named_modules())
    assert modules["bert.embeddings.dropout"].p == wanted
    assert modules["dropout"].p == wanted
    assert modules[f"{base.targets[0]}.lora_dropout.default"].p == 0.25
    with raises(ConfigError, "bad-value", "model.dropout"):
        parse_config("[model]\ndropout = 1.0")
