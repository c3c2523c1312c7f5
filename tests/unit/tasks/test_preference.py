"""Laws of the task "preference": the papers' equations, the reference of a round, any company, pairs under privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import adapter, together
from support.errors import raises
from support.states import gap
from support.tiny_federations import WORDS

from fedlora.adapter import ALL_PARTS
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.errors import DataError
from fedlora.model import Base, load_base
from fedlora.speedups.attention import choose_attention
from fedlora.tasks import Examples, Table, Task, load_task
from fedlora.tasks._text import load_tokenizer
from fedlora.tasks._token_loss import IGNORED
from fedlora.tasks.preference import SIDES, Preference, _log_odds
from fedlora.training import TrainJob
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings, Schedule
from fedlora.training.job import batches

BETA = 0.3


def pairs(number: int) -> dict[str, list[Any]]:
    word = [WORDS[k % len(WORDS)] for k in range(number)]
    return {
        "prompt": word,
        "chosen": [f" {one} {one}" for one in word],
        "rejected": [f" {one} blue old dog" if k % 2 else " red" for k, one in enumerate(word)],
    }


def prepared(folder: Path, columns: dict[str, list[Any]], **fields: Any) -> tuple[Preference, Examples]:
    task = load_task(OpenTable(name="preference", beta=BETA, **fields))  # type: ignore[call-arg]
    assert isinstance(task, Preference)
    return task, task.prepare(Table(columns), folder, {role: role for role in task.roles_of(columns, {})}, keep=())


def log_probability(model: torch.nn.Module, examples: Examples, row: int, before: str) -> tuple[torch.Tensor, int]:
    """Of one completion, from the logits of the whole sequence."""
    ids = torch.from_numpy(examples.inputs[f"{before}input_ids"][row].astype(np.int64))
    counted = examples.inputs[f"{before}labels"][row] != IGNORED
    each = model(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return each[torch.from_numpy(counted[1:])].sum(), int(counted.sum())


def expected(
    loss_type: str, model: torch.nn.Module, examples: Examples, row: int, reference: torch.Tensor | None
) -> torch.Tensor:
    """Equation (7) of the DPO paper, (17) of IPO's by token, (6) and (7) of ORPO's; of SFT the cross entropy."""
    (w, n), (v, m) = (log_probability(model, examples, row, before) for before in SIDES.values())
    r, s = (0.0, 0.0) if reference is None else reference.tolist()
    if loss_type == "dpo":
        return -torch.log(torch.sigmoid(BETA * (w - r) - BETA * (v - s)))
    if loss_type == "ipo":
        return ((w - r) / n - (v - s) / m - 1 / (2 * BETA)) ** 2
    if loss_type == "sft":
        return -w / n
    p, q = torch.exp(w / n), torch.exp(v / m)
    return -w / n - BETA * torch.log(torch.sigmoid(torch.log((p / (1 - p)) / (q / (1 - q)))))


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    config = RunConfig(
        model=ModelConfig(name=str(tiny_llama), dtype="float64"),
        adapter=AdapterConfig(rank=4, targets=("q_proj", "down_proj")),
        runtime=RuntimeConfig(device="cpu"),
    )
    base = load_base(config, Preference.auto_class, (), {}, Preference.peft_task_type)
    choose_attention(base.model)
    return base


def jobs(base: Base, *sizes: int) -> list[TrainJob]:
    begins = np.cumsum([0, *sizes])
    return [
        TrainJob(adapter(base, None, k), ALL_PARTS, np.arange(begins[k], begins[k + 1]), seed=k)
        for k in range(len(sizes))
    ]


def by_hand(base: Base, task: Preference, examples: Examples, job: TrainJob, config: TrainConfig) -> Any:
    """Plain SGD on the equations, with PEFT's own layers and a reference of the start."""
    parameters = base.write(job.adapter, ALL_PARTS)
    base.train_mode(False)
    with torch.no_grad():
        known = {
            int(row): torch.stack([log_probability(base.model, examples, row, side)[0] for side in SIDES.values()])
            for row in job.indices
        }
    for drawn in batches(job.indices, config.batch_size, config.steps or 0, job.seed):
        losses = [expected(task.loss_type, base.model, examples, row, known[int(row)]) for row in drawn]
        found = torch.autograd.grad(torch.stack(losses).mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= config.lr * gradient
    return base.read()


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "orpo", "sft"])
@pytest.mark.parametrize("referred", [False, True])
def test_a_pairs_loss_is_the_papers_whoever_is_beside_it(
    loss_type: str, referred: bool, base: Base, tiny_llama: Path
) -> None:
    task, examples = prepared(tiny_llama, pairs(24), loss_type=loss_type)
    base.write(adapter(base, None, 3), ALL_PARTS)
    base.train_mode(False)
    rows = [5, 0, 13, 2]
    batch = task.collate(examples, rows)
    reference = torch.tensor([[-3.0, -2.0], [-1.0, -4.0], [-5.0, -5.5], [-0.5, -9.0]], dtype=torch.float64)
    if referred:
        batch["reference"] = reference
    with torch.no_grad():
        found = task.losses(base.model, batch)
        use = referred and task.refers
        assert torch.equal(found, task.measure(base.model, batch)["loss"])
        for place, row in enumerate(rows):
            wanted = expected(loss_type, base.model, examples, row, reference[place] if use else None)
            assert float(found[place]) == pytest.approx(float(wanted), abs=1e-10)
        for place, pair in enumerate(task.reference(base.model, batch)):
            for said, side in zip(pair, SIDES.values(), strict=True):
                wanted = log_probability(base.model, examples, rows[place], side)[0]
                assert float(said) == pytest.approx(float(wanted), abs=1e-10)


