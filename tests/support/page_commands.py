"""Could this command of a page be run? Asked of the parsers that would read it, without running it."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import typer
import yaml

from fedlora.config import load_config, parse_config
from fedlora.errors import FedloraError
from fedlora.flower.app_config import NODE_KEYS
from fedlora.sweep import grid
from support.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
VARIABLES = {"FLWR_HOME", "OMP_NUM_THREADS"}


class PageError(AssertionError):
    """A command that would not do what the page says."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise PageError(message)


def check_shell(text: str) -> None:
    """Each command of a shell script; an unknown program is an error."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.split(r";\s*(?:do\s)?|&&", line.split(" #")[0]):
            check_command(command.strip())


def check_command(command: str, *, mention: bool = False) -> None:
    """One command.

    Args:
        command: as it is printed; words in capitals stand for something, "..." and brackets for more of it.
        mention: it stands within a sentence, and may leave out what it needs.

    Raises:
        PageError: no such program, command, option, file, target, service or key.
    """
    words = shlex.split(re.sub(r"\$\([^)]*\)", "1", command.partition(" > ")[0]), comments=True)
    if mention:
        words = [word if "[" in word[1:] else word.strip("[]").removesuffix("...") for word in words]
        words = ["3" if word == "N" else word for word in words if word and word != "..."]
    while words and re.match(r"[A-Z_]+=", words[0]):
        check_variable(words.pop(0))
    if not words or words == ["done"]:
        return
    require(words[0] in PROGRAMS, f"{words[0]!r} is no program that this page could be tested for")
    PROGRAMS[words[0]](words[1:], mention)


def parse(app: click.Command, name: str, words: Sequence[str], mention: bool) -> click.Context | None:
    """The context of the innermost command; None where it only shows its help, or lacks what a mention may lack."""
    try:
        context = app.make_context(name, list(words))
        while isinstance(context.command, click.Group):
            rest = [*context._protected_args, *context.args]
            if not rest and mention:
                return None
            name, command, rest = context.command.resolve_command(context, rest)
            require(command is not None, f"there is no command {name!r}")
            assert command is not None
            context = command.make_context(name, rest, parent=context)
    except click.exceptions.Exit:
        return None
    except click.exceptions.NoArgsIsHelpError:
        require(mention, f"{' '.join(words)}: which command?")
        return None
    except click.MissingParameter as error:
        require(mention, f"{' '.join(words)}: {error.format_message()}")
        return None
    except click.UsageError as error:
        raise PageError(f"{' '.join(words)}: {error.format_message()}") from None
    return context


def name_of(command: click.Command, shown: str) -> str:
    """The name in Python of an option, or of an argument by what stands for it; "" where there is none."""
    found = [p for p in command.params if shown in p.opts or (p.metavar or "").strip("[]") == shown]
    return str(found[0].name) if found else ""


def fedlora(words: Sequence[str], mention: bool) -> None:
    from fedlora.cli import app

    if list(words) == ["--install-completion"]:  # to read it is to do it
        require(name_of(typer.main.get_command(app), words[0]), "there is no --install-completion")
        return
    context = parse(typer.main.get_command(app), "fedlora", words, mention)
    if context is None:
        return
    changes = context.params.get(name_of(context.command, "--set")) or []
    config = context.params.get(name_of(context.command, "CONFIG"))
    files = [ROOT / "configs" / f"{config}.toml", ROOT / str(config)]
    try:
        choices = grid(changes).values() if context.info_name == "sweep" else [changes]
        for choice in choices:
            file = next((file for file in files if file.is_file()), None)
            _ = parse_config("", list(choice)) if file is None else load_config(file, list(choice))
    except FedloraError as error:
        raise PageError(f"{' '.join(words)}: {error}") from None


def flwr(words: Sequence[str], mention: bool) -> None:
    from flwr.cli.app import app
    from flwr.common.config import parse_config_args

    context = parse(typer.main.get_command(app), "flwr", words, mention)
    given = parse_config_args(context.params.get(name_of(context.command, "--run-config"))) if context else {}
    for key in given:
        require(key in PROJECT["tool"]["flwr"]["app"]["config"], f"there is no key {key!r} in [tool.flwr.app.config]")
    parse_config("", shlex.split(str(given.get("set", ""))))


def supernode(words: Sequence[str], mention: bool) -> None:
    from flwr.common.config import parse_config_args
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    found, unknown = _parse_args_run_supernode().parse_known_args([word for word in words if word != "..."])
    require(not unknown, f"flower-supernode has no {unknown}")
    for key in parse_config_args([found.node_config]):
        require(key in NODE_KEYS, f"a node's config has no key {key!r}")


def make(words: Sequence[str], mention: bool) -> None:
    for word in words:
        require(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"there is no target {word!r}")


def python(words: Sequence[str], mention: bool) -> None:
    if words[0] == "-m":
        require(words[1] in ("venv", "pytest"), f"python -m {words[1]}?")
        return
    path = ROOT / words[0]
    require(path.is_file() or "/" not in words[0], f"there is no script {words[0]!r}")
    for word in words[1:]:
        if word.startswith("--"):
            require(f'"{word}"' in path.read_text(), f"{words[0]} has no option {word!r}")
        elif "/" in word:
            require((ROOT / word).exists(), f"there is no file {word!r}")


def pip(words: Sequence[str], mention: bool) -> None:
    require(words[0] in ("install", "wheel"), f"pip {words[0]}?")
    for word in words[1:]:
        if word.startswith("fedlora["):
            require(word[8:-1] in PROJECT["project"]["optional-dependencies"], f"there is no extra {word!r}")
        elif word.endswith(".whl"):
            require(f"-{PROJECT['project']['version']}-" in word, f"{word!r} is another version's wheel")
        else:
            require(word in (".", "-e", "--no-deps", "pytest"), f"pip ... {word}?")


def docker(words: Sequence[str], mention: bool) -> None:
    require(list(words[:2]) == ["compose", "up"], f"docker {' '.join(words)}?")
    for word in words[2:]:
        if word.startswith("-"):
            require(word in ("--build", "--detach"), f"docker compose up {word}?")
        else:
            require(word in COMPOSE["services"], f"docker-compose.yml has no service {word!r}")


def check_variable(word: str) -> None:
    name = word.partition("=")[0]
    known = name in VARIABLES or f"${{{name}" in (ROOT / "docker-compose.yml").read_text()
    require(
        known or any(name in path.read_text() for path in (ROOT / "fedlora").rglob("*.py")), f"nobody reads {name!r}"
    )


def export(words: Sequence[str], mention: bool) -> None:
    for word in words:
        check_variable(word)


def anything(words: Sequence[str], mention: bool) -> None:
    """A command of the shell itself."""


PROGRAMS: dict[str, Callable[[Sequence[str], bool], Any]] = {
    "fedlora": fedlora,
    "flwr": flwr,
    "flower-supernode": supernode,
    "make": make,
    "python": python,
    "pip": pip,
    "docker": docker,
    "export": export,
    "cd": anything,
    ".": anything,
    "for": anything,
    "mkdir": anything,
    "useradd": anything,
    "chown": anything,
    "chmod": anything,
}


def mentions(page: Path) -> list[str]:
    """The commands in the sentences and tables of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names = "|".join(re.escape(name) for name, check in PROGRAMS.items() if check is not anything)
    found = re.findall(rf"`((?:[A-Z_]+=\S+ )*(?:{names}) [^`]+)`", text)
    return [" ".join(command.split()) for command in found]
