"""A run directory with everything that a report can show, without a run: for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora.config import parse_config
from fedlora.runs.rundir import RunDir

HOSTILE = """<script>document.title='taken'</script><img src=x onerror="alert(1)">"&'`</style></title>\u202e\x00"""


def records(rounds: int = 4, clients: int = 6, name: str = "films", **more: Any) -> list[dict[str, Any]]:
    """Metrics in which each round one client is late, one refused, one offline, and the others answer."""
    lines: list[dict[str, Any]] = [{"round": 0, "accuracy": 0.5, "loss": 0.7, "domains": {name: {"accuracy": 0.5}}}]
    for number in range(1, rounds + 1):
        late, refused, offline = ((number + k) % clients for k in range(3))
        answered = [k for k in range(clients) if k not in (late, refused, offline)]
        lines.append(
            {
                "round": number,
                "accuracy": 0.5 + 0.4 * number / rounds,
                "loss": 0.7 - 0.1 * number / rounds,
                "domains": {name: {"accuracy": 0.5 + 0.3 * number / rounds}},
                "train_loss": 0.6,
                "asked": [k for k in range(clients) if k != offline],
                "answered": answered,
                "refused": {str(refused): "its norm is 9, above server.max_norm"},
                "missing": [],
                "offline": [offline],
                "dropped": [],
                "late": [late],
                "lost": False,
                "clients": {str(k): {"num_examples": 10.0, "loss": 0.5 + 0.01 * k, "steps": 3.0} for k in answered},
                "rule": {},
                "aggregation_error": 0.1,
                "bytes_up": 1000 * len(answered),
                "bytes_down": 9000,
                "simulated_seconds": 60.0,
                "seconds": 2.0,
                "seconds_train": 1.5,
                "seconds_evaluate": 0.5,
                **more,
            }
        )
    return lines


def partition(word: str, clients: int) -> dict[str, Any]:
    """What partition.json holds of so many clients with two labels and one domain, `word`."""
    sizes = [10 + k for k in range(clients)]
    return {
        "sizes": sizes,
        "test_size": 2000,
        "dropped": 0,
        "note": word,
        "label_names": [word, "other"],
        "label_counts": [[size - 3, 3] for size in sizes],
        "label_js_divergence": 0.25,
        "domains": [word],
        "domain_counts": [[size] for size in sizes],
        "domain_js_divergence": 0.0,
    }


def make_run(root: Path, word: str = "films", toml: str = "", rounds: int = 4, clients: int = 6) -> RunDir:
    """A finished run; `word` stands wherever a name, a reason or a text of the data may stand."""
    config = parse_config(f'name = "seen"\nrounds = {rounds}\n{toml}')
    run = RunDir.create(config, root)
    lines = [
        {**record, "refused": {k: f"{why} {word}" for k, why in record.get("refused", {}).items()}}
        for record in records(rounds, clients, word)
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config.privacy is None:
        run.write_json("partition.json", partition(word, clients))
    run.write_json("samples.json", [{"prompt": word, "reference": word, "before": "no", "after": f"yes {word}"}])
    run.note_environment(commit="0" * 40, packages={"torch": word})
    run.write_json("result.json", {"rounds": rounds, "relative_error": 0.0})
    return run
