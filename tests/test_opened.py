"""What is opened once is passed on: files, tokens and answers, counted in a run and in a comparison."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import dolly_rows, write_rows

from bellwether import run
from bellwether.arms.compare import compare
from bellwether.recipe.file import load_recipe, with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import prepare
from bellwether.store.history import load_rows

ARMS = {
    "base": {"trains": "nobody"},
    "nearest": {"trains": "nearest row"},
    "local": {"trains": "alone"},
    "centralized": {"trains": "together"},
    "federated": {"trains": "federation"},
    "slower": {"trains": "federation", "learning_rate": 0.001},
    "even": {"trains": "federation", "set": {"partition.method": "shards", "federation.fraction": 1.0}},
}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often files are opened or read, and rows are rendered for the tokenizer."""
    import transformers

    made: collections.Counter[str] = collections.Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **named: Any) -> Any:
            made[name] += 1
            return function(*arguments, **named)

        return count

    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        method = staticmethod(counted(kind.__name__, kind.from_pretrained))
        monkeypatch.setattr(kind, "from_pretrained", method)
    for module, function in (
        ("model.base", "find_folder"),
        ("data.sources", "read_records"),
        ("data.encoding", "render_unplaced"),
        ("data.trace", "_trace_line"),
        ("runner.answers", "load_rows"),
        ("arms.arm", "read_outcomes"),
        ("arms.compare", "read_outcomes"),
    ):
        where = __import__(f"bellwether.{module}", fromlist=[function])
        monkeypatch.setattr(where, function, counted(function, getattr(where, function)))
    return made


@pytest.fixture
def recipe(tmp_path: Path, tiny_recipe: Path) -> Recipe:
    """Forty rows, of which eight are held out and some more by clients themselves, evaluated three times."""
    fields = {
        "model.threads": 1,
        "partition.client_test_fraction": 0.2,
        "evaluation.every": 1,
        "output.folder": str(tmp_path / "run"),
    }
    return with_overrides(load_recipe(tiny_recipe), fields)


ONCE = {"AutoConfig": 1, "AutoTokenizer": 1, "find_folder": 1, "read_records": 1, "render_unplaced": 40}


def test_a_run_opens_model_and_rows_once_and_reads_none_of_its_answers_back(recipe, counts):
    result = run(recipe)
    assert counts == ONCE
    assert result.scored == load_rows((result.folder / "answers" / "0002.jsonl").read_bytes())


def test_a_resumed_run_reads_the_answers_of_the_process_before(recipe, counts):
    finished = run(recipe)
    counts.clear()
    again = run(resume=finished.folder)
    assert again.scored == finished.scored
    assert counts == ONCE | {"load_rows": 2}


def test_a_comparison_opens_model_and_rows_once_for_all_arms_and_seeds(recipe, counts, tmp_path):
    recipe = with_overrides(recipe, {"output.folder": None, "compare": {"seeds": [3, 4, 5], "arms": ARMS}})
    comparison = compare(recipe, tmp_path / "out")
    assert len(comparison.outcomes) == 3 * (len(ARMS) - 1 + 4)
    assert counts == ONCE


def test_trials_open_nothing_that_their_arms_open(recipe, counts, tmp_path):
    tune = {"seeds": [0, 1], "learning_rates": [0.01, 0.02], "passes": [1]}
    arms = {name: ARMS[name] for name in ("local", "federated")}
    fields = {"output.folder": None, "compare": {"seeds": [3], "arms": arms, "tune": tune}}
    compare(with_overrides(recipe, fields | {"data.validation_rows_per_category": 1}), tmp_path / "out")
    assert counts == ONCE


def test_a_trace_of_clients_is_read_once(recipe, counts, tmp_path):
    line = {"client": "client-01", "round": 1, "available": True, "rows_per_second": 9.0}
    write_rows(tmp_path / "trace.jsonl", [line])
    run(with_overrides(recipe, {"federation.availability": {"trace": str(tmp_path / "trace.jsonl")}}))
    assert counts == ONCE | {"_trace_line": 1}


def test_another_run_of_the_same_process_reads_files_anew(recipe, tmp_path):
    changed = write_rows(tmp_path / "changed.jsonl", dolly_rows(("letters",), 20))
    own = with_overrides(recipe, {"data.sources": [str(changed)]})
    assert len(prepare(own).scored.rows) == 2
    write_rows(changed, dolly_rows(("letters", "sums"), 20))
    assert len(prepare(own).scored.rows) == 4


def test_a_worker_process_opens_for_itself_once_whatever_it_is_sent():
    sent, more = (pickle.loads(pickle.dumps(opened)) for opened in (Opened(), Opened()))
    assert sent is more
