r"""What goes into a paper: tables as LaTeX, every chart as SVG and PDF, scores by seed as CSV.

bellwether report FOLDER --figures

Tables take the package booktabs and are a bare ``tabular``: caption and label are the author's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bellwether.exchange.scores import Scores, macro
from bellwether.report.compare_table import METRICS, Line
from bellwether.report.page.parts import Figure, Page, Table, visible
from bellwether.store.comparison import Comparison
from bellwether.tools.atomic import slug
from bellwether.tools.intervals import Interval
from bellwether.tools.spreadsheet import csv_table
from bellwether.tools.version import VERSION
from bellwether.tools.words import counted

_HEADS = {"loss": "loss", "rouge_l": r"ROUGE-L, \%", "exact": r"exact match, \%", "preferred": r"preferred, \%"}
_DIGITS = {"loss": 3, "rouge_l": 1, "exact": 1, "preferred": 1}
_SCALE = {"loss": 1.0, "rouge_l": 100.0, "exact": 100.0, "preferred": 100.0}
_BETTER = {"loss": -1, "rouge_l": 1, "exact": 1, "preferred": 1}
_NONE = "--"
# Sections whose tables are none of a paper's, or have files of their own (``comparison_tables``).
_ELSEWHERE = {"environment", "scores"}
_MARKS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "[": "{[}",  # after a line's end it would be taken for an option
    "]": "{]}",
    "*": "{*}",  # likewise
    "`": r"\textasciigrave{}",
    "−": "$-$",
    "→": r"$\to$",
    "∞": r"$\infty$",
    "≤": r"$\le$",
    "–": "--",
    "…": r"\ldots{}",
    "‹": "{[}",  # around the number of a hidden character
    "›": "{]}",
    **{mark: f"\\{mark}" for mark in "{}$&#_%"},
}
_SPECIAL = re.compile("[" + re.escape("".join(_MARKS)) + "]")


def tex(text: str) -> str:
    """Return a text for LaTeX, on one line and without any command; letters beyond ASCII stay as they are."""
    return _SPECIAL.sub(lambda mark: _MARKS[mark[0]], " ".join(visible(text).split()))


def tabular(heads: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], words: int = 1) -> str:
    """Return a table as LaTeX, by the package booktabs.

    Args:
        heads: of the columns, as LaTeX.
        groups: lines of as many cells, as LaTeX, in groups that a rule parts.
        words: how many columns at the left hold words; the others are numbers and stand at the right.
    """
    parts = ["".join(f"{' & '.join(line)} \\\\\n" for line in lines) for lines in ([heads], *groups) if lines]
    columns = "l" * words + "r" * (len(heads) - words)
    body = "\\midrule\n".join(parts)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def comparison_tables(lines: Sequence[Line], comparison: Comparison) -> dict[str, bytes]:
    """Return a comparison's scores and differences as LaTeX, by file name; differences where there are any.

    Args:
        lines: of ``compare_table.make_lines``.
        comparison: what it gave.
    """
    known = [metric for metric in METRICS if any(metric in line.scores for line in lines)]
    arms = [line for line in lines if line.name in comparison.arms]
    others = [line for line in lines if line.name not in comparison.arms]
    best = {metric: _best(arms, metric, comparison) for metric in known}
    heads = ["arm", *(_HEADS[metric] for metric in known)]
    scores = [
        [[tex(line.name), *(_cell(line, metric, best[metric]) for metric in known)] for line in group]
        for group in (arms, others)
    ]
    bold = "Bold: the best of the arms where it can be told from every other one."
    if len({outcome.seed for outcome in comparison.outcomes}) == 1:
        bold += " With one seed intervals speak of questions alone."
    files = {"table.tex": _about(comparison, bold) + tabular(heads, scores)}
    gaps = [
        [[tex(line.name), *(_gap(line.gaps.get(metric), metric) for metric in known)] for line in group if line.gaps]
        for group in (arms, others)
    ]
    if any(gaps):
        doubt = "Federated minus the arm. ns: cannot be told from none (p > 0.05, adjusted by Holm's method)."
        files["differences.tex"] = _about(comparison, doubt) + tabular(heads, gaps)
    return {name: text.encode() for name, text in files.items()}


def _about(comparison: Comparison, more: str) -> str:
    """Return comments on what stands in a table."""
    seeds = ", ".join(map(str, dict.fromkeys(outcome.seed for outcome in comparison.outcomes)))
    name = " ".join(visible(comparison.recipe.name).split())
    return (
        f"% Written by bellwether {VERSION}: recipe {name}, seeds {seeds}, "
        f"{counted(len(comparison.outcomes[0].categories), 'scored row')}.\n"
        f"% Means with 95 % intervals. {more}\n% \\usepackage{{booktabs}}\n"
    )


def _best(arms: Sequence[Line], metric: str, comparison: Comparison) -> str | None:
    """Return the name of the arm that is better than each other one beyond chance; None where there is no such arm."""
    known = [line for line in arms if metric in line.scores]
    best = max(known, key=lambda line: line.scores[metric].mean * _BETTER[metric])
    others = [line for line in known if line is not best]
    return best.name if others and all(_apart(best, other, metric, comparison) for other in others) else None


def _apart(one: Line, other: Line, metric: str, comparison: Comparison) -> bool:
    """Return whether two arms differ beyond chance: by their difference where it is known, else by their intervals."""
    for line, reference in ((one, other), (other, one)):
        if reference.name == comparison.reference(comparison.arms[line.name].counts_steps) and metric in line.gaps:
            return line.gaps[metric].p <= 0.05
    first, second = one.scores[metric], other.scores[metric]
    return first.low > second.high or second.low > first.high


def _cell(line: Line, metric: str, best: str | None) -> str:
    """Return a score with its interval, as LaTeX."""
    found = line.scores.get(metric)
    return _NONE if found is None else _interval(found, metric, bold=line.name == best)


def _gap(found: Interval | None, metric: str) -> str:
    """Return a difference with its interval, as LaTeX."""
    if found is None:
        return _NONE
    return _interval(found, metric) + (r"\textsuperscript{ns}" if found.p > 0.05 else "")


def _interval(found: Interval, metric: str, *, bold: bool = False) -> str:
    """Return a mean, and the ends of its interval in brackets."""
    mean, low, high = (_number(value, metric) for value in (found.mean, found.low, found.high))
    mean = rf"\textbf{{{mean}}}" if bold else mean
    return mean if math.isnan(found.low) else rf"{mean} {{[{low}, {high}]}}"


def _number(value: float, metric: str) -> str:
    """Return a score as LaTeX, with a minus that is as long as a plus."""
    text = f"{abs(value) * _SCALE[metric]:.{_DIGITS[metric]}f}"
    return f"$-${text}" if value < 0 and float(text) else text


def scores_by_seed(comparison: Comparison) -> bytes:
    """Return every arm's scores under each seed as CSV: arm, seed, measure, value; means over categories, then clients.

    Args:
        comparison: what it gave.
    """
    by_seed: dict[tuple[str, int], list[Scores]] = {}
    for outcome in comparison.outcomes:
        by_seed.setdefault((outcome.arm, outcome.seed), []).append(macro(outcome.by_category()))
    return csv_table(("arm", "seed", "measure", "value"), _values(by_seed))


def _values(by_seed: Mapping[tuple[str, int], Sequence[Scores]]) -> Iterator[tuple[Any, ...]]:
    """Yield the lines of the table by seed; a score that some adapter does not have is left out."""
    for (arm, seed), scores in by_seed.items():
        for metric in METRICS:
            values = [getattr(one, metric) for one in scores]
            if None not in values:
                yield arm, seed, metric, math.fsum(values) / len(values)


def page_files(page: Page) -> dict[str, bytes]:
    """Return every chart of a page as SVG and PDF, and every table of results as LaTeX, by file name.

    Args:
        page: whose sections they are of.
    """
    files: dict[str, bytes] = {}
    for section in page.sections:
        for part in section.parts:
            if isinstance(part, Figure):
                files |= part.chart.printed()
            elif isinstance(part, Table) and section.key not in _ELSEWHERE:
                files[f"{slug(part.title)}.tex"] = _table(part)
    return files


def _table(part: Table) -> bytes:
    """Return a table of a page as LaTeX."""
    words = next((place for place, cell in enumerate(part.rows[0]) if cell.number), len(part.heads)) if part.rows else 1
    lines = [[tex(cell.text) for cell in row] for row in part.rows]
    about = " ".join(visible(part.title).split())
    text = tabular([tex(head) for head in part.heads], [lines], words)
    return f"% {about}\n% \\usepackage{{booktabs}}\n{text}".encode()
