"""Nodes with a patched Flower on a real SuperLink: they are left out, by name, and the run ends as it would without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.real_federation import ROOT, Federation, local

from fedlora.config import load_config
from fedlora.deploy import FederationPlan, NodePlan

PATCH = '''
"""Imported by each Python of one node: what its ClientApp pushes is not what Flower would have made of it."""
import os, pathlib, sys

if any("flwr-clientapp" in word for word in sys.orig_argv):
    from flwr.app.message import Array, ConfigRecord, MetricRecord
    from flwr.app.message.arraychunk import ArrayChunk
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

    kind, mark = os.environ["HOSTILE"], pathlib.Path(os.environ["HOSTILE_MARK"])

    def garbage(self):
        mark.touch()
        return add_header_to_object_body(b"\\xff\\xff\\xff", self)

    if kind == "hello":
        ConfigRecord.deflate = garbage
    elif not mark.exists():  # its first round
        MetricRecord.deflate = garbage
    else:  # the others: one megabyte that becomes many
        chunk = ArrayChunk(memoryview(bytes(1 << 20)))
        name = chunk.object_id
        Array.slice_array = lambda self: [(name, chunk)] * 300
'''
NODES = ("site-a", "site-b", "garbage", "mute")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.fixture
def federation(tiny_bert: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("h")
    (folder / "patch").mkdir()
    (folder / "patch" / "sitecustomize.py").write_text(PATCH)
    config = load_config(
        ROOT / "configs" / "quickstart.toml",
        [
            *(f"model.name={tiny_bert}", f"data.source={tiny_csv}", "data.domain=domain", "partition.clients=4"),
            *("partition.mixing=1.0", "train.steps=3", "train.lr=0.01", "train.batch_size=8", "rounds=2"),
            *("runtime.device=cpu", "runtime.threads=1", "runtime.cohort=1", "runtime.kernels=off"),
            *("server.node_timeout_s=40", "server.deadline_s=120", "name=hostile"),
        ],
    )
    nodes = tuple(NodePlan(name, ledger=f"{folder}/{name}-ledger.jsonl") for name in NODES)
    ports = int(local.free_ports(1 + len(NODES)))
    federation = Federation(folder, config, FederationPlan(("127.0.0.1",), nodes, control_port=ports))
    try:
        federation.begin()
        for name in NODES:
            how = {"garbage": "train", "mute": "hello"}.get(name)
            patch = (f"PYTHONPATH={folder / 'patch'}", f"HOSTILE={how}", f"HOSTILE_MARK={folder / name}.mark")
            federation.up(name, *(("env", *patch) if how else ()))
        yield federation
    finally:
        federation.down()


def test_a_node_that_pushes_what_cannot_be_inflated_is_left_out_and_named(federation: Federation) -> None:
    run = federation.run("name=hostile")
    left_out = run.finish()
    assert run.answers() == [[0, 1]] * 2
    assert "cannot be read" in left_out[1, 2]
    assert "bytes of tensors" in left_out[2, 2]
    turned_away = run.records()[1]["turned_away"]
    assert len(turned_away) == 1
    assert "cannot be read" in next(iter(turned_away.values()))
    run.require_equal(run.simulate(replay=run.records()))
