"""Reports: what stands on the page, that nothing in data can act there, and that it reads well in a real browser."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browser import console, foreign, picture, resize
from conftest import TINY_RECIPE, Command, Outcome, dolly_rows, write_rows
from PIL import Image
from rich.console import Console

from bellwether.errors import CheckpointError
from bellwether.exchange.records import ClientRecord, EvaluationRecord, RoundRecord
from bellwether.exchange.scores import Totals, add_up
from bellwether.recipe.file import dump_recipe, load_recipe
from bellwether.recipe.recipe import Arm, Model, Recipe
from bellwether.report.compare_table import ClientGain, Line
from bellwether.report.page.charts import Series, lines, scatter
from bellwether.report.page.comparison import Compared, comparison_page
from bellwether.report.page.curves import SMOOTHED, middle_curve, smoothed
from bellwether.report.page.draw import Chart
from bellwether.report.page.metrics import EXACT, LOSS, ROUGE_L, changes
from bellwether.report.page.parts import named, visible
from bellwether.report.page.render import render
from bellwether.report.page.run import run_page
from bellwether.report.page.scores import gains
from bellwether.report.report import report
from bellwether.store.comparison import Comparison
from bellwether.store.comparison import Outcome as Scored
from bellwether.store.finished import FinishedRun, read_run
from bellwether.store.history import ScoredRow
from bellwether.store.holdings import ClientSummary, Description
from bellwether.tools.intervals import Interval
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted

# What would act if a page did not show it as what it is.
NASTY = (
    "<script>document.title='pwned'</script>",
    "\"><img src=x onerror=document.title='pwned'>",
    "</script></style></title><h1 id=pwned>",
    "<svg onload=document.title='pwned'>",
    "\x1b]0;pwned\x07\x1b[31mred",
    "\u202elive\u202c \u2067x",
    "{{ 7*7 }}{% raw %}",
    "$\\frac{1}{2}$ &lt;b&gt;",
    "]]> --> <!--",
    "_hidden 'onclick=x' `",
    "fill: #010101; url(#p1)",
    "\U000e0041tag\ufeff\u2028\ufffe",
)
# Names of clients cannot have control characters or parts of a path.
SITES = (NASTY[1], NASTY[3], "<h1 id=pwned>", "_{{ 7*7 }}")
ARMS = {
    "base": {"trains": "nobody"},
    "local": {"trains": "alone"},
    "centralized <b>": {"trains": "together"},
    "federated": {"trains": "federation"},
}


class Reader(HTMLParser):
    """Reads a page: its tags with their attributes, and its text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def nasty_run(clients: int = 12, rounds: int = 6, categories: tuple[str, ...] = NASTY) -> FinishedRun:
    """Return a run in which every text from elsewhere would act if it could."""
    generator = np.random.default_rng(0)
    names = [f"{NASTY[number % len(NASTY)]} {number}" for number in range(clients)]
    held = [{name: int(generator.integers(1, 9)) for name in generator.permutation(categories)[:3]} for _ in names]
    pooled = {name: sum(one.get(name, 0) for one in held) for name in categories}
    summaries = [
        ClientSummary(name, sum(one.values()), 3, one, 0.4, groups={NASTY[0]: 3, NASTY[5]: 2})
        for name, one in zip(names, held, strict=True)
    ]
    records, evaluations = [], []
    for round in range(1, rounds + 1):
        cohort = tuple(generator.permutation(names)[: max(2, clients // 3)])
        took = tuple(ClientRecord(name, 9, 9, 90, 2.0 / round, 0.1) for name in cohort[1:])
        records.append(
            RoundRecord(
                round, cohort, took, {cohort[0]: f"it said {NASTY[1]}"}, 1e-3, 2.0 / round, 9, 9, 90, 1000, 900,
                {"train": 0.5, "aggregate": 0.1, "evaluate": 0.2}, 1.0, "f",
            )
        )  # fmt: skip
    for round in (0, rounds):
        totals = {name: Totals(4, 40, 80.0 / (round + 1), 4, 1.0 + round / 10, min(round, 4)) for name in categories}
        own = {name: {categories[0]: Totals(3, 30, 60.0 / (round + 1), 3, 1.5, min(round, 3))} for name in names}
        evaluations.append(
            EvaluationRecord(round, "test", totals, 0.1, groups={NASTY[0]: Totals(4, 40, 9.0, 4, 1.0, 1)})
        )
        evaluations.append(EvaluationRecord(round, "clients", own[names[0]], 0.1, own))
    scored = [
        [
            ScoredRow(name, NASTY[2], Totals(1, 10, 20.0 / (round + 1), 1, 0.2 + round / 10, min(round, 1)))
            for name in categories
            for _ in range(4)
        ]
        for round in (0, rounds)
    ]
    whole = load_tiny()
    return dataclasses.replace(
        whole,
        environment={"command": [*NASTY], "versions": {NASTY[0]: NASTY[1]}},
        description=Description(summaries, pooled, 0, 8, False, (f"A note: {NASTY[3]}",)),
        rounds=records,
        evaluations=evaluations,
        before=scored[0],
        after=scored[1],
        samples=[
            dataclasses.replace(
                _SAMPLE,
                row=number,
                category=text,
                instruction=text,
                context=text,
                reference=text,
                before=text,
                after=text,
            )
            for number, text in enumerate(NASTY)
        ],
    )


def compared_page(
    arms: dict[str, dict[str, Any]], lines: list[Line], gains: tuple[ClientGain, ...] = ()
) -> tuple[str, str]:
    """Return the headline and the whole text of a page on a comparison that gave these lines and gains."""
    outcomes = [Scored(name, 1, "", ("a",), (Totals(1, 10, 20.0),), (None,)) for name in arms]
    recipe = Recipe(name="made-up", model=Model(path="none"))
    comparison = Comparison(recipe, {name: Arm(**arm) for name, arm in arms.items()}, outcomes, [])
    page = comparison_page(Compared(comparison, lines, gains, None, {}))
    return Reader(str(page.result).encode()).text, Reader(render(page)).text


def load_tiny() -> FinishedRun:
    """Return a run of which everything but the recipe is to be replaced."""
    return FinishedRun(
        Recipe(name="nasty", model=Model(path=NASTY[0])), {}, Description([], {}, 0, 0, False), [], [], [], [], []
    )


def _sample() -> Any:
    from bellwether.store.finished import Sample

    return Sample(0, "", "", "", "", "", "")


_SAMPLE = _sample()


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dolly_like: Path) -> tuple[Path, Outcome]:
    """A finished comparison of four arms under two seeds: its folder, and what the command said. Read only."""
    from conftest import call

    place = tmp_path_factory.mktemp("compared")
    arms = "".join(f"    {json.dumps(name)}: {json.dumps(arm)}\n" for name, arm in ARMS.items())
    text = TINY_RECIPE.format(model=tiny_llama, data=dolly_like).replace(
        "samples: 2", "samples: 2, max_rows_per_category: 1"
    )
    text = text.replace("clients: 4}", "clients: 4, client_test_fraction: 0.3}")
    (place / "arms.yaml").write_text(f"{text}compare:\n  seeds: [3, 4]\n  arms:\n{arms}")
    outcome = call("compare", place / "arms.yaml", "--out", place / "out")
    assert outcome.code == 0, outcome.err
    return place / "out", outcome


@pytest.fixture
def own_run(tmp_path: Path, tiny_run: tuple[Path, Outcome]) -> Path:
    """A copy of a finished run that may be spoilt."""
    return Path(shutil.copytree(tiny_run[0], tmp_path / "own"))


# Where it comes from ------------------------------------------------------------------------------


def test_a_run_ends_with_the_path_of_its_report(tiny_run: tuple[Path, Outcome]) -> None:
    folder, outcome = tiny_run
    assert outcome.out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_comparison_ends_with_the_path_of_its_report(compared: tuple[Path, Outcome]) -> None:
    folder, outcome = compared
    assert outcome.out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_terminal_is_told_that_the_report_is_drawn_and_a_file_is_not(
    tiny_run: tuple[Path, Outcome], bellwether: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "drawing the report" not in bellwether("report", tiny_run[0], "--out", "one.html").out
    monkeypatch.setattr("bellwether.cli.say.console", lambda: Console(force_terminal=True, _environ={"TERM": "xterm"}))
    told = bellwether("report", tiny_run[0], "--out", "two.html").out
    assert "drawing the report" in told
    assert told.splitlines()[-1].endswith("Report: two.html")


@pytest.mark.parametrize("kind", ["tiny_run", "compared"])
def test_the_same_folder_gives_the_same_bytes(kind: str, request: Any, bellwether: Command, tmp_path: Path) -> None:
    folder = request.getfixturevalue(kind)[0]
    assert bellwether("report", folder, "--out", "again.html").code == 0
    assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()


def test_a_persons_own_matplotlibrc_changes_nothing(tiny_run: tuple[Path, Outcome], tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9, "text.usetex": True}):
        again = report(tiny_run[0], tmp_path / "again.html")
    assert again.read_bytes() == (tiny_run[0] / "report.html").read_bytes()


def test_a_report_that_cannot_be_written_leaves_the_results(
    bellwether: Command, tiny_recipe: Path, tmp_path: Path
) -> None:
    assert bellwether("run", tiny_recipe, "--out", "out").code == 0
    (tmp_path / "out" / "report.html").unlink()
    (tmp_path / "out" / "report.html").mkdir()
    (tmp_path / "out" / "report.html" / "mine").touch()
    outcome = bellwether("run", "--resume", "out")
    assert outcome.code == 2
    assert outcome.err.startswith("bellwether: Results are in out, but their report is not")
    assert len(outcome.err.splitlines()) == 1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def spoil(path: str, content: bytes | None) -> Callable[[Path], None]:
    def spoiled(folder: Path) -> None:
        (folder / path).unlink()
        if content is not None:
            (folder / path).write_bytes(content)

    return spoiled


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (shutil.rmtree, "own holds no run, comparison or audit; give a folder that bellwether wrote."),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "own holds no run, comparison or audit"),
        (lambda folder: shutil.rmtree(folder / "adapter"), "is not finished; go on with bellwether run --resume own."),
        (lambda folder: shutil.rmtree(folder / "checkpoints" / "0002"), "history.jsonl ends with round 1 of 2"),
        (spoil("clients.json", None), "own/clients.json cannot be read (No such file or directory"),
        (spoil("clients.json", b"{"), "own/clients.json cannot be read ("),
        (spoil("samples.jsonl", b"[]\n"), "own/samples.jsonl cannot be read ("),
        (spoil("samples.jsonl", b'{"row": 0}\n'), "own/samples.jsonl cannot be read ("),
        (spoil("environment.json", b"[]"), "own/environment.json cannot be read ("),
        (spoil("recipe.yaml", b"seed: x"), "own/recipe.yaml cannot be read ("),
        (spoil("answers/0000.jsonl", b'{"answer": "x"}\n'), "own/answers/0000.jsonl cannot be read ("),
        (spoil("answers/0002.jsonl", b""), "own/answers/0002.jsonl has 0 rows, and"),
        (spoil("checkpoints/0002/history.jsonl", b"\xff"), "own/checkpoints/0002/history.jsonl cannot be read ("),
    ],
)  # fmt: skip
def test_what_is_not_finished_or_broken_gets_one_sentence(
    change: Callable[[Path], None], sentence: str, own_run: Path, bellwether: Command
) -> None:
    (own_run / "report.html").unlink()
    change(own_run)
    outcome = bellwether("report", "own")
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert sentence in outcome.err
    assert not (own_run / "report.html").exists()


