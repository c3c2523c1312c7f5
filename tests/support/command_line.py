"""The command line, in the tests' process."""

from __future__ import annotations

from collections.abc import Mapping

from typer.testing import CliRunner, Result

from fedlora.cli import app

PLAIN = {"COLUMNS": "100", "NO_COLOR": "1"}
"""Environment of a terminal of that width, without colours."""


def invoke(*words: object, said: str | None = None, env: Mapping[str, str | None] | None = None) -> Result:
    """What a command ends with.

    Args:
        words: Of the command, after "fedlora".
        said: Standard input.
        env: More of the environment.
    """
    return CliRunner().invoke(app, [str(word) for word in words], input=said, env=env)


def succeeds(*words: object, said: str | None = None, env: Mapping[str, str | None] | None = None) -> Result:
    """As `invoke`, of one that must succeed."""
    done = invoke(*words, said=said, env=env)
    assert done.exit_code == 0, done.output
    return done
