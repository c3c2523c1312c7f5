"""`fedlora push`: what lies on the hub is what lies in the folder, and what the hub says is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import TOKEN, Hub, hub

pytestmark = pytest.mark.slow  # processes of their own: the hub's address is read when its library is imported


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    adapter = tmp_path / "runs" / "mine" / "adapter"
    adapter.mkdir(parents=True)
    (adapter.parent / "config.toml").write_text("")
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Adapter\n")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    (adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (adapter / "additional").mkdir()
    (adapter / "additional" / "tool.jinja").write_text("{{ messages }}")
    return adapter.parent


def push(server: Hub, *words: object, token: str = TOKEN, **more: str) -> subprocess.CompletedProcess[str]:
    theirs = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token, **more}
    call = [sys.executable, "-m", "fedlora", "push", *map(str, words)]
    return subprocess.run(call, env=os.environ | theirs, capture_output=True, text=True, timeout=500)


def test_all_files_arrive_in_one_commit(server: Hub, run: Path, tmp_path: Path) -> None:
    done = push(server, run, "me/adapter", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{server.url}/me/adapter" in done.stdout
    here = {
        path.relative_to(run / "adapter").as_posix(): path.read_bytes()
        for path in (run / "adapter").rglob("*")
        if path.is_file()
    }
    assert server.repos["me/adapter"] == here
    assert server.private == {"me/adapter"}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    for folder in (run, run / "adapter"):
        again = push(server, folder, "me/other")
        assert again.returncode == 1
        assert f"fedlora export {folder} OUT --base OWNER/NAME" in again.stderr
    assert "me/other" not in server.repos, "no path of this machine goes out"


@pytest.mark.parametrize(
    ("repo", "how", "words"),
    [
        ("me/adapter", {"token": "hf_wrong"}, "hf auth login"),
        ("taken/adapter", {}, "refuses 'taken/adapter' (403)"),
        ("me/not a name", {}, "no name on the hub"),
        ("me/adapter", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses_is_one_line(repo: str, how: dict[str, str], words: str, server: Hub, run: Path) -> None:
    done = push(server, run, repo, **how)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in done.stderr


def test_folders_that_are_no_export_are_refused(server: Hub, run: Path, tmp_path: Path) -> None:
    (run / "adapter" / "README.md").unlink()
    for place, words in ((run, "no adapter yet"), (tmp_path, "neither a run nor an export")):
        done = push(server, place, "me/adapter")
        assert done.returncode == 1
        assert words in done.stderr
    assert not server.repos
