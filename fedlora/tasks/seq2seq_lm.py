"""The task "seq2seq-lm": a text for a text, such as a translation or a summary, by an encoder and a decoder (T5, BART).

Shapes: b = examples in a batch, t = tokens of the longest source, u = of the longest target.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from fedlora.assets import Checkpoint
from fedlora.errors import ModelError
from fedlora.model.plain import quiet_transformers
from fedlora.model.reach import longest_text
from fedlora.tasks._base import NEW_TOKENS, Batch, Examples, Sample, Table, require_possible, sums_of, tasks
from fedlora.tasks._text import TextTask, Tokens, encode, load_tokenizer, most_tokens, tokens_of
from fedlora.tasks._token_loss import (
    COMPARED,
    DECODED,
    IGNORED,
    mean_losses,
    perplexity_figures,
    perplexity_sums,
    require_tokens,
)
from fedlora.tasks._trials import evaluating

ROUGE = ("rougeL", "rouge1", "rouge2")
"""F-measures of what is written, by rouge-score's names."""
WRAPPED = ("mbart", "plbart")


@tasks.register("seq2seq-lm")
@dataclass(frozen=True)
class Seq2SeqLM(TextTask):
    """A text is written for a text: the columns `text` and `target`.

    The decoder is given the target behind its start token, as transformers shifts it, and predicts the target with its
    end token. The loss of an example is the mean cross entropy of its target's tokens, in nats. Evaluation also lets
    the model write, greedily, and compares what it writes with the target.

    Args:
        max_length: longer texts are cut to so many tokens, special tokens included. None: as many as the model takes,
            1,024 at most.
        max_target_length: longer targets are cut to so many tokens, and so have no end token to learn; so many are
            written at most.
        prefix: is put before each text, as in "summarize: ".
        label_smoothing: as for "causal-lm".
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    metric: ClassVar[str] = "rougeL"
    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    kept_on_cpu: ClassVar[tuple[str, ...]] = ("labels",)
    roles: ClassVar[tuple[str, ...]] = ("text", "target")

    max_length: Annotated[int, Field(ge=4)] | None = None
    max_target_length: Annotated[int, Field(ge=2)] = 128
    prefix: str = ""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise a table of texts and targets.

        Raises:
            DataError: a text or target is missing; the message names the row (from 0) and the column.
            ModelError: the model does not say what its decoder begins with.
        """
        most, start = self.max_length or most_tokens(model_path), _decoder_start(Checkpoint.at(model_path))
        texts, targets = (table.columns[columns[role]] for role in self.roles)
        texts = [self.prefix + text if isinstance(text, str) and text.strip() else text for text in texts]
        sources = encode(model_path, [(columns["text"], texts)], most + 1)[0]
        longer = sources.lengths > most
        if longer.any():
            sources = encode(model_path, [(columns["text"], texts)], most)[0]
        wanted = encode(model_path, [(columns["target"], targets)], self.max_target_length + 1, target=True)[0]
        starts = [ids[-1] if start is None else start for ids in wanted]
        wanted, cut = _ended(wanted, load_tokenizer(model_path).eos_token_id, self.max_target_length)
        notes = [
            f"{number} of {len(cut)} {what} are longer than {limit} tokens and are cut (task.{key})"
            for what, number, limit, key in (
                ("texts", longer.sum(), most, "max_length"),
                ("targets", cut.sum(), self.max_target_length, "max_target_length"),
            )
            if number
        ]
        before = [np.append(np.int32(first), ids[:-1]) for first, ids in zip(starts, wanted, strict=True)]
        return Examples(
            inputs={"input_ids": sources, DECODED: Tokens.join(before, sources.pad_id), "labels": wanted},
            labels=None,
            lengths=sources.lengths + wanted.lengths,
            columns={name: np.asarray(table.columns[name]) for name in keep},
            notes=tuple(notes),
        )

    def invented(self, role: str) -> Sequence[Any] | None:
        """Targets of unequal length."""
        return ("one two", "it", "there are four of them", "as good as new") if role == "target" else None

    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """A padded batch: "input_ids" and "attention_mask" [b, t]; "decoder_input_ids", "decoder_attention_mask" and
        "labels" [b, u], where labels that do not count are -100."""
        ids, mask = tokens_of(examples).pad(indices)
        before, inside = tokens_of(examples, DECODED).pad(indices)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            DECODED: before,
            "decoder_attention_mask": inside,
            "labels": tokens_of(examples, "labels").pad(indices)[0],
        }

    def plain_inputs(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """The whole texts and the beginning of their targets: a vocabulary has many logits."""
        batch = super().plain_inputs(examples, indices)
        return {name: value[:, :COMPARED] if name.startswith("decoder") else value for name, value in batch.items()}

    def padding(self, examples: Examples) -> Mapping[str, int]:
        """The tokeniser's own padding, and labels that do not count."""
        pad = tokens_of(examples).pad_id
        return {"input_ids": pad, "attention_mask": 0, DECODED: pad, "decoder_attention_mask": 0, "labels": IGNORED}

    def tokens(self, batch: Batch) -> int | None:
        """Of text and target."""
        return int(batch["input_ids"].shape[1] + batch[DECODED].shape[1])

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """Mean cross entropy of each target's tokens, in nats, with the labels smoothed."""
        return mean_losses(model, batch, self.label_smoothing)[0]

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """For each example "loss" as in `losses`, how many "tokens" its target has, `ROUGE` of what is written, and
        whether it is "exact" (1 or 0): just the target, white space apart."""
        loss, tokens = mean_losses(model, batch)
        checkpoint = Checkpoint(
            model.name_or_path,  # type: ignore[arg-type]
            getattr(model.config, "_commit_hash", None),
            type(model).__module__.startswith("transformers_modules"),
        )
        tokenizer = load_tokenizer(checkpoint)
        wanted = [tokenizer.decode(row[row != IGNORED].tolist(), skip_special_tokens=True) for row in batch["labels"]]
        written = _written(model, batch, self.max_target_length, tokenizer)
        scores = [_scored(*pair) for pair in zip(wanted, written, strict=True)]
        found = {name: loss.new_tensor([score[name] for score in scores]) for name in (*ROUGE, "exact")}
        return {"loss": loss, "tokens": tokens, **found}

    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As of "causal-lm"; and `ROUGE` added up over the examples."""
        return perplexity_sums(measures) | sums_of(measures, ROUGE)

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures of the examples that were added up.

        Returns:
            "rougeL", "rouge1" and "rouge2", the means of ROUGE's F-measures (Lin 2004, Text Summarization Branches Out,
            equations (2) to (4) and section 2), computed by rouge-score on words of letters and digits in lower case;
            "exact_match", the share of examples for which the target is written, white space apart; "perplexity",
            "loss" and "token_loss" as of "causal-lm", of the target behind its own beginnings.
        """
        means = {name: float(sums[name] / sums["examples"]) for name in ROUGE}
        return {**means, **perplexity_figures(sums)}

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """A target has one token at least, and at most `max_target_length`; no score is above 1."""
        require_tokens(sums, self.max_target_length)
        most = float(sums["examples"]) * (1 + 1e-6)
        require_possible(all(float(sums[name]) <= most for name in ROUGE), "a score is above 1")

    def spans(
        self, examples: Examples, index: int, model_path: str | Path | Checkpoint
    ) -> tuple[tuple[str, bool], ...]:
        """The text, and its target on another line."""
        text, target = (
            load_tokenizer(model_path).decode(tokens_of(examples, name)[index].tolist())
            for name in ("input_ids", "labels")
        )
        return (f"{text}\n", False), (target, True)

    def samples(
        self,
        model: nn.Module,
        examples: Examples,
        indices: Sequence[int] | np.ndarray,
        model_path: str | Path | Checkpoint,
    ) -> tuple[Sample, ...]:
        """What the model writes for some texts."""
        tokenizer, device = load_tokenizer(model_path), next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.collate(examples, indices).items()}
        with evaluating(model), torch.inference_mode():
            written = _written(model, batch, NEW_TOKENS, tokenizer)
        texts, targets = (
            [tokenizer.decode(tokens_of(examples, name)[int(k)].tolist(), skip_special_tokens=True) for k in indices]
            for name in ("input_ids", "labels")
        )
        return tuple(map(Sample, texts, targets, written))


