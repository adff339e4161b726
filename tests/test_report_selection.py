"""The report of runs and comparisons that choose rows: the space, the shares used, what was trained instead of all."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_RECIPE, Command, call, json_lines
from test_report import NASTY, Reader, nasty_run

from bellwether.errors import CheckpointError
from bellwether.exchange.records import SurveyRecord
from bellwether.report.compare_show import cost_cells
from bellwether.report.compare_table import Line
from bellwether.report.page.charts import Series
from bellwether.report.page.draw import Chart
from bellwether.report.page.render import render
from bellwether.report.page.run import run_page
from bellwether.report.page.selection import _gained, normalised_entropy
from bellwether.report.page.space import Space
from bellwether.report.report import report
from bellwether.store.chosen import Chosen
from bellwether.store.comparison import read_outcomes
from bellwether.store.finished import FinishedRun

SELECTION = "selection: {method: hierarchical, min_cluster_rows: 2, keep_lone: true, dimensions: 3, layers: [-1]}\n"


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dolly_like: Path) -> Path:
    """A finished run whose clients choose rows; its folder is read only."""
    place = tmp_path_factory.mktemp("choosing")
    (place / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like) + SELECTION)
    outcome = call("run", place / "tiny.yaml", "--out", place / "run")
    assert outcome.code == 0, outcome.err
    return place / "run"


@pytest.fixture
def copied(choosing: Path, tmp_path: Path) -> Path:
    shutil.copytree(choosing, tmp_path / "run")
    return tmp_path / "run"


def chosen_rows(folder: Path) -> dict[str, set[int]]:
    """Return the numbers of all rows that each client ever chose, as its own files say."""
    found: dict[str, set[int]] = {}
    for path in sorted(folder.glob("clients/*/selected/*.json")):
        found.setdefault(path.parts[-3], set()).update(json.loads(path.read_text())["rows"])
    return found


def label(page: str, name: str) -> str:
    """Return what a chart shows, as told to those who cannot see it."""
    return next(text for text in re.findall(r'aria-label="([^"]*)"', page) if text.startswith(name))


def test_the_section_says_what_was_trained_beside_what_all_rows_would_have_been(choosing: Path) -> None:
    text = Reader((choosing / "report.html").read_bytes()).text
    rounds = json_lines(choosing / "rounds.jsonl")
    held = {path.parts[-2][2:]: len(json.loads(path.read_text())) for path in choosing.glob("clients/*/rows.json")}
    seen = sum(one["rows_seen"] for one in rounds)
    of_all = sum(held[client] for one in rounds for client in one["cohort"])
    assert 0 < seen < of_all
    assert f"{seen} rows were trained, repetitions counted; all rows of the same cohorts, with the same 1 pass" in text
    assert f"would have been {of_all}: so it is {100 * seen / of_all:.1f} % of them" in text
    survey, train = (sum(one["seconds"].get(name, 0) for one in rounds) for name in ("survey", "train"))
    whole = train * of_all / seen
    more = whole - survey - train
    assert f"At that pace all rows would have taken {whole:.1f} s; full batches go faster, so choosing " in text
    assert (f"saved {more:.1f} s at most." if more > 0 else f"cost {-more:.1f} s at least.") in text


@pytest.mark.parametrize(
    ("spent", "whole", "text"),
    [(2.0, 10.0, "saved 8.0 s at most."), (12.0, 10.0, "cost 2.0 s at least.")],
)
def test_what_choosing_saved_is_said_and_also_where_it_cost_more(spent: float, whole: float, text: str) -> None:
    said = _gained(spent, whole)
    assert said.endswith(f"all rows would have taken 10.0 s; full batches go faster, so choosing {text}")


def test_the_share_of_rows_used_counts_a_row_once(choosing: Path) -> None:
    text = Reader((choosing / "report.html").read_bytes()).text
    used = sum(map(len, chosen_rows(choosing).values()))
    assert f"Rows used{100 * used / 32:.1f} %{used} of 32 rows, chosen in any round" in text


def test_the_picture_shows_all_rows_and_centroids_of_the_last_survey(choosing: Path) -> None:
    page, last = (choosing / "report.html").read_text(), json_lines(choosing / "rounds.jsonl")[-1]
    survey, count = last["survey"], sum(one["selected"] for one in last["clients"])
    sent, kept = (sum(map(len, survey[name].values())) for name in ("centroids", "kept"))
    rows = sum(len(np.load(path)["points"]) for path in _surveyed(choosing, last["cohort"]))
    assert label(page, "Points in a plane") == (
        f"Points in a plane, round 2: {rows} rows of {len(last['cohort'])} clients, {count} of them chosen, and "
        f"{sent} centroids, {kept} of them kept."
    )
    assert "The first two principal components of 3 dimensions; rows by category." in page


def _surveyed(folder: Path, cohort: list[str]) -> list[Path]:
    return [path for path in folder.glob("clients/*/survey/0002.npz") if path.parts[-3].partition("-")[2] in cohort]


def test_shares_of_categories_are_those_of_the_rows_in_the_clients_folders(choosing: Path) -> None:
    chosen: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for one in json_lines(choosing / "rounds.jsonl"):
        for client in one["cohort"]:
            own = next(choosing.glob(f"clients/*-{client}"))
            categories = json.loads((own / "rows.json").read_text())
            every.update(categories)
            path = own / "selected" / f"{one['round']:04d}.json"
            chosen.update(categories[row] for row in json.loads(path.read_text())["rows"]) if path.exists() else None
    evenness = [normalised_entropy([counts[name] for name in every]) for counts in (chosen, every)]
    text = Reader((choosing / "report.html").read_bytes()).text
    assert f"{evenness[0]:.3f} of chosen rows, {evenness[1]:.3f} of all rows" in text


def test_a_run_in_which_nothing_was_ever_chosen_has_a_page(
    bellwether: Command, tiny_llama: Path, dolly_like: Path
) -> None:
    Path("tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like) + SELECTION)
    outcome = bellwether("run", "tiny.yaml", "selection.min_cluster_rows=9", "--out", "out")
    assert outcome.code == 0, outcome.err
    text = Reader(Path("out/report.html").read_bytes()).text
    assert "0 rows were trained, repetitions counted; all rows of the same cohorts" in text
    assert "4 of 4 clients trained on none." in text
    assert "The space of the survey" not in text
    assert "Categories among chosen rows" not in text


@pytest.mark.parametrize(
    ("counts", "value"),
    [([3, 3, 3], 1.0), ([5, 0], 0.0), ([1, 1, 2], 1.5 * math.log(2) / math.log(3)), ([1, 1, 0, 0], 0.5)],
)
def test_normalised_entropy_is_that_worked_by_hand(counts: list[int], value: float) -> None:
    assert normalised_entropy(counts) == pytest.approx(value)


def test_a_run_on_all_rows_has_no_such_section(tiny_run: tuple[Path, object]) -> None:
    assert "Rows chosen for training" not in (tiny_run[0] / "report.html").read_text()


def test_without_the_clients_own_folders_centroids_alone_are_shown(copied: Path) -> None:
    shutil.rmtree(copied / "clients")
    page = report(copied).read_text()
    assert "0 rows of 0 clients, 0 of them chosen, and " in label(page, "Points in a plane")
    assert "rows stay in the clients' own folders" in Reader(page.encode()).text
    assert "Rows used" not in page


@pytest.mark.parametrize("name", ["rows.json", "survey/0002.npz", "selected/0002.json"])
def test_a_broken_file_of_a_client_is_told_by_name(copied: Path, name: str) -> None:
    path = next(path for path in sorted(copied.glob(f"clients/*/{name}")))
    path.write_text('{"rows": [999]}' if name.endswith("2.json") else "no")
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} (cannot be read|is not as it was written) .*; "):
        report(copied)


def test_steps_that_are_counted_are_not_said_to_be_saved(copied: Path) -> None:
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(re.sub(r"local_steps: null", "local_steps: 2", recipe))
    text = Reader(report(copied).read_bytes()).text
    assert "Every client takes 2 steps a round, however many rows it chooses" in text
    assert "would have been" not in text


def test_clients_of_whom_nothing_was_chosen_count_where_all_rows_would_have_been_trained() -> None:
    run = nasty_run(clients=12, rounds=1)
    record = run.rounds[0]
    survey = SurveyRecord(dict.fromkeys(record.cohort, ()), {}, {}, 1, {})
    rounds = [dataclasses.replace(record, survey=survey, clients=record.clients[:1], rows_seen=2)]
    held = {one.client: one.rows for one in run.description.clients}
    answered = [name for name in record.cohort if name not in record.left_out]
    assert len(answered) > 1
    of_all = sum(held[name] for name in answered)
    text = Reader(render(run_page(dataclasses.replace(choosing_run(run), rounds=rounds)))).text
    assert f"would have been {of_all}: so it is {200 / of_all:.1f} % of them" in text


def choosing_run(run: FinishedRun) -> FinishedRun:
    """Return a run whose recipe has the clients choose rows."""
    selection = run.recipe.selection.model_copy(update={"method": "hierarchical"})
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"selection": selection}))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the section has drawn, by the chart's name: of a space what lies where, of bars their values by name."""
    found: dict[str, Any] = {}

    def bare(figure: Any) -> None:
        pass

    def space(name: str, label: str, shown: Space, axis: tuple[str, str]) -> Chart:
        found[name] = shown
        return Chart(name, label, 100, bare)

    def bars(name: str, label: str, names: Sequence[str], series: Sequence[Series], x: str) -> Chart:
        found[name] = {one.name: dict(zip(names, one.y, strict=True)) for one in series}
        return Chart(name, label, 100, bare)

    def stacks(name: str, label: str, x: Sequence[int], series: Sequence[Series], axis: tuple[str, str]) -> Chart:
        found[name] = {one.name: dict(zip(x, one.y, strict=True)) for one in series}
        return Chart(name, label, 100, bare)

    for chart in (space, bars, stacks):
        monkeypatch.setattr(f"bellwether.report.page.selection.{chart.__name__}", chart)
    return found


