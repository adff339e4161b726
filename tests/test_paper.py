"""What goes into a paper: LaTeX is read back by pylatexenc, PDF by pypdf, SVG and CSV by Python's own readers."""

from __future__ import annotations

import csv
import io
import re
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Command
from matplotlib.backends.backend_svg import FigureCanvasSVG
from pylatexenc.latex2text import LatexNodes2Text
from pylatexenc.latexwalker import LatexEnvironmentNode, LatexWalker
from pypdf import PdfReader

from bellwether.recipe.recipe import Arm
from bellwether.report.compare_table import Line
from bellwether.report.page import draw
from bellwether.report.page.charts import Series, bars, lines
from bellwether.report.page.draw import COLUMN, VARIABLES, Chart
from bellwether.report.paper import comparison_tables, tabular, tex
from bellwether.store.comparison import Comparison, read_comparison
from bellwether.tools.intervals import Interval

NASTY = [
    "\\input{/etc/passwd}",
    "[10pt] closed_qa",
    "*100% & more \\\\ #1",
    "a^b_c ~ {open",
    "}close{ $x$",
    "<b>|`quoted'",
    'say "hi"',
    "two\nlines",
    "über, 中文",
]


def table_of(text: str) -> list[list[str]]:
    """The cells of a ``tabular`` as plain text, as pylatexenc reads them; anything that is not whole LaTeX raises."""
    nodes, _, _ = LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    (environment,) = [node for node in nodes if node.isNodeType(LatexEnvironmentNode)]
    assert environment.environmentname == "tabular"
    body = text[text.index("\\toprule") :].removesuffix("\\bottomrule\n\\end{tabular}\n")
    body = re.sub(r"\\(top|mid)rule\n", "", body)
    plain = LatexNodes2Text(strict_latex_spaces=True)
    lines = [line for line in body.split(" \\\\\n") if line]
    assert not any(re.match(r"\s*[\[*]", line) for line in lines), "taken for an option of the line's end before"
    return [[plain.latex_to_text(cell).strip() for cell in re.split(r"(?<!\\)&", line)] for line in lines]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", cell.replace("−", "-"))]


def test_tables_in_latex_say_what_the_csv_file_says(tiny_comparison: Path) -> None:
    scale = {"loss": 1.0, "rouge_l": 100.0, "exact": 100.0}
    figures = list(csv.DictReader(io.StringIO((tiny_comparison / "table.csv").read_text())))
    for name, what in (("table.tex", "score"), ("differences.tex", "federated minus it")):
        (_, *metrics), *rows = table_of((tiny_comparison / name).read_text())
        assert metrics == ["loss", "ROUGE-L, %", "exact match, %"]
        wanted = [row for row in figures if row["what"] == what]
        assert [row[0] for row in rows] == list(dict.fromkeys(row["line"] for row in wanted))
        for row in rows:
            for metric, cell in zip(scale, row[1:], strict=True):
                (one,) = [one for one in wanted if (one["line"], one["metric"]) == (row[0], metric)]
                ends = [float(one[side]) * scale[metric] for side in ("mean", "low", "high")]
                half = 0.0005 if metric == "loss" else 0.05
                assert numbers(cell) == pytest.approx(ends, abs=half * 1.0001)
                assert cell.endswith("ns") == (what != "score" and float(one["p"]) > 0.05)


def test_names_are_never_commands_of_latex() -> None:
    read = table_of(tabular(["arm", "score"], [[[tex(name), "1"] for name in NASTY]]))
    shown = [row[0].translate({ord("ˆ"): "^", ord("”"): '"'}) for row in read[1:]]  # marks as pylatexenc has them
    assert shown == [" ".join(name.split()) for name in NASTY]
    for name in NASTY:
        assert re.fullmatch(r"(\\[a-z]+|\\[{}$&#_%]|[^\\])*", tex(name)), "only known commands and escapes"
    assert tex("turned \u202e around\x1b") == "turned {[}U+202E{]} around{[}U+001B{]}"


