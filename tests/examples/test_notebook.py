"""The notebook is executed from its first cell to its last."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_model.ipynb"


def test_notebook_code_trains_serves_and_equals_pytorch(monkeypatch: pytest.MonkeyPatch):
    nbformat = pytest.importorskip("nbformat", reason="the notebook's packages are not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, vars(sys.modules["__main__"]))
    check(printed.getvalue())


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # from the kernel's packages
def test_first_model_trains_serves_and_equals_pytorch(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    nbformat = pytest.importorskip("nbformat", reason="the notebook's packages are not installed")
    nbclient = pytest.importorskip("nbclient", reason="the notebook's packages are not installed")
    pytest.importorskip("ipykernel", reason="the notebook's packages are not installed")
    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, environment[name])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=PATIENCE).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    check(printed)


def check(printed: str) -> None:
    assert "streaming yes" in printed
    assert "61 steps; largest difference from PyTorch" in printed


def test_notebook_is_stored_without_outputs():
    pytest.importorskip("nbformat", reason="the notebook's packages are not installed")
    import nbformat

    assert all(not cell.get("outputs") for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