def test_the_share_that_is_ranked_right_adds_up(base: Base, tiny_llama: Path) -> None:
    task, examples = prepared(tiny_llama, pairs(10))
    with torch.no_grad():
        found = task.measure(base.model, task.collate(examples, range(10)))
        said = [[log_probability(base.model, examples, row, side)[0] for row in range(10)] for side in SIDES.values()]
        right = [chosen > rejected for chosen, rejected in zip(*said, strict=True)]
    measures = {name: value.numpy() for name, value in found.items()}
    figures = task.summarise(measures)
    assert figures["ranking_accuracy"] == pytest.approx(np.mean([bool(one) for one in right]))
    halves = [task.sums({name: value[part] for name, value in measures.items()}) for part in ([0, 1, 2], slice(3, 10))]
    together = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    assert task.figures(together) == pytest.approx(figures)


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "orpo", "sft"])
@pytest.mark.slow
def test_training_is_sgd_against_the_start_of_the_round_in_any_company(
    loss_type: str, base: Base, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, examples = prepared(tiny_llama, pairs(24), loss_type=loss_type)
    config = TrainConfig(steps=5, batch_size=3, lr=0.05, optimizer="sgd")
    work = jobs(base, 6, 9)
    seen: list[int] = []
    before = Preference.reference
    monkeypatch.setattr(Preference, "reference", lambda *args: seen.append(len(args[2]["labels"])) or before(*args))
    found = together(base, task, examples, [(job, config) for job in work])
    assert (not seen) == (loss_type in ("orpo", "sft"))
    assert sum(seen) <= 2 * 6 + 2 * 9  # of 30 draws: each pair once, but for those beside one that is new
    monkeypatch.undo()
    for job, result in zip(work, found, strict=True):
        wanted = by_hand(base, task, examples, job, config)
        assert gap(wanted, job.adapter) > 1e-4, "it did train"
        assert gap(wanted, result.adapter) < 1e-10


def test_the_first_step_of_a_round_begins_at_log_two(base: Base, tiny_llama: Path) -> None:
    task, examples = prepared(tiny_llama, pairs(24))
    one = TrainConfig(steps=1, batch_size=6, lr=0.05)
    for result in together(base, task, examples, [(job, one) for job in jobs(base, 6, 9)]):
        assert result.loss == pytest.approx(np.log(2), abs=1e-9)


@pytest.mark.slow
def test_private_training_clips_pairs_and_has_the_same_reference(base: Base, tiny_llama: Path) -> None:
    """With all pairs in each sample, and next to no noise or clipping, it is plain SGD; a clipped pair moves by C."""
    task, examples = prepared(tiny_llama, pairs(24))
    (job,) = jobs(base, 8)
    config = TrainConfig(steps=3, batch_size=8, lr=0.05, optimizer="sgd")
    loose = PrivateSettings(Schedule(1.0, 3, 1, 8.0), 1e-13, 1e3)
    found = train_private(base, task, examples, job, config, loose)
    assert gap(by_hand(base, task, examples, job, config), found.adapter) < 1e-7
    tight = PrivateSettings(Schedule(1.0, 1, 1, 1.0), 1e-9, 1e-3)
    one = TrainJob(job.adapter, ALL_PARTS, job.indices[:1], seed=0)
    moved = train_private(base, task, examples, one, config, tight).adapter.tensors()
    start = job.adapter.tensors()
    length = sum(float((moved[name] - start[name]).double().square().sum()) for name in start) ** 0.5
    assert length == pytest.approx(config.lr * 1e-3, rel=1e-2)


# ------------------------------------------------------------------------------------------------ data


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [say("user", "cat")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": [say("assistant", "red")], "rejected": [say("assistant", "old")]},
        {"chosen": [*ASKED, say("assistant", "red")], "rejected": [*ASKED, say("assistant", "old")]},
        {"prompt": "cat", "chosen": [*ASKED, say("assistant", "red")], "rejected": [*ASKED, say("assistant", "old")]},
    ],
    ids=["explicit", "implicit", "both"],
)
def test_pairs_in_messages_come_in_three_layouts(row: dict[str, Any], tiny_llama: Path) -> None:
    _, examples = prepared(tiny_llama, {name: [cell] for name, cell in row.items()})
    tokenizer = load_tokenizer(tiny_llama)
    for before, answer in (("", "red"), ("rejected_", "old")):
        ids, labels = examples.inputs[f"{before}input_ids"][0], examples.inputs[f"{before}labels"][0]
        assert tokenizer.decode(ids) == f"you : cat <end> me : {answer} <end>"
        assert tokenizer.decode(ids[labels != IGNORED]) == f"{answer} <end>"


