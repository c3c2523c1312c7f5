"""The path of a stranger who has nothing but the wheel and the page "Start here": its blocks, as one shell script.

The script is made from docs/index.md, block after block: files are written, commands are run. The environment that it
makes borrows the installed dependencies, so that no network is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.pages import ROOT, blocks
from test_report_in_a_browser import browser, look
from test_wheel import wheel

PAGE = ROOT / "docs" / "index.md"
WHERE = "python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'"

__all__ = ["browser", "wheel"]  # fixtures
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]  # under a minute where nothing else runs


def script(site_packages: str) -> str:
    """The page as a shell script."""
    lines = ["set -eu -o pipefail"]
    for block in blocks(PAGE):
        if block.file:
            lines.append(f"cat > {block.file} <<'END OF {block.file}'\n{block.text}END OF {block.file}")
            continue
        assert block.kind == "console", f"{block}: what should a stranger do with this?"
        for command, said in block.commands:
            assert not said, f"{block}: an error, on the way to a first run?"
            lines += [f"echo '$ {command}'", command]
            if command.startswith("pip install ./fedlora"):
                # Behind the environment's own folder, so that the wheel's fedlora wins over an installed one.
                lines.append(f"echo '{site_packages}' > $({WHERE})/borrowed.pth")
    return "\n".join([*lines, "python -c 'import fedlora; print(fedlora.__file__)'", ""])


@pytest.fixture(scope="module")
def walked(wheel: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder at the path's end, and what was said on the way."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copy(wheel, folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-c", script(sysconfig.get_path("purelib"))],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return folder / "first", done.stdout


def test_every_step_is_on_the_page() -> None:
    commands = [command for block in blocks(PAGE, "console") for command, _ in block.commands]
    steps = [
        "pip install ./fedlora",
        "fedlora init",
        "python -m pytest",
        "fedlora run",
        "fedlora run",
        "fedlora compare",
    ]
    places = [next(k for k, command in enumerate(commands) if command.startswith(steps[0]))]
    for step in steps[1:]:
        later = [k for k, command in enumerate(commands) if command.startswith(step) and k > places[-1]]
        assert later, f"{step} is not where it should be: {commands}"
        places.append(later[0])


def test_the_page_leads_from_a_wheel_to_a_comparison(walked: tuple[Path, str]) -> None:
    project, said = walked
    assert Path(said.splitlines()[-1]).is_relative_to(project.parent / ".venv")  # it was the wheel that ran
    assert re.search(r"\d+ passed, \d+ skipped", said)
    assert "report: runs/momentum/report.html" in said
    assert "strategy.name" in said  # the comparison names what differs
    for name in ("momentum", "fedavg"):
        assert len((project / "runs" / name / "metrics.jsonl").read_text().splitlines()) == 4
    adapters = [(project / "runs" / name / "adapter" / "adapter_model.safetensors") for name in ("momentum", "fedavg")]
    assert adapters[0].read_bytes() != adapters[1].read_bytes()
    assert (project / "adapter" / "adapter_config.json").is_file()
    assert (project / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_opens_in_a_browser(walked: tuple[Path, str], browser: str, tmp_path: Path) -> None:
    project, _ = walked
    seen = look(browser, tmp_path, (project / "runs" / "momentum" / "report.html").read_text(), 1100)
    assert seen["title"] == "momentum: fedlora report"
    assert re.search(r"accuracy went from \d+\.\d% to \d+\.\d%", seen["text"])
    assert seen["charts"] > 0
    assert seen["outside"] == 0
