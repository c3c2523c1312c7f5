"""docs/example.ipynb runs in a kernel, and its cells show what they are there for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="requirements.lock has it")
nbclient = pytest.importorskip("nbclient", reason="requirements.lock has it")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


class Watching(nbclient.NotebookClient):  # type: ignore[misc,name-defined]
    """Keeps what the outputs of cells were replaced by while a cell went on."""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "update_display_data":
            self.moved.append(msg["content"]["data"]["text/plain"])
        return super().process_message(msg, cell, cell_index)


@pytest.mark.usefixtures("minilm")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "example.ipynb", as_version=4)
    client = Watching(notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.moved = []
    client.execute()
    assert len((tmp_path / "runs" / "notebook" / "metrics.jsonl").read_text().splitlines()) == 3
    outputs = {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    tables = [outputs[last][-1].data["text/html"] for last in outputs if last.startswith(("fedlora.", "run.metrics["))]
    assert ["labels.good" in table for table in tables] == [True, False, False]
    assert all("<table" in table for table in tables)
    (plot,) = [last for last in outputs if ".plot(" in last]
    assert "image/png" in outputs[plot][-1].data
    assert "PeftModel" in outputs[notebook.cells[-1].source.splitlines()[-1]][-1].text
    (trains,) = [last for last in outputs if last.startswith("run = ")]
    assert not [output for output in outputs[trains] if "Warning" in str(output)]
    assert any("round 2 of 2" in text for text in client.moved)
    assert client.moved[-1] == ""  # nothing of it is left
