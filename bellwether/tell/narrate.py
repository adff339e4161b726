"""How far a run has come, in words: what its events have told, as plain lines and as the table at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bellwether.exchange.records import (
    Evaluated,
    EvaluationRecord,
    Event,
    Note,
    Record,
    RoundFinished,
    RoundRecord,
    RunFinished,
    RunStarted,
    SurveyFinished,
    SurveyRecord,
    Watcher,
)
from bellwether.exchange.scores import Scores, Totals, macro, means
from bellwether.tell.status import Clock, RunStatus
from bellwether.tools.progress import TRAINING, Advanced
from bellwether.tools.words import byte_size, clean, counted, duration

SPARSE = 10.0  # seconds without a line after which one tells how far a phase is

Show = Callable[[float | None], str]


# Plain lines --------------------------------------------------------------------------------------


def plain_lines(write: Callable[[str], None], clock: Clock = time.monotonic) -> Watcher:
    """Return a watcher that writes one line per round, evaluation and note, and now and then how far a phase is.

    Args:
        write: takes one line without its end.
        clock: seconds that only grow.
    """
    status, last = RunStatus(clock=clock), clock()

    def watcher(event: Event) -> None:
        nonlocal last
        status.take(event)
        if isinstance(event, Advanced) and clock() - last < SPARSE:
            return
        for line in _lines(event, status):
            write(line)
            last = clock()

    return watcher


@contextlib.contextmanager
def write_log(path: Path) -> Iterator[Watcher]:
    """Append the plain lines of a run to a file, each with the time of day in UTC.

    Args:
        path: the log, such as ``log.txt`` of a run folder.

    Yields:
        The watcher to hand to the run.
    """
    with path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        yield plain_lines(lambda text: print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), text, file=log))


def tell_all(watchers: Iterable[Watcher]) -> Watcher:
    """Return a watcher that tells several."""
    told = tuple(watchers)

    def watcher(event: Event) -> None:
        for each in told:
            each(event)

    return watcher


def _lines(event: Event, status: RunStatus) -> list[str]:
    """Return the plain lines for an event, after the status took it."""
    match event:
        case RunStarted():
            verb = f"goes on after round {event.done}" if event.done else "begins"
            return [
                f"run {clean(event.name)} {verb} in {clean(event.folder)}: "
                f"{counted(event.rounds, 'round')}, {event.cohort} of {counted(event.clients, 'client')} in each"
            ]
        case SurveyFinished():
            return [f"round {event.round}: {survey_line(event.record)}"]
        case RoundFinished():
            return [_round_line(event.record, status), *_left_out(event.record)]
        case Evaluated():
            base = status.base[event.record.part]
            return [_evaluation_line(event.record, base), *_group_lines(event.record, base)]
        case Note():
            return [note_line(event)]
        case Advanced():
            return [f"  {phase_line(status)}{left_words(status.remaining)}"]
        case RunFinished():
            return [f"run ends after {duration(event.seconds)}"]
    return []


def phase_line(status: RunStatus) -> str:
    """Return what is done at the moment, and how much of it is done."""
    phase, words = status.phase, phase_words(status.phase) if status.phase is not None else ""
    if not status.in_round or (phase is not None and phase.phase != TRAINING):
        return words
    answered = len(status.finished) + len(status.failed) + len(status.idle)
    total = f" of {status.run.rounds}" if status.run is not None else ""
    where = f"round {status.round}{total}, {answered} of {len(status.cohort)} clients done"
    return f"{where}: {words}" if words else where


def phase_words(phase: Advanced) -> str:
    """Return how far a phase is, in words."""
    several = phase.whole_total > 1
    where = f"{phase.whole_done} of {phase.whole_total} {phase.whole_unit}: " if several else ""
    return f"{where}{phase.phase} {phase.done:,}/{phase.total:,} {phase.unit}" if phase.total else where + phase.phase


def left_words(left: float | None) -> str:
    """Return the time that is left as the end of a line; nothing where none is known."""
    return f"; about {duration(left)} left" if left is not None and left >= 0.5 else ""


def _round_line(record: RoundRecord, status: RunStatus) -> str:
    """Return the line of a round."""
    total = f" of {status.run.rounds}" if status.run else ""
    times = left_words(status.remaining)
    if record.failure is not None:
        return f"round {record.round}{total} failed, the adapter stays as it was: {clean(record.failure)}{times}"
    if not record.clients:
        return f"round {record.round}{total}: no row was selected, the adapter stays as it was{times}"
    speed = status.rows_per_second
    pace = "" if speed is None else f", {speed:,.0f} rows/s"
    preferred = "" if record.preferred is None else f", preferred {_percent(record.preferred)}"
    return (
        f"round {record.round}{total}: loss {record.loss:.4f}{preferred}, {len(record.clients)} of "
        f"{counted(len(record.cohort), 'client')}, "
        f"{counted(record.rows_seen, 'row')}{pace}, {byte_size(record.bytes_up)} up, "
        f"{byte_size(record.bytes_down)} down{times}"
    )


def survey_line(record: SurveyRecord) -> str:
    """Return what came of a survey."""
    sent, kept = (sum(map(len, numbers.values())) for numbers in (record.centroids, record.kept))
    where = sum(map(bool, record.kept.values()))
    up = byte_size(record.bytes_up)
    return (
        f"{counted(sent, 'centroid')} ({up}) of {counted(len(record.centroids), 'client')}, {kept:,} kept at "
        f"{where} of them"
    )


def _left_out(record: RoundRecord) -> list[str]:
    """Return a line per client that was left out of a round."""
    return [f"  left out: {clean(client)}: {clean(reason)}" for client, reason in record.left_out.items()]


def _evaluation_line(record: EvaluationRecord, base: EvaluationRecord) -> str:
    """Return the line of an evaluation."""
    when = "of the untuned base" if record.round == 0 else f"after round {record.round}"
    before = None if record is base else macro(base.categories)
    return f"{clean(record.part)} {when}: {_scores(before, macro(record.categories))}"


def _group_lines(record: EvaluationRecord, base: EvaluationRecord) -> list[str]:
    """Return a line per group that was scored: means over all its rows."""
    return [
        f"  all rows of {clean(name) or '(no group)'}: "
        f"{_scores(None if record is base else means(base.groups.get(name, Totals())), means(totals))}"
        for name, totals in record.groups.items()
    ]


def _scores(before: Scores | None, after: Scores) -> str:
    """Return scores, with those before where there are any."""
    shown = [
        f"{name} {show(new)}" if before is None or old is None else f"{name} {show(old)} -> {show(new)}"
        for name, show, old, new, _ in pairs(before or after, after)
        if new is not None
    ]
    return f"{', '.join(shown) or 'nothing scored'} ({counted(after.rows, 'row')})"


def note_line(event: Note) -> str:
    """Return the line of a note."""
    return f"warning: {clean(event.text)}" if event.warning else clean(event.text)


# The table at the end -----------------------------------------------------------------------------


def summary(records: Iterable[Record], *, ascii_only: bool = False) -> Group:
    """Return the tables of base against final scores, one per part that was scored, and one by group where there are.

    Args:
        records: the records of a run, of which the evaluations count.
        ascii_only: whether only ASCII can be shown.
    """
    parts: dict[str, list[EvaluationRecord]] = {}
    for record in records:
        if isinstance(record, EvaluationRecord):
            parts.setdefault(record.part, []).append(record)
    tables = []
    for scored in parts.values():
        tables.append(score_table(scored[0], scored[-1], ascii_only=ascii_only))
        if scored[-1].groups:
            tables.append(group_table(scored[0], scored[-1], ascii_only=ascii_only))
    return Group(*tables)


def score_table(base: EvaluationRecord, final: EvaluationRecord, *, ascii_only: bool = False) -> Table:
    """Return the table of base against final scores of one part, by category and as their macro mean.

    Args:
        base: the scores of the untuned base.
        final: those of the result, on the same part.
        ascii_only: whether only ASCII can be shown.
    """
    title = f"{clean(final.part)}: untuned base against round {final.round}"
    # The mean stands first, since it is what most people look for.
    mean = macro(base.categories), macro(final.categories)
    table = _table(title, "category", mean[1], ascii_only)
    table.add_row("mean of categories", *_cells(*mean, ascii_only), end_section=True)
    _add_rows(table, base.categories, final.categories, ascii_only)
    return table


def group_table(base: EvaluationRecord, final: EvaluationRecord, *, ascii_only: bool = False) -> Table:
    """Return the table of base against final scores of one part by group, as means over all rows of each.

    Args:
        base: the scores of the untuned base.
        final: those of the result, on the same part.
        ascii_only: whether only ASCII can be shown.
    """
    title = f"{clean(final.part)} by group: untuned base against round {final.round}"
    table = _table(title, "group (mean of rows)", macro(final.groups), ascii_only)
    _add_rows(table, base.groups, final.groups, ascii_only)
    return table


def _table(title: str, first: str, scores: Scores, ascii_only: bool) -> Table:
    """Return an empty table with a column for each of the scores."""
    table = Table(title=title, box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD, title_style="bold")
    table.add_column(first, overflow="fold", min_width=8)
    table.add_column("rows", justify="right", no_wrap=True)
    for heading in ("loss", "ROUGE-L", "exact match", *(["preferred"] if scores.preferred is not None else [])):
        table.add_column(heading, justify="right")
    return table


def _add_rows(table: Table, base: Mapping[str, Totals], final: Mapping[str, Totals], ascii_only: bool) -> None:
    """Add a row of scores for every name."""
    for name in sorted({*base, *final}):
        before, after = (means(totals.get(name, Totals())) for totals in (base, final))
        table.add_row(Text(clean(name, ascii_only)), *_cells(before, after, ascii_only))


def _cells(before: Scores, after: Scores, ascii_only: bool) -> list[Text]:
    """Return the number of rows, and what became of each score."""
    changes = [
        Text(change(show, old, new, ascii_only), style=verdict(old, new, sign))
        for _, show, old, new, sign in pairs(before, after)
    ]
    return [Text(f"{after.rows:,}"), *changes]


# Words --------------------------------------------------------------------------------------------


def pairs(before: Scores, after: Scores) -> list[tuple[str, Show, float | None, float | None, int]]:
    """Return name, format, old and new value, and the sign of an improvement, per score; of preferences where known."""
    scores: list[tuple[str, Show, float | None, float | None, int]] = [
        ("loss", _plain_number, before.loss, after.loss, -1),
        ("ROUGE-L", _percent, before.rouge_l, after.rouge_l, 1),
        ("exact", _percent, before.exact, after.exact, 1),
    ]
    if before.preferred is not None or after.preferred is not None:
        scores.append(("preferred", _percent, before.preferred, after.preferred, 1))
    return scores


def change(show: Show, old: float | None, new: float | None, ascii_only: bool) -> str:
    """Return ``old→new`` with the unit once, or what there is of it."""
    if old is None and new is None:
        return "-" if ascii_only else "–"
    before, after = (show(value) for value in (old, new))
    unit = " %" if after.endswith(" %") else ""
    return f"{before.removesuffix(unit)}{'->' if ascii_only else '→'}{after}"


def verdict(old: float | None, new: float | None, sign: int) -> str:
    """Return the style for a change: green for better, red for worse, plain for equal or unknown."""
    if old is None or new is None or old == new:
        return ""
    return "green" if (new - old) * sign > 0 else "red"


def _plain_number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.1f} %"
