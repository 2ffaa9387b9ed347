"""The notebooks in examples/ run from top to bottom, and what they show is what they compute."""

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300  # for one cell, on a busy machine
LARGEST = 300_000  # bytes, so that the repository stays light


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> set[str]:
    """What a cell shows: text, pictures, values. Not warnings, which differ between machines."""
    return {
        *(o.name for o in cell.outputs if o.output_type == "stream" and o.name != "stderr"),
        *(kind for o in cell.outputs if o.output_type != "stream" for kind in o.get("data", ())),
        *(o.ename for o in cell.outputs if o.output_type == "error"),
    }


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_run_from_top_to_bottom(path: Path) -> None:
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_is_stored(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        fresh, timeout=SECONDS, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert kinds(after) == kinds(before), before.source
