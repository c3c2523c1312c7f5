"""The site has the simulations too, which lie beside docs/: their pages, and links to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent


def on_files(files: Files, config: Any) -> Files:
    """Add each simulation's README and picture."""
    for path in sorted((ROOT / "simulations").glob("*/*")):
        if path.name in ("README.md", "plot.png"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links lead there, as they do in a checkout."""
    return markdown.replace("](../simulations/", "](simulations/")
