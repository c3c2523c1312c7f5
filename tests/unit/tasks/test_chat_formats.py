"""Chat data in the formats that people have: a good file of each trains, a bad one says row and cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import succeeds
from support.errors import raises
from test_task_causal_lm import CHATML, tiny_llama, tokenizer_folder

from fedlora.config import RunConfig, parse_config
from fedlora.data import load_data
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.tasks import load_task
from fedlora.tasks._chat import encode_rows
from fedlora.tasks._chat_formats import read_rows, roles_of
from fedlora.tasks._text import load_tokenizer, most_tokens
from fedlora.tasks._token_loss import IGNORED
from fedlora.tasks.causal_lm import CausalLM


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def turn(sender: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": sender, "value": value, **more}


USER = [say("user", "who ?")]
# format -> a row, the text that counts, a wrong row, the error's code, what it says
GOOD_AND_BAD: dict[str, tuple[dict[str, Any], str, dict[str, Any], str, tuple[str, ...]]] = {
    "messages": (
        {"messages": [*USER, say("assistant", "the cat")]},
        "the cat<|end|>",
        {"messages": [*USER, say("assistant", "the cat", mood="good")]},
        "unknown-message-key",
        ("column 'messages'", "message 1", "'mood'", "remove it"),
    ),
    "prompt-completion": (
        {"prompt": "who ?", "completion": " the cat"},
        " the cat<|end|>",
        {"prompt": "who ?", "completion": [say("assistant", "the cat")]},
        "not-a-text",
        ("column 'completion'", "not a string", "fill it in"),
    ),
    "prompt-completion (conversational)": (
        {"prompt": USER, "completion": [say("assistant", "the cat")]},
        "the cat<|end|>",
        {"prompt": [*USER, say("assistant", "the")], "completion": [say("assistant", "cat")]},
        "prompt-ends-with-answer",
        ("column 'prompt'", "move it to the completion"),
    ),
    "alpaca": (
        {"instruction": "who ?", "input": "a cat", "output": "the cat"},
        "the cat<|end|>",
        {"instruction": "who ?", "input": 3, "output": "the cat"},
        "not-a-text",
        ("column 'input'", "3, not a string", "fill it in"),
    ),
    "sharegpt": (
        {"conversations": [turn("human", "who ?"), turn("gpt", "the cat")]},
        "the cat<|end|>",
        {"conversations": [turn("human", "who ?"), turn("llama", "the cat")]},
        "unknown-sender",
        ("column 'conversations'", "message 1", "'llama'", "gpt"),
    ),
    "text": (
        {"text": "the cat sees"},
        "he cat sees<|end|>",  # nothing predicts the first token
        {"text": 5},
        "not-a-text",
        ("column 'text'", "5, not a string", "fill it in"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tokenizer_folder(tmp_path_factory.mktemp("formats"), CHATML)
    tiny_llama().config.save_pretrained(folder)
    return folder


def config_of(folder: Path, rows: list[dict[str, Any]], file: Path, *overrides: str) -> RunConfig:
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return parse_config(
        "",
        [f"model.name='{folder}'", f"data.source='{file}'", "task={name='causal-lm'}",
         "partition={name='natural', column='user_id'}", "data.test_fraction=0.2", *overrides],
    )  # fmt: skip


@pytest.mark.parametrize("name", GOOD_AND_BAD)
def test_a_file_of_each_format_is_recognised_and_trains(name: str, folder: Path, tmp_path: Path) -> None:
    row, counted, *_ = GOOD_AND_BAD[name]
    config = config_of(folder, [row | {"user_id": k % 3} for k in range(12)], tmp_path / "rows.jsonl")
    data = load_data(config)
    assert len(data.clients) == 3
    assert f"read as {name.split(' ')[0]} (" in data.train.notes[0]
    ids, labels = data.train.inputs["input_ids"][0], data.train.inputs["labels"][0]
    assert load_tokenizer(folder).decode(ids[labels != IGNORED]) == counted
    task, model = load_task(config.task), tiny_llama()
    head = model.lm_head.weight.requires_grad_(True)
    losses = []
    for _ in range(3):
        loss = task.losses(model, task.collate(data.train, [0, 1])).mean()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            head -= 0.05 * torch.autograd.grad(loss, head)[0]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", GOOD_AND_BAD)
def test_a_wrong_row_is_named_with_a_cure(name: str, folder: Path, tmp_path: Path) -> None:
    good, _, bad, code, words = GOOD_AND_BAD[name]
    rows = [one | {"user_id": "a"} for one in (good, good, bad, good)]
    with raises(DataError, code, "row 2", *words):
        load_data(config_of(folder, rows, tmp_path / "rows.jsonl"))


# ------------------------------------------------------------------------------------------------ recognising


def test_what_is_meant_is_never_guessed() -> None:
    alpaca = ["instruction", "input", "output", "text"]  # as in Stanford's file
    assert roles_of(None, alpaca, {}) == ("instruction", "output", "input")
    assert roles_of(None, ["text", "messages"], {"text": "text"}) == ("messages",)
    assert roles_of(None, ["body", "messages"], {"text": "body"}) == ("text",)
    assert roles_of(None, ["question", "reply", "text"], {"instruction": "question", "output": "reply"}) == (
        "instruction", "output",
    )  # fmt: skip
    assert roles_of(None, ["messages", "text"], {"messages": "turns"}) == ("messages",)  # missing, and said so later
    assert roles_of("text", alpaca, {}) == ("text",)
    with raises(DataError, "format-ambiguous", "task.format", "'messages'", "'sharegpt'"):
        roles_of(None, ["messages", "conversations"], {})
    with raises(DataError, "format-unknown", "question", "data.columns"):
        roles_of(None, ["question", "reply"], {})
    with raises(ConfigError, "format-unknown", "task.format"):
        roles_of(None, None, {})  # under privacy no file is looked at


def test_a_train_on_for_texts_is_refused_also_where_they_are_recognised(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "a cat", "user_id": "a"}] * 4
    with raises(ConfigError, "key-without-effect", "task.train_on"):
        load_data(config_of(folder, rows, tmp_path / "rows.jsonl", "task.train_on=all"))


# ------------------------------------------------------------------------------------------------ kept or refused

TOOLS = (
    "{% if tools %}{{ tools[0].name }}\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.reasoning_content %}{{ m.reasoning_content }}\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.name }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
EXTRAS = [{"tool_calls": [{"name": "look"}]}, {"reasoning_content": "since"}]


def encoded(folder: Path, columns: dict[str, list[Any]], train_on: Any = "answer", most: int = 500) -> list[Any]:
    rows = list(read_rows(columns, {role: role for role in columns}, None))
    return list(encode_rows(load_tokenizer(folder), rows, train_on, most))


def said(folder: Path, *args: Any) -> list[str]:
    return [load_tokenizer(folder).decode(one.ids[one.counts]) for one in encoded(folder, *args)]


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_a_template_shows_is_kept_and_the_rest_refused(extra: Any, folder: Path, tmp_path: Path) -> None:
    shows = tokenizer_folder(tmp_path, TOOLS)
    rows = {"messages": [[*USER, say("assistant", "so", **extra)]]}
    word = {"tool_calls": "look", "reasoning_content": "since"}[next(iter(extra))]
    assert word in said(shows, rows)[0]
    with raises(DataError, "template-leaves-out", "row 0", f"'{next(iter(extra))}' of message 1", "remove it"):
        encoded(folder, rows)


def test_a_call_without_content_is_an_answer_and_tools_are_shown_or_refused(folder: Path, tmp_path: Path) -> None:
    shows = tokenizer_folder(tmp_path, TOOLS)
    talk = [*USER, say("assistant", None, **EXTRAS[0])]
    assert said(shows, {"messages": [talk]}) == ["look<|end|>"]
    columns = {"messages": [[*USER, say("assistant", "so")]], "tools": ['[{"name": "find"}]']}
    assert load_tokenizer(shows).decode(encoded(shows, columns)[0].ids).startswith("find\n")
    with raises(DataError, "template-leaves-out", "row 0", "the tools"):
        encoded(folder, columns)
    with raises(DataError, "bad-tools", "row 0, column 'tools'"):
        encoded(shows, columns | {"tools": ["no json"]})


def test_a_system_message_that_the_template_passes_over_is_refused(tmp_path: Path) -> None:
    deaf = tokenizer_folder(tmp_path, "{% for m in messages if m.role != 'system' %}{{ m.content }}<|end|>{% endfor %}")
    with raises(DataError, "template-leaves-out", "row 0", "message 0", "'system'"):
        encoded(deaf, {"messages": [[say("system", "be kind"), *USER, say("assistant", "so")]]})


def test_the_weight_of_a_message_decides_whether_it_counts(folder: Path) -> None:
    talk = [*USER, say("assistant", "no", weight=0), *USER, say("assistant", "yes", weight=1)]
    assert said(folder, {"messages": [talk]}, "answers") == ["yes<|end|>"]
    assert said(folder, {"messages": [[talk[0], say("assistant", "no", weight=1), *talk[2:]]]}, "answers") == [
        "no<|end|>yes<|end|>"
    ]
    first = [*USER, say("assistant", "no", weight=1), *USER, say("assistant", "yes", weight=0)]
    assert said(folder, {"messages": [first]}, "answers") == ["no<|end|>"]
    for train_on in ("answer", "all"):
        with raises(DataError, "nothing-to-learn", "row 0", "task.train_on = 'answers'"):
            encoded(folder, {"messages": [first]}, train_on)
    for wrong in (0.5, "1"):
        with raises(DataError, "bad-message-weight", "row 0", "message 1", "0 or 1"):
            encoded(folder, {"messages": [[*USER, say("assistant", "no", weight=wrong)]]})
    with raises(DataError, "bad-message-weight", "message 0"):
        encoded(folder, {"messages": [[say("user", "who", weight=1), say("assistant", "no")]]})


def test_content_in_parts_is_its_one_text(folder: Path) -> None:
    part = {"type": "text", "text": "the cat", "image": None}
    assert said(folder, {"messages": [[*USER, say("assistant", [part])]]}) == ["the cat<|end|>"]
    with raises(DataError, "several-parts", "row 0", "message 1", "join them"):
        encoded(folder, {"messages": [[*USER, say("assistant", [part, part])]]})
    with raises(DataError, "part-not-text", "row 0", "message 0", "'image'"):
        encoded(folder, {"messages": [[say("user", [{"type": "image", "image": "a.png"}]), say("assistant", "so")]]})


def test_a_column_of_system_messages_wins_over_the_task_and_never_over_the_row(folder: Path) -> None:
    columns: dict[str, list[Any]] = {
        "conversations": [[turn("human", "who"), turn("gpt", "so")]],
        "system": ["be kind"],
    }
    assert load_tokenizer(folder).decode(encoded(folder, columns)[0].ids).startswith("<|start|>system\nbe kind")
    columns["conversations"][0].insert(0, turn("system", "be short"))
    with raises(DataError, "two-system-messages", "row 0, column 'system'"):
        encoded(folder, columns)


# ------------------------------------------------------------------------------------------------ masks

MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>{% endif %}"
)
LONG = [*USER, say("assistant", "the cat 🌹"), say("user", "where"), say("assistant", "in paris"), *USER,
        say("assistant", "yes")]  # fmt: skip


def test_marks_of_the_template_are_transformers_own_mask(tmp_path: Path) -> None:
    """Also where the generation prompt is no beginning of the answer, so that nothing else could tell them apart."""
    folder = tokenizer_folder(tmp_path, MARKED)
    tokenizer = load_tokenizer(folder)
    wanted = tokenizer.apply_chat_template(LONG, return_dict=True, return_assistant_tokens_mask=True)
    (found,) = encoded(folder, {"messages": [LONG]}, "answers")
    size = len(found.ids)
    assert found.ids.tolist() == wanted["input_ids"][:size]
    assert found.counts.astype(int).tolist() == wanted["assistant_masks"][:size]
    assert tokenizer.decode(wanted["input_ids"][size:]).strip() == ""
    assert said(folder, {"messages": [LONG]}) == ["yes<|end|>"]
    weighed = [one | ({"weight": 0} if k == 3 else {}) for k, one in enumerate(LONG)]
    assert said(folder, {"messages": [weighed]}, "answers") == ["the cat 🌹<|end|>yes<|end|>"]
    unmarked = tokenizer_folder(tmp_path / "other", MARKED.replace("{{ m.content }}<|end|>{% endgen", "{% endgen"))
    with raises(ModelError, "template-marks-nothing", "generation"):
        encoded(unmarked, {"messages": [LONG]})


def test_of_a_completion_in_messages_the_assistants_count(folder: Path) -> None:
    columns: dict[str, list[Any]] = {"prompt": [LONG[:3]], "completion": [[LONG[3], *USER, LONG[5]]]}
    assert said(folder, columns) == ["in paris<|end|>yes<|end|>"]
    assert said(folder, columns, "answers") == ["the cat 🌹<|end|>in paris<|end|>yes<|end|>"]


@pytest.mark.parametrize(("system", "more"), [("Answer in French.", {}), (None, {"tools": [[{"name": "look"}]]})])
def test_what_is_for_conversations_is_refused_beside_a_text_prompt(system: str | None, more: Any) -> None:
    columns: dict[str, list[Any]] = {"prompt": ["1 + 1 ="], "completion": [" 2"], **more}
    with raises(DataError, "key-without-effect", "row 0", "list of messages"):
        list(read_rows(columns, {name: name for name in columns}, system))


def test_a_text_prompt_is_continued_as_it_stands(folder: Path) -> None:
    (found,) = encoded(folder, {"prompt": ["1 + 1 ="], "completion": [" 2"]})
    tokenizer = load_tokenizer(folder)
    assert found.ids.tolist() == [*tokenizer("1 + 1 = 2")["input_ids"], tokenizer.eos_token_id]
    assert found.counts.tolist() == [False] * 7 + [True] * 3
    (whole,) = encoded(folder, {"prompt": ["1 + 1 ="], "completion": [" 2"]}, "all")
    assert whole.counts.all()


# ------------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize("most", [8, 11, 20, 1000])
@pytest.mark.parametrize("train_on", ["answer", "answers", "all"])
def test_whatever_is_cut_something_counts(most: int, train_on: str, folder: Path) -> None:
    words = ["a", "word " * 9, "much longer " * 30]
    rows = [[say("user", asked), say("assistant", one), say("user", asked), say("assistant", two)]
            for asked in words for one in words for two in words]  # fmt: skip
    for found in encoded(folder, {"messages": rows}, train_on, most):
        assert len(found.ids) <= most
        assert found.counts[1:].any()


def test_the_longest_is_what_the_model_takes_and_what_is_cut_is_said(folder: Path, tmp_path: Path) -> None:
    assert most_tokens(folder) == 512  # of tiny_llama's positions
    rows = [{"text": "a " * (300 if k < 3 else 5), "user_id": "a"} for k in range(10)]
    data = load_data(config_of(folder, rows, tmp_path / "rows.jsonl"))
    assert data.train.lengths.max() == 512
    assert "3 of 10 examples are longer than 512 tokens and are cut (task.max_length)" in data.train.notes
    fits = load_data(config_of(folder, rows[3:], tmp_path / "short.jsonl"))
    assert not any("cut" in note for note in fits.train.notes)


# ------------------------------------------------------------------------------------------------ fedlora data


def test_examples_are_printed_as_the_model_sees_them(folder: Path, tmp_path: Path) -> None:
    row = GOOD_AND_BAD["alpaca"][0]
    rows = [row | {"input": "", "user_id": f"u{k % 2}"} for k in range(10)]
    config = config_of(folder, rows, tmp_path / "rows.jsonl")
    (tmp_path / "run.toml").write_text(config.to_toml())
    done = succeeds("data", tmp_path / "run.toml", "--show", "2")
    assert "read as alpaca (instruction, output, input)" in done.output
    assert "8 training examples, 2 to test, 2 clients" in done.output
    assert done.output.count("<|start|>user\nwho ?<|end|>\n<|start|>assistant\n⟦the cat<|end|>⟧") == 2
    pieces = CausalLM().spans(load_data(config).train, 0, folder)
    assert "".join(text for text, _ in pieces).endswith("the cat<|end|>")
    assert [counts for _, counts in pieces] == [False, True]
