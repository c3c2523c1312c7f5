"""Federated fine-tuning of foundation models with low-rank adapters."""

__version__ = "0.1.0"
