"""A config whose run takes about a second."""

from __future__ import annotations

import json
from pathlib import Path


def write_tiny_toml(folder: Path, base: Path, data: Path) -> Path:
    """Two rounds of four clients on the tiny model and texts; the runs go to `folder`/runs."""
    path = folder / "tiny.toml"
    path.write_text(
        f"""
        output = {json.dumps(str(folder / "runs"))}
        rounds = 2
        [model]
        name = {json.dumps(str(base))}
        [adapter]
        rank = 2
        targets = ["query", "value"]
        [data]
        source = {json.dumps(str(data))}
        domain = "domain"
        test_fraction = 0.25
        [partition]
        name = "domain"
        clients = 4
        [train]
        steps = 2
        batch_size = 8
        lr = 0.01
        [runtime]
        threads = 1
        kernels = "off"
        """
    )
    return path