def test_a_comparison_that_is_not_finished_is_said_to_be_so(compared: tuple[Path, Outcome], tmp_path: Path) -> None:
    from conftest import call

    folder = shutil.copytree(compared[0], tmp_path / "begun")
    (folder / "comparison.json").unlink()
    outcome = call("report", folder)
    assert outcome.code == 2
    assert "holds no finished comparison" in outcome.err


# What stands there --------------------------------------------------------------------------------


def test_the_page_says_what_the_tables_of_the_run_say(tiny_run: tuple[Path, Outcome]) -> None:
    folder, _ = tiny_run
    text = Reader((folder / "report.html").read_bytes()).text
    rows = list(csv.DictReader((folder / "evaluation.csv").read_text().splitlines()))
    last = [row for row in rows if row["round"] == "2" and row["part"] == "test"]
    for row in last:
        if row["category"] != "(macro)":
            assert row["category"] in text
        assert f"{float(row['loss']):.3f}" in text
        assert f"{100 * float(row['rouge_l']):.1f}" in text
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all(sample["instruction"] in text for sample in samples)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert f"{sum(round['tokens'] for round in rounds):,} tokens" in text
    assert dump_recipe(load_recipe(folder / "recipe.yaml")) in text


def test_the_page_of_a_comparison_names_all_arms_and_their_scores(compared: tuple[Path, Outcome]) -> None:
    folder, _ = compared
    text = Reader((folder / "report.html").read_bytes()).text
    lines = json.loads((folder / "table.json").read_text())["lines"]
    for line in lines:
        assert line["name"] in text
        assert f"{line['scores']['loss']['mean']:.3f}" in text
    for title in (
        "Learning curves",
        "Scores by category",
        "Who holds what",
        "Gain per client",
        "Cohorts",
        "Answers side by side",
    ):
        assert title in text


