"""The model card beside an export: what it is, how it came about, what it reaches, and what may be done with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.assets import Checkpoint
from fedlora.sanitize import clean_text

HUB_NAME = r"[\w.-]+/[\w.-]+"
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
}


@dataclass(frozen=True)
class Origin:
    """How a model came about.

    Args:
        facts: "Rule" -> "fedavg", for a table.
        figures: Name -> value on the test examples.
        privacy: What is claimed, or that nothing is.
        base: By what name others find the base model; empty: by that of `fedlora.assets.public_name`.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    privacy: str = ""
    base: str = ""


NOTHING_SAID = Origin()


def card(
    name: str, checkpoint: Checkpoint, auto_class: str, snippet: str, classes: Mapping[Any, Any], origin: Origin
) -> str:
    """README.md, with the hub's metadata at its top.

    Args:
        name: Of the base model.
        checkpoint: Where its files are.
        auto_class: Of transformers.
        snippet: Python that loads the model.
        classes: Number -> name; empty: there are none.
        origin: See there.
    """
    licence = base_licence(checkpoint)
    head = {
        "library_name": "peft" if "peft" in snippet else "transformers",
        "license": licence or "unknown",
        **({"base_model": name} if re.fullmatch(HUB_NAME, name) and not Path(name).exists() else {}),
        **({"pipeline_tag": PIPELINES[auto_class]} if auto_class in PIPELINES else {}),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in head.items())]
    lines += ["tags:", "- fedlora", "- federated-learning", "- lora", "---"]
    lines += [f"# {'Adapter for' if 'peft' in snippet else 'Fine-tuned'} {clean_text(name)}", ""]
    lines += ["```python", snippet.rstrip("\n"), "```", ""]
    if classes:
        lines += [f"Classes: {', '.join(f'{number} = {clean_text(one)}' for number, one in classes.items())}", ""]
    if origin.facts:
        lines += ["## How it was trained", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in origin.facts.items()]
        lines += [""]
    if origin.figures:
        lines += ["## On the test examples", "", "| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in origin.figures.items()]
        lines += [""]
    if origin.privacy:
        lines += ["## Privacy", "", clean_text(origin.privacy, 4000), ""]
    lines += ["## Licence", "", _of_licence(licence), ""]
    return "\n".join(lines)


def base_licence(checkpoint: Checkpoint) -> str | None:
    """The licence that the base's own model card names; None where it has none here."""
    readme = Path(checkpoint.source) / "README.md"
    try:
        head = readme.read_text(encoding="utf-8").split("---", 2)[1]
    except (OSError, UnicodeDecodeError, IndexError):
        return None
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", head, re.MULTILINE)
    return found[1] if found else None


def _of_licence(licence: str | None) -> str:
    if licence is None:
        return "The base model's files name no licence: look it up, and write it above before you publish this model."
    return f"That of the base model, {licence}, holds for what was made of it; add what the training data ask for."


def _cell(value: str) -> str:
    return clean_text(value).replace("|", "\\|")
