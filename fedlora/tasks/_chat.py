"""Conversations as token ids, with a mark on each token that counts.

A rendered conversation is tokenised as one string, as transformers does it: a SentencePiece tokeniser, for one, puts a
blank before whatever it is given first, so that parts of a conversation tokenised on their own are other tokens. Which
tokens count follows from the tokeniser's offsets in that string. A token that holds characters of an answer counts,
also where it holds some of the prompt too (as in transformers' `return_assistant_tokens_mask`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fedlora.errors import DataError, ModelError
from fedlora.sanitize import clean_text
from fedlora.tasks._text import require_encodable, require_text

Messages = list[dict[str, str]]
Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids as int32 [t], and which of them count as bool [t]."""

PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For tokenisers without a chat template: "User: ...", "Assistant: ...", and the end token after an answer."""

SLICE = 2048  # conversations that are rendered and tokenised at once


def read_messages(values: Sequence[Sequence[Any]], columns: Sequence[str], system: str | None) -> list[Messages]:
    """Conversations from one column of message lists, or from a column of prompts and one of answers.

    Args:
        values: the columns.
        columns: their names, for messages.
        system: put first where a conversation has no system message; None for nothing.

    Raises:
        DataError: a value is not usable.
    """
    conversations: list[Messages] = []
    for row, cells in enumerate(zip(*values, strict=True)):
        if len(cells) == 2:
            messages = [
                {"role": role, "content": require_text(cell, row, column)}
                for role, cell, column in zip(("user", "assistant"), cells, columns, strict=True)
            ]
        else:
            messages = _messages(cells[0], row, columns[0])
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        conversations.append(messages)
    return conversations


def _messages(value: Any, row: int, column: str) -> Messages:
    where = f"row {row}, column {column!r}"
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) == 0:
        raise DataError(
            f'{where}: give a list of messages such as {{"role": "user", "content": "..."}}', code="not-a-conversation"
        )
    messages: Messages = []
    for place, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(
                f'{where}: message {place} needs the strings "role" and "content"', code="malformed-message"
            )
        # Tables of one schema (Parquet) hold every key in every message, and None where there is nothing.
        others = [key for key, inner in message.items() if key not in ("role", "content") and not _is_nothing(inner)]
        if others:
            raise DataError(
                f'{where}: message {place} has the key {clean_text(str(others[0]))!r}, and only "role" and '
                '"content" are used: remove it, or write its value into the content',
                code="unknown-message-key",
            )
        for key in ("role", "content"):
            require_encodable(message[key], row, column)
        messages.append({"role": message["role"], "content": message["content"]})
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(
            f"{where}: the last message must be the assistant's and not be empty: shorten or remove the row",
            code="no-final-answer",
        )
    return messages


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict | np.ndarray) and len(value) == 0)


def encode_texts(tokenizer: Any, texts: Sequence[Any], column: str, max_length: int) -> Iterator[Encoded]:
    """Plain texts, each closed by the end token, cut to `max_length` tokens; every token counts."""
    checked = [require_text(text, row, column) for row, text in enumerate(texts)]
    for start in range(0, len(checked), SLICE):
        for found in _ids(tokenizer, checked[start : start + SLICE], special=True)["input_ids"]:
            end = tokenizer.eos_token_id
            closed = found if end is None or found[-1:] == [end] else [*found, end]
            ids = np.asarray(closed[:max_length], dtype=np.int32)
            yield ids, np.ones(len(ids), dtype=bool)


def encode_conversations(
    tokenizer: Any,
    conversations: Sequence[Messages],
    train_on: Literal["answer", "answers", "all"],
    max_length: int,
) -> Iterator[Encoded]:
    """Conversations by the tokeniser's chat template, or `PLAIN_TEMPLATE` if it has none.

    Raises:
        DataError: the template refuses a conversation; the message names the row.
        ModelError: the template renders a conversation's beginning differently once it goes on.
    """
    for start in range(0, len(conversations), SLICE):
        rendered = [
            _pieces_of_row(tokenizer, messages, train_on, row)
            for row, messages in enumerate(conversations[start : start + SLICE], start)
        ]
        encoded = _whole(tokenizer, [[text for text, _ in parts] for parts in rendered])
        for parts, (ids, starts, ends) in zip(rendered, encoded, strict=True):
            edges = np.cumsum([0, *(len(text) for text, _ in parts)])
            counts = np.full(len(ids), train_on == "all")
            for (_, taught), begin, end in zip(parts, edges[:-1], edges[1:], strict=True):
                if taught:
                    counts |= (starts < end) & (ends > begin)
            answer = int(np.argmax(ends > edges[-2])) if len(ids) else 0
            yield _cut(ids, counts, answer, max_length)


def _pieces_of_row(
    tokenizer: Any, messages: Messages, train_on: Literal["answer", "answers", "all"], row: int
) -> list[tuple[str, bool]]:
    """`pieces`; what a template raises (by `raise_exception`, or since it meets what it does not expect) names the row.

    The templates are programs of their authors, so any exception is possible.
    """
    if train_on == "answers" and messages[0]["role"] == "assistant":
        raise DataError(
            f"row {row}: the conversation begins with the assistant, whose first message has no prompt: set "
            "task.train_on = 'answer', or remove that message",
            code="answer-without-prompt",
        )
    try:
        return pieces(tokenizer, messages, train_on)
    except ModelError:
        raise
    except Exception as error:
        roles = clean_text(", ".join(message["role"] for message in messages[:6]), 80)
        raise DataError(
            f"row {row}: the model's chat template refuses this conversation (roles: {roles}): "
            f"{clean_text(error, 150) or type(error).__name__}; change the row, task.system, or the chat template in "
            "the model's folder",
            code="template-refuses",
        ) from error


def _ids(tokenizer: Any, texts: list[str], *, special: bool, offsets: bool = False) -> Any:
    """transformers' encoding of some texts, without masks."""
    return tokenizer(
        texts,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


Whole = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids [t] as int32, and where each token begins and ends in its text, in characters [t]."""


def _whole(tokenizer: Any, rendered: Sequence[Sequence[str]]) -> Iterator[Whole]:
    """Texts that are given in parts, each tokenised in one piece.

    Raises:
        ModelError: the tokeniser gives no offsets, and a token lies across the border of two parts.
    """
    texts = ["".join(parts) for parts in rendered]
    if not tokenizer.is_fast:
        yield from (_by_beginnings(tokenizer, parts) for parts in rendered)
        return
    found = _ids(tokenizer, texts, special=False, offsets=True)
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        # A token of no width (a blank that the tokeniser adds) is where it begins.
        yield np.asarray(ids, dtype=np.int32), places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)


def _by_beginnings(tokenizer: Any, parts: Sequence[str]) -> Whole:
    """As `_whole` for one text, from the tokens of all its beginnings that end with a part."""
    beginnings = [""] + ["".join(parts[: number + 1]) for number in range(len(parts))]
    tokens = _ids(tokenizer, beginnings[1:], special=False)["input_ids"]
    ids = tokens[-1]
    if any(ids[: len(beginning)] != beginning for beginning in tokens):
        raise ModelError(
            "the model's tokenizer gives no character offsets, and one of its tokens spans the end of a prompt and the "
            "start of its answer: use a model folder with tokenizer.json",
            code="token-across-border",
        )
    counts = np.diff([0, *map(len, tokens)])
    edges = np.asarray([len(beginning) for beginning in beginnings])
    return np.asarray(ids, dtype=np.int32), np.repeat(edges[:-1], counts), np.repeat(edges[1:], counts)


def pieces(tokenizer: Any, messages: Messages, train_on: Literal["answer", "answers", "all"]) -> list[tuple[str, bool]]:
    """A rendered conversation in pieces, each with whether it counts; the last one is the last answer.

    An answer ends with its end token: blanks that the template puts after it are not learnt.
    """
    taught = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    out: list[tuple[str, bool]] = []
    done = ""
    for place in taught if train_on == "answers" else taught[-1:]:
        before = _render(tokenizer, messages[:place], prompt=True)
        after = _render(tokenizer, messages[: place + 1], prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ModelError(
                "the model's chat template changes earlier messages when later ones follow, so that prompt and answer "
                "cannot be told apart: use a tokenizer with another chat_template",
                code="template-rewrites-beginning",
            )
        closed = after.rstrip()
        answer = closed if any(closed.endswith(token) for token in tokenizer.all_special_tokens) else after
        out += [(before[len(done) :], False), (answer[len(before) :], True)]
        done = answer
    return out


def _render(tokenizer: Any, messages: Messages, *, prompt: bool) -> str:
    template = {} if tokenizer.chat_template else {"chat_template": PLAIN_TEMPLATE}
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **template)
    return text


def _cut(ids: np.ndarray, counts: np.ndarray, answer: int, max_length: int) -> Encoded:
    """At most `max_length` tokens: the prompt gives its oldest ones, down to half of them; the answer its last.

    Args:
        ids: all tokens.
        counts: which of them count.
        answer: where the last answer begins.
        max_length: of the result.
    """
    kept = min(len(ids) - answer, max_length - min(answer, max_length // 2))
    end = answer + kept
    return ids[max(0, end - max_length) : end], counts[max(0, end - max_length) : end]
