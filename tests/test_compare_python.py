"""Comparisons from Python, and their plan, against what arms really did."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bellwether import Arm, compare, load_recipe, run
from bellwether.arms.plan import comparison_plan_table, plan_comparison
from bellwether.errors import RecipeError
from bellwether.exchange.records import ArmFinished, ArmRun, ArmStarted, ArmTold, ComparisonStarted, Event
from bellwether.exchange.scores import macro
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.tools.progress import Advanced

TUNE = {"seeds": [0], "learning_rates": [0.001, 0.01], "passes": [1, 2]}


@pytest.fixture
def tiny(tiny_recipe: Path) -> Recipe:
    """All clients in every round, of which some hold rows out, and validation rows for trials."""
    fields = {"federation.fraction": 1.0, "model.threads": 1, "evaluation.every": 1, "evaluation.generate": False}
    return with_overrides(load_recipe(tiny_recipe), {**fields, "data.validation_rows_per_category": 1})


ARMS: dict[str, Any] = {
    "base": {"trains": "nobody"},
    "nearest": {"trains": "nearest row"},
    "local": {"trains": "alone", "clients": ["client-01", "client-03"]},
    "centralized": Arm(trains="together"),
    "federated": {},
}


def test_python_gets_the_tables_the_page_and_the_scores_of_every_round(tiny: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    variant = with_overrides(tiny, {"lora.rank": 1, "seed": 9, "output.trackers": []})
    result = compare(tiny, {**ARMS, "rank 1": variant}, folder=folder, seeds=[3, 4])

    kept = json.loads((folder / "table.json").read_text())
    assert [row["arm"] for row in result.scores if row["metric"] == "loss"] == [
        line["name"] for line in kept["lines"] if "loss" in line["scores"]
    ]
    assert result.scores[0] == {"arm": "base", "metric": "loss"} | {
        end: kept["lines"][0]["scores"]["loss"][end] for end in ("mean", "low", "high")
    }
    assert {"arm", "metric", "mean", "low", "high", "p"} == result.differences[0].keys()
    assert "category" in result.categories[0]
    assert result.page == folder / "report.html"
    assert result.page.read_bytes().startswith(b"<!DOCTYPE html>")
    assert dict(result.comparison.arms["rank 1"].set) == {"lora.rank": 1}, "what is not of training is left out"
    # What an arm scored after its last round is what its outcome says.
    last = {(row["arm"], row["seed"]): row for row in result.rounds if row["round"] == tiny.federation.rounds}
    assert last.keys() == {(name, seed) for name in ("federated", "rank 1") for seed in (3, 4)}
    for outcome in result.outcomes:
        if (outcome.arm, outcome.seed) in last:
            assert last[outcome.arm, outcome.seed]["loss"] == pytest.approx(macro(outcome.by_category()).loss)
    assert {row["round"] for row in result.rounds} == {0, 1, 2}
    assert {row["part"] for row in result.rounds} == {"test"}


def test_a_federated_arm_of_python_is_an_ordinary_run(tiny: Recipe, tmp_path: Path) -> None:
    result = compare(tiny, {"federated": {}}, folder=tmp_path / "out", seeds=[5])
    alone = run(with_overrides(tiny, {"seed": 5, "data.seed": tiny.seed, "output.folder": str(tmp_path / "run")}))
    found = [row["loss"] for row in result.rounds]
    assert found == [macro(record.categories).loss for record in alone.evaluations]


def test_without_arms_or_seeds_python_takes_those_of_the_recipe(tiny: Recipe, tmp_path: Path) -> None:
    recipe = with_overrides(tiny, {"compare": {"seeds": [7], "arms": {"base": {"trains": "nobody"}}}})
    assert {outcome.seed for outcome in compare(recipe, folder=tmp_path / "out").outcomes} == {7}
    with pytest.raises(RecipeError, match="compare is null"):
        compare(tiny, folder=tmp_path / "other")


def test_an_arm_that_cannot_be_is_refused_in_one_sentence(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"compare: .*trains.*nobody"):
        compare(tiny, {"odd": {"trains": "everywhere"}}, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_who_watches_hears_of_every_arm_from_its_beginning_to_its_end(tiny: Recipe, tmp_path: Path, jobs: int) -> None:
    told: list[Event] = []
    few = {name: ARMS[name] for name in ("base", "centralized", "federated")}
    compare(tiny, few, folder=tmp_path / "out", seeds=[3], jobs=jobs, watch=told.append)
    [started] = [event for event in told if isinstance(event, ComparisonStarted)]
    runs = [ArmRun(name, 3) for name in few]
    assert list(started.expected) == runs
    assert started.expected[runs[0]].training == 0
    for one in runs:
        [begun] = [number for number, event in enumerate(told) if event == ArmStarted(one)]
        [ended] = [n for n, event in enumerate(told) if isinstance(event, ArmFinished) and event.run == one]
        inside = [(n, event.event) for n, event in enumerate(told) if isinstance(event, ArmTold) and event.run == one]
        phases = {event.phase for _, event in inside if isinstance(event, Advanced)}
        assert "computing losses" in phases
        assert ("training" in phases) == (one.arm != "base")
        assert begun < min(n for n, _ in inside)
        if jobs == 1:
            assert max(n for n, _ in inside) < ended
    again: list[Event] = []
    compare(tiny, few, folder=tmp_path / "out", seeds=[3], watch=again.append)
    assert [event.run for event in again if isinstance(event, ArmFinished) and event.before] == runs


def test_the_plan_counts_what_arms_record(tiny: Recipe, tmp_path: Path) -> None:
    result = compare(tiny, ARMS, folder=tmp_path / "out", seeds=[3, 4])
    plan = plan_comparison(result.comparison.recipe)
    assert plan.total.runs == 10
    for name, needs in plan.arms.items():
        outcomes = [outcome for outcome in result.outcomes if outcome.arm == name]
        assert needs.rows == pytest.approx(sum(outcome.cost.get("rows_seen", 0) for outcome in outcomes))
        assert needs.sent == sum(outcome.cost.get("bytes", 0) for outcome in outcomes)
        assert needs.adapters == sum(bool(outcome.adapter) for outcome in outcomes)
    # 38 rows of training in one place, batches of four, two passes, two seeds.
    rows = result.outcomes[-1].cost["rows_of_all"]
    assert plan.arms["centralized"].steps == 2 * 2 * -(-rows // 4)
    assert plan.arms["base"].expected.training == 0
    scored = len(result.outcomes[0].totals)
    assert plan.arms["local"].scored == 2 * 2 * scored
    assert plan.arms["federated"].scored == 2 * 3 * scored
    kept = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert kept / 10 < plan.total.disk < kept * 10


def test_the_plan_counts_every_trial_and_shows_them_under_their_arm(tiny: Recipe) -> None:
    recipe = with_overrides(
        tiny, {"compare": {"seeds": [3, 4], "arms": {"base": ARMS["base"], "fed": {}}, "tune": TUNE}}
    )
    plan = plan_comparison(recipe)
    assert list(plan.trials) == ["fed"]
    assert plan.trials["fed"].runs == 2 * 2
    # One pass and two passes, each with two learning rates; the arm itself with the longer ones.
    assert plan.trials["fed"].rows == pytest.approx(plan.arms["fed"].rows / 2 / 2 * (1 + 2) * 2)
    console = Console(width=60, record=True)
    console.print(comparison_plan_table(plan))
    text = console.export_text()
    assert "2 arms × 2 seeds = 4 runs" in " ".join(text.split())
    assert "1 arm × 2 learning rates × 2" in " ".join(text.split())
    assert "its trials" in text