def points(*series: Series) -> set[tuple[float, float]]:
    return {point for one in series for point in zip(one.x, one.y, strict=True)}


def test_every_mark_and_bar_is_where_the_clients_files_and_the_records_say(drawn: dict[str, Any]) -> None:
    run = choosing_run(nasty_run(clients=12, rounds=2))
    one, other = run.rounds[-1].cohort[:2]
    rounds = [dataclasses.replace(record, cohort=(one, other), left_out={}) for record in run.rounds]
    centroids = {one: ((0.0, 1.0), (0.0, 2.0)), other: ((5.0, 5.0),)}
    survey = SurveyRecord(centroids, {one: (0, 1), other: (1,)}, {one: (1,), other: ()}, 1, {})
    seconds = [{"survey": 0.5, "train": 2.0}, {"survey": 0.25, "train": 1.0}]
    rounds = [
        dataclasses.replace(record, survey=survey, seconds=took) for record, took in zip(rounds, seconds, strict=True)
    ]
    chosen = {
        one: Chosen(["a", "a", "b"], {1: [0], 2: [0, 2]}, np.array([[0.0, 9.0], [1.0, 9.0], [2.0, 9.0]])),
        other: Chosen(["b", "b"], {1: [1]}, np.array([[3.0, 8.0], [4.0, 8.0]])),
    }
    run_page(dataclasses.replace(run, rounds=rounds, chosen=chosen))

    shown = drawn["space"]
    assert points(shown.kept) == {(0.0, 2.0)}
    assert points(shown.sent) == {(0.0, 1.0), (5.0, 5.0)}
    assert points(shown.rings) == {(0.0, 9.0), (2.0, 9.0)}  # of the last round alone
    dots = {series.name: points(series) for series in shown.dots}
    assert dots == {"a": {(0.0, 9.0), (1.0, 9.0)}, "b": {(2.0, 9.0), (3.0, 8.0), (4.0, 8.0)}}
    # By hand: of three rows two, of two one; of two rows of a one, of three of b two.
    assert list(drawn["used"][""].values()) == pytest.approx([200 / 3, 50])
    assert drawn["used-of"][""] == pytest.approx({"a": 50, "b": 200 / 3})
    # Of the five rows of the cohort twice; chosen were a, a and b at one, b at the other.
    assert drawn["evened"]["all rows"] == pytest.approx({"a": 40, "b": 60})
    assert drawn["evened"]["chosen rows"] == pytest.approx({"a": 50, "b": 50})
    assert drawn["surveys"] == {"survey": {1: 0.5, 2: 0.25}, "training": {1: 2.0, 2: 1.0}}


