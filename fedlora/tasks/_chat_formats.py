"""The formats that chat data come in, with TRL's names: recognised by their columns, and read as conversations.

Each row is read by itself. What a row says is kept, or the row is refused with what to change; nothing is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedlora.errors import ConfigError, DataError
from fedlora.sanitize import clean_text
from fedlora.tasks._text import require_encodable, require_text

FormatName = Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """Roles of the columns of a format, and of those that a file may have besides."""

    roles: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = {
    "messages": Format(("messages",), ("tools",)),
    "prompt-completion": Format(("prompt", "completion"), ("tools",)),
    "alpaca": Format(("instruction", "output"), ("input", "system")),
    "sharegpt": Format(("conversations",), ("system", "tools")),
    "text": Format(("text",)),
}
OPTIONAL = tuple(dict.fromkeys(role for one in FORMATS.values() for role in one.optional))
SENDERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SENDERS |= {"tool": "tool", "observation": "tool"}
"""Who speaks in a ShareGPT message ("from") -> role."""
BESIDE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
"""Keys of a message beside role, content and weight, for templates that show them."""


@dataclass(frozen=True)
class Conversation:
    """One row.

    Args:
        messages: as the chat template gets them.
        answer: place of the first message that `train_on = "answer"` is about.
        unlearnt: places of the assistant's messages with weight 0.
        tools: schemas of the tools that the assistant may call.
    """

    messages: list[Message]
    answer: int
    unlearnt: frozenset[int] = frozenset()
    tools: list[Any] | None = None

    def counted(self, train_on: str) -> list[int]:
        """Places of the messages that count; with "all" the last answer, up to which everything does."""
        first = 0 if train_on == "answers" else self.answer
        said = [k for k, one in enumerate(self.messages) if one["role"] == "assistant" and k >= first]
        return said[-1:] if train_on == "all" else [k for k in said if k not in self.unlearnt]


Row = Conversation | tuple[str, str]
"""A conversation, or a text without a template: what does not count of it, and what does."""


def roles_of(name: FormatName | None, found: Collection[str] | None, named: Mapping[str, str]) -> tuple[str, ...]:
    """The roles of a file's columns, optional ones only where they are there.

    Args:
        name: of the format; None to recognise it.
        found: the file's columns; None where they may not be looked at.
        named: role -> column, as the config has it.

    Raises:
        ConfigError: the format is not named and there are no columns to look at.
        DataError: the columns are those of no format, or of several.
    """
    if found is None:
        if name is None:
            raise ConfigError(
                "the format of the examples must be known before any file is read: set task.format to one of "
                f"{', '.join(map(repr, FORMATS))}",
                code="format-unknown",
            )
        return (*FORMATS[name].roles, *FORMATS[name].optional)
    one = FORMATS[name or _recognised(found, named)]
    renamed = {role for role, column in named.items() if column != role}
    return (*one.roles, *(role for role in one.optional if role in renamed or named.get(role, role) in found))


def _recognised(found: Collection[str], named: Mapping[str, str]) -> str:
    renamed = {role for role, column in named.items() if column != role}
    meant = [name for name, one in FORMATS.items() if renamed.intersection(one.roles)]
    there = [name for name in meant or FORMATS if all(named.get(role, role) in found for role in FORMATS[name].roles)]
    if len(there) > 1 and not meant:  # alpaca's own file has a column "text" beside the others
        there = [name for name in there if name != "text"]
    if len(there) == 1 or (not there and len(meant) == 1):
        return (there or meant)[0]
    columns = ", ".join(clean_text(name, 60) for name in sorted(found))
    if there:
        raise DataError(
            f"the columns ({columns}) are those of several formats: set task.format to one of "
            f"{', '.join(map(repr, there))}",
            code="format-ambiguous",
        )
    known = "; ".join(f"{name}: {', '.join(one.roles)}" for name, one in FORMATS.items())
    raise DataError(
        f"the columns ({columns}) are those of no known format ({known}): name yours in data.columns, as in "
        "data.columns = { messages = 'turns' }",
        code="format-unknown",
    )


def read_rows(
    columns: Mapping[str, Sequence[Any]], names: Mapping[str, str], system: str | None, *, first: int = 0
) -> Iterator[Row]:
    """The rows of a table.

    Args:
        columns: role -> values; the roles say which format it is.
        names: role -> the column's name, for messages.
        system: put first where a conversation has no system message; None for nothing.
        first: number of the first row.

    Raises:
        DataError: a value is not usable; the message names the row (from 0) and the column.
    """
    for number, row in enumerate(zip(*columns.values(), strict=True), first):
        cells = dict(zip(columns, row, strict=True))
        if "text" in cells:
            yield "", require_text(cells["text"], number, names["text"])
        elif "prompt" in cells and not isinstance(cells["prompt"], list | tuple | np.ndarray):
            if system is not None or not is_nothing(cells.get("tools")):
                what = "task.system" if system is not None else f"column {names['tools']!r}"
                raise DataError(
                    f"row {number}: {what} is for conversations, and this prompt is a text: remove it, or write the "
                    "prompt as a list of messages",
                    code="key-without-effect",
                )
            yield tuple(require_text(cells[role], number, names[role]) for role in ("prompt", "completion"))  # type: ignore[misc]
        else:
            yield _conversation(cells, names, number, system)


def _conversation(cells: Mapping[str, Any], names: Mapping[str, str], row: int, system: str | None) -> Conversation:
    own = cells.get("system")
    system = system if is_nothing(own) else require_text(own, row, names["system"])
    answer: int | None = None
    messages: list[Message] = []
    weights: list[float | None] = []
    last = ""
    if "instruction" in cells:
        asked = require_text(cells["instruction"], row, names["instruction"])
        if not is_nothing(cells.get("input")) and str(cells["input"]).strip():
            asked = f"{asked}\n{require_text(cells['input'], row, names['input'])}"
        said = require_text(cells["output"], row, names["output"])
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        weights = [None, None]
    else:
        for role in [role for role in ("messages", "conversations", "prompt", "completion") if role in cells]:
            last = names[role]
            if role == "completion":
                _require_question(messages, row, names["prompt"])
                answer = len(messages)
            for message, weight in _messages(cells[role], row, last):
                messages.append(message)
                weights.append(weight)
        where = f"row {row}, column {last!r}"
        if messages[-1]["role"] != "assistant" or not (messages[-1]["content"].strip() or "tool_calls" in messages[-1]):
            raise DataError(
                f"{where}: the last message must be the assistant's and not be empty: shorten or remove the row",
                code="no-final-answer",
            )
    if system is not None and messages[0]["role"] != "system":
        messages, weights = [{"role": "system", "content": system}, *messages], [None, *weights]
        answer = None if answer is None else answer + 1
    elif not is_nothing(own):
        raise DataError(
            f"row {row}, column {names['system']!r}: the conversation has a system message already: remove one of them",
            code="two-system-messages",
        )
    return Conversation(
        messages,
        len(messages) - 1 if answer is None else answer,
        frozenset(place for place, weight in enumerate(weights) if weight == 0),
        _tools(cells.get("tools"), row, names.get("tools", "")),
    )


def _require_question(prompt: Sequence[Message], row: int, column: str) -> None:
    if prompt and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"row {row}, column {column!r}: the prompt ends with the assistant's message: move it to the completion",
            code="prompt-ends-with-answer",
        )


def _messages(value: Any, row: int, column: str) -> Iterator[tuple[Message, float | None]]:
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) == 0:
        raise DataError(
            f'row {row}, column {column!r}: give a list of messages such as {{"role": "user", "content": "..."}}',
            code="not-a-conversation",
        )
    for place, message in enumerate(value):
        yield _message(message, f"row {row}, column {column!r}: message {place}", row, column)


def _message(value: Any, where: str, row: int, column: str) -> tuple[Message, float | None]:
    """A message with its weight; tables of one schema (Parquet) hold every key, and None where there is nothing."""

    given = {key: inner for key, inner in value.items() if not is_nothing(inner)} if isinstance(value, Mapping) else {}
    sharegpt = "from" in given
    role, content = given.pop("from" if sharegpt else "role", None), given.pop("value" if sharegpt else "content", "")
    if sharegpt and isinstance(role, str) and role not in SENDERS:
        raise DataError(
            f"{where} is from {clean_text(repr(role), 60)}: write one of {', '.join(SENDERS)}", code="unknown-sender"
        )
    if isinstance(content, list | tuple | np.ndarray):
        content = _text_of(content, where)
    raw = value.get("value" if sharegpt else "content") if isinstance(value, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str) or (raw is None and "tool_calls" not in given):
        raise DataError(
            f'{where} needs the strings "role" and "content" (or "from" and "value")', code="malformed-message"
        )
    weight = given.pop("weight", None)
    message = {"role": SENDERS[role] if sharegpt else role, "content": content}
    if weight is not None and (message["role"] != "assistant" or weight not in (0, 1) or isinstance(weight, str)):
        raise DataError(
            f"{where} has the weight {clean_text(repr(weight), 40)}: only the assistant's messages have one, 0 or 1; "
            "remove it",
            code="bad-message-weight",
        )
    if others := [key for key in given if key not in BESIDE]:
        raise DataError(
            f"{where} has the key {clean_text(repr(others[0]), 60)}, which is not used: remove it, or write its value "
            "into the content",
            code="unknown-message-key",
        )
    for text in (role, content, json.dumps(given, ensure_ascii=False, default=str)):
        require_encodable(text, row, column)
    return message | given, weight


def _text_of(parts: Any, where: str) -> str:
    """The text of content in parts: exactly one, since how several are to be joined is not said."""
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in parts]
    for kind, part in zip(kinds, parts, strict=True):
        keys = {key for key, inner in part.items() if not is_nothing(inner)} if isinstance(part, Mapping) else set()
        if kind != "text" or keys != {"type", "text"} or not isinstance(part["text"], str):
            raise DataError(
                f"{where} has a part of the type {clean_text(repr(kind), 60)} that is not text alone, "
                '{"type": "text", "text": "..."}: remove it',
                code="part-not-text",
            )
    if len(parts) != 1:
        raise DataError(f"{where} has {len(parts)} parts: join them into one string", code="several-parts")
    return str(parts[0]["text"])


def _tools(value: Any, row: int, column: str) -> list[Any] | None:
    if is_nothing(value):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(
            f"row {row}, column {column!r}: give a list of the tools' JSON schemas, or leave it empty", code="bad-tools"
        )
    return value or None


def is_nothing(value: Any) -> bool:
    """Whether a cell or value is none: missing, or of length 0."""
    return value is None or (isinstance(value, str | list | tuple | dict | np.ndarray) and len(value) == 0)
