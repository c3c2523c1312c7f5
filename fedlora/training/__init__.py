"""A client's local training, the evaluation, and what both stand on."""

from fedlora.training.cohort import train, train_cohort
from fedlora.training.evaluate import evaluate
from fedlora.training.job import TrainJob, TrainResult
from fedlora.training.runtime import setup
from fedlora.training.workspace import Workspace, close_workspace, open_workspace

__all__ = [
    "TrainJob",
    "TrainResult",
    "Workspace",
    "close_workspace",
    "evaluate",
    "open_workspace",
    "setup",
    "train",
    "train_cohort",
]
