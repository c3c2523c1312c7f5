"""What tasks of a causal language model share: how it is tried out, what it says, and what of a text is learnt.

Shapes: w = rows of a batch, t = tokens of the longest row, k = tokens whose logits are looked at, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedlora.assets import Checkpoint
from fedlora.model.reach import longest_text
from fedlora.tasks._base import NEW_TOKENS, Batch, Examples, Sample, Task
from fedlora.tasks._text import load_tokenizer, tokens_of
from fedlora.tasks._token_loss import COMPARED, IGNORED, logits_at
from fedlora.tasks._trials import evaluating, refuse_foresight


class Decoder(Task):
    """A task whose examples have a text that a causal model continues, "input_ids", and its "labels"."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"

    def check(self, model: nn.Module, sets: Sequence[Examples]) -> None:
        """Refuse a model that sees what it is to predict; see `fedlora.tasks._trials`."""
        if (longest := longest_of(sets)) is not None:
            refuse_foresight(model, longest, chosen_logits)

    def plain_inputs(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """The beginning of each text, padded, whether packing or not: a vocabulary has many logits."""
        ids, mask = tokens_of(examples).pad(indices)
        return {"input_ids": ids[:, :COMPARED], "attention_mask": mask[:, :COMPARED]}

    def spans(
        self, examples: Examples, index: int, model_path: str | Path | Checkpoint
    ) -> tuple[tuple[str, bool], ...]:
        """The example's text, cut where tokens begin or cease to count."""
        tokenizer = load_tokenizer(model_path)
        ids, counts = tokens_of(examples)[index], tokens_of(examples, "labels")[index] != IGNORED
        edges = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(ids)]
        texts = [tokenizer.decode(ids[:edge].tolist()) for edge in edges]
        return tuple(
            (text[len(before) :], bool(counts[edge]))
            for before, text, edge in zip(texts, texts[1:], edges, strict=False)
        )

    def samples(
        self,
        model: nn.Module,
        examples: Examples,
        indices: Sequence[int] | np.ndarray,
        model_path: str | Path | Checkpoint,
    ) -> tuple[Sample, ...]:
        """What the model says to the prompts of some examples: greedy, so the same each time.

        A plain text's first half is its prompt, otherwise everything before the last answer; of a prompt that leaves no
        room for an answer within the model's positions the oldest tokens are cut.
        """
        tokenizer = load_tokenizer(model_path)
        ids, labels = tokens_of(examples), tokens_of(examples, "labels")
        device = next(model.parameters()).device
        longest = longest_text(model)
        new_tokens = NEW_TOKENS if longest is None else min(NEW_TOKENS, longest // 2)
        out = []
        with evaluating(model), torch.inference_mode():
            for index in indices:
                row, cut = ids[int(index)], _prompt_length(labels[int(index)])
                if longest is not None:
                    row = row[max(0, cut + new_tokens - longest) :]
                cut -= len(ids[int(index)]) - len(row)
                prompt = torch.from_numpy(row[:cut].astype(np.int64)).to(device)[None]
                # One prompt at a time: a batch would need padding on the left, which not every model masks.
                grown = model.generate(  # type: ignore[operator]
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                )[0, cut:]
                said = tokenizer.decode(grown.tolist(), skip_special_tokens=True).strip()
                wanted = tokenizer.decode(row[cut:].tolist(), skip_special_tokens=True).strip()
                out.append(Sample(tokenizer.decode(row[:cut].tolist()), wanted, said))
        return tuple(out)


def longest_of(sets: Sequence[Examples]) -> np.ndarray | None:
    """The ids of the longest text of all examples; None where there are none."""
    each = [tokens_of(found)[int(np.argmax(found.lengths))] for found in sets if len(found)]
    return max(each, key=len, default=None)


def chosen_logits(model: nn.Module, batch: Batch, chosen: Bool[Tensor, "w t"]) -> Float[Tensor, "k v"]:
    """Of some tokens of a batch, for `fedlora.tasks._trials`."""
    return logits_at(model, batch, chosen.flatten().nonzero()[:, 0])


def _prompt_length(labels: np.ndarray) -> int:
    counts = labels != IGNORED
    if counts[1:].all():
        return max(1, len(labels) // 2)
    return int(np.flatnonzero(counts[1:] & ~counts[:-1])[-1]) + 1
