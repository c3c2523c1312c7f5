"""Whether a run keeps what the layers below its adapters compute."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.memory import total_bytes
from fedlora.model import Base
from fedlora.model.prefix import Prefix, UnfitError, lower_kinds, open_prefix
from fedlora.progress import activity
from fedlora.tasks._base import Batch, Examples, Task
from fedlora.training.evaluate import length_batches
from fedlora.training.job import to_device
from fedlora.training.trial import model_inputs

SHARE = 0.125  # of all memory, not of what is free now: a run that is started again decides alike
AT_ONCE = 16384  # tokens that are put into one batch, to be taken apart by length


@dataclass(frozen=True)
class PrefixReport:
    """What `choose_prefix` did.

    Attributes:
        mode: "on" or "off". Pass it to repeat the choice.
        reason: One line, why.
        nbytes: What it may grow to.
    """

    mode: Literal["on", "off"]
    reason: str
    nbytes: int = 0


def choose_prefix(
    base: Base,
    task: Task,
    sets: Sequence[Examples],
    mode: Literal["auto", "on", "off"],
    how: Hashable = None,
    *,
    secret: Sequence[Examples] = (),
) -> PrefixReport:
    """Open, keep or close a base's prefix cache.

    Args:
        base: at its pristine version, with its kernels and its attention chosen.
        task: gives batches.
        sets: all examples that the run may look at.
        mode: as in the config.
        how: what decides the bits that the lower layers compute besides their modules' classes; what an earlier run on
            the same base kept is used again where both are the same.
        secret: further examples that the run may look at. They are kept where there is room, and nothing that is
            chosen or told goes by them.

    Raises:
        ModelError: "on" was asked for and cannot be.
    """
    try:
        if mode == "off":
            raise UnfitError("switched off")
        return _open(base, task, sets, how, secret, forced=mode == "on")
    except UnfitError as unfit:
        _close(base)
        if mode == "on":
            raise ModelError(f"runtime.prefix_cache = 'on' cannot be: {unfit}; set it to 'auto' or 'off'") from None
        return PrefixReport("off", str(unfit))


def _open(
    base: Base, task: Task, sets: Sequence[Examples], how: Hashable, secret: Sequence[Examples], *, forced: bool
) -> PrefixReport:
    if not task.rows_are_examples:
        raise UnfitError("several examples are packed into a row")
    if base.coupled is not None:
        raise UnfitError(base.coupled)
    examples = next((found for found in sets if len(found)), None)
    if examples is None:
        raise UnfitError("there are no examples")
    how = (how, lower_kinds(base.model, base.targets))
    shortest, longest = int(np.argmin(examples.lengths)), int(np.argmax(examples.lengths))
    inputs = _inputs(base, task, task.collate(examples, [shortest, longest]))
    kept, base.prefix = base.prefix, None
    prefix = kept if kept is not None and kept.how == how else _opened(base, inputs, kept, how)
    base.prefix = prefix
    states = prefix.reach(inputs)
    # What counts as a token for a task may be a little more or less for the model: a class token, patches.
    factor = states.shape[1] / float(examples.lengths[longest])
    tokens = int(np.ceil(factor * sum(float(np.sum(found.lengths)) for found in sets)))
    needed, room = tokens * states.shape[-1] * states.element_size(), int(SHARE * total_bytes(base.device))
    more = int(np.ceil(factor * sum(float(np.sum(found.lengths)) for found in secret)))
    least = max(tokens, min(tokens + more, room // (states.shape[-1] * states.element_size())))
    if prefix.capacity < least:
        if needed > room and not forced:
            raise UnfitError(
                f"{_size(needed)} are needed for {tokens} tokens, and an eighth of the memory is {_size(room)}"
            )
        prefix.clear(least)
    reason = f"{prefix.depth} layers below the adapters, {tokens} tokens, at most {_size(needed)}"
    return PrefixReport("on", reason, needed)


def _opened(base: Base, inputs: dict[str, Tensor], old: Prefix | None, how: Hashable) -> Prefix:
    if old is not None:
        old.close()
    prefix = open_prefix(base.model, base.targets, base.heads, inputs)
    prefix.how = how
    return prefix


def _close(base: Base) -> None:
    if base.prefix is not None:
        base.prefix.close()
        base.prefix = None


def prepare(base: Base, task: Task, examples: Examples, rows: np.ndarray) -> None:
    """Compute what a base's prefix cache will be asked for, many examples at once; nothing where it has none.

    Without it the same would be computed batch by batch, to the same bits, in smaller products.

    Args:
        base: whose adapter does not matter.
        task: gives batches.
        examples: all of them.
        rows: those that will be used, in any order, any number of times.
    """
    if base.prefix is None or not len(rows):
        return
    chosen = np.unique(rows)
    done = 0
    for places in length_batches(np.asarray(examples.lengths)[chosen], AT_ONCE):
        activity.info("computing the frozen layers once: %d of %d examples", done, len(chosen))
        done += len(places)
        try:
            batch = task.collate(examples, chosen[places])
        except Exception:  # whoever owns the broken example will meet it in its own batch, and the others will not
            continue
        base.prefix.prepare(_inputs(base, task, batch))


def _inputs(base: Base, task: Task, batch: Batch) -> dict[str, Tensor]:
    return model_inputs(base.model, task, to_device(batch, base.device))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