def compared(scores: dict[str, tuple[float, float, float]], gaps: dict[str, float], seeds: int = 2) -> dict[str, str]:
    """The tables of arms with one score each: mean and ends of its interval, and the p-value of the difference."""
    arms = {name: Arm(trains="federation" if name == "federated" else "alone") for name in scores}
    table = [
        Line(
            name,
            {"exact": Interval(*found, 1.0)},
            {"exact": Interval(0.1, 0.0, 0.2, gaps[name])} if name in gaps else {},
        )
        for name, found in scores.items()
    ]
    recipe = type("Recipe", (), {"name": "made\nup"})
    outcomes = [type("Outcome", (), {"seed": seed, "categories": ("a",)}) for seed in range(seeds)]
    made: Any = Comparison(recipe, arms, outcomes, ())  # type: ignore[arg-type]
    return {name: text.decode() for name, text in comparison_tables(table, made).items()}


@pytest.mark.parametrize(
    ("scores", "gaps", "best"),
    [
        ({"alone": (0.1, 0.0, 0.2), "federated": (0.5, 0.4, 0.6)}, {"alone": 0.01}, "50.0"),
        ({"alone": (0.1, 0.0, 0.2), "federated": (0.5, 0.4, 0.6)}, {"alone": 0.06}, None),
        ({"alone": (0.6, 0.3, 0.8), "federated": (0.5, 0.4, 0.6)}, {"alone": 0.04}, "60.0"),
        ({"one": (0.6, 0.5, 0.7), "two": (0.3, 0.2, 0.4)}, {}, "60.0"),
        ({"one": (0.6, 0.4, 0.7), "two": (0.3, 0.2, 0.4)}, {}, None),
        ({"only": (0.6, 0.4, 0.7)}, {}, None),
    ],
)
def test_an_arm_is_bold_only_where_it_can_be_told_from_every_other(
    scores: dict[str, tuple[float, float, float]], gaps: dict[str, float], best: str | None
) -> None:
    text = compared(scores, gaps)["table.tex"]
    assert re.findall(r"\\textbf{([\d.]+)}", text) == ([best] if best else [])
    assert text.startswith("% Written by bellwether")
    assert "recipe made up, seeds 0, 1" in text
    assert "one seed" in compared(scores, gaps, seeds=1)["table.tex"]
    assert "one seed" not in text


def test_scores_by_seed_are_those_whose_mean_the_table_has(tiny_comparison: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((tiny_comparison / "scores.csv").read_text())))
    comparison = read_comparison(tiny_comparison)
    places = [(row["arm"], row["seed"], row["measure"]) for row in rows]
    assert len(set(places)) == len(places) == len(comparison.arms) * 1 * 3
    table = list(csv.DictReader(io.StringIO((tiny_comparison / "table.csv").read_text())))
    means = {(row["line"], row["metric"]): float(row["mean"]) for row in table if row["what"] == "score"}
    for arm in comparison.arms:
        for measure in ("loss", "rouge_l", "exact"):
            values = [float(row["value"]) for row in rows if (row["arm"], row["measure"]) == (arm, measure)]
            assert statistics.fmean(values) == pytest.approx(means[arm, measure], rel=1e-12, abs=1e-15)


def drawn(wide: bool = False) -> Chart:
    series = [Series("training", [1, 2, 3], [3.0, 2.0, 1.5], look=0), Series("tëst", [1, 3], [2.5, 2.0], look=1)]
    return lines("loss-by-round", "Loss by round: \x1b falls", series, "round", "nats per token", wide=wide)


