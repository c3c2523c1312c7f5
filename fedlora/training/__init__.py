"""A client's local training, the evaluation, and what both stand on."""

from fedlora.training.evaluate import Evaluation, evaluate
from fedlora.training.loop import TrainJob, TrainResult, train
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
]
