"""Pictures of a run, and its report: one HTML file in the run's folder."""

from fedlora.report.page import write_report
from fedlora.report.pictures import plot_accuracy, plot_labels

__all__ = ["plot_accuracy", "plot_labels", "write_report"]
