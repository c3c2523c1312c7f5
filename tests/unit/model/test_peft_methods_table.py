"""docs/methods.md says which method runs with which rule; it is written here, by trying each pair.

WRITE_DOCS=1 .venv/bin/python -m pytest tests/unit/model/test_peft_methods_table.py    # after a new rule or method
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_peft_methods import SMALL

from fedlora.aggregators import ClientSpec, load_aggregator, rules
from fedlora.config import AdapterConfig, ModelConfig, RunConfig, RuntimeConfig
from fedlora.errors import RuleError
from fedlora.federation.initial_state import first_state
from fedlora.federation.planner import plan_for
from fedlora.model import Base, load_base
from fedlora.model.peft_methods import METHODS, PAIR_KEYS, REFUSED

PAGE = Path(__file__).parents[3] / "docs" / "methods.md"
WRITE = "WRITE_DOCS"
INTRODUCTION = """# Methods and rules

`adapter.method` names one of PEFT's methods; `[strategy] name` the rule that combines what the clients trained. The
server draws the adapter once, from the seed, and ships it, or [begins with one](models.md#begin-with-an-adapter) that
was trained already.

Every export loads with plain `PeftModel.from_pretrained`, and is checked that way: with the base loaded by
transformers alone, its logits must be the trained model's. `adapter/README.md` holds the Python for it. Modules whose
weights the checkpoint lacks, such as the pooler of DeBERTa, are frozen and part of the export. Where
`adapter.export_rank` cuts an adapter, `relative_error` in `result.json` says how much was lost, and the check is of
what is left.

```toml
[adapter]
method = "vera"
rank = 256
options = { d_initial = 0.1 }   # other fields of PEFT's config, for a method that is no LoRA
```

- **LoRA variants** train pairs, dW = s B A, and go with every rule that lets the clients go on from the global
  pair. `pissa` and `olora` start from a part of the weight itself, which the base gives up: W0 - s B0 A0 is version
  1 of the base, an update that each client is sent once. Their exports are LoRA adapters of twice the rank, on the
  unchanged base.
- **`dora`** trains magnitudes beside the pairs, which are averaged as they are. The weight is not linear in what is
  averaged, so that no rule is exact for it and no aggregation error is reported.
- **All others** train tensors that are no pairs. A rule that treats every tensor alike averages them as they are,
  which is an average of parameters and not of weights. What they keep frozen (random projections, indices) is drawn
  on each machine and compared by its hash when a client says hello. Mixed ranks and private training need pairs.
"""


def load(path: Path, method: str) -> Base:
    keys = PAIR_KEYS if METHODS[method].pairs else METHODS[method].keys
    table = {"rank": 4} if "rank" in keys else {}
    config = RunConfig(
        model=ModelConfig(name=str(path)),
        adapter=AdapterConfig(method=method, targets=("query",), options=SMALL.get(method, {}), **table),
        runtime=RuntimeConfig(device="cpu"),
    )
    return load_base(config, "AutoModelForSequenceClassification", ("classifier",), {"num_labels": 2}, "SEQ_CLS")


def letter(column: int) -> str:
    """The heading of a column of rules."""
    return chr(ord("A") + column)


def page(path: Path) -> str:
    """The whole page."""
    notes: list[str] = []
    rows: dict[str, dict[str, str]] = {}  # rules whose words for no differ are columns of their own
    for name, method in METHODS.items():
        base = load(path, name)
        rows[name] = {}
        for rule_name, rule_class in rules.items():
            rule = load_aggregator(rule_name, {})
            try:
                plan_for(rule, first_state(rule, base, 0), ClientSpec(0, base.layout()))
            except RuleError as error:
                reason = str(error).replace(rule_class.__name__, "The rule").replace(f"method {name!r}", "the method")
                reason = reason.replace(f" ({method.trains})", "")
                notes += [reason] if reason not in notes else []
                rows[name][rule_name] = f"no ({notes.index(reason) + 1})"
            else:
                rows[name][rule_name] = "runs"
    alike: dict[tuple[str, ...], list[str]] = {}
    for rule_name in rules:
        alike.setdefault(tuple(row[rule_name] for row in rows.values()), []).append(rule_name)
    header = ["method", "trains", *(letter(k) for k in range(len(alike))), "keys of `[adapter]`", "paper"]
    lines = [header, ["---"] * len(header)]
    for name, method in METHODS.items():
        keys = PAIR_KEYS[:4] if method.pairs else (*method.keys, "options")
        cells = [rows[name][members[0]] for members in alike.values()]
        lines.append([f"`{name}`", method.trains, *cells, ", ".join(keys), method.paper])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    groups = "\n".join(
        f"| {letter(k)} | {', '.join(f'`{name}`' for name in members)} |" for k, members in enumerate(alike.values())
    )
    table = f"| column | rules |\n| --- | --- |\n{groups}\n\n{table}"
    reasons = "\n".join(f"{number}. {note}." for number, note in enumerate(notes, 1))
    refused = "\n".join(f"| `{name}` | {reason} |" for name, reason in REFUSED.items())
    return (
        f"{INTRODUCTION}\n{table}\n\nWhat a run says where it says no:\n\n{reasons}\n\n"
        f"## Not with any rule\n\n| method | because |\n| --- | --- |\n{refused}\n\n"
        "What else PEFT has was not tried.\n"
    )


@pytest.mark.slow
def test_the_page_on_methods_is_what_happens(tiny_bert: Path) -> None:
    found = page(tiny_bert)
    if os.environ.get(WRITE):
        PAGE.write_text(found, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == found, f"the page is stale: run this test with {WRITE}=1"
