"""The fenced blocks of a page of documentation, and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: that it stands on.
        line: of its fence.
        kind: the word behind the fence; "" where there is none.
        text: without the fences.
    """

    page: Path
    line: int
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that it is, where its first line is "# NAME.toml" or "# NAME.py"."""
        found = re.match(r"# ([\w-]+\.(?:toml|py))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Of a console block: each command behind "$ ", and the lines below it."""
        found = re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", self.text, flags=re.MULTILINE)
        return [(command.replace("\\\n", " "), said) for command, said in found]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *kinds: str) -> list[Block]:
    """The fenced blocks of a page in their order, of some kinds or of all.

    Raises:
        ValueError: a fence is never closed.
    """
    found: list[Block] = []
    inside: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        fence = re.match(r"\s*```(.*)$", line)
        if fence and inside is None:
            inside = (number, fence[1].strip(), [])
        elif fence and inside is not None:
            found.append(Block(page, inside[0], inside[1], "".join(inside[2])))
            inside = None
        elif inside is not None:
            inside[2].append(line)
    if inside is not None:
        raise ValueError(f"{page}:{inside[0]}: this block is never closed")
    return [block for block in found if not kinds or block.kind in kinds]
