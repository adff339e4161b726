"""The notebooks in ``examples/`` are executed as they are, in a folder of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


def test_the_notebook_of_the_default_run_is_there() -> None:
    assert [path.name for path in NOTEBOOKS] == ["default_run.ipynb"]


def test_the_default_notebook_ends_better_than_it_began_and_shows_curve_and_answers(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = read(NOTEBOOKS[0])
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    before, after = (float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed(notebook)))
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert after < before
    assert len(pictures) == 1
    assert printed(notebook).count("before:") == 1 + 4  # the scores, and four sample answers
    assert (tmp_path / "runs" / "notebook-1" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
