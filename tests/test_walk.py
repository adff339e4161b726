"""The walk that CONTRIBUTING describes: the files on the stack of a real call of ``bellwether run``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import call

import bellwether

PACKAGE = Path(bellwether.__file__).parent
ROOT = PACKAGE.parent


def walks(page: str) -> list[list[str]]:
    """The chains of files in a page, each on a line of its own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [line.split(" → ") for line in re.findall(r"^\S+\.py(?: → \S+\.py)+$", text, flags=re.MULTILINE)]


def files_on_the_stack() -> list[str]:
    """The package's files from the command's own function down to the caller, each where it is entered."""
    files: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and "typer" not in Path(frame.f_code.co_filename).parts:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            files.append(path.relative_to(PACKAGE).as_posix())
        frame = frame.f_back
    return [file for file, above in zip(files[::-1], [None, *files[::-1]], strict=False) if file != above]


@pytest.fixture
def walked(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[list[str]]]:
    """Every different stack of a small run at the optimizer's step, and in training at the adapters' products."""
    import torch

    from bellwether.client.optimizer import StackedAdamW
    from bellwether.model import lora, low_rank

    found: dict[str, list[list[str]]] = {"step": [], "product": []}

    def noting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            path = Path(function.__code__.co_filename).relative_to(PACKAGE).as_posix()
            files = [*files_on_the_stack(), path]
            if files not in found[what] and torch.is_grad_enabled() | (what == "step"):
                found[what].append(files)
            return function(*arguments)

        return noted

    monkeypatch.setattr(StackedAdamW, "step", noting("step", StackedAdamW.step))
    monkeypatch.setattr(lora, "add_low_rank", noting("product", low_rank.add_low_rank))
    outcome = call("run", tiny_recipe, "federation.rounds=1", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    return found


def test_a_run_walks_through_the_files_that_the_documentation_names(walked):
    to_the_step, to_the_product = walks("CONTRIBUTING.md")
    assert walked["step"] == [to_the_step]
    shared = to_the_step[: to_the_step.index(to_the_product[0])]
    assert walked["product"] == [shared + to_the_product]


def test_contributing_explains_every_file_of_the_walk_in_its_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = re.findall(r"^\d+\. \[`(.+?)`\]\((.+?)\)", text, flags=re.MULTILINE)
    assert [file for file, _ in links] == list(
        dict.fromkeys(file for walk in walks("CONTRIBUTING.md") for file in walk)
    )
    for file, link in links:
        assert link == f"bellwether/{file}"
        assert (ROOT / link).is_file()
