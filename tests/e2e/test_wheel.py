"""The package: a wheel with everything in it, which runs the quickstart from any folder of any environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
    ]
    subprocess.run(words, check=True, timeout=300)
    (path,) = folder.glob("fedlora-*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment of its own, with the wheel; it borrows the installed dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    lib = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    words = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps"]
    subprocess.run([*words, "--no-index", str(wheel)], check=True, timeout=300)
    # Behind the environment's own folder, so that the wheel's fedlora wins over an installed one.
    (lib / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def call(fresh: Path, folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_the_code_the_templates_and_the_configs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    configs = {f"fedlora/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    files = [path for path in (ROOT / "fedlora").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    code_and_templates = {str(path.relative_to(ROOT)) for path in files}
    assert configs <= set(names)
    given = {name for name in names if not name.startswith("fedlora-")}
    assert given == code_and_templates | configs


def test_the_installed_package_is_the_wheels(fresh: Path, tmp_path: Path) -> None:
    found = call(fresh, tmp_path, str(fresh / "python"), "-c", "import fedlora; print(fedlora.__file__)")
    assert Path(found.strip()).is_relative_to(fresh.parent)


def test_it_runs_the_quickstart_from_any_folder(fresh: Path, tmp_path: Path, minilm: Path, vader: Path) -> None:
    few = ["rounds=1", "train.steps=1", "data.limit=200", "partition.clients=4"]
    changes = [word for change in few for word in ("--set", change)]
    said = call(fresh, tmp_path, str(fresh / "fedlora"), "run", "quickstart", *changes)
    assert said.splitlines()[-1] == "report: runs/quickstart/report.html"
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    assert (tmp_path / "runs" / "quickstart" / "adapter" / "adapter_model.safetensors").is_file()


def test_it_starts_a_project(fresh: Path, tmp_path: Path) -> None:
    call(fresh, tmp_path, str(fresh / "fedlora"), "init", "mine")
    assert (tmp_path / "mine" / "texts.csv").is_file()