def test_what_there_is_one_of_stands_in_the_singular(compared: tuple[Path, Outcome], tmp_path: Path) -> None:
    one = nasty_run(clients=1, rounds=1, categories=("only",))
    pages = [render(run_page(one)), (compared[0] / "report.html").read_bytes()]
    plural = r"(?<![\d.,])1 (\w+ )?(rows|clients|rounds|categories|seeds|arms|passes|steps|questions|tokens|times)\b"
    for page in pages:
        assert not re.search(plural, Reader(page).text), re.search(plural, Reader(page).text)
    assert "1 simulated client holds" in Reader(pages[0]).text
    assert (counted(1, "row"), counted(2000, "row"), counted(0, "pass", "passes")) == (
        "1 row",
        "2,000 rows",
        "0 passes",
    )


def test_a_page_loads_nothing_and_runs_nothing(tiny_run: tuple[Path, Outcome], compared: tuple[Path, Outcome]) -> None:
    for folder in (tiny_run[0], compared[0]):
        page = (folder / "report.html").read_bytes()
        tags = Reader(page).tags
        assert not {"script", "link", "img", "iframe", "object", "form", "base", "foreignobject"} & {
            tag for tag, _ in tags
        }
        assert not [
            key for _, attributes in tags for key in attributes if key.startswith("on") or key in ("src", "style")
        ]
        assert {value[0] for _, attributes in tags if (value := attributes.get("href"))} == {"#"}
        assert b"http://" not in page
        assert b"https://" not in page
        policy = next(found["content"] for tag, found in tags if tag == "meta" and "http-equiv" in found)
        assert re.fullmatch(
            r"default-src 'none'; style-src 'sha256-[\w+/]{43}='; base-uri 'none'; form-action 'none'", policy or ""
        )


