"""Environments beside the tests' own, for packages that ask for other versions than the lock has."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest


def borrowing(folder: Path, *requirements: str, without: Sequence[str] = ()) -> Path:
    """The Python of an environment with some packages of its own, which borrows all others from this one.

    Skips the test where they cannot be had.

    Args:
        folder: of the environment.
        requirements: as for pip.
        without: packages that come with them and do not work here.
    """
    venv.create(folder, with_pip=False)
    program = folder / "bin" / "python"
    lib = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (lib / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(program)]
    done = subprocess.run([*pip, "install", *requirements], capture_output=True, text=True, timeout=1500)
    if done.returncode:
        pytest.skip(f"{', '.join(requirements)} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    if without:
        subprocess.run([*pip, "uninstall", "--yes", *without], check=True, capture_output=True, timeout=300)
    return program
