"""The pages of docs/: their configs are valid, their Python runs, their links lead somewhere, their commands work.

In a block marked `console` a line "$ command" is run, the lines of a page one after the other in one folder; a line
"error: ..." below it is what it must say on its way out ("..." stands for anything).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.aggregators import load_aggregator
from fedlora.config import parse_config
from fedlora.partition import load_partitioner
from fedlora.tasks import load_task

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OWN = [
    page for page in PAGES if page.name not in ("deployment.md", "methods.md", "worker.md")
]  # those have tests of their own


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        if language in languages:
            yield language, block


def run_python(block: str, page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    exec(compile(block, page.name, "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_configs_on_the_page_are_valid(page: Path) -> None:
    for _, block in blocks(page, "toml"):
        config = parse_config(block)
        load_aggregator(config.strategy.name, config.strategy.fields)
        load_partitioner(config.partition.name, config.partition.fields)
        load_task(config.task)


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_python_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "docs", types.ModuleType("docs"))
    for _, block in blocks(page, "python"):
        run_python(block, page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    for target in targets:
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_page_of_ours_is_in_the_navigation() -> None:
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert {page.name for page in OWN} <= listed
    assert all((ROOT / "docs" / name).is_file() for name in listed)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in OWN if list(blocks(page, "console"))], ids=lambda page: page.stem)
def test_commands_on_the_page_work(page: Path, tmp_path: Path, minilm: Path, vader: Path) -> None:
    here = tmp_path
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for language, block in blocks(page, "console", "python"):
        if language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=here, env=environment, check=True, timeout=300)
            continue
        for command, said in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", block, flags=re.MULTILINE):
            words = shlex.split(command)
            if words[0] == "cd":
                here = here / words[1]
                continue
            assert words[0] == "fedlora", command
            done = subprocess.run(
                [sys.executable, "-m", *words], cwd=here, env=environment, capture_output=True, text=True, timeout=500
            )
            assert (done.returncode == 0) == (not said), f"{command}\n{done.stdout}{done.stderr}"
            pattern = ".*".join(re.escape(part) for part in said.strip().split("..."))
            assert re.search(pattern, done.stderr if said else done.stdout), f"{command}\n{done.stderr}"
