"""Conversations as token ids, with a mark on each token that counts.

A rendered conversation is tokenised as one string, as transformers does it: a SentencePiece tokeniser, for one, puts a
blank before whatever it is given first, so that parts of a conversation tokenised on their own are other tokens. Which
tokens count follows from the tokeniser's offsets in that string. A token that holds characters of an answer counts,
also where it holds some of the prompt too (as in transformers' `return_assistant_tokens_mask`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from fedlora.errors import DataError, ModelError
from fedlora.sanitize import clean_text
from fedlora.tasks._chat_formats import Conversation, Message, Row
from fedlora.tasks._text import Tokens
from fedlora.tasks._token_loss import IGNORED

TrainOn = Literal["answer", "answers", "all"]


class Encoded(NamedTuple):
    """Token ids as int32 [t], which of them count as bool [t], and whether tokens were cut off."""

    ids: np.ndarray
    counts: np.ndarray
    cut: bool


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


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_rows(tokenizer: Any, rows: Sequence[Row], train_on: TrainOn, max_length: int) -> Iterator[Encoded]:
    """Conversations by the tokeniser's chat template, or `PLAIN_TEMPLATE` if it has none; texts without any.

    A text is closed by the end token, as in TRL.

    Raises:
        DataError: the template refuses or leaves out something of a conversation, or nothing of a row counts; the
            message names the row.
        ModelError: the template renders a conversation's beginning differently once it goes on.
    """
    for start in range(0, len(rows), SLICE):
        some = rows[start : start + SLICE]
        texts = [place for place, row in enumerate(some) if not isinstance(row, Conversation)]
        talks = [place for place, row in enumerate(some) if isinstance(row, Conversation)]
        parts: list[list[tuple[str, bool]]] = [
            _pieces_of_row(tokenizer, row, train_on, start + place)
            if isinstance(row, Conversation)
            else [(row[0], train_on == "all"), (row[1], True)]
            for place, row in enumerate(some)
        ]
        found: dict[int, Whole] = {}
        for places, special in ((texts, True), (talks, False)):
            found |= zip(places, _whole(tokenizer, [[t for t, _ in parts[k]] for k in places], special), strict=True)
        for place, own in enumerate(parts):
            ids, starts, ends = found[place]
            edges = np.cumsum([0, *(len(text) for text, _ in own)])
            plain = not isinstance(some[place], Conversation)
            counts = np.full(len(ids), train_on == "all" or (plain and not own[0][0]))
            for (_, taught), begin, end in zip(own, edges[:-1], edges[1:], strict=True):
                if taught:
                    counts |= (starts < end) & (ends > begin)
            answer = max((edges[k] for k, (text, taught) in enumerate(own) if taught and text), default=0)
            if plain:
                ids, counts, ends = _closed(ids, counts, ends, tokenizer.eos_token_id)
            yield _cut(ids, counts, int(np.argmax(ends > answer)) if len(ids) else 0, max_length)


def learnt(rows: Iterable[Encoded], column: str, pad_id: int) -> tuple[Tokens, Tokens, Bool[np.ndarray, "n"]]:
    """Token ids of encoded rows, their labels, and which rows were cut.

    Args:
        rows: as `encode_rows` gives them.
        column: that is named where nothing of a row counts.
        pad_id: fills shorter rows of ids.

    Raises:
        DataError: nothing of a row counts.
    """
    ids, labels, cut = [], [], []
    for row, (tokens, counts, shorter) in enumerate(rows):
        counts[:1] = False  # nothing predicts the first token
        if not counts.any():
            raise DataError(
                f"row {row}, column {column!r}: it has no token to learn: remove the row", code="nothing-to-learn"
            )
        ids.append(tokens)
        labels.append(np.where(counts, tokens, IGNORED).astype(np.int32))
        cut.append(shorter)
    return Tokens.join(ids, pad_id), Tokens.join(labels, IGNORED), np.asarray(cut, dtype=bool)


def _closed(
    ids: np.ndarray, counts: np.ndarray, ends: np.ndarray, end: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text that ends with the end token, which counts."""
    if end is not None and ids[-1:].tolist() != [end]:
        ids, counts, ends = np.append(ids, np.int32(end)), np.append(counts, True), np.append(ends, ends[-1:])
    counts[-1:] |= end is not None
    return ids, counts, ends


