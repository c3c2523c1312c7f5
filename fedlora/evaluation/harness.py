"""Evaluation by lm-evaluation-harness: an adapter's language model and its base side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.assets import Checkpoint
from fedlora.errors import ConfigError, closest, in_words
from fedlora.evaluation.pretrained_adapter import Adapted, Source, find_adapter, load_for
from fedlora.tasks import load_task
from fedlora.tasks._text import load_tokenizer

Table = dict[str, dict[str, float]]
"""Column ("base", "federated", ...) -> "task/figure" -> value."""
BASE = "base"
FEDERATED = "federated"


def evaluate_outside(source: Source, named: Sequence[str], limit: int | None, others: Mapping[str, Path]) -> Table:
    """Figures of some of the harness's tasks.

    Args:
        source: the adapter.
        named: tasks or groups of the harness, or files that define tasks (.yaml).
        limit: the most examples of each task; None: all.
        others: column -> adapter on the same base, such as one that a client trained alone.

    Returns:
        The figures of the base alone, of the adapter, and of the others.

    Raises:
        ConfigError: the harness is not installed, does not know a task, or cannot measure such a model.
        ModelError: the model or an adapter cannot be loaded.
    """
    if load_task(source.config.task).auto_class != "AutoModelForCausalLM":
        raise ConfigError(
            f"--lm-eval measures causal language models, and the adapter is for the task {source.config.task.name!r}: "
            "leave it out",
            code="generates-no-text",
        )
    tasks = _tasks(named)
    adapted, _ = load_for(source, None, packed=True)
    found: Table = {}
    with adapted.peft.disable_adapter():
        found[BASE] = _measured(source, adapted, tasks, limit)
    found[FEDERATED] = _measured(source, adapted, tasks, limit)
    for name, folder in others.items():
        other = find_adapter(folder)
        if (theirs := other.config.model.name) != source.config.model.name:
            raise ConfigError(
                f"the adapter {str(folder)!r} is for {theirs!r}, not for {source.config.model.name!r}: name one on the "
                "same base",
                code="other-base",
            )
        adapted, _ = load_for(other, None, packed=True)
        found[name] = _measured(other, adapted, tasks, limit)
    return found


def _tasks(named: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's manager of tasks, and the names of those that are wanted."""
    try:
        import lm_eval.tasks
    except ImportError:
        raise ConfigError(
            "--lm-eval needs lm-evaluation-harness: pip install 'fedlora[lm-eval]'", code="extra-missing"
        ) from None
    files = [Path(name) for name in named if name.endswith((".yaml", ".yml"))]
    if gone := [file for file in files if not file.is_file()]:
        raise ConfigError(f"there is no task file {str(gone[0])!r}", code="no-such-file")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = lm_eval.tasks.TaskManager(
        include_path=[str(file.parent.resolve()) for file in files] or None,
        include_defaults=len(files) < len(named),  # thousands of files
    )
    wanted = [_name_in(file) if (file := Path(name)) in files else name for name in named]
    for name in wanted:
        if name not in manager.all_tasks:
            near = closest(name, manager.all_tasks)
            cure = (
                f"did you mean {near!r}?" if near else "lm-eval ls tasks lists them; a file of your own ends in .yaml"
            )
            raise ConfigError(f"lm-evaluation-harness has no task {name!r}; {cure}", code="unknown-name")
    return manager, wanted


def _name_in(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("task", "group"):
            return value.strip().strip("'\"")
    raise ConfigError(f"the task file {str(file)!r} names no task: add a line 'task: ...'", code="missing-key")


def _measured(source: Source, adapted: Adapted, tasks: Any, limit: int | None) -> dict[str, float]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager, wanted = tasks
    tokenizer = load_tokenizer(Checkpoint.of(source.config.model))
    adapted.train_mode(False)
    model = HFLM(pretrained=adapted.model, tokenizer=tokenizer, batch_size=8)
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=wanted, task_manager=manager, limit=limit, bootstrap_iters=0)
    except (OSError, ConnectionError, ValueError) as error:  # data that must be fetched, or another template
        raise ConfigError(
            f"lm-evaluation-harness fails on {', '.join(wanted)}: {in_words(error)[:300]}", code="harness-fails"
        ) from error
    figures = {}
    for task, row in found["results"].items():
        for key, value in row.items():  # "acc,none": what is measured, and by which of the task's filters
            name, comma, how = key.partition(",")
            if comma and isinstance(value, int | float) and not name.endswith("_stderr"):
                figures[f"{task}/{name}" + ("" if how == "none" else f" ({how})")] = float(value)
    return figures
