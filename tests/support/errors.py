"""Expecting an error by its code, so that its wording can improve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from fedlora.errors import FedloraError

E = TypeVar("E", bound=FedloraError)


@contextmanager
def raises(kind: type[E], code: str, *named: object) -> Iterator[pytest.ExceptionInfo[E]]:
    """Inside, an error of this class and code is raised, in one line.

    Args:
        kind: The class.
        code: Its code.
        named: What the line must name: a key, a value, a row, a file.
    """
    with pytest.raises(kind) as info:
        yield info
    assert info.value.code == code, f"{info.value.code!r}: {info.value}"
    text = str(info.value)
    assert "\n" not in text
    for one in named:
        assert str(one) in text, f"{one!r} is not named in: {text}"
