"""Matplotlib figures as PNG files, and as SVG that takes its colours from the page around it.

A `Drawing` makes its figure for a width in CSS pixels, so that the same one serves a desk, a phone and a PNG. It takes
every colour from `LIGHT`; in an SVG each becomes the style sheet's variable of that name, which has another value on a
dark screen. The colours of lines are Okabe and Ito's, which colour-blind readers can tell apart, darkened or lightened
to a contrast of 3 with the page; text has one of 4.5.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fedlora.sanitize import clean_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawing = Callable[[float], "Figure"]

WIDE, NARROW = 760.0, 350.0
"""Widths in CSS pixels: of a chart on a desk and of a PNG, and of a chart on a phone."""
PNG_SCALE = 1.5
"""Pixels of a PNG for one CSS pixel."""

LETTER, LINE_HEIGHT = 6.9, 15.0
"""Mean width of a letter and distance of two lines, in CSS pixels."""


def _palette(ground: str, lines: str) -> dict[str, str]:
    words = ground.split()
    return dict(zip(words[::2], words[1::2], strict=True)) | {f"c{k}": colour for k, colour in enumerate(lines.split())}


LIGHT = _palette(
    "page #ffffff panel #f4f6f8 ink #1b1f24 soft #57606a grid #d0d7de link #0050a0 warn #8a4600 warnbg #fff5e5 "
    "idle #e9ecef",
    "#0072b2 #d55e00 #008a66 #b0528a #9a6a00 #3f8fc4 #7f7f7f",
)
DARK = _palette(
    "page #14171b panel #1e2329 ink #eceff2 soft #a9b2bc grid #3a424b link #7cc0ff warn #ffc46b warnbg #33280f "
    "idle #262c33",
    "#4fa8e0 #ff8a3d #2fc79a #e394c2 #e6b43c #9fcdf5 #a8a8a8",
)
COLOURS = 7
"""Colours of lines and bars in a palette, "c0" to "c6"."""

_STYLE = Path(__file__).with_name("report.mplstyle")


@dataclass(frozen=True)
class Chart:
    """A drawing in a page.

    Args:
        draw: makes the figure.
        label: what a screen reader says instead.
        caption: stands below.
    """

    draw: Drawing
    label: str
    caption: str

    def svg(self, width: float) -> str:
        """An SVG element for an HTML page. The same figures give the same text."""
        label = clean_text(self.label, 2000)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        root = ElementTree.fromstring(
            _render(self.draw, width, {"svg.hashsalt": f"{width} {label}"}, format="svg", metadata=metadata)
        )
        for node in list(root):
            if node.tag.endswith(("metadata", "defs")):  # matplotlib's style sheet and clip paths; markers are deeper
                root.remove(node)
        defined = {node for defs in root.iter("{http://www.w3.org/2000/svg}defs") for node in defs}
        for node in root.iter():
            node.tag = _local(node.tag)
            node.attrib = {
                _local(key): _slim(value)
                for key, value in node.attrib.items()
                if not key.endswith("clip-path") and (not key.endswith("id") or node in defined)
            }
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
        return ElementTree.tostring(root, encoding="unicode")


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of a size in CSS pixels, without pyplot: no global state, no window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    return figure, figure.add_subplot()


def save_png(draw: Drawing, path: str | Path) -> Path:
    """Write a drawing as a PNG. The same figures give the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # matplotlib would write its version into the file, and nothing else that changes.
    data = _render(
        draw, WIDE, {}, format="png", dpi=72 * PNG_SCALE, facecolor=LIGHT["page"], metadata={"Software": None}
    )
    path.write_bytes(data)
    return path


def fit(name: object, most: int) -> str:
    """A foreign name in at most `most` characters; the end stays, where a value is."""
    cleaned = clean_text(name)
    if len(cleaned) <= most:
        return cleaned
    keep = max(2, most - 1)
    return cleaned[: keep // 2] + "…" + cleaned[-(keep - keep // 2) :]


def _render(draw: Drawing, width: float, style: Any, **options: Any) -> bytes:
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context(style, _STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script is not the reader's mistake
        draw(width).savefig(data, **options)
    return data.getvalue()


def _local(name: str) -> str:
    return name.rpartition("}")[2]


_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def _slim(value: str) -> str:
    """Colours as variables, and coordinates to a hundredth of a pixel."""
    value = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), value)