def test_identifiers_on_a_page_are_unlike_each_other(compared: tuple[Path, Outcome]) -> None:
    tags = Reader((compared[0] / "report.html").read_bytes()).tags
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    targets = {value[1:] for _, attributes in tags if (value := attributes.get("href"))}
    assert targets <= set(names)


def test_hidden_characters_are_shown_and_others_kept() -> None:
    assert visible("a\x1b[31m\x00\x7f") == "a‹U+001B›[31m‹U+0000›‹U+007F›"
    assert visible("\u202eb\u2066\ufeff") == "‹U+202E›b‹U+2066›‹U+FEFF›"
    assert visible("\ud800\ufffe\x85") == "‹U+D800›‹U+FFFE›‹U+0085›"
    kept = "é 中文 עברית العربية 👩\u200d👧 می\u200cخواهم\n\ttwo\u00a0words"
    assert visible(kept) == kept
    assert str(named("<b>\u202e")) == "<bdi>&lt;b&gt;‹U+202E›</bdi>"


def test_an_interval_is_that_of_paired_rows() -> None:
    def rows(losses: list[float], exact: int) -> list[ScoredRow]:
        return [
            ScoredRow(name, "", Totals(1, 10, loss, 1, 0.5, exact)) for name, loss in zip("aabb", losses, strict=True)
        ]

    # Every row gains the same, so there is no doubt: 0.3 nats per token, and all answers right.
    found = changes(rows([9, 5, 7, 8], 0), rows([6, 2, 4, 5], 1), Randomness(0))
    assert [getattr(found["loss"].gap, end) for end in ("mean", "low", "high")] == pytest.approx([-0.3] * 3)
    assert [getattr(found["exact"].gap, end) for end in ("mean", "low", "high")] == pytest.approx([1.0] * 3)
    assert found["loss"].before["a"].mean == pytest.approx(0.7)
    # Rows that gain 0 or 0.6: the mean is the same, and the interval holds more than it.
    found = changes(rows([9, 5, 7, 8], 0), rows([9, -1, 7, 2], 0), Randomness(0))
    assert found["loss"].gap.mean == pytest.approx(-0.3)
    assert found["loss"].gap.low < -0.35 < -0.25 < found["loss"].gap.high


def test_scores_that_are_not_finite_or_not_there_have_no_interval() -> None:
    before = [ScoredRow("a", None, Totals(1, 10, 20.0)), ScoredRow("a", None, Totals(1, 10, 20.0))]
    after = [ScoredRow("a", None, Totals(1, 10, float("inf"))), ScoredRow("a", None, Totals(1, 10, 20.0))]
    assert changes(before, after, Randomness(0)) == {}
    assert changes([], [], Randomness(0)) == {}
    assert list(changes(before, before, Randomness(0))) == ["loss"]


def test_numbers_are_written_with_their_signs() -> None:
    assert [EXACT.number(value, sign=True) for value in (64.31, -3.0, 0.0, -0.04)] == ["+64.3", "−3.0", "+0.0", "+0.0"]
    assert [LOSS.number(value) for value in (0.1936, float("nan"), float("inf"))] == ["0.194", "–", "∞"]


def test_two_scores_and_their_difference_agree_as_they_are_shown() -> None:
    assert (EXACT.step(0.04, 68.75, 68.71), LOSS.step(2.3, 0.2, -2.1)) == ((68.71, 2), (-2.1, 3))
    draw = np.random.default_rng(0)
    for metric, most in ((EXACT, 100.0), (ROUGE_L, 100.0), (LOSS, 12.0)):
        for before, after, fuzz in draw.uniform(size=(3000, 3)).tolist():
            # Ninths and eighths lie often half-way between two roundings; the difference comes from another sum.
            first, last = (round(72 * share) / 72 * most if fuzz < 0.5 else share * most for share in (before, after))
            gap, digits = metric.step(first, last, last - first + (fuzz - 0.5) * 1e-12)
            texts = [metric.number(value, digits=digits, sign=True) for value in (first, last, gap)]
            shown = [Decimal(text.replace("−", "-")) for text in texts]
            assert shown[1] - shown[0] == shown[2]
            assert metric.digits <= digits <= metric.digits + 2
            assert float(shown[2]) == pytest.approx(last - first, abs=1.01 * 10**-digits)
    small = ROUGE_L.step(0.34561, 0.85235, 0.50674)  # 0.3 and 0.9 with 0.6 between them would be a fifth too much
    assert small == (pytest.approx(0.506), 3)
    assert EXACT.step(math.nan, 1.0, math.nan)[1] == EXACT.digits


@pytest.mark.parametrize("seed", range(5))
def test_the_headline_of_a_run_and_its_tiles_agree_with_their_difference(seed: int) -> None:
    draw = np.random.default_rng(seed)
    run = nasty_run(clients=2, rounds=1, categories=("a", "b", "c"))
    rows = int(draw.integers(5, 90))
    scored = [
        [
            ScoredRow(name, "", Totals(1, 1, 1.0, 1, 0.5, int(draw.random() < share)))
            for name in "abc"
            for _ in range(rows)
        ]
        for share in (0.3, 0.7)
    ]
    records = [
        dataclasses.replace(record, part="test", categories=add_up((row.category, row.totals) for row in rows_of))
        for record, rows_of in zip((run.evaluations[0], run.evaluations[-1]), scored, strict=True)
    ]
    page = run_page(dataclasses.replace(run, before=scored[0], after=scored[1], evaluations=records))
    (tile,) = [tile for tile in page.tiles if tile.name == "Exact match"]
    number = r"[+−]?\d+\.\d+"
    for text in (str(page.result), f"{tile.value} {tile.note}"):
        first, last, gap = (Decimal(one.replace("−", "-")) for one in re.findall(number, text)[:3])
        assert last - first == gap, text


