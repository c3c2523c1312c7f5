"""docker-compose.yml in the engine of `make test-containers`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ENGINE = os.environ.get("FEDLORA_TEST_ENGINE", "")
"""Its socket; "" where there is none."""


class Machine:
    """One compose project: a machine with some of the services.

    Args:
        name: Of the project.
        file: The compose file.
        environment: Variables that it reads.
    """

    def __init__(self, name: str, file: Path, environment: dict[str, str]) -> None:
        self.name, self._file = name, file
        self._environment = {**os.environ, **environment, "DOCKER_HOST": ENGINE, "COMPOSE_PROJECT_NAME": name}

    def compose(self, *words: str) -> str:
        return self._run("docker-compose", "--file", str(self._file), *words)

    def docker(self, *words: str) -> str:
        return self._run("docker", *words)

    def container(self, service: str) -> str:
        return self.compose("ps", "--quiet", service).strip()

    def ask(self, service: str, template: str) -> str:
        return self.docker("inspect", "--format", template, self.container(service)).strip()

    def kill(self, service: str) -> None:
        """As a crash: `docker kill` would count as an order to stay down."""
        os.kill(int(self.ask(service, "{{.State.Pid}}")), 9)

    def _run(self, *words: str) -> str:
        done = subprocess.run(words, env=self._environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout
