"""The pages of docs/ and README.md: each block is run, or checked as far as it can be where it cannot be run here.

What a block is, is the word behind its fence:

- `console`: "$ command" is run, the commands of a page one after the other in one folder (slow). Lines "error: ..."
  below it are what it must say on its way out ("..." stands for anything). docs/index.md has a test of its own,
  tests/e2e/test_strangers_path.py.
- `sh`: other machines, minutes or root; the real parsers read each command.
- `toml`: a config, read as a run would.
- `python`: run, the blocks of a page one after the other.
- `ini`, `yaml`: a systemd unit, a part of a compose file; their commands are read by the real parsers.
- `text`: a picture or an output; no command is in it.

A block whose first line is "# NAME.toml" or "# NAME.py" is that file for what follows.
"""

from __future__ import annotations

import configparser
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import succeeds
from support.page_commands import PROGRAMS, PageError, check_command, check_shell, mentions
from support.pages import ROOT, Block, blocks

from fedlora.aggregators import load_aggregator
from fedlora.config import parse_config
from fedlora.partition import load_partitioner
from fedlora.site.policy import Policy
from fedlora.tasks import load_task
from fedlora.testing import AggregatorContract, broken_laws

DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
PAGES = [*DOCS, README, *sorted((ROOT / "simulations").glob("*/README.md"))]
WALKED = ROOT / "docs" / "index.md"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --------------------------------------------------------------------------------------------- what can be checked


def check_toml(block: Block) -> None:
    if block.text.startswith("# policy.toml"):
        Policy.model_validate(tomllib.loads(block.text))
        return
    config = parse_config(block.text)
    if ":" not in config.strategy.name:  # a rule of the page's own
        load_aggregator(config.strategy.name, config.strategy.fields)
    if ":" not in config.partition.name:
        load_partitioner(config.partition.name, config.partition.fields)
    if ":" not in config.task.name:
        load_task(config.task)


def check_console(block: Block) -> None:
    assert block.commands, f"{block}: no '$ command'"
    for command, said in block.commands:
        if not said:  # one that is to fail is run, and its message compared
            check_command(command)


def check_sh(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    check_shell(block.text)


def check_ini(block: Block) -> None:
    """A systemd unit."""
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block.text)
    for key in unit["Service"]:
        assert re.fullmatch(r"[A-Z][A-Za-z]+", key), key
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    check_command(shlex.join([Path(program).name, *words]))
    if tool := shutil.which("systemd-analyze"):
        path = Path(os.environ["FLWR_HOME"]) / "page.service"
        path.write_text(block.text.replace(program, sys.executable))
        done = subprocess.run([tool, "verify", str(path)], capture_output=True, text=True)
        assert "Unknown" not in done.stderr, done.stderr


def check_yaml(block: Block) -> None:
    """Services of a compose file."""
    services = yaml.safe_load(block.text)
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    known = {key for service in compose["services"].values() for key in service}
    for service in services.values():
        assert set(service) <= known
        check_command(shlex.join(service["command"]))
        check_command(shlex.join(service["healthcheck"]["test"][1:]))


def check_python(block: Block) -> None:
    compile(block.text, str(block), "exec")


def check_text(block: Block) -> None:
    for line in block.text.splitlines():
        first = line.removeprefix("$ ").split(" ")[0]
        assert first not in PROGRAMS, f"{block}: {line!r} is a command: mark the block as console or sh"


