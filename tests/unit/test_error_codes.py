"""Every error that fedlora raises carries a code literal in kebab-case, so that programs and tests need no wording."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fedlora
from fedlora import errors

SOURCE = Path(fedlora.__file__).parent
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KINDS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.FedloraError)
}


def constructions(source: str) -> list[ast.Call]:
    """The calls of error classes in a module's source."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func).rpartition(".")[2] in KINDS]


def constants(source: str) -> dict[str, ast.expr]:
    """What a module's own names in capitals stand for."""
    found = [node for node in ast.parse(source).body if isinstance(node, ast.Assign) and len(node.targets) == 1]
    return {name: node.value for node in found if (name := ast.unparse(node.targets[0])).isupper()}


def code_of(call: ast.Call, named: dict[str, ast.expr]) -> str | None:
    """The code that an error is constructed with; None without one, or if it is not a literal in kebab-case.

    A constant of the module is as good as its literal. An error that tells another one's words keeps its code:
    `code=error.code`.
    """
    given = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    given = [named.get(ast.unparse(value), value) for value in given]
    if given and ast.unparse(given[0]) == "error.code":
        return "error.code"
    if given and isinstance(given[0], ast.Constant) and CODE.fullmatch(str(given[0].value)):
        return str(given[0].value)
    return None


PARTS = sorted({path.stem for path in SOURCE.iterdir() if path.is_dir() or path.suffix == ".py"})


@pytest.mark.parametrize("part", PARTS)
def test_every_error_has_a_code(part: str) -> None:
    path = SOURCE / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert [
        f"{file.relative_to(SOURCE)}:{call.lineno}"
        for file in files
        for source in [file.read_text("utf-8")]
        for call in constructions(source)
        if code_of(call, constants(source)) is None
    ] == []


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('raise ConfigError("x", code="unknown-key")', "unknown-key"),
        ('raise errors.DataError("x", code="no-such-row-2")', "no-such-row-2"),
        ('raise ConfigError("x")', None),
        ('raise ConfigError("x", code="")', None),
        ('raise ConfigError("x", code="Unknown_Key")', None),
        ('raise ConfigError("x", code=code)', None),
        ('LOST = "copy-lost"\nraise ConfigError("x", code=LOST)', "copy-lost"),
        ('LOST = "Copy_Lost"\nraise ConfigError("x", code=LOST)', None),
        ('raise ConfigError("x", code=LOST)', None),
        ('raise DataError(f"domain {name!r}: {error}", code=error.code)', "error.code"),
    ],
)
def test_a_code_is_a_literal_in_kebab_case(source: str, code: str | None) -> None:
    [call] = constructions(source)
    assert code_of(call, constants(source)) == code