@pytest.mark.parametrize(("wide", "width"), [(False, COLUMN), (True, COLUMN * 804 / 390)])
def test_a_chart_for_a_paper_is_a_vector_file_of_a_columns_width_with_its_letters(wide: bool, width: float) -> None:
    files = drawn(wide).printed()
    assert sorted(files) == ["loss-by-round.pdf", "loss-by-round.svg"]
    (page,) = PdfReader(io.BytesIO(files["loss-by-round.pdf"]), strict=True).pages
    assert float(page.mediabox.width) == pytest.approx(width, abs=0.01)
    assert "nats per token" in page.extract_text()
    assert "tëst" in page.extract_text()
    fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]  # type: ignore[index]
    programs = [one["/DescendantFonts"][0].get_object() if "/DescendantFonts" in one else one for one in fonts]
    assert programs
    assert all("/FontFile2" in one["/FontDescriptor"] for one in programs)
    assert not page.images, "nothing is painted in dots"
    root = ElementTree.fromstring(files["loss-by-round.svg"])
    assert root.get("width") == f"{width:g}pt" or float(str(root.get("width")).removesuffix("pt")) == pytest.approx(
        width
    )
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "path" in tags
    assert not tags & {"text", "image"}
    assert b"var(" not in files["loss-by-round.svg"]
    assert draw.SERIES[1].encode() in files["loss-by-round.svg"]


def test_files_for_a_paper_have_the_same_bytes_every_time() -> None:
    first, again = drawn().printed(), drawn().printed()
    assert first == again
    assert not PdfReader(io.BytesIO(first["loss-by-round.pdf"])).metadata.keys() & {"/CreationDate", "/ModDate"}  # type: ignore[union-attr]
    assert b"<dc:date>" not in first["loss-by-round.svg"]


def test_charts_have_the_colours_of_the_pages_light_style() -> None:
    style = (Path(draw.__file__).parent / "style.css").read_text()
    light = style[: style.index("@media")]
    for colour, variable in VARIABLES.items():
        assert re.search(rf"--{variable[6:-1]}: {colour};", light), (colour, variable)


@pytest.mark.parametrize("chart", [drawn(), drawn(wide=True)], ids=["narrow", "wide"])
def test_a_layout_is_that_of_matplotlibs_constrained_layout(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_laid_out_alike(chart, monkeypatch)


def test_a_layout_of_named_rows_is_that_of_matplotlibs_constrained_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"category {'of a long name ' * (number % 3)}{number}" for number in range(9)]
    values = [0.5 * number for number in range(9)]
    series = [Series("base", [], values), Series("tuned", [], values, [0.0] * 9, [9.0] * 9, look=1)]
    assert_laid_out_alike(bars("by-category", "Bars.", names, series, "exact match, %"), monkeypatch)


def assert_laid_out_alike(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our places of the axes are matplotlib's, to a thousandth of the figure."""
    places = []

    def constrained(figure: Any) -> None:
        FigureCanvasSVG(figure)  # in whose letters it measures
        figure.set_layout_engine("constrained")
        figure.get_layout_engine().execute(figure)
        places.append(figure.axes[0].get_position().bounds)

    ours = draw.place

    def measured(figure: Any) -> None:
        ours(figure)
        places.append(figure.axes[0].get_position().bounds)

    for place in (measured, constrained):
        monkeypatch.setattr(draw, "place", place)
        chart.inline()
    assert places[0] == pytest.approx(places[1], abs=1e-3)


def test_the_option_writes_charts_and_tables_beside_the_page(
    bellwether: Command, tiny_comparison: Path, tiny_run: Any, tmp_path: Path
) -> None:
    for folder, chart, table in (
        (tiny_comparison, "score-loss", "What-an-adapter-of-each-arm-cost-mean-over-seeds"),
        (tiny_run[0], "by-round-loss", "Scores-by-category"),
    ):
        page = tmp_path / folder.name / "page.html"
        page.parent.mkdir()
        assert bellwether("report", folder, "--out", page).code == 0
        assert [one.name for one in page.parent.iterdir()] == ["page.html"]
        outcome = bellwether("report", folder, "--out", page, "--figures")
        assert outcome.code == 0, outcome.err
        names = {path.name for path in (page.parent / "figures").iterdir()}
        assert {f"{chart}.svg", f"{chart}.pdf", f"{table}.tex"} <= names
        assert not any(name.startswith(".") for name in names)
        for path in (page.parent / "figures").glob("*.tex"):
            heads, *rows = table_of(path.read_text().split("booktabs}\n")[1])
            assert rows
            assert {len(row) for row in rows} == {len(heads)}
        assert not (folder / "figures").exists()
