"""Fixtures that everybody uses: a tiny random BERT, a tiny labelled file, and the downloaded assets.

The environment is set here, before torch, transformers or flwr are imported: no network, one thread, a Flower home
of its own.
"""

from __future__ import annotations

import csv
import gc
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for programs that pip brings
_FLWR_HOME = tempfile.mkdtemp(prefix="fedlora-flwr-home-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
    FLWR_HOME=_FLWR_HOME,
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
    MPLBACKEND="Agg",
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from support.tiny_words import DOMAIN_WORDS, FILLERS, LABEL_WORDS  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")  # no test is one of time: machines are busy
os.fsync = lambda fd: None  # a test's files need not outlive the machine; tests of the disk put their own here


def pytest_configure(config: pytest.Config) -> None:
    """xdist's own process runs no test and imports no torch, so that its workers start seconds earlier."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        for name in ("support.left_out", "support.tiny_federations"):
            config.pluginmanager.import_plugin(name)


REAL_PROCESSES = ("e2e", "test_ray_pool", "test_node_worker", "test_deploy_up")
"""Folder and files whose tests start servers, clusters or nodes: with --dist loadgroup these run one after the other.

They wait more than they compute, so that one worker of xdist has all of them while the others have the rest. (xdist's
own groups have no effect under pytest 9.2, which no longer reads the node ids that they change.)
"""


class ProcessesInOneWorker(LoadScopeScheduling):
    """Each test by itself, but for those that start processes, which one worker has."""

    def _split_scope(self, nodeid: str) -> str:
        path = Path(nodeid.split("::", 1)[0])
        return "processes" if {path.stem, path.parent.name} & set(REAL_PROCESSES) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    return ProcessesInOneWorker(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Give back the models and graphs of a nightly test: Python leaves their cycles until they take gigabytes."""
    if item.get_closest_marker("nightly"):
        gc.collect()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_FLWR_HOME, ignore_errors=True)


@pytest.fixture
def faults_are_fedloras(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test puts in fedlora's place and raises there is no user's own code."""
    monkeypatch.setattr("fedlora.unexpected._place_in_own_code", lambda error: None)


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 short texts with columns text, label ("negative" or "positive"), domain ("films" or "phones") and document.

    A text's label can be read from its words, three of which are the label's own; labels are drawn evenly, domains are
    of equal size, and a document holds three texts of one domain. Always the same bytes.
    """
    path = tmp_path_factory.mktemp("tiny_csv") / "tiny.csv"
    draw = random.Random(0)
    labels, domains = sorted(LABEL_WORDS), sorted(DOMAIN_WORDS)
    rows = []
    for number in range(240):
        domain = domains[number // 3 % 2]
        label = draw.choice(labels)
        words = draw.sample(LABEL_WORDS[label], 3)
        words += draw.sample(DOMAIN_WORDS[domain], 2) + draw.sample(FILLERS, draw.randint(2, 6))
        draw.shuffle(words)
        rows.append((" ".join(words), label, domain, f"{domain}-{number // 3}"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "domain", "document"))
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer BERT (hidden 32, 2 heads) and a WordPiece tokeniser for `tiny_csv`'s words."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny_bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = sorted({*FILLERS, *(w for table in (LABEL_WORDS, DOMAIN_WORDS) for ws in table.values() for w in ws)})
    vocabulary = list(dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words, ".", ","]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=BertWordPieceTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})._tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.2,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        model.save_pretrained(path)
    return path


@pytest.fixture
def tiny_toml(tmp_path: Path, tiny_bert: Path, tiny_csv: Path) -> Path:
    """A config whose run takes about a second."""
    from support.tiny import write_tiny_toml

    return write_tiny_toml(tmp_path, tiny_bert, tiny_csv)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; `make test` has fetched it, otherwise it is fetched here or fails saying why."""
    from fedlora.assets import fetch

    return fetch("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def vader() -> Path:
    """The file of the vader corpus; `make test` has fetched it, otherwise it is fetched here or fails saying why."""
    from fedlora.assets import fetch

    return fetch("vader")