def _pieces_of_row(tokenizer: Any, talk: Conversation, train_on: TrainOn, row: int) -> list[tuple[str, bool]]:
    """`pieces`; what a template raises (by `raise_exception`, or since it meets what it does not expect) names the row.

    The templates are programs of their authors, so any exception is possible.
    """
    if train_on == "answers" and talk.messages[0]["role"] == "assistant":
        raise DataError(
            f"row {row}: the conversation begins with the assistant, whose first message has no prompt: set "
            "task.train_on = 'answer', or remove that message",
            code="answer-without-prompt",
        )
    if not talk.counted(train_on) or (train_on == "all" and talk.unlearnt):
        cure = "remove the weights, or set task.train_on = 'answers'" if train_on != "answers" else "remove the row"
        raise DataError(
            f"row {row}: messages with the weight 0 are not to be learnt, and task.train_on = {train_on!r} "
            f"{'would learn them' if train_on == 'all' else 'leaves no other'}: {cure}",
            code="nothing-to-learn",
        )
    try:
        _require_shown(tokenizer, talk, row)
        return pieces(tokenizer, talk, train_on)
    except (ModelError, DataError):
        raise
    except Exception as error:
        roles = clean_text(", ".join(message["role"] for message in talk.messages[:6]), 80)
        raise DataError(
            f"row {row}: the model's chat template refuses this conversation (roles: {roles}): "
            f"{clean_text(error, 150) or type(error).__name__}; change the row, task.system, or the chat template in "
            "the model's folder",
            code="template-refuses",
        ) from error


def _require_shown(tokenizer: Any, talk: Conversation, row: int) -> None:
    """Refuse what a template does not look at: a conversation without it would be rendered alike.

    What users and assistants say is taken for granted: templates that leave out the reasoning in earlier answers do
    so on purpose.
    """
    changes: list[tuple[str, list[Message], list[Any] | None]] = []
    for place, message in enumerate(talk.messages):
        for key in message:
            if key == "role" or (key == "content" and (message["role"] in ("user", "assistant") or not message[key])):
                continue
            other = {name: inner for name, inner in message.items() if name != key}
            other |= {"content": message["content"] + "."} if key == "content" else {}
            what = (
                f"message {place} of the role {message['role']!r}"
                if key == "content"
                else f"{key!r} of message {place}"
            )
            changes.append((what, [*talk.messages[:place], other, *talk.messages[place + 1 :]], talk.tools))
    if talk.tools:
        changes.append(("the tools", talk.messages, None))
    whole = render(tokenizer, talk.messages, talk.tools, prompt=False) if changes else ""
    for what, messages, tools in changes:
        try:
            unseen = render(tokenizer, messages, tools, prompt=False) == whole
        except Exception:  # it was looked at
            unseen = False
        if unseen:
            raise DataError(
                f"row {row}: the model's chat template does not show {clean_text(what, 80)}: remove it, or write it "
                "into the content of a message",
                code="template-leaves-out",
            )


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


def _whole(tokenizer: Any, rendered: Sequence[Sequence[str]], special: bool) -> Iterator[Whole]:
    """Texts that are given in parts, each tokenised in one piece, with the tokeniser's own special tokens or without.

    Raises:
        ModelError: the tokeniser gives no offsets, and a token lies across the border of two parts.
    """
    texts = ["".join(parts) for parts in rendered]
    if not texts:
        return
    if not tokenizer.is_fast:
        yield from (_by_beginnings(tokenizer, parts, special) for parts in rendered)
        return
    found = _ids(tokenizer, texts, special=special, offsets=True)
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        # A token of no width (a blank that the tokeniser adds) is where it begins.
        yield np.asarray(ids, dtype=np.int32), places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)


def _by_beginnings(tokenizer: Any, parts: Sequence[str], special: bool) -> Whole:
    """As `_whole` for one text, from the tokens of all its beginnings that end with a part."""
    parts = [part for part in parts if part]
    beginnings = [""] + ["".join(parts[: number + 1]) for number in range(len(parts))]
    tokens = _ids(tokenizer, beginnings[1:], special=special)["input_ids"]
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


