"""Deployment: the folders of a federation, and Flower's own commands that run them. Flower itself is not imported."""

from __future__ import annotations

from fedlora.deploy.commands import CONNECTION, ENVIRONMENT, Address
from fedlora.deploy.foreground import Program, programs, script, start, stop, up
from fedlora.deploy.project import FederationPlan, NodePlan, write_project

__all__ = [
    "CONNECTION",
    "ENVIRONMENT",
    "Address",
    "FederationPlan",
    "NodePlan",
    "Program",
    "programs",
    "script",
    "start",
    "stop",
    "up",
    "write_project",
]
