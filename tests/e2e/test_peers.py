"""The benchmark against other frameworks compares like with like: their clients train what ours train."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.integrations import hub_kernels  # noqa: F401 (looks for a package "kernels", as a benchmark is named)

from fedlora.adapter import ALL_PARTS
from fedlora.model import save_adapter
from fedlora.rng import derive
from fedlora.training.cohort import train
from fedlora.training.job import TrainJob
from fedlora.training.workspace import open_workspace

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.nightly
@pytest.mark.parametrize("shape", ["tiny", "llama"])
def test_a_peers_client_trains_what_ours_trains(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers
    from peer import peer_client

    config = peers.federation(shape, 2, tmp_path)
    peers.export(shape, config, tmp_path)
    workspace = open_workspace(config)
    model = peer_client.build(str(tmp_path), "float32")
    peer_client.train(model, str(tmp_path), 1, 1)
    job = TrainJob(
        workspace.base.initial_adapter(config.seed),
        ALL_PARTS,
        workspace.data.clients[1],
        derive(config.seed, "train", 1, 1),
    )
    result = train(workspace.base, workspace.task, workspace.data.train, job, config.train)
    save_adapter(workspace.base, result.adapter, tmp_path / "ours", {})
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours, theirs = load_file(tmp_path / "ours" / "adapter_model.safetensors"), peer_client.tensors(model)
    assert ours.keys() == theirs.keys()
    # By norms: AdamW's first steps are as long for a gradient that is rounding alone as for any other.
    assert peers.distance(ours, start) > 0.1
    assert peers.distance(ours, theirs) < 0.01 * peers.distance(ours, start)