def _ended(targets: Tokens, end: int | None, most: int) -> tuple[Tokens, Bool[np.ndarray, "n"]]:
    """Targets of at most `most` tokens, and which were cut; the others have an end token."""
    rows = [ids[:most] if end is None or end in ids else np.append(ids, np.int32(end))[:most] for ids in targets]
    return Tokens.join(rows, IGNORED), targets.lengths > most


def _decoder_start(checkpoint: Checkpoint) -> int | None:
    """The token that a decoder is given first; None: the target's own last one, as transformers has it for mBART.

    Raises:
        ModelError: neither the model's config nor its generation settings name one.
    """
    from transformers import AutoConfig, GenerationConfig

    for kind in (AutoConfig, GenerationConfig):
        try:
            found = kind.from_pretrained(checkpoint.source, **checkpoint.options)
        except (OSError, ValueError):  # loading the model says what is wrong
            continue
        if getattr(found, "model_type", "") in WRAPPED:
            return None
        if isinstance(start := getattr(found, "decoder_start_token_id", None), int):
            return start
    raise ModelError(
        f"the config of {str(checkpoint)!r} does not say with which token its decoder begins: set "
        "decoder_start_token_id in its config.json (T5 takes the padding token), or choose a "
        "model with an encoder and a decoder",
        code="no-decoder-start",
    )


def _written(model: nn.Module, batch: Batch, most: int, tokenizer: Any) -> list[str]:
    """What a model writes for the texts of a batch, greedily: at most `most` tokens, and what its positions hold."""
    longest = longest_text(model)
    with quiet_transformers():
        found = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=most if longest is None else min(most, longest - 1),
            do_sample=False,
            num_beams=1,
            use_cache=True,
        )
    return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in found]


def _scored(wanted: str, written: str) -> dict[str, float]:
    """`ROUGE` and "exact" of a text."""
    scores = _scorer().score(wanted, written)
    found = {name: float(scores[name].fmeasure) for name in ROUGE}
    return {**found, "exact": float(wanted.split() == written.split())}


class _Words:
    """rouge-score's own words where a text is ASCII; its tokenizer knows no other letters."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), tokenizer=_Words())
