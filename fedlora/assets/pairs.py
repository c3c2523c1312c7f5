"""Preference pairs out of conversations: what a person answered, preferred to what a chat model would have said.

Samples are drawn from the seed; the last digits of the logits are those of a machine and its torch, so that another
machine may draw some others.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.assets._rows import write_rows


@dataclass(frozen=True)
class Recipe:
    """What the pairs depend on beside conversations and model; lengths are in words.

    Args:
        people: those with most turns to choose from.
        turns: drawn for each of them; one without a sample of like length is left out.
        shortest: of an answer.
        longest: of an answer.
        longest_prompt: of what it answers.
        samples: drawn for each turn.
        temperature: of the draw.
        seed: of turns and samples.
    """

    people: int = 6
    turns: int = 32
    shortest: int = 5
    longest: int = 11
    longest_prompt: int = 15
    samples: int = 3
    temperature: float = 0.7
    seed: int = 0
    version: int = 1


RECIPE = Recipe()
PROMPTS = 32  # that are answered at once
TEXTS = ("prompt", "answer")
SENTENCE_ENDS = (".", "!", "?")


def write_pairs(rows: Iterable[Mapping[str, str]], model_folder: Path, folder: Path, recipe: Recipe = RECIPE) -> int:
    """Write pairs.jsonl, with the columns prompt, chosen, rejected, person and conversation, and recipe.json.

    Args:
        rows: see `fedlora.assets._made.chitchat_rows`.
        model_folder: of a causal language model with a chat template.
        folder: gets the files.
        recipe: see there.

    Returns:
        The number of pairs.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order are other sums
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model.eval()
        turns = _drawn(rows, tokenizer, recipe)
        pairs = []
        for turn, rejected in _rejected(turns, model, tokenizer, recipe):
            said = {"user": turn["prompt"]}, {"assistant": turn["answer"]}, {"assistant": rejected}
            messages = [[{"role": role, "content": text} for role, text in one.items()] for one in said]
            pair = dict(zip(("prompt", "chosen", "rejected"), messages, strict=True))
            pairs.append(pair | {name: turn[name] for name in ("person", "conversation")})
    finally:
        torch.set_num_threads(threads)
    write_rows(pairs, folder / "pairs.jsonl", compact=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)) + "\n", encoding="utf-8")
    return len(pairs)


def _drawn(rows: Iterable[Mapping[str, str]], tokenizer: Any, recipe: Recipe) -> list[Mapping[str, Any]]:
    """Turns of the most talkative people, with the tokens of their answers; those with short prompts first, so that
    batches have little padding."""
    suited: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        asked, answered = (len(row[name].split()) for name in TEXTS)
        if asked <= recipe.longest_prompt and recipe.shortest <= answered <= recipe.longest:
            suited[row["person"]].append(row)
    drawn = []
    for person in sorted(suited, key=lambda name: -len(suited[name]))[: recipe.people]:
        order = np.random.default_rng([recipe.seed, *person.encode()]).permutation(len(suited[person]))
        drawn += [suited[person][k] for k in order[: recipe.turns]]
    sizes = {name: [len(ids) for ids in tokenizer([row[name] for row in drawn])["input_ids"]] for name in TEXTS}
    order = np.argsort(sizes["prompt"], kind="stable")
    return [{**drawn[k], "tokens": sizes["answer"][k]} for k in order]


def _rejected(
    turns: Sequence[Mapping[str, Any]], model: Any, tokenizer: Any, recipe: Recipe
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each turn with the sample that the model finds most likely, by token, of those of like length."""
    left = iter(turns)
    batch = 0
    while some := list(islice(left, PROMPTS)):
        ids, scores = _sample(some, model, tokenizer, recipe, seed=recipe.seed + batch)
        for place, turn in enumerate(some):
            own = range(place * recipe.samples, (place + 1) * recipe.samples)
            alike = [(row, kept) for row in own if (kept := _like(ids[row], turn["tokens"], tokenizer)) is not None]
            if found := [(float(np.mean(scores[row][:number])), text) for row, (text, number) in alike]:
                yield turn, max(found)[1]
        batch += 1


def _sample(
    turns: Sequence[Mapping[str, Any]], model: Any, tokenizer: Any, recipe: Recipe, *, seed: int
) -> tuple[list[list[int]], np.ndarray]:
    """Samples of each turn after each other: their tokens, and each token's log-probability."""
    import torch

    tokenizer.padding_side = "left"
    asked = [[{"role": "system", "content": ""}, {"role": "user", "content": turn["prompt"]}] for turn in turns]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    generator = torch.Generator().manual_seed(seed)
    mask = inputs["attention_mask"]
    rows: list[Any] = []
    scores: list[Any] = []
    with torch.no_grad():
        place = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(inputs["input_ids"], attention_mask=mask, position_ids=place, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        cache.batch_repeat_interleave(recipe.samples)
        logits = out.logits[:, -1].repeat_interleave(recipe.samples, 0)
        mask, last = (value.repeat_interleave(recipe.samples, 0) for value in (mask, place[:, -1:]))
        for _ in range(max(turn["tokens"] for turn in turns) + 3):
            chances = (logits / recipe.temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            rows.append(drawn)
            scores.append(logits.log_softmax(-1).gather(1, drawn))
            mask = torch.cat([mask, torch.ones_like(drawn)], 1)
            last = last + 1
            out = model(drawn, attention_mask=mask, position_ids=last, past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]
    return torch.cat(rows, 1).tolist(), torch.cat(scores, 1).numpy()


def _like(ids: Sequence[int], wanted: int, tokenizer: Any) -> tuple[str, int] | None:
    """A sample's whole sentences, as many as come nearest to a length, and their tokens; None if all are off by more
    than a quarter."""
    ends = []
    for number in range(1, len(ids) + 1):
        over = number < len(ids) and ids[number] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[:number], skip_special_tokens=True)
        if over or text.endswith(SENTENCE_ENDS):
            ends.append((abs(number - wanted), number, text.strip()))
        if over:
            break
    if not ends:
        return None
    off, number, text = min(ends)
    return (text, number) if text and 4 * off <= wanted else None
