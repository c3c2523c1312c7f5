"""A SuperNode whose loop or heartbeat is dead ends, so that it is started again; Flower's own ends stay as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedlora.flower.program import ENDED

LATER = "threading.Thread(target=lambda: time.sleep(600)).start()"
"""As the thread of a SuperNode's API, which keeps its process."""
DIES = "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(600)"
ENDS = {
    "returns": (f"{LATER}", ENDED),
    "raises": (f"{LATER}; raise OSError('database is locked')", ENDED),
    "a thread dies": (f"{LATER}; {DIES}", ENDED),
    "exits": ("sys.exit(3)", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_a_supernode_ends_with_its_loop_and_its_threads(how: str) -> None:
    body, status = ENDS[how]
    code = "import sys, threading, time\nfrom fedlora.flower.program import _run_supernode\n"
    code += f"def program():\n    {body.replace('; ', chr(10) + '    ')}\n_run_supernode(program)\n"
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("to be started again" in done.stderr) == (status == ENDED)


@pytest.mark.slow
def test_a_superexec_starts_the_servers_app_with_patience_and_a_nodes_without() -> None:
    code = """
import sys
from flwr.supercore.superexec.executor import subprocess_executor
from fedlora.flower import program
started = []
program.subprocess.Popen = lambda words, **_: started.append(words)
program._start_server_apps_patiently()
for name in ("flwr-serverapp", "flwr-clientapp"):
    subprocess_executor.subprocess.Popen([name, "--token"])
patient = [sys.executable, "-m", program.MODULE]
assert started == [[*patient, "flwr-serverapp", "--token"], ["flwr-clientapp", "--token"]], started
"""
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
