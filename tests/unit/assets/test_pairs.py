"""Preference pairs: whose they are, samples of like length, and the likelier one of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_federations import WORDS

from fedlora.assets import pairs
from fedlora.assets.pairs import Recipe, _like, _sample, write_pairs

RECIPE = Recipe(people=2, turns=4, shortest=1, longest=3, longest_prompt=2, samples=3, temperature=1.0)
DRAW = np.random.default_rng(0)


def turn(person: str, asked: int, answered: int) -> dict[str, str]:
    prompt, answer = (" ".join(DRAW.choice(WORDS, size)) for size in (asked, answered))
    return {"prompt": prompt, "answer": answer, "person": person, "conversation": f"{person}-{DRAW.integers(9)}"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    suited = [
        turn(person, 1 + n % 2, 1 + n % 3) for person, size in (("a", 9), ("b", 3), ("c", 7)) for n in range(size)
    ]
    return [*suited, *(turn("b", 3, 2) for _ in range(20)), *(turn("b", 2, 4) for _ in range(20))]


def test_they_are_those_of_the_people_with_most_turns_and_come_again_by_their_seed(
    rows: list[dict[str, str]], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "SENTENCE_ENDS", tuple(WORDS))  # of a tiny model that knows no full stop
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        number = write_pairs(iter(rows), tiny_llama, tmp_path / name, RECIPE)
    text = (tmp_path / "one" / "pairs.jsonl").read_text()
    assert text == (tmp_path / "two" / "pairs.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert len(found) == number
    assert {pair["person"] for pair in found} == {"a", "c"}, "b talks much, but not in short turns"
    assert all(sum(pair["person"] == who for pair in found) <= RECIPE.turns for who in "ac")
    there = {(row["prompt"], row["answer"], row["person"], row["conversation"]) for row in rows}
    for pair in found:
        (asked,), (chosen,), (rejected,) = (pair[name] for name in ("prompt", "chosen", "rejected"))
        assert (asked["content"], chosen["content"], pair["person"], pair["conversation"]) in there
        assert [one["role"] for one in (asked, chosen, rejected)] == ["user", "assistant", "assistant"]
        assert rejected["content"]
    (tmp_path / "three").mkdir()
    write_pairs(iter(rows), tiny_llama, tmp_path / "three", Recipe(**{**vars(RECIPE), "seed": 1}))
    assert text != (tmp_path / "three" / "pairs.jsonl").read_text()


def test_samples_have_the_log_probabilities_of_a_pass_without_cache_and_padding(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama).eval(),
        AutoTokenizer.from_pretrained(tiny_llama),
    )
    turns = [{"prompt": "cat", "tokens": 2}, {"prompt": "cat dog red old", "tokens": 5}]
    ids, scores = _sample(turns, model, tokenizer, RECIPE, seed=0)
    assert len(ids) == len(turns) * RECIPE.samples
    for row, own in enumerate(ids):
        asked = [{"role": "system", "content": ""}, {"role": "user", "content": turns[row // RECIPE.samples]["prompt"]}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + own])).logits[0, len(before) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None])[:, 0]
        np.testing.assert_allclose(scores[row], wanted, atol=1e-4)


class Letters:
    """A tokeniser of single letters."""

    eos_token_id = ord("$")

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("said", "wanted", "kept"),
    [
        ("abc. def. gh", 8, ("abc. def.", 9)),
        ("abc. def. gh", 4, ("abc.", 4)),
        ("abc. def. gh", 6, None),  # off by two and three
        ("abcde$fg.", 5, ("abcde", 5)),
        ("abcdefgh", 8, None),  # it was not done
        ("$", 1, None),
    ],
)
def test_a_sample_is_cut_after_the_sentence_that_comes_nearest(
    said: str, wanted: int, kept: tuple[str, int] | None
) -> None:
    assert _like([ord(letter) for letter in said], wanted, Letters()) == kept


def test_the_likeliest_by_token_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, scores = ["ab.", "cde.", "fghijk."], [[-2.0] * 7, [-1.0] * 4 + [-9.0] * 3, [-0.5] * 7]
    sampled = [[ord(letter) for letter in text.ljust(7, "x")] for text in texts], np.array(scores)
    monkeypatch.setattr(pairs, "_sample", lambda *_, **__: sampled)
    ((_, found),) = pairs._rejected([{"tokens": 4}], None, Letters(), RECIPE)
    assert found == "cde.", "of those of like length; what was cut off does not count"
