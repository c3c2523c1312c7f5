"""Whether the model can compute the data at all: what it has no row for is refused before anything is trained.

In a round a client whose texts are too long would be left out each time, and on a GPU one index too large ends the
process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedlora.assets import Checkpoint
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, DataError, FedloraError, ModelError
from fedlora.model import Base
from fedlora.model.reach import embedding_rows, position_limit
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Examples, Task, to_device
from fedlora.tasks._text import Tokens, load_tokenizer, most_tokens


def require_fit(config: RunConfig, base: Base, task: Task, sets: Sequence[Examples]) -> None:
    """Look at all tokens and lengths, and compute the longest example once.

    Args:
        config: names the model in messages.
        base: left as it was.
        task: gives batches and measures them.
        sets: examples that will be trained on or evaluated.

    Raises:
        DataError: an example is longer than the model's positions, or the model cannot compute it.
        ModelError: a token has no row in the model's embeddings.
    """
    sets = [examples for examples in sets if len(examples)]
    if not sets:
        return
    _require_rows(config, base, sets)
    _require_positions(base, sets)
    _try_longest(base, task, sets)


def require_fit_of_any(config: RunConfig, base: Base, task: Task) -> None:
    """As `require_fit`, for whatever texts there may be: in a private run their lengths and words are secret, and so is
    a failure by them.

    Raises:
        ConfigError: a text could be longer than the model's positions.
        ModelError: a text could have a token without a row.
    """
    if not hasattr(task, "max_length"):
        return
    limit, rows = position_limit(base.model), embedding_rows(base.model)
    lengths = {"max_length": task.max_length or most_tokens(Checkpoint.of(config.model))}
    lengths |= {name: getattr(task, name) for name in ("max_target_length",) if hasattr(task, name)}
    for name, most in lengths.items():
        if limit is not None and most > limit:
            raise ConfigError(
                f"task.{name} is {most} and the model has {limit} positions; a private run must not fail on one long "
                f"text: set task.{name} = {limit}",
                code="max-length-too-large",
            )
    if rows is not None:
        _require_row(config, len(load_tokenizer(Checkpoint.of(config.model))) - 1, rows)


def _require_rows(config: RunConfig, base: Base, sets: Sequence[Examples]) -> None:
    rows = embedding_rows(base.model)
    tokens = [ids for examples in sets for ids in _ids(examples)]
    if rows is None or not tokens:
        return
    largest = max(max(int(ids.flat.max(initial=0)), ids.pad_id) for ids in tokens)
    _require_row(config, largest, rows)


def _require_row(config: RunConfig, largest: int, rows: int) -> None:
    if largest >= rows:
        name = load_tokenizer(Checkpoint.of(config.model)).convert_ids_to_tokens(largest)
        raise ModelError(
            f"the tokenizer of {config.model.name!r} gives token {clean_text(repr(name), 60)} the id {largest}, and "
            f"the model's embeddings have rows 0 to {rows - 1}: take the token out of the tokenizer, or add rows with "
            "model.resize_token_embeddings(len(tokenizer)) and save both",
            code="token-without-embedding",
        )


def _require_positions(base: Base, sets: Sequence[Examples]) -> None:
    limit = position_limit(base.model)
    lengths = [np.max([ids.lengths for ids in found], axis=0) for examples in sets if (found := _ids(examples))]
    if limit is None or not lengths:
        return
    longest = max(int(each.max()) for each in lengths)
    if longest > limit:
        number = sum(int((each > limit).sum()) for each in lengths)
        raise DataError(
            f"{number} of {sum(map(len, sets))} texts are longer than the model's {limit} positions (the longest has "
            f"{longest} tokens): set task.max_length = {limit}, or use a model for longer texts",
            code="text-too-long",
        )


def _ids(examples: Examples) -> list[Tokens]:
    """What an example gives the model, at once or one after the other."""
    return [ids for name, ids in examples.inputs.items() if name.endswith("input_ids") and isinstance(ids, Tokens)]


def _try_longest(base: Base, task: Task, sets: Sequence[Examples]) -> None:
    """Whatever else a model cannot do with the data shows on its longest example: a size of pictures, an argument."""
    examples = max(sets, key=lambda each: int(each.lengths.max()))
    place = int(np.argmax(examples.lengths))
    base.train_mode(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            task.measure(base.model, to_device(task, task.collate(examples, [place]), base.device))
    except (FedloraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = clean_text(next(iter(str(error).splitlines()), ""), 200)
        held = base.config.quantize
        cure = "" if held is None else f"remove model.quantize = {held!r}, which its code may not go with, or "
        raise DataError(
            f"the model cannot compute the longest example ({int(examples.lengths[place])} tokens): "
            f"{type(error).__name__}: {first}; {cure}use a model for such data, or another task",
            code="examples-not-computable",
        ) from error
