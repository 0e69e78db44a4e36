"""The notebook, run as a reader runs it: a fresh kernel, another folder, no network."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/translate.ipynb"


def test_it_is_kept_without_results():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.timeout(900)
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://localhost:9")  # whoever asks a network fails
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    text = "".join(output.get("text", "") for output in outputs)
    cosines = dict(re.findall(r"^(\w[\w ,]+?) +token cosine ([\d.]+)", text, re.MULTILINE))
    assert float(cosines["mean predictor"]) < 0.3 < 0.7 < float(cosines["one Euler step"])
    errors = dict(re.findall(r"^(\w[\w ]+?), (?:\d+ evaluations): ([\d.]+)", text, re.MULTILINE))
    assert float(errors["fitted to this model"]) < float(errors["heun"])
