"""The task "preference": of two completions of a prompt the chosen one becomes more likely than the rejected one.

Shapes: b = pairs in a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedlora.assets import Checkpoint
from fedlora.errors import DataError
from fedlora.tasks._base import REFERENCE, Batch, Examples, Table, require_possible, sums_of, tasks
from fedlora.tasks._chat import Encoded, encode_rows, learnt
from fedlora.tasks._chat_formats import Conversation, Row, is_nothing, read_rows
from fedlora.tasks._decoder import Decoder
from fedlora.tasks._text import Tokens, load_tokenizer, most_tokens, tokens_of
from fedlora.tasks._token_loss import IGNORED, mean_losses
from fedlora.tasks.causal_lm import CausalLM

UNCUT = 1 << 30
"""Tokens that no example has."""
SIDES = {"chosen": "", "rejected": "rejected_"}
"""Role -> what stands before the names of its tensors."""


@tasks.register("preference")
@dataclass(frozen=True)
class Preference(Decoder):
    """Preference tuning on pairs, with the names of TRL's trainers.

    An example is a pair, so that differential privacy by example protects pairs. With l = log p(chosen) -
    log p(rejected), summed over the completions' tokens, and l_ref the same of the reference, the loss of a pair is

    - "dpo": -log sigmoid(beta (l - l_ref)) (Rafailov et al. 2023, arXiv 2305.18290, equation (7));
    - "ipo": (m - m_ref - 1 / (2 beta))^2, m being l with each log-probability divided by its number of tokens (Azar et
      al. 2023, arXiv 2310.12036, equation (17), normalised as in TRL);
    - "orpo": the chosen completion's cross entropy by token - beta log sigmoid(log-odds ratio), of probabilities by
      token; it has no reference (Hong et al. 2024, arXiv 2403.07691, equations (6) and (7));
    - "sft": the chosen completion's cross entropy by token alone, to compare the others with on the same pairs.

    The reference is the model that the client's round starts from: the base with the adapter that it was sent, without
    dropout. Its log-probabilities are computed once for each pair that is drawn in a round. In evaluation, where there
    is no round, the reference counts as indifferent (l_ref = 0).

    A pair has a prompt and two completions (columns prompt, chosen, rejected), each a text or a list of messages. Where
    chosen and rejected are whole conversations, they differ in their last answer alone, and prompt may be missing.

    Args:
        loss_type: see above.
        beta: see above.
        max_length: of a prompt with a completion, as for "causal-lm".
        system: a system message for conversations that have none.
    """

    metric: ClassVar[str] = "ranking_accuracy"
    roles: ClassVar[tuple[str, ...]] = ("chosen", "rejected", "prompt")
    optional_roles: ClassVar[tuple[str, ...]] = ("prompt",)
    texts_of_an_example: ClassVar[int] = len(SIDES)
    kept_on_cpu: ClassVar[tuple[str, ...]] = ("labels", "rejected_labels")

    loss_type: Literal["dpo", "ipo", "orpo", "sft"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    max_length: Annotated[int, Field(ge=8)] | None = None
    system: str | None = None

    @property
    def refers(self) -> bool:
        """See `Task.refers`."""
        return self.loss_type in ("dpo", "ipo")

    def roles_of(self, found: Collection[str] | None, named: Mapping[str, str]) -> tuple[str, ...]:
        """All, but for a prompt that is not there."""
        prompt = named.get("prompt", "prompt")
        return self.roles if found is None or prompt != "prompt" or prompt in found else ("chosen", "rejected")

    def reads(self, model: str | Path | Checkpoint) -> dict[str, str]:
        """The hashes of the tokeniser and the chat template."""
        return CausalLM().reads(model)

    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Tokenise a table of pairs.

        Raises:
            DataError: a value is not usable, or the two completions have different prompts; the message names the row.
            ModelError: the model's chat template cannot tell where an answer begins.
        """
        tokenizer, most = load_tokenizer(model_path), self.max_length or most_tokens(model_path)
        values = {role: table.columns[column] for role, column in columns.items()}
        pairs = list(_pairs(values, columns, self.system))
        inputs: dict[str, Tokens] = {}
        cut = np.zeros(len(pairs), dtype=bool)
        whole = [encode_rows(tokenizer, [pair[side] for pair in pairs], "answer", UNCUT) for side in range(len(SIDES))]
        encoded = [_cut_alike(sides, most) for sides in zip(*whole, strict=True)]
        for side, (role, before) in enumerate(SIDES.items()):
            own = (pair[side] for pair in encoded)
            ids, labels, shorter = learnt(own, columns[role], int(tokenizer.pad_token_id))
            inputs |= {f"{before}input_ids": ids, f"{before}labels": labels}
            cut |= shorter
        notes = [f"pairs are read from the columns {', '.join(columns.values())}"]
        if cut.any():
            notes.append(f"{cut.sum()} of {len(cut)} pairs are longer than {most} tokens and are cut (task.max_length)")
        return Examples(
            inputs=inputs,
            labels=None,
            lengths=inputs["input_ids"].lengths + inputs["rejected_input_ids"].lengths,
            columns={name: np.asarray(table.columns[name]) for name in keep},
            notes=tuple(notes),
        )

    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """A padded batch: "input_ids", "attention_mask", "labels" of the chosen ones, the rejected ones' after them."""
        batch: Batch = {}
        for before in SIDES.values():
            ids, labels = tokens_of(examples, f"{before}input_ids"), tokens_of(examples, f"{before}labels")
            padded, mask = ids.pad(indices)
            batch |= {f"{before}input_ids": padded, f"{before}attention_mask": mask}
            batch[f"{before}labels"] = labels.pad(indices)[0]
        return batch

    def padding(self, examples: Examples) -> Mapping[str, int]:
        """As of "causal-lm", for both sides."""
        fill = {"input_ids": tokens_of(examples).pad_id, "attention_mask": 0, "labels": IGNORED}
        return {f"{before}{name}": value for before in SIDES.values() for name, value in fill.items()}

    def tokens(self, batch: Batch) -> int | None:
        """Of both sides."""
        return sum(int(batch[f"{before}input_ids"].shape[1]) for before in SIDES.values())

    def reference(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b 2"]:
        """The log-probabilities of the chosen and the rejected completions."""
        return torch.stack([_log_probability(model, batch, before)[0] for before in SIDES.values()], dim=1)

    def losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b"]:
        """The loss of each pair; without "reference" in the batch the reference is indifferent."""
        if self.loss_type == "sft":
            chosen, size = _log_probability(model, batch, SIDES["chosen"])
            return -chosen / size
        return self._of(model, batch)[0]

    def _of(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss of each pair, the log-probabilities of its two completions, and the chosen one's tokens."""
        (chosen, size), (rejected, other) = (_log_probability(model, batch, before) for before in SIDES.values())
        reference = batch.get(REFERENCE)
        to_chosen, to_rejected = (0.0, 0.0) if reference is None else reference.to(chosen).unbind(1)
        if self.loss_type == "dpo":
            loss = -functional.logsigmoid(self.beta * ((chosen - to_chosen) - (rejected - to_rejected)))
        elif self.loss_type == "ipo":
            loss = ((chosen - to_chosen) / size - (rejected - to_rejected) / other - 1 / (2 * self.beta)) ** 2
        elif self.loss_type == "sft":
            loss = -chosen / size
        else:
            odds = _log_odds(chosen / size) - _log_odds(rejected / other)
            loss = -chosen / size - self.beta * functional.logsigmoid(odds)
        return loss, chosen, rejected, size

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, "b"]]:
        """For each pair "loss", whether it is ranked "right", and the chosen completion's cross entropy by token."""
        loss, chosen, rejected, size = self._of(model, batch)
        return {"loss": loss, "right": (chosen > rejected).to(loss), "chosen_loss": -chosen / size}

    def sums(self, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The number of "examples", and the rest added up over them."""
        return sums_of(measures, ("loss", "right", "chosen_loss"))

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Means over the pairs; "ranking_accuracy" is the share whose chosen completion is the more likely one."""
        means = {name: float(sums[name] / sums["examples"]) for name in ("right", "loss", "chosen_loss")}
        return {"ranking_accuracy": means.pop("right"), **means}

    def require_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        """No more pairs are ranked right than there are."""
        require_possible(float(sums["right"]) <= float(sums["examples"]), "more pairs are ranked right than there are")

    def spans(
        self, examples: Examples, index: int, model_path: str | Path | Checkpoint
    ) -> tuple[tuple[str, bool], ...]:
        """The chosen and then the rejected one."""
        spans = super().spans
        sides = [spans(_side(examples, before), index, model_path) for before in SIDES.values()]
        return ("chosen: ", False), *sides[0], ("\nrejected: ", False), *sides[1]


def _side(examples: Examples, before: str) -> Examples:
    """One side of the pairs, as examples of "causal-lm"."""
    inputs = {name: examples.inputs[f"{before}{name}"] for name in ("input_ids", "labels")}
    return Examples(inputs, None, tokens_of(examples, f"{before}input_ids").lengths)


def _cut_alike(sides: Sequence[Encoded], most: int) -> list[Encoded]:
    """At most `most` tokens of each side, which begin at one place of the prompt, so that both completions are scored
    after the same tokens: the prompt gives its oldest ones, down to half of `most`, each completion its last."""
    answers = [int(np.argmax(side.counts)) for side in sides]
    prompt, longest = max(answers), max(len(side.ids) - answer for side, answer in zip(sides, answers, strict=True))
    start = prompt - min(prompt, max(most // 2, most - longest))
    window = slice(start, start + most)
    return [Encoded(side.ids[window], side.counts[window], len(side.ids[window]) < len(side.ids)) for side in sides]


def _log_probability(model: nn.Module, batch: Batch, before: str) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """The log-probability of each completion of one side, and its number of tokens.

    Each side is a forward pass of its own, in which row i belongs to pair i.
    """
    inputs = {name: batch[f"{before}{name}"] for name in ("input_ids", "attention_mask", "labels")}
    loss, tokens = mean_losses(model, inputs)
    return -loss * tokens, tokens


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)), stable at both ends; of a p that rounds to 1 that of the largest below."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    half = log_p > -np.log(2.0)
    small = torch.log(-torch.expm1(torch.where(half, log_p, -1.0)))
    return log_p - torch.where(half, small, torch.log1p(-torch.exp(torch.where(half, -1.0, log_p))))


def _pairs(
    values: Mapping[str, Sequence[Any]], columns: Mapping[str, str], system: str | None
) -> Sequence[tuple[Row, Row]]:
    """The chosen and the rejected example of each row."""
    out = []
    for row in range(len(values["chosen"])):
        cells = {role: column[row] for role, column in values.items()}
        prompt, asked = cells.get("prompt"), not is_nothing(cells.get("prompt"))
        listed = isinstance(cells["chosen"], list | tuple | np.ndarray)
        whole = listed and not (asked and not isinstance(prompt, str))
        for role in () if whole or not listed else SIDES:
            asking = [] if prompt is None else list(prompt)
            if list(cells[role][: len(asking)]) == asking:
                raise DataError(
                    f"row {row}, column {columns[role]!r}: it repeats the prompt of column {columns['prompt']!r}: "
                    "remove it from one of them",
                    code="prompts-differ",
                )
        if not listed and not asked:
            raise DataError(
                f"row {row}: two texts without a prompt say not where they part: add the column "
                f"{columns.get('prompt', 'prompt')!r}",
                code="no-prompt",
            )
        sides: list[Row] = []
        for role in SIDES:
            if whole:
                roles, names = {"messages": cells[role]}, {"messages": columns[role]}
            else:
                roles = {"prompt": prompt, "completion": cells[role]}
                names = {"prompt": columns["prompt"], "completion": columns[role]}
            sides += _one(roles, names, system, row)
        chosen, rejected = sides
        if isinstance(chosen, Conversation) and isinstance(rejected, Conversation):
            before = [side.messages[: side.answer] for side in (chosen, rejected)]
            if before[0] != before[1]:
                raise DataError(
                    f"row {row}: the chosen and the rejected conversation differ before their last answer: make their "
                    "earlier messages the same, or remove the row",
                    code="prompts-differ",
                )
            if whole and asked and prompt not in [one["content"] for one in before[0]]:
                raise DataError(
                    f"row {row}, column {columns['prompt']!r}: the prompt is none of the conversation's messages: "
                    "correct or remove the row",
                    code="prompts-differ",
                )
        out.append((chosen, rejected))
    return out


def _one(roles: Mapping[str, Any], names: Mapping[str, str], system: str | None, row: int) -> list[Row]:
    """One row, read with its own number."""
    return list(read_rows({role: [cell] for role, cell in roles.items()}, names, system, first=row))
