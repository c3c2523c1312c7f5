"""One file from the package index, through pip, without running a line of it.

For an sdist pip asks the project's build backend for its name and version, which would run `setup.py`; a stub backend
of ours answers instead, so that no foreign code runs and no build tools are fetched.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fedlora.assets._package import Package
from fedlora.errors import AssetError

# Answers pip's question for a source archive's metadata, in the place of setuptools.
_STUB_BACKEND = """
import os

NAME, VERSION = {name!r}, {version!r}


class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = NAME.replace("-", "_") + "-" + VERSION + ".dist-info"
        os.makedirs(os.path.join(metadata_directory, folder))
        with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: " + NAME + "\\nVersion: " + VERSION + "\\n")
        return folder


__legacy__ = Backend()
get_requires_for_build_wheel = __legacy__.get_requires_for_build_wheel
prepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel
"""


def download(package: Package, work: Path, cache: Path, report: Callable[[str], None]) -> Path:
    """One file through `pip download`, checked twice: by pip before it opens the file, and here.

    Args:
        package: which.
        work: an empty folder; the file is left in it.
        cache: for messages: the folder that a machine without a network can be given.
        report: is told each tenth of the download, one line a call.

    Raises:
        AssetError: pip cannot fetch it, or it is not the expected file.
    """
    temporary, target = work / "pip", work / "download"
    temporary.mkdir()
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command += ["--requirement", str(requirements), "--dest", str(target)]
    if package.sdist:
        stub = work / "stub" / "setuptools"
        stub.mkdir(parents=True)
        name, _, version = package.requirement.partition("==")
        (stub / "__init__.py").write_text("", encoding="utf-8")
        (stub / "build_meta.py").write_text(_STUB_BACKEND.format(name=name, version=version), encoding="utf-8")
        others = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([str(stub.parent), *others])
        environment["PIP_USE_PEP517"] = "1"
        command += ["--no-binary", ":all:", "--no-build-isolation"]
    else:
        command += ["--only-binary", ":all:"]
    log = work / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, temporary, package.size, report)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise _pip_error(package, cache, log.read_text(encoding="utf-8", errors="replace"))
    files = list(target.iterdir())
    if len(files) != 1 or sha256_of(files[0]) != package.sha256:
        raise AssetError(
            f"{package.requirement} is not the expected file (its sha256 differs); nothing was kept",
            code="hash-mismatch",
        )
    return files[0]


def _watch(process: subprocess.Popen[bytes], temporary: Path, size: int, report: Callable[[str], None]) -> None:
    """Report the growth of pip's temporary file, each tenth once, until pip ends."""
    said = 0
    while True:
        try:
            process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            tenths = 10 * max(_sizes(temporary), default=0) // size
            if said < tenths < 10:
                said = tenths
                report(f"{said * 10}% of {size / 1e6:.1f} MB")
        else:
            return


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        try:
            yield path.stat().st_size
        except OSError:  # pip removed it meanwhile
            continue


def _pip_error(package: Package, cache: Path, output: str) -> AssetError:
    what = f"{package.requirement} cannot be downloaded"
    if "No module named pip" in output:
        return AssetError(f"{what}: this Python has no pip; run `{sys.executable} -m ensurepip`", code="no-pip")
    if "DO NOT MATCH THE HASHES" in output:
        return AssetError(
            f"{what}: the index gave a file whose sha256 differs from the expected {package.sha256}",
            code="hash-mismatch",
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = (errors or lines or ["pip said nothing"])[-1]
    return AssetError(
        f"{what}: {last}; check the network and pip's index, or copy {cache} from a machine that has the asset",
        code="download-failed",
    )


def sha256_of(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
