"""What a judge found, as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping

from rich.console import Group
from rich.text import Text

from bellwether.ask.judge import ATTEMPTS, Judgement
from bellwether.ask.judge_folder import A, B
from bellwether.ask.judging import Judged, Orders, Tally
from bellwether.tell.tables import markdown, rich_table
from bellwether.tools.intervals import Interval
from bellwether.tools.json_text import plain
from bellwether.tools.words import clean, counted

HEADS = ("", "sum of scores", "better on")


def judgement_files(judgement: Judgement, names: Mapping[str, str]) -> dict[str, str]:
    """Return the files of a result by name: tables for people, and all figures as JSON.

    Args:
        judgement: what the judge found.
        names: what the two models, A and B, are called.
    """
    tally = judgement.tally
    parts = [_plain(_title(judgement)), markdown(HEADS, _rows(tally, names)), _plain(" ".join(_sentences(judgement)))]
    if len({one.category for one in tally.judged}) > 1:
        parts.append(markdown(("category", "questions", A, B, f"{B} / {A}"), _category_rows(tally)))
    rows = [(one.question, one.category, f"{one.a:.2f}", f"{one.b:.2f}") for one in tally.judged]
    parts.append(markdown(("question", "category", A, B), rows))
    return {"result.md": "\n".join(parts), "result.json": json.dumps(_figures(judgement, names), indent=1) + "\n"}


def table(judgement: Judgement, names: Mapping[str, str], *, ascii_only: bool = False) -> Group:
    """Return the result for the terminal.

    Args:
        judgement: what the judge found.
        names: what the two models, A and B, are called.
        ascii_only: whether only ASCII can be shown.
    """
    shown = rich_table(_title(judgement), HEADS, _rows(judgement.tally, names), ascii_only=ascii_only)
    return Group(shown, *(Text(clean(sentence, ascii_only)) for sentence in _sentences(judgement)))


def _title(judgement: Judgement) -> str:
    judged = len(judgement.tally.judged)
    return f"{counted(judged, 'question')} judged by {judgement.judge.model}"


def _rows(tally: Tally, names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return the cells of the main table."""
    if tally.sums is None:
        return []
    better = {A: sum(one.a > one.b for one in tally.judged), B: sum(one.b > one.a for one in tally.judged)}
    sums = tally.sums
    return [
        (f"{A}  {names[A]}", _shown(sums.a, 1), str(better[A])),
        (f"{B}  {names[B]}", _shown(sums.b, 1), str(better[B])),
        (f"{B} - {A}", _shown(sums.difference, 1), ""),
        (f"{B} / {A}", _shown(sums.ratio, 3), ""),
    ]


def _category_rows(tally: Tally) -> list[tuple[str, str, str, str, str]]:
    """Return the cells of the table by category: sums, and their ratio."""
    by_category: dict[str, list[Judged]] = {}
    for one in tally.judged:
        by_category.setdefault(one.category, []).append(one)
    rows = []
    for category, judged in by_category.items():
        a, b = math.fsum(one.a for one in judged), math.fsum(one.b for one in judged)
        rows.append((category, str(len(judged)), f"{a:.1f}", f"{b:.1f}", f"{b / a:.3f}"))
    return rows


def _shown(found: Interval, digits: int) -> str:
    """Return a figure with its interval, where there is one."""
    ends = "" if math.isnan(found.low) else f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"{found.mean:.{digits}f}{ends}"


def _sentences(judgement: Judgement) -> list[str]:
    """Return what there is to say beside the table."""
    tally, repeats = judgement.tally, judgement.settings.repeats
    over = "both orders" if repeats == 1 else f"both orders and {repeats} repeats"
    said = [f"Scores from 1 to 10, means over {over}; intervals of 95 % over questions."]
    if tally.left_out:
        left = ", ".join(tally.left_out[:5]) + (" and more" if len(tally.left_out) > 5 else "")
        said.append(
            f"Not counted, for want of a verdict in one order: {counted(len(tally.left_out), 'question')} ({left})."
        )
    said.append(_orders(tally.orders))
    said.append(
        f"{tally.unreadable} of {counted(tally.verdicts, 'verdict')} could not be read after "
        f"{counted(ATTEMPTS, 'reply', 'replies')}; the judge "
        f"replied {judgement.replies} times."
    )
    if judgement.prompt_tokens is None or judgement.reply_tokens is None:
        said.append("Spent: not known, since the server did not count tokens.")
    else:
        said.append(
            f"Spent: {counted(judgement.prompt_tokens, 'token')} of requests, {judgement.reply_tokens:,} of replies."
        )
    return said


def _orders(orders: Orders) -> str:
    """Return the sentence on how often the two orders disagree."""
    if orders.share is None:
        return "No pair of answers has a verdict in both orders."
    return (
        f"The two orders disagree in {orders.inconsistent} of {counted(orders.pairs, 'pair')} of verdicts "
        f"({100 * orders.share:.1f} %): in {orders.first} the answer shown first was better both times, in "
        f"{orders.second} the second."
    )


def _plain(text: str) -> str:
    """Return a line of Markdown in which nothing is taken for markup of a page."""
    return html.escape(clean(text), quote=False) + "\n"


def _figures(judgement: Judgement, names: Mapping[str, str]) -> dict[str, object]:
    """Return all figures as JSON's own types."""
    settings, tally = judgement.settings, judgement.tally
    return {
        "models": dict(names),
        "judge": judgement.judge.model,
        "judges": list(judgement.judges),
        "address": judgement.judge.address,
        "temperature": judgement.judge.temperature,
        "questions": judgement.questions,
        "repeats": settings.repeats,
        "max_new_tokens": settings.max_new_tokens,
        "replies": judgement.replies,
        "prompt_tokens": judgement.prompt_tokens,
        "reply_tokens": judgement.reply_tokens,
        **plain(tally),
    }
