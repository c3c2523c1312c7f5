"""`fedlora evaluate --lm-eval`: the harness sees the base, the adapter and a third model as plain PEFT has them.

lm-evaluation-harness asks for an older python-dateutil than all else does, and is therefore in no lock: it is installed
into an environment of its own, which borrows the other packages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.borrowing import borrowing
from support.command_line import invoke
from support.federations import simulate
from support.tiny_federations import WORDS, MakeConfig

pytestmark = pytest.mark.timeout(900)  # a minute or two where nothing else runs
ROOT = Path(__file__).parents[2]
HARNESS = "lm_eval==0.4.13"
PROMPTS = [f"you : {word} <end> me :" for word in WORDS]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the harness."""
    return borrowing(tmp_path_factory.mktemp("harness"), HARNESS)


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A task of one's own, of local data: which word answers a word?"""
    rows = tmp_path / "echo.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": text, "target": k}) for k, text in enumerate(PROMPTS)))
    task = tmp_path / "tasks" / "echo.yaml"
    task.parent.mkdir()
    task.write_text(f"""
task: echo_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: [{", ".join(WORDS)}]
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return task


def evaluate(python: Path, *words: object) -> subprocess.CompletedProcess[str]:
    call = [str(python), "-m", "fedlora", "evaluate", *map(str, words), "--format", "csv"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=800)


def accuracy(llama: Path, folder: Path | None) -> float:
    """By transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    tuned: Any = model if folder is None else PeftModel.from_pretrained(model, str(folder))
    choices, right = tokenizer.convert_tokens_to_ids(list(WORDS)), 0
    for k, text in enumerate(PROMPTS):
        with torch.no_grad():
            logits = tuned.eval()(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        right += int(logits[choices].argmax()) == k
    return right / len(PROMPTS)


@pytest.mark.nightly
def test_base_federated_and_local_only_stand_side_by_side(
    tiny_config: MakeConfig, tasks: dict[str, list[str]], tiny_llama: Path, echo: Path, python: Path
) -> None:
    words = (*tasks["causal-lm"], "train.lr=0.05", "train.steps=8")
    run = simulate(tiny_config(*words, "rounds=3")).rundir.path
    alone = simulate(tiny_config(*words, "rounds=1", "server.clients_per_round=1", name="alone")).rundir.path
    done = evaluate(python, run, "--lm-eval", echo, "--local-only", alone)
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()[-2:]
    found = dict(zip(header.split(","), row.split(","), strict=True))
    assert (found["task"], found["figure"]) == ("echo_words", "acc")
    for whose, folder in (("base", None), ("federated", run / "adapter"), ("local-only", alone / "adapter")):
        assert float(found[whose]) == accuracy(tiny_llama, folder), whose
    assert float(found["federated"]) > float(found["base"])
    few = evaluate(python, run, "--lm-eval", echo, "--examples", 1)
    assert few.returncode == 0, few.stderr
    assert {float(value) for value in few.stdout.splitlines()[-1].split(",")[2:]} <= {0.0, 1.0}


@pytest.mark.nightly
def test_an_unknown_task_is_named(tiny_config: MakeConfig, tasks: dict[str, list[str]], python: Path) -> None:
    run = simulate(tiny_config(*tasks["causal-lm"], "rounds=1")).rundir.path
    for name, said in (("hella_swag", "did you mean 'hellaswag'?"), ("nothing.yaml", "there is no task file")):
        refused = evaluate(python, run, "--lm-eval", name)
        assert refused.returncode == 1
        assert said in refused.stderr.splitlines()[-1]


@pytest.mark.slow
def test_what_the_harness_cannot_do_is_one_line(
    tiny_config: MakeConfig, tasks: dict[str, list[str]], echo: Path
) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-evaluation-harness is installed")
    classes = simulate(tiny_config("rounds=1", name="classes")).rundir.path
    words = simulate(tiny_config(*tasks["causal-lm"], "rounds=1", name="words")).rundir.path
    for given, said in (
        ((classes, "--lm-eval", echo), "causal language models"),
        ((words, "--lm-eval", echo), "pip install 'fedlora[lm-eval]'"),
        ((words, "--local-only", classes), "--local-only applies to --lm-eval"),
        ((words, "--lm-eval", echo, "--clients"), "leave out --data, --clients and --federation"),
    ):
        refused = invoke("evaluate", *given)
        assert refused.exit_code == 1
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
