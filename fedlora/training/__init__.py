"""A client's local training, the evaluation, and what both stand on."""

from fedlora.training.cohort import train, train_cohort
from fedlora.training.evaluate import Evaluation, evaluate
from fedlora.training.job import TrainJob, TrainResult
from fedlora.training.runtime import describe, setup
from fedlora.training.workbench import Workbench, close_workbench, open_workbench

__all__ = [
    "Evaluation",
    "TrainJob",
    "TrainResult",
    "Workbench",
    "close_workbench",
    "describe",
    "evaluate",
    "open_workbench",
    "setup",
    "train",
    "train_cohort",
]