def test_the_middle_of_curves_is_their_median() -> None:
    curves = [[(1.0, level), (2.0, level + 1.0), (3.0, level + 2.0)] for level in (0.0, 1.0, 10.0)]
    x, middle, low, high = middle_curve(curves)
    assert (x, middle) == ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert low[0] == pytest.approx(0.2)
    assert high[0] == pytest.approx(8.2)
    assert middle_curve(curves[:1])[2:] == ([], [])


def test_curves_of_the_same_places_have_their_medians_at_these() -> None:
    curves = [[(0.0, start), (3.0, start + 1), (4.0, start + 5)] for start in (1.0, 2.0, 9.0)]
    assert middle_curve(curves)[:2] == ([0.0, 3.0, 4.0], [2.0, 3.0, 7.0])


def test_a_smoothed_curve_begins_and_ends_as_it_was_measured() -> None:
    assert smoothed([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]  # too few to be smoothed
    values = [float(value) for value in np.random.default_rng(0).normal(size=25)]
    found = smoothed(values)
    assert (found[0], found[-1]) == (values[0], values[-1])
    assert found[1] == pytest.approx(np.mean(values[:3]))
    inner = np.convolve(values, np.ones(5) / 5, mode="valid")  # a tenth of 25 on either side
    assert found[2:-2] == pytest.approx(inner)
    straight = [0.5 * place for place in range(40)]
    assert smoothed(straight) == pytest.approx(straight)


def test_scores_by_round_of_a_comparison_are_the_medians_of_its_runs(
    bellwether: Command, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = "{base: {trains: nobody}, federated: {}}"
    words = [
        "federation.rounds=9",
        "evaluation={every: 1, generate: false}",
        f"compare={{seeds: [3, 4, 5], arms: {arms}}}",
        "--out",
        "out",
    ]
    assert bellwether("compare", tiny_recipe, *words).code == 0
    runs = [tmp_path / "out" / "federated" / f"seed-{seed}" / "run" for seed in (3, 4, 5)]
    rows = [list(csv.DictReader((run / "evaluation.csv").read_text().splitlines())) for run in runs]
    losses = [[float(row["loss"]) for row in one if row["category"] == "(macro)"] for one in rows]
    drawn: dict[str, Any] = {}

    def kept(name: str, label: str, series: Any, x: str, y: str, **how: Any) -> Any:
        drawn[name] = (series, x, how["smooth"])
        return lines(name, label, series, x, y, **how)

    monkeypatch.setattr("bellwether.report.page.comparison.lines", kept)
    for words, smooth in ((["--smooth"], True), (["--no-smooth"], False)):
        assert bellwether("report", "out", *words).code == 0
        (only,), x, as_said = drawn["by-round-loss"]
        assert (only.name, only.x, x, as_said) == ("federated", [*map(float, range(10))], "round", smooth)
        assert only.y == pytest.approx([statistics.median(values) for values in zip(*losses, strict=True)])
        assert len(only.low) == len(only.high) == 10
        text = Reader((tmp_path / "out" / "report.html").read_bytes()).text
        assert (SMOOTHED in text) is smooth
        assert "Medians over 3 seeds" in text
    shutil.rmtree(runs[1])
    assert bellwether("report", "out").code == 0
    assert "Medians over 2 seeds" in Reader((tmp_path / "out" / "report.html").read_bytes()).text


@pytest.mark.parametrize("costs", [(1024.0,), (100.0, 100.0), (100.0, 1e7)])
def test_arms_of_any_cost_have_a_place_in_the_chart(costs: tuple[float, ...]) -> None:
    series = [Series(f"arm {number}", [cost], [0.5], [0.4], [0.6], number) for number, cost in enumerate(costs)]
    svg = scatter("cost", "Cost", series, "bytes", "score").inline()
    assert all(f"arm {number}" in svg for number in range(len(costs)))


def test_a_text_in_a_chart_that_looks_like_a_style_stays_a_text() -> None:
    text = 'fill: #010101" style="fill:#010101;stroke:url(#x)'
    svg = str(Chart("one", "a chart", 100, lambda figure: figure.text(0.1, 0.5, text) and None).inline())
    assert 'fill: #010101" style="fill:#010101;stroke:url(#x)</text>' in svg
    assert 'style="' not in re.sub(r">[^<]*<", "><", svg)
    assert "var(--ink)" in svg


def test_a_run_without_scores_or_answers_has_a_page(bellwether: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    words = ["data.test_rows_per_category=0", "--out", "none"]
    assert bellwether("run", tiny_recipe, *words).code == 0
    assert "Nothing was scored" in Reader((tmp_path / "none" / "report.html").read_bytes()).text
    assert bellwether("run", tiny_recipe, "evaluation.generate=false", "--out", "loss").code == 0
    text = Reader((tmp_path / "loss" / "report.html").read_bytes()).text
    assert re.search(r"Loss (rose|fell) from \d", text)
    assert "Answers side by side" not in text


def test_a_comparison_without_a_federation_or_answers_has_a_page(
    bellwether: Command, tiny_recipe: Path, tmp_path: Path
) -> None:
    arms = "{base: {trains: nobody}, everything: {trains: together, passes: 2}}"
    words = ["evaluation.generate=false", f"compare={{seeds: [3], arms: {arms}}}", "--out", "out"]
    outcome = bellwether("compare", tiny_recipe, *words)
    assert outcome.code == 0, outcome.err
    text = Reader((tmp_path / "out" / "report.html").read_bytes()).text
    assert re.search(r"The best loss has the arm \w+: \d", text)
    assert "Who holds what" not in text
    assert "base model" in text  # of inputs.json, since there is no run


def test_the_headline_compares_only_with_arms_that_count_as_the_federation_does() -> None:
    arms = {
        "base": {"trains": "nobody"},
        "together by passes": {"trains": "together"},
        "together by steps": {"trains": "together", "steps": 5},
        "federated": {"trains": "federation"},
        "federated by steps": {"trains": "federation", "set": {"training.local_steps": 5}},
    }
    gap = Interval(0.2, 0.1, 0.3, 0.001)
    lines = [Line(name, {"exact": Interval(0.5, 0.4, 0.6, 1.0)}, {"exact": gap}) for name in arms]
    headline, text = compared_page(arms, lines)
    assert "than base" in headline
    assert "than together by passes" in headline
    assert "together by steps" not in headline
    assert "Arms are compared with the arm federated." in text
    assert "Arms that count steps are compared with the arm federated by steps." in text


@pytest.mark.parametrize("trains", ["federation", "together", "nobody"])
def test_the_headline_speaks_of_a_score_that_a_model_has(trains: str) -> None:
    arms = {"model": {"trains": trains}, "rule": {"trains": "nearest row"}}
    rule = Line("rule", {"rouge_l": Interval(0.5, 0.4, 0.6, 1.0), "exact": Interval(0.1, 0.0, 0.2, 1.0)}, {})
    loss, none = {"loss": Interval(1.25, 1.0, 1.5, 1.0)}, Interval(0.0, 0.0, 0.0, 1.0)
    headline, _ = compared_page(arms, [Line("model", loss, {}), rule])
    assert "loss" in headline
    assert "1.250" in headline
    headline, _ = compared_page(
        arms, [Line("model", loss | {"rouge_l": rule.scores["rouge_l"], "exact": none}, {}), rule]
    )
    assert "ROUGE-L" in headline


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((-0.162, -0.059), "not distinguishable after Holm's adjustment over the table's 3 differences from all ("),
        ((0.059, 0.162), "not distinguishable after Holm's adjustment over the table's 3 differences from all ("),
        ((-0.162, 0.059), "not distinguishable from all ("),
    ],
)
def test_an_interval_without_zero_that_is_in_doubt_is_explained(ends: tuple[float, float], words: str) -> None:
    arms = {"all": {"trains": "together"}, "each": {"trains": "alone"}, "federated": {"trains": "federation"}}
    score, sure = Interval(0.5, 0.4, 0.6, 1.0), Interval(0.2, 0.1, 0.3, 0.001)
    gaps = [{"exact": Interval(sum(ends) / 2, *ends, 0.2)}, {"exact": sure, "rouge_l": sure}, {}]
    lines = [Line(name, {"exact": score}, gap) for name, gap in zip(arms, gaps, strict=True)]
    headline, _ = compared_page(arms, lines)
    assert words in headline
    assert "20.0 points more than each" in headline


def test_gains_per_client_name_the_arms_that_they_are_of() -> None:
    arms = {
        "alone": {"trains": "alone"},
        "alone for longer": {"trains": "alone", "passes": 9},
        "federated": {"trains": "federation"},
        "federated again": {"trains": "federation"},
    }
    score, gain = {"loss": Interval(1.25, 1.0, 1.5, 1.0)}, {"loss": Interval(-0.25, -0.5, -0.1, 0.01)}
    gains = (ClientGain("alone", "federated", "north", {"loss": 1.5}, gain, {}),)
    _, text = compared_page(arms, [Line(name, score, {}) for name in arms], gains)
    assert "The score of the federated model (arm federated) minus" in text
    assert "that a client trains alone (arm alone)." in text


def test_figures_of_a_comparison_are_those_of_its_table_or_made_anew(
    compared: tuple[Path, Outcome], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compared[0], tmp_path / "copy"))
    (folder / "table.json").unlink()
    assert report(folder).read_bytes() == (compared[0] / "report.html").read_bytes()
    (folder / "table.json").write_text('{"lines": [], "clients": []}')
    with pytest.raises(CheckpointError, match=r"table.json cannot be read \(it lacks an arm\)"):
        report(folder)