def pieces(tokenizer: Any, talk: Conversation, train_on: TrainOn) -> list[tuple[str, bool]]:
    """A rendered conversation in pieces, each with whether it counts; the last one that counts is the last answer.

    Where the template marks what is generated, its marks decide, and the whole conversation is there. Otherwise an
    answer is what rendering it adds to its prompt, and the last one that counts is the end. An answer ends with its end
    token: blanks that the template puts after it are not learnt.
    """
    if _GENERATION.search(_template(tokenizer, talk.tools)):
        return _marked(tokenizer, talk, train_on)
    out: list[tuple[str, bool]] = []
    done = ""
    for place in talk.counted(train_on):
        before = render(tokenizer, talk.messages[:place], talk.tools, prompt=True)
        after = render(tokenizer, talk.messages[: place + 1], talk.tools, prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ModelError(
                "the model's chat template changes earlier messages when later ones follow, so that prompt and answer "
                "cannot be told apart: use a tokenizer with another chat_template",
                code="template-rewrites-beginning",
            )
        answer = _without_blanks(tokenizer, after)
        out += [(before[len(done) :], False), (answer[len(before) :], True)]
        done = answer
    return out


def _marked(tokenizer: Any, talk: Conversation, train_on: TrainOn) -> list[tuple[str, bool]]:
    """As `pieces`, by the template's marks `{% generation %}`: what a message adds to them is its own."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def marks(messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        found: Any = render_jinja_template(
            [list(messages)],
            tools=talk.tools,
            chat_template=_template(tokenizer, talk.tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        (text,), (spans,) = found
        return text, spans

    text, spans = marks(talk.messages)
    counted = talk.counted(train_on)
    said = [k for k, one in enumerate(talk.messages) if one["role"] == "assistant"]
    if counted != said:
        # What a message adds to the marks of those before it.
        numbers = [len(marks(talk.messages[:k])[1]) if k else 0 for k in counted]
        after = [len(marks(talk.messages[: k + 1])[1]) for k in counted]
        spans = [span for low, high in zip(numbers, after, strict=True) for span in spans[low:high]]
    if not any(begin < end for begin, end in spans):
        raise ModelError(
            "the model's chat template marks nothing as generated in an answer: take its marks {% generation %} out",
            code="template-marks-nothing",
        )
    out, done = [], 0
    for begin, end in spans:
        out += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    rest = text[done:]
    return out if _without_blanks(tokenizer, text) == text[:done] else [*out, (rest, False)]


def _without_blanks(tokenizer: Any, text: str) -> str:
    """The text without the blanks after a special token at its end."""
    closed = text.rstrip()
    return closed if any(closed.endswith(token) for token in tokenizer.all_special_tokens) else text


def _template(tokenizer: Any, tools: list[Any] | None) -> str:
    found = tokenizer.chat_template
    if isinstance(found, dict):  # several by name
        found = tokenizer.get_chat_template(tools=tools)
    return found or PLAIN_TEMPLATE


def render(tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool) -> str:
    """Messages in the tokeniser's chat template, or a plain one where it has none.

    Args:
        tokenizer: Of the model.
        messages: With "role" and "content".
        tools: That the model may call.
        prompt: Whether an answer is to follow.
    """
    more: dict[str, Any] = {} if tokenizer.chat_template else {"chat_template": PLAIN_TEMPLATE}
    more |= {} if tools is None else {"tools": tools}
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **more)
    return text


def _cut(ids: np.ndarray, counts: np.ndarray, answer: int, max_length: int) -> Encoded:
    """At most `max_length` tokens: the prompt gives its oldest ones, down to half of them; the answer its last.

    Args:
        ids: all tokens.
        counts: which of them count.
        answer: where the last answer begins, which counts.
        max_length: of the result.
    """
    kept = min(len(ids) - answer, max_length - min(answer, max_length // 2))
    end = answer + kept
    start = max(0, end - max_length)
    return Encoded(ids[start:end], counts[start:end], end - start < len(ids))