CHECKS: dict[str, Callable[[Block], None]] = {
    "toml": check_toml,
    "console": check_console,
    "sh": check_sh,
    "ini": check_ini,
    "yaml": check_yaml,
    "python": check_python,
    "text": check_text,
}


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page)], ids=str)
def test_a_block_is_of_a_known_kind_and_could_be_run(block: Block) -> None:
    assert block.kind in CHECKS, f"{block}: a block of {block.kind!r} is not tested; choose from {', '.join(CHECKS)}"
    CHECKS[block.kind](block)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_command_within_a_sentence_could_be_run(page: Path) -> None:
    for command in mentions(page):
        check_command(command, mention=True)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("fedlora run quickstart --sett rounds=1", "--sett"),
        ("fedlora rune quickstart", "No such command 'rune'"),
        ("fedlora worker --supervise", "--socket"),
        ("fedlora run quickstart --set train.lrr=1", "unknown key 'train.lrr'"),
        ("fedlora sweep CONFIG --set train.lr=0.1,x --seeds 2", "train.lr"),
        ("flwr run app federation --streem", "--streem"),
        ("flwr run app federation --run-config seed=3", "no key 'seed'"),
        ("flower-supernode --node-config 'partition=3'", "no key 'partition'"),
        ("flower-supernode --insecurely --node-config 'partition-id=3'", "--insecurely"),
        ("make tests", "no target 'tests'"),
        ("python benchmarks/nothing.py", "no script"),
        ("python benchmarks/base_kernels.py --modell x", "no option '--modell'"),
        ("pip install 'fedlora[wandbb]'", "no extra"),
        ("docker compose up superlnk", "no service 'superlnk'"),
        ("export FEDLORA_UUID=3", "nobody reads 'FEDLORA_UUID'"),
        ("curl https://example.org", "no program"),
    ],
)
def test_a_command_that_is_not_there_is_found(command: str, what: str) -> None:
    with pytest.raises(PageError, match=re.escape(what)):
        check_command(command)


# ------------------------------------------------------------------------------------------------- what can be run


@pytest.fixture
def a_run(tmp_path: Path, tiny_bert: Path, tiny_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What some pages take for granted: a finished quickstart, and the folder of its base model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "all-MiniLM-L6-v2").symlink_to(tiny_bert)
    few = [f"model.name={tiny_bert}", f"data.source={tiny_csv}", "data.domain=domain", "partition.clients=2"]
    few += ["rounds=1", "train.steps=1"]
    succeeds("run", "quickstart", *(word for change in few for word in ("--set", change)))


@pytest.mark.slow
@pytest.mark.usefixtures("a_run")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setitem(sys.modules, "the_page", module := types.ModuleType("the_page"))
    space: dict[str, Any] = vars(module)
    files = [block.file for block in blocks(page, "python") if block.file]
    try:
        for block in blocks(page, "python"):
            if "fedlora.run(" in block.text and "model=" not in block.text:
                continue  # minutes: `test_commands_on_the_page_work` runs it
            if block.file is None:
                exec(compile(block.text, str(block), "exec", dont_inherit=True), space)
                continue
            (tmp_path / block.file).write_text(block.text)
            space |= vars(importlib.import_module(Path(block.file).stem))
    finally:
        for file in files:
            sys.modules.pop(Path(file).stem, None)
    for value in list(space.values()):
        if isinstance(value, type) and issubclass(value, AggregatorContract) and value is not AggregatorContract:
            assert set(broken_laws(value.aggregator)) == set(value.exempt)
            for law in {"test_every_exemption_is_paid_with_a_law", *value.exempt.values()}:
                getattr(value(), law)()


@pytest.mark.nightly
@pytest.mark.timeout(3000)  # README trains the quickstart twice: minutes, more where other tests run
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console") and p != WALKED], ids=name)
def test_commands_on_the_page_work(page: Path, tmp_path: Path, minilm: Path, vader: Path) -> None:
    here = tmp_path
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for block in blocks(page):
        if block.file:
            (here / block.file).write_text(block.text)
        elif block.kind == "python":
            subprocess.run([sys.executable, "-c", block.text], cwd=here, env=environment, check=True, timeout=1400)
        for command, said in block.commands if block.kind == "console" else []:
            words = shlex.split(command)
            if words[0] == "cd":
                here = here / words[1]
                continue
            call = [sys.executable, *{"fedlora": ["-m", "fedlora"], "python": []}[words[0]], *words[1:]]
            done = subprocess.run(call, cwd=here, env=environment, capture_output=True, text=True, timeout=1400)
            assert (done.returncode == 0) == (not said.startswith("error: ")), f"{command}\n{done.stdout}{done.stderr}"
            pattern = ".*".join(re.escape(part) for part in said.strip().split("..."))
            assert re.search(pattern, done.stderr if said else done.stdout), f"{command}\n{done.stderr}"


# ------------------------------------------------------------------------------------------------------- the site


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    for target in targets:
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for path in re.findall(r"`((?:fedlora|benchmarks|tests|simulations)/[\w/]+\.\w+)`", page.read_text()):
        assert (ROOT / path).is_file(), path


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert {page.name for page in DOCS} == listed


@pytest.mark.nightly
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "python-api" / "index.html").read_text()
    assert "fedlora.testing.AggregatorContract" in api
