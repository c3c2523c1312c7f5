"""The report as a browser renders it: on a desk and on a phone, light and dark, and on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import HOSTILE, make_run

from fedlora.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROBE = """
function probe(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const shown = [...page.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0);
  const box = svg => svg.getBoundingClientRect();
  const letters = shown.flatMap(svg => [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect().height));
  return {
    title: page.title, text: page.body.innerText, background: view.getComputedStyle(page.body).backgroundColor,
    ink: view.getComputedStyle(page.body).color, wide: page.documentElement.scrollWidth, view: view.innerWidth,
    charts: shown.length, all: page.querySelectorAll('svg').length,
    outside: shown.filter(svg => box(svg).right > view.innerWidth || box(svg).left < 0).length,
    letters: Math.min(...letters), images: page.images.length, scripts: page.scripts.length,
    curves: [...page.querySelectorAll('#learning ~ figure path')].filter(path => {
      const style = view.getComputedStyle(path);
      return style.fill === 'none' && parseFloat(style.strokeWidth) > 1.5 && path.getBoundingClientRect().width > 0;
    }).map(path => path.getTotalLength()),
    fills: [...page.querySelectorAll('#participation ~ figure path:not(defs path)')]
      .map(path => view.getComputedStyle(path).fill),
  };
}
"""

pytestmark = [pytest.mark.nightly]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: install one of {', '.join(BROWSERS)}")
    return found


def call(browser: str, folder: Path, *flags: str) -> str:
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def look(browser: str, folder: Path, page: str, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What a frame of that width shows of the page."""
    outer = (
        f"<!DOCTYPE html><iframe id=f style='width:{width}px;height:900px;border:0' "
        f'srcdoc="{html.escape(page)}"></iframe>'
        f"<pre id=out></pre><script>{PROBE}\ndocument.getElementById('f').onload = () => {{"
        "document.getElementById('out').textContent = JSON.stringify(probe(document.getElementById('f')));}</script>"
    )
    path = folder / "outer.html"
    path.write_text(outer)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dumped = call(browser, folder, scheme, "--virtual-time-budget=5000", "--dump-dom", path.as_uri())
    (answer,) = re.findall(r'<pre id="out">(.*?)</pre>', dumped, flags=re.DOTALL)
    return dict(json.loads(html.unescape(answer)))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_fits_its_screen_and_can_be_read(browser: str, tmp_path: Path, width: int, dark: bool) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    seen = look(browser, tmp_path, page, width, dark=dark)
    assert seen["view"] == width
    assert seen["wide"] <= width  # nothing to scroll sideways
    assert seen["charts"] * 2 == seen["all"]  # of each chart the one for this width
    assert seen["outside"] == 0
    assert seen["letters"] >= 10
    assert "accuracy went from 50.0% to 90.0%" in seen["text"]
    assert "answered: 12" in seen["text"]
    light = [int(part) > 127 for part in re.findall(r"\d+", seen["background"])[:3]]
    assert light == [not dark] * 3
    assert [int(part) > 127 for part in re.findall(r"\d+", seen["ink"])[:3]] == [dark] * 3
    assert len(seen["curves"]) == 2  # of all texts and of the one domain
    assert min(seen["curves"]) > 100  # they are drawn, not only there
    assert len(set(seen["fills"]) - {"none", seen["background"]}) == 4  # a colour for each outcome of a client


def test_texts_of_the_data_are_shown_and_not_run(browser: str, tmp_path: Path) -> None:
    seen = look(browser, tmp_path, write_report(make_run(tmp_path, HOSTILE)).read_text(), 800)
    assert seen["title"] == "seen: fedlora report"
    assert (seen["images"], seen["scripts"]) == (0, 0)
    assert "<script>document.title='taken'</script>" in seen["text"]


def test_on_paper_everything_is_unfolded(browser: str, tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    call(browser, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'folded.pdf'}", path.as_uri())
    path.write_text(path.read_text().replace("<details>", "<details open>"))
    call(browser, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'open.pdf'}", path.as_uri())
    pages = [
        len(re.findall(rb"/Type\s*/Page\b", (tmp_path / name).read_bytes())) for name in ("folded.pdf", "open.pdf")
    ]
    assert pages[0] == pages[1] >= 3
