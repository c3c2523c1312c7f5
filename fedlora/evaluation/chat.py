"""A conversation with a language model and its adapter, or with the base alone beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, final

import torch

from fedlora.assets import Checkpoint
from fedlora.errors import ConfigError, ModelError
from fedlora.evaluation.pretrained_adapter import Adapted, Source, load_for
from fedlora.model import seeded
from fedlora.model.reach import longest_text
from fedlora.rng import derive
from fedlora.sanitize import clean_lines
from fedlora.tasks import load_task
from fedlora.tasks._chat import render
from fedlora.tasks._text import load_tokenizer
from fedlora.tasks._trials import evaluating

Message = dict[str, str]
GENERATES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        new_tokens: At most so many tokens an answer.
        temperature: 0: always the likeliest token; None: as the model's own generation settings say.
        seed: Of the draws.
    """

    new_tokens: int = 256
    temperature: float | None = None
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate` that differ from the model's settings."""
        given: dict[str, Any] = {"max_new_tokens": self.new_tokens}
        if self.temperature == 0:  # the others would say nothing then, and transformers warns of them
            return given | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return given if self.temperature is None else given | {"do_sample": True, "temperature": self.temperature}


@final
@dataclass
class Chat:
    """One conversation, which each `answer` carries on.

    Args:
        adapted: The model.
        tokenizer: Of its base.
        tuned: Whether the adapter is on.
        system: Message that it begins with; None: as the chat template has it.
        continues: Whether there are no turns: what is said is continued, each time anew.
        sampling: How answers are drawn.
    """

    adapted: Adapted
    tokenizer: Any
    tuned: bool = True
    system: str | None = None
    continues: bool = False
    sampling: Sampling = Sampling()
    messages: list[Message] = field(default_factory=list)

    def answer(self, said: str, write: Callable[[str], None]) -> str:
        """What the model says, written piece by piece. After Ctrl-C it is what had been said by then.

        Args:
            said: By the user.
            write: Gets each piece of printable text as soon as it is there.

        Raises:
            ModelError: The chat template refuses the messages, or they are longer than the model takes.
        """
        ids, kept = self._prompt(said)
        model: Any = self.adapted.model
        pieces: list[str] = []

        def told(text: str) -> None:
            pieces.append(text)
            write(text)

        off = nullcontext() if self.tuned else self.adapted.peft.disable_adapter()
        seed = derive(self.sampling.seed, "chat", len(self.messages))
        with off, evaluating(model), seeded(seed, self.adapted.device), torch.inference_mode():
            try:
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=_streamer(self.tokenizer, told, skip=not model.config.is_encoder_decoder),
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=True,
                    **self.sampling.options,
                )
            except KeyboardInterrupt:
                write(" [stopped]")
        answer = "".join(pieces).strip()
        self.messages = [*kept, {"role": "assistant", "content": answer}]
        return answer

    def _prompt(self, said: str) -> tuple[torch.Tensor, list[Message]]:
        """Tokens of the prompt, [1, t], and the turns in it: the oldest are left out where all are too long."""
        turns = [*([] if self.continues else self.messages), {"role": "user", "content": said}]
        longest = longest_text(self.adapted.model)
        room = None if longest is None else longest - min(self.sampling.new_tokens, longest // 2)
        while True:
            ids = self._encoded(turns)
            if room is None or ids.shape[1] <= room:
                return ids, turns
            if len(turns) < 3:
                raise ModelError(
                    f"that is {ids.shape[1]} tokens, and the model takes {longest} with its answer: say it shorter",
                    code="text-too-long",
                )
            turns = turns[2:]

    def _encoded(self, turns: Sequence[Message]) -> torch.Tensor:
        if self.continues:
            text, special = turns[-1]["content"], True
        else:
            first = [] if self.system is None else [{"role": "system", "content": self.system}]
            try:
                text, special = render(self.tokenizer, [*first, *turns], None, prompt=True), False
            except Exception as error:  # a template may raise anything
                raise ModelError(
                    f"the model's chat template refuses this: {clean_lines(error, 200)}; leave out --system where it "
                    "knows no system message",
                    code="chat-template-refuses",
                ) from None
        ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
        return ids.to(self.adapted.device)


def open_chats(source: Source, *, compare: bool, system: str | None, sampling: Sampling) -> list[Chat]:
    """Conversations with an adapter's model, and where they are compared with its base before it.

    Args:
        source: From `find_adapter`.
        compare: Whether the base takes part.
        system: See `Chat`; None: as the run's task says.
        sampling: How answers are drawn.

    Raises:
        ConfigError: The model does not generate text.
        ModelError: It cannot be loaded.
    """
    task = load_task(source.config.task)
    if task.auto_class not in GENERATES:
        raise ConfigError(
            f"the adapter is for the task {source.config.task.name!r}, whose model generates no text: chat with one of "
            "the task 'causal-lm'",
            code="generates-no-text",
        )
    tokenizer = load_tokenizer(Checkpoint.of(source.config.model))
    continues = getattr(task, "format", None) == "text" or (source.run is None and not tokenizer.chat_template)
    if continues and system is not None:
        raise ConfigError(
            "this model continues texts, and knows no system message: leave out --system", code="option-without-effect"
        )
    adapted, _ = load_for(source, None, packed=True)
    said = getattr(task, "system", None) if system is None else system
    sides = [False, True] if compare else [True]
    return [Chat(adapted, tokenizer, tuned, said, continues, sampling) for tuned in sides]


def _streamer(tokenizer: Any, told: Callable[[str], None], *, skip: bool) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                told(_printable(text))

    return Pieces(tokenizer, skip_prompt=skip, skip_special_tokens=True)


def _printable(text: str) -> str:
    """Foreign text for a terminal, blanks and line breaks at its ends included, which join it to other pieces."""
    begin, end = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :] if text.strip() else ""
    breaks = {"\n": "\n", "\t": "    "}
    around = ["".join(breaks.get(blank, " ") for blank in blanks) for blanks in (begin, end)]
    return around[0] + clean_lines(text.strip(), max(1, 2 * len(text))) + around[1]