def test_gains_of_clients_that_hold_rows_out_are_shown(bellwether: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    words = ["partition.client_test_fraction=0.3", "data.test_rows_per_category=0"]
    assert bellwether("run", tiny_recipe, *words, "--out", "own").code == 0
    text = Reader((tmp_path / "own" / "report.html").read_bytes()).text
    assert "Gain per client" in text
    assert re.search(r"\d of 4 clients are better off", text)
    run = read_run(tmp_path / "own")
    for client, totals in run.scored("clients")[-1].clients.items():
        assert client in text
        rows = sum(part.rows for part in totals.values())
        assert f"{rows:,}" in text


def test_who_gains_and_who_loses_by_an_adapter_of_its_own_is_shown_beside_what_all_share() -> None:
    losses = {"north": (2.0, 1.5, 1.0), "south": (3.0, 2.0, 2.5), "west": (1.0, 1.25, 1.25)}

    def totals(loss: float) -> dict[str, Totals]:
        return {"x": Totals(rows=2, tokens=10, loss=10 * loss)}

    base, shared, own = ({name: totals(loss[stage]) for name, loss in losses.items()} for stage in range(3))
    records = [
        EvaluationRecord(0, "clients", totals(2.0), 1.0, base),
        EvaluationRecord(5, "clients", totals(1.6), 1.0, own, shared=shared),
    ]
    run = SimpleNamespace(evaluations=records, scored=lambda part: records)
    (section,) = gains(run)
    figure, table = section.parts
    assert figure.chart.legend == ["what all share", "its own"]
    assert figure.note == (
        "With an adapter of its own: 2 of 3 clients are better off, and 1 worse. "
        "1 of 3 clients is better off than with what all share, and 1 worse."
    )
    assert table.heads[-3:] == [f"loss, nats per token, {stage}" for stage in ("base", "shared", "own")]
    assert [[cell.text for cell in row[-3:]] for row in table.rows] == [
        ["2.000", "1.500", "1.000"], ["3.000", "2.000", "2.500"], ["1.000", "1.250", "1.250"],
    ]  # fmt: skip
    # One that did not answer the second question has no such score.
    records[-1] = dataclasses.replace(records[-1], shared={name: shared[name] for name in ("north", "south")})
    (section,) = gains(run)
    assert section.parts[1].rows[2][-2].text == "–"


@pytest.mark.parametrize(("clients", "rounds"), [(100, 20), (300, 200)])
def test_very_many_clients_and_categories_stay_readable_and_small(clients: int, rounds: int) -> None:
    categories = tuple(f"category {number}" for number in range(40))
    page = render(run_page(nasty_run(clients, rounds, categories)))
    assert len(page) < 1_500_000
    assert "clients, in the order of their largest category" in page.decode()


# In a browser -------------------------------------------------------------------------------------


def opened(driver: Any, page: bytes, path: Path) -> Any:
    path.write_bytes(page)
    driver.get(path.as_uri())
    return driver


def test_nothing_in_data_acts_on_a_page(chromium: Any, tmp_path: Path) -> None:
    page = run_page(nasty_run())
    driver = opened(chromium, render(page), tmp_path / "nasty.html")
    count = "return document.querySelectorAll(arguments[0]).length"
    assert driver.title == "bellwether run: nasty"
    assert (
        driver.execute_script(count, "script, img, iframe, h1[id], svg[onload], [onerror], [onclick], link, base") == 0
    )
    assert driver.execute_script(count, "h1") == 1
    assert driver.execute_script(count, "main > section") == len(page.sections)
    assert driver.execute_script(count, "article.exchange") == len(NASTY)
    assert driver.execute_script(count, "svg.chart") == driver.execute_script(count, "svg")
    text = " ".join(driver.execute_script("return document.body.textContent").split())
    for nasty in NASTY:
        assert " ".join(visible(nasty).split()) in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", driver.page_source)
    assert [line for line in console(driver) if not line.startswith("INFO")] == []
    assert not foreign(driver)


def test_the_policy_of_a_page_stops_what_would_slip_through(chromium: Any, tmp_path: Path, tiny_run: Any) -> None:
    page = (tiny_run[0] / "report.html").read_bytes()
    slip = b"<script>document.title='pwned'</script>"
    slip += b"<img src=x onerror=document.title='pwned'><p id=p style='color:red'>x</p>"
    driver = opened(chromium, page.replace(b"</main>", slip + b"</main>"), tmp_path / "slip.html")
    assert driver.title == "bellwether run: tiny"
    red = "return getComputedStyle(document.getElementById('p')).color == 'rgb(255, 0, 0)'"
    assert driver.execute_script(red) is False
    assert len([line for line in console(driver) if "Content Security Policy" in line]) >= 3


def test_a_name_written_from_right_to_left_keeps_its_neighbours_in_place(chromium: Any, tmp_path: Path) -> None:
    run = nasty_run(categories=("עברית", "العربية", "plain"))
    driver = opened(chromium, render(run_page(run)), tmp_path / "rtl.html")
    isolated = """
        return [...document.querySelectorAll("tbody th, td, .tag, dd")]
            .every(e => e.closest('[dir=auto]') || e.querySelector('bdi'))
    """
    assert driver.execute_script(isolated)


@pytest.mark.parametrize("kind", ["tiny_run", "compared"])
def test_a_page_fits_a_phone_and_a_desktop(kind: str, request: Any, chromium: Any) -> None:
    chromium.get((request.getfixturevalue(kind)[0] / "report.html").as_uri())
    for width in (360, 390, 768, 1280):
        resize(chromium, width, 844)
        wide = "return [document.documentElement.scrollWidth, innerWidth]"
        found, room = chromium.execute_script(wide)
        assert found <= room == width
    assert console(chromium) == []
    assert not foreign(chromium)


@pytest.mark.parametrize("kind", ["tiny_run", "compared"])
def test_letters_of_charts_can_be_read_on_a_phone(kind: str, request: Any, chromium: Any) -> None:
    chromium.get((request.getfixturevalue(kind)[0] / "report.html").as_uri())
    sizes = "return [...document.querySelectorAll('.chart')].map(one => one.clientWidth / one.viewBox.baseVal.width)"
    for width, least in ((360, 9.0), (768, 8.0), (1280, 9.0)):
        resize(chromium, width, 844)
        letters = [10 * scale for scale in chromium.execute_script(sizes)]
        assert letters
        assert min(letters) > least


def test_what_scrolls_has_a_shadow_where_there_is_more(compared: Any, chromium: Any, tmp_path: Path) -> None:
    chromium.get((compared[0] / "report.html").as_uri())
    resize(chromium, 360, 844)
    media(chromium, "screen", "light")
    chromium.execute_script("document.querySelector('.plot.large').id = 'probe'")
    edges = []
    for side in ("0", "one.scrollWidth"):
        chromium.execute_script(f"const one = document.getElementById('probe'); one.scrollLeft = {side};")
        image = Image.open(picture(chromium, tmp_path / "part.png", part="#probe")).convert("L")
        edges.append([image.getpixel((place, image.height - 2)) for place in (1, image.width - 2)])
    (left, right), (left_after, right_after) = edges
    assert left == right_after == 255, "paper at the side where nothing more is"
    assert max(right, left_after) < 240, "a shadow where there is more"


def media(driver: Any, kind: str, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})


