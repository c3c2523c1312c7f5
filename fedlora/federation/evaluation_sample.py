"""The part of the server's test set that is measured between the first and the last round."""

from __future__ import annotations

import numpy as np

from fedlora.data.own import brought_by_nodes
from fedlora.federation.checks import clients_wanted
from fedlora.federation.simulated_devices import examples_to_tell
from fedlora.rng import derive
from fedlora.tasks import Examples
from fedlora.training.workspace import Workspace

LEAST = 256
"""Examples, by default: half of the 95% interval of an accuracy is then at most 6 points."""
SHARE = 0.25
"""Examples measured for each that is trained on, by default. The backward pass of an adapter makes an example in
training 2 to 2.6 times as expensive as one in evaluation, so that these cost about a tenth of the round."""


def sample_size(workspace: Workspace) -> int:
    """How many test examples `evaluation.sample` asks for; all where a round's work is not known beforehand.

    The same in each session of a run: a function of config and data alone.
    """
    wanted, data = workspace.config.evaluation.sample, workspace.data
    size = len(data.require_test())
    if isinstance(wanted, int):
        return min(wanted, size)
    if isinstance(wanted, float):
        return max(1, round(wanted * size))
    if size <= LEAST:
        return size
    clients = range(len(data.clients))
    if brought_by_nodes(workspace.config):
        jobs = [workspace.config.train_of(k) for k in clients]
        if not all(job.steps for job in jobs):
            return size
        each = [(job.steps or 0) * job.batch_size for job in jobs]
    else:
        each = [examples_to_tell(workspace, k) for k in clients]
    trained = float(np.mean(each)) * clients_wanted(workspace.config, len(clients))
    return min(size, max(LEAST, round(SHARE * trained)))


def stratified(test: Examples, domain_column: str | None, size: int, seed: int) -> np.ndarray:
    """A systematic sample: examples by domain and class, shuffled within each, every so many of them.

    Each stratum of m of the n examples has m size / n of the sample, rounded up or down.

    Args:
        test: n examples.
        domain_column: of `test.columns`.
        size: of the sample, at most n.
        seed: decides the draw.

    Returns:
        Sorted positions [size].
    """
    generator = np.random.default_rng(derive(seed, "test sample"))
    keys = [generator.permutation(len(test))]
    if test.labels is not None:
        keys.append(test.labels)
    if domain_column is not None:
        keys.append(np.unique(test.columns[domain_column], return_inverse=True)[1])
    places = ((np.arange(size) + generator.random()) * len(test) / size).astype(np.int64)
    return np.sort(np.lexsort(keys)[places])
