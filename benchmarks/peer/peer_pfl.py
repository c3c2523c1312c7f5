"""pfl-research: its FederatedAveraging on its SimulatedBackend, one resident model a process.

Started by peers.py in the environment that has pfl, once for each process: `python peer_pfl.py FOLDER CLIENTS DTYPE`,
with PFL_WORKER_ADDRESSES and PFL_WORKER_RANK set; pfl deals the clients out and sums over the processes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import peer_client as client
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class Learner(torch.nn.Module):
    """The model as pfl wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return client.loss(self.model, ids, labels)

    def metrics(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"loss": Weighted(float(self.loss(ids, labels)), len(ids))}


class Turns(TrainingProcessCallback):
    """Holds pfl at the end of a turn until the benchmark asks for the next."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._asked: Iterator[dict[str, Any]] = client.turns()
        self._turn: dict[str, Any] = {}
        self._left = 0
        self.round = 1

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._next()
        return Metrics()

    def after_central_iteration(self, *_args: Any, **_kwargs: Any) -> tuple[bool, Metrics]:
        self.round += 1
        self._left -= 1
        if self._left:
            return False, Metrics()
        if self._turn.get("save") and pytorch_ops.distributed.global_rank == 0:
            from safetensors.torch import save_file

            save_file(client.tensors(self._learner.model), self._turn["save"])
        return not self._next(), Metrics()

    def _next(self) -> bool:
        self._turn = next(self._asked, {})
        self._left = self._turn.get("rounds", 0)
        return bool(self._turn)


def main() -> None:
    """Answer the benchmark's turns."""
    folder, clients, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    learner = Learner(client.build(folder, dtype))
    trained = [p for p in learner.parameters() if p.requires_grad]
    model = PyTorchModel(learner, client.optimizer, torch.optim.SGD(trained, lr=1.0))
    turns = Turns(learner)
    everybody = itertools.cycle(range(clients))
    users = FederatedDataset(
        lambda user: Dataset(client.examples(folder, turns.round, user), user_id=str(user)), lambda: next(everybody)
    )
    never = 1 << 30
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=never, evaluation_frequency=never, train_cohort_size=clients, val_cohort_size=None
        ),
        SimulatedBackend(users, users),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=client.RATE, local_batch_size=client.batch_size(folder)
        ),
        NNEvalHyperParams(local_batch_size=None),
        [turns],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main()