@pytest.mark.parametrize("width", [1, 2, 5])
def test_nothing_in_names_of_clients_or_categories_acts_in_the_section(width: int) -> None:
    run = nasty_run(clients=70)
    generator = np.random.default_rng(1)
    held = {one.client: one.rows for one in run.description.clients}
    chosen = {
        name: Chosen([*NASTY, *NASTY, *NASTY][:rows], {6: [0]}, generator.normal(size=(rows, width)))
        for name, rows in held.items()
    }
    cohort = run.rounds[-1].cohort
    centroids = {name: (tuple(generator.normal(size=width).tolist()),) for name in cohort}
    survey = SurveyRecord(centroids, dict.fromkeys(cohort, (0,)), {cohort[0]: (0,)}, 1, {})
    rounds = [*run.rounds[:-1], dataclasses.replace(run.rounds[-1], survey=survey)]
    page = render(run_page(dataclasses.replace(choosing_run(run), rounds=rounds, chosen=chosen)))
    tags = Reader(page).tags
    assert not {"script", "img", "image"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert ("section", "selection") in {(tag, attributes.get("id")) for tag, attributes in tags}


def test_the_cost_of_an_arm_that_chooses_counts_rows_ever_chosen_and_its_surveys(
    bellwether: Command, tiny_llama: Path, dolly_like: Path
) -> None:
    arms = "full: {}, chosen: {set: {selection.method: hierarchical}}, drawn: {set: {selection.method: random}}"
    settings = SELECTION.replace("method: hierarchical, ", "rows: 2, ")
    text = TINY_RECIPE.format(model=tiny_llama, data=dolly_like) + settings
    Path("c.yaml").write_text(text + f"compare: {{seeds: [3], arms: {{{arms}}}}}\n")
    outcome = bellwether("compare", "c.yaml", "--out", "out")
    assert outcome.code == 0, outcome.err
    costs = {name: read_outcomes(Path("out") / name / "seed-3")[0].cost for name in ("full", "chosen", "drawn")}
    for name in ("chosen", "drawn"):
        used = chosen_rows(Path("out") / name / "seed-3" / "run")
        assert costs[name]["rows"] == sum(map(len, used.values())) < costs["full"]["rows"] <= 32
    assert costs["chosen"]["survey_seconds"] > 0
    assert "survey_seconds" not in costs["full"] | costs["drawn"]
    page = Reader(Path("out/report.html").read_bytes()).text
    assert "survey, s" in page


def test_rounds_in_which_nobody_trained_leave_no_gap_in_the_curves_of_a_comparison(
    bellwether: Command, tiny_llama: Path, dolly_like: Path
) -> None:
    arms = "all: {set: {selection.method: full}}, none: {set: {selection.min_cluster_rows: 9}}"
    text = TINY_RECIPE.format(model=tiny_llama, data=dolly_like) + SELECTION
    Path("c.yaml").write_text(text + f"compare: {{seeds: [3], arms: {{{arms}}}}}\n")
    outcome = bellwether("compare", "c.yaml", "--out", "out")
    assert outcome.code == 0, outcome.err
    assert [len(read_outcomes(Path("out") / name / "seed-3")[0].curve) for name in ("all", "none")] == [2, 0]
    assert not re.search(r"\bnan\b", Reader(Path("out/report.html").read_bytes()).text.lower())


def test_the_table_of_costs_has_seconds_of_surveys_where_there_were_any() -> None:
    cost = {"rows": 8.0, "rows_of_all": 32.0, "rows_seen": 9.0, "tokens": 90.0, "seconds": 1.5}
    lines = [Line("full", {}, {}, cost=cost), Line("chosen", {}, {}, cost={**cost, "survey_seconds": 0.25})]
    heads, rows = cost_cells(lines)
    assert heads[heads.index("seconds") + 1] == "survey, s"
    assert [row[heads.index("survey, s")] for row in rows] == ["-", "0.2"]
    assert "survey, s" not in cost_cells(lines[:1])[0]
