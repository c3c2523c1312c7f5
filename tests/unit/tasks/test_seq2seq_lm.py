"""The task "seq2seq-lm": transformers' own loss, rouge-score's figures over any division, cut texts, refused rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises
from support.tiny_t5 import write_tiny_t5

from fedlora.assets import Checkpoint
from fedlora.config import ModelConfig
from fedlora.data._screen import invented
from fedlora.errors import DataError, ModelError, ReplyError
from fedlora.federation.evaluator import added
from fedlora.tasks import Examples, Table
from fedlora.tasks._text import load_tokenizer, tokens_of
from fedlora.tasks.seq2seq_lm import ROUGE, Seq2SeqLM, _scored

TEXTS = ["the cat sees a bird", "who", "a dog likes the old red bird and the cat", "the bird"]
TARGETS = ["a bird", "the dog sees who", "red", "old old old old"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t5(tmp_path_factory.mktemp("t5"), [*TEXTS, *TARGETS, "say: it"])


@pytest.fixture(scope="module")
def model(t5: Path) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(t5, dtype=torch.float64).eval()


def prepared(path: Path, task: Seq2SeqLM | None = None, **columns: list[Any]) -> Examples:
    table = Table({"article": TEXTS, "summary": TARGETS} | columns)
    return (task or Seq2SeqLM()).prepare(table, path, {"text": "article", "target": "summary"}, keep=())


def test_the_loss_of_each_example_is_transformers_own(t5: Path, model: Any) -> None:
    task, tokenizer = Seq2SeqLM(), load_tokenizer(t5)
    together = task.losses(model, task.collate(prepared(t5), range(4)))
    for row, (text, target) in enumerate(zip(TEXTS, TARGETS, strict=True)):
        labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(together[row], model(**tokenizer(text, return_tensors="pt"), labels=labels).loss)


def test_figures_are_rouge_scores_of_what_the_model_writes(t5: Path, model: Any) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    task, tokenizer = Seq2SeqLM(max_target_length=5), load_tokenizer(t5)
    targets = [*TARGETS[:3], ""]
    ids = model.generate(**tokenizer(TEXTS[3], return_tensors="pt"), max_new_tokens=5, do_sample=False)
    targets[3] = tokenizer.decode(ids[0], skip_special_tokens=True)  # so that one is written exactly
    examples = prepared(t5, task, summary=targets)
    with torch.inference_mode():
        measures = {name: v.numpy() for name, v in task.measure(model, task.collate(examples, range(4))).items()}
    scorer, wanted = RougeScorer(["rouge1", "rouge2", "rougeL"]), []
    for text, target in zip(TEXTS, targets, strict=True):
        ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
        wanted.append(scorer.score(target, tokenizer.decode(ids[0], skip_special_tokens=True)))
    figures = task.figures(added([task.sums({n: v[part] for n, v in measures.items()}) for part in ([0, 1], [2, 3])]))
    assert figures == pytest.approx(task.summarise(measures))
    for name in ("rouge1", "rouge2", "rougeL"):
        assert figures[name] == pytest.approx(np.mean([one[name].fmeasure for one in wanted]))
    assert 0 < figures["rougeL"] < 1
    assert figures["exact_match"] == measures["exact"].mean() >= 0.25
    assert next(iter(figures)) == task.metric
    said = task.samples(model, examples, [3], t5)
    assert said[0].prompt == TEXTS[3]
    assert said[0].generated.startswith(said[0].reference), "which is what it writes, cut"


@pytest.mark.parametrize(
    ("wanted", "written", "rougeL", "exact"),
    [
        ("東京 タワー", "東京 タワー", 1.0, 1.0),
        ("über alles", "Über  allem!", 0.5, 0.0),
        ("a\nb", "a b ", 1.0, 1.0),
        ("a", "", 0.0, 0.0),
    ],
)
def test_words_are_those_of_any_language(wanted: str, written: str, rougeL: float, exact: float) -> None:
    found = _scored(wanted, written)
    assert found.keys() == {*ROUGE, "exact"}
    assert (found["rougeL"], found["exact"]) == (rougeL, exact)


def test_a_cut_text_keeps_its_end_and_a_cut_target_does_not(t5: Path) -> None:
    examples, end = prepared(t5, Seq2SeqLM(max_length=5, max_target_length=3)), load_tokenizer(t5).eos_token_id
    assert tokens_of(examples).lengths.tolist() == [5, 2, 5, 3]
    assert all(ids[-1] == end for ids in tokens_of(examples))
    labels = tokens_of(examples, "labels")
    assert [ids[-1] == end for ids in labels] == [True, False, True, False]
    assert labels.lengths.tolist() == [3, 3, 2, 3]
    assert examples.notes == (
        "2 of 4 texts are longer than 5 tokens and are cut (task.max_length)",
        "2 of 4 targets are longer than 3 tokens and are cut (task.max_target_length)",
    )
    assert not prepared(t5).notes
    exact = prepared(t5, Seq2SeqLM(max_length=11, max_target_length=5))
    assert not exact.notes, "as long as they may be"


def test_the_prefix_stands_before_each_text_and_counts_nothing(t5: Path) -> None:
    task = Seq2SeqLM(prefix="say: ")
    spans = task.spans(prepared(t5, task), 0, t5)
    assert [(text.replace(" </s>", "").strip(), counts) for text, counts in spans] == [
        (f"say: {TEXTS[0]}", False),
        (TARGETS[0], True),
    ]


@pytest.mark.parametrize(("column", "value"), [("article", ""), ("summary", " "), ("article", None), ("summary", 7)])
def test_a_bad_row_is_refused_by_its_number(column: str, value: Any, t5: Path) -> None:
    good = {"article": TEXTS[0], "summary": TARGETS[0]}[column]
    with raises(DataError, "not-a-text", "row 1", repr(column)):
        prepared(t5, Seq2SeqLM(prefix="say: "), **{column: [good, value, good, good]})


def test_targets_of_unknown_words_are_refused(t5: Path) -> None:
    with raises(DataError, "all-words-unknown", "'summary'"):
        prepared(t5, summary=["x", "y", "z", "x"])


def test_a_model_without_a_decoder_is_refused(tiny_bert: Path) -> None:
    with raises(ModelError, "no-decoder-start", "decoder_start_token_id"):
        prepared(tiny_bert)


def test_the_decoders_start_may_stand_in_the_generation_settings(t5: Path, tmp_path: Path) -> None:
    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, wanted = (tokens_of(prepared(path), "decoder_input_ids") for path in (tmp_path, t5))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in wanted]


def test_examples_can_be_made_up(t5: Path) -> None:
    task = Seq2SeqLM()
    found = invented(task, Checkpoint.of(ModelConfig(name=str(t5))), {role: role for role in task.roles})
    assert len(found) == 4
    assert len(set(found.lengths.tolist())) > 1


@pytest.mark.parametrize("changed", [{"rouge2": 3.0}, {"exact": 3.0}, {"tokens": 1.0}, {"tokens": 900.0}])
def test_sums_that_no_examples_give_are_refused(changed: dict[str, float]) -> None:
    sums = dict.fromkeys(("examples", "exact", "tokens", "loss", "token_loss", *ROUGE), np.asarray(2.0))
    Seq2SeqLM().require_sums(sums)
    with raises(ReplyError, "invalid-sums"):
        Seq2SeqLM().require_sums(sums | {name: np.asarray(value) for name, value in changed.items()})