def test_pairs_of_texts_continue_the_prompt(tiny_llama: Path) -> None:
    task, examples = prepared(tiny_llama, {"prompt": ["cat"], "chosen": [" red"], "rejected": [" old dog"]})
    pieces = task.spans(examples, 0, tiny_llama)
    assert [counts for _, counts in pieces] == [False, False, True, False, False, True]
    text = "".join(f"[{text.strip()}]" if counts else text for text, counts in pieces)
    assert text.replace(" ", "") == "chosen:cat[red<end>]\nrejected:cat[olddog<end>]"


WRONG: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"chosen": "red", "rejected": "old"}, "no-prompt", ("'prompt'", "add the column")),
    ({"prompt": "cat", "chosen": " red", "rejected": 5}, "not-a-text", ("column 'rejected'", "fill it in")),
    ({"chosen": [*ASKED, say("assistant", "red")], "rejected": [say("user", "dog"), say("assistant", "old")]},
     "prompts-differ", ("before their last answer", "remove the row")),
    ({"prompt": "dog", "chosen": [*ASKED, say("assistant", "red")], "rejected": [*ASKED, say("assistant", "old")]},
     "prompts-differ", ("column 'prompt'", "correct")),
    ({"prompt": ASKED, "chosen": [say("assistant", "red")], "rejected": [say("user", "old")]},
     "no-final-answer", ("column 'rejected'", "remove the row")),
    ({"prompt": ASKED, "chosen": [*ASKED, say("assistant", "red")], "rejected": [say("assistant", "old")]},
     "prompts-differ", ("column 'chosen'", "repeats the prompt")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "code", "words"), WRONG)
def test_a_wrong_pair_is_named_with_a_cure(row: Any, code: str, words: tuple[str, ...], tiny_llama: Path) -> None:
    names = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    good = {"prompt": "cat", "chosen": [*ASKED, say("assistant", "red")], "rejected": [*ASKED, say("assistant", "old")]}
    columns = {name: [good[name], row[name]] for name in names}
    with raises(DataError, code, "row 1", *words):
        prepared(tiny_llama, columns)


def test_completions_of_a_cut_pair_follow_the_same_tokens(tiny_llama: Path) -> None:
    columns = {
        "prompt": [" ".join(WORDS[k % len(WORDS)] for k in range(60))],
        "chosen": [" red"],
        "rejected": [" old" * 50],
    }
    _, examples = prepared(tiny_llama, columns)
    prompts = []
    for before in SIDES.values():
        ids, labels = examples.inputs[f"{before}input_ids"][0], examples.inputs[f"{before}labels"][0]
        assert len(ids) <= 64
        prompts.append(ids[: int(np.argmax(labels != IGNORED))].tolist())
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 32


def test_the_odds_of_a_certain_completion_have_a_gradient() -> None:
    log_p = torch.tensor([0.0, -1e-9, -0.5, -50.0], requires_grad=True)
    _log_odds(log_p).sum().backward()
    assert log_p.grad is not None
    assert torch.isfinite(log_p.grad).all()


def test_a_cut_pair_still_has_both_completions(tiny_llama: Path) -> None:
    columns = {"prompt": ["cat " * 80, "cat"], "chosen": [" red", " red"], "rejected": [" old " * 90, " old"]}
    task, examples = prepared(tiny_llama, columns)
    assert any("1 of 2 pairs are longer than 64 tokens and are cut" in note for note in examples.notes)
    for before in SIDES.values():
        assert all((labels[1:] != IGNORED).any() for labels in examples.inputs[f"{before}labels"])
    assert isinstance(task, Task)
