"""Differential privacy over the whole run."""