def test_a_page_is_light_or_dark_as_asked_and_its_charts_with_it(chromium: Any, tiny_run: tuple[Path, Outcome]) -> None:
    chromium.get((tiny_run[0] / "report.html").as_uri())
    shades = """
        const of = e => getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color'];
        const light = e => of(e).match(/[\\d.]+/g).slice(0, 3).map(Number);
        const back = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number);
        return [back, light(document.querySelector('h1')), light(document.querySelector('svg.chart text'))]
            .map(c => c.reduce((a, b) => a + b) / 3);
    """
    media(chromium, "", "light")
    ground, head, label = chromium.execute_script(shades)
    assert ground > 230 > 130 > label > 0
    assert head < 60
    media(chromium, "", "dark")
    ground, head, label = chromium.execute_script(shades)
    assert ground < 40 < 140 < label
    assert head > 200
    media(chromium, "print", "dark")
    assert chromium.execute_script("return getComputedStyle(document.querySelector('h1')).color") == "rgb(22, 32, 43)"


def test_what_is_folded_is_open_in_print(chromium: Any, tiny_run: tuple[Path, Outcome]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    chromium.get((tiny_run[0] / "report.html").as_uri())
    shown = "return document.querySelector('#recipe pre').checkVisibility({contentVisibilityAuto: true})"
    assert chromium.execute_script(shown) is False
    media(chromium, "print", "light")
    WebDriverWait(chromium, 20).until(lambda driver: driver.execute_script(shown))
    size = "return document.querySelector('#recipe details').getBoundingClientRect().height"
    assert chromium.execute_script(size) > 500


def test_data_full_of_markup_goes_through_a_whole_run(
    bellwether: Command, tiny_llama: Path, tmp_path: Path, chromium: Any
) -> None:
    rows = dolly_rows([f"{text.strip()} {number}" for number, text in enumerate(NASTY[:6])], 8)
    sites = [
        row | {"site": SITES[number % 4], "instruction": NASTY[number % len(NASTY)] + row["instruction"]}
        for number, row in enumerate(rows)
    ]
    write_rows(tmp_path / "rows.jsonl", sites)
    text = TINY_RECIPE.format(model=tiny_llama, data=tmp_path / "rows.jsonl").replace(
        "method: iid, clients: 4", "method: column, column: site"
    )
    (tmp_path / "nasty.yaml").write_text(text.replace("samples: 2", "samples: 6"))
    outcome = bellwether("run", "nasty.yaml", "--out", "run")
    assert outcome.code == 0, outcome.err
    chromium.get((tmp_path / "run" / "report.html").as_uri())
    assert chromium.title == "bellwether run: tiny"
    assert chromium.execute_script("return document.querySelectorAll('script, img, h1[id]').length") == 0
    shown = " ".join(chromium.execute_script("return document.body.textContent").split())
    assert all(" ".join(visible(name).split()) in shown for name in (*SITES, *NASTY[:6]))
