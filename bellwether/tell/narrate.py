"""How far a run has come, in words: what its events have told, as plain lines and as the table at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bellwether.exchange.records import (
    ClientFailed,
    ClientFinished,
    ClientRecord,
    Evaluated,
    EvaluationRecord,
    Event,
    Note,
    Record,
    RoundFinished,
    RoundRecord,
    RoundStarted,
    RunFinished,
    RunStarted,
    SurveyFinished,
    SurveyRecord,
    Watcher,
)
from bellwether.exchange.scores import Scores, Totals, macro, means
from bellwether.tools.words import byte_size, clean, counted, duration

Clock = Callable[[], float]
Show = Callable[[float | None], str]


@dataclass
class RunStatus:
    """What the events of a run have told so far.

    Args:
        clock: seconds that only grow.
    """

    clock: Clock = time.monotonic
    run: RunStarted | None = None
    round: int = 0
    cohort: tuple[str, ...] = ()
    finished: dict[str, ClientRecord] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    losses: list[float] = field(default_factory=list)
    base: dict[str, EvaluationRecord] = field(default_factory=dict)
    now: dict[str, EvaluationRecord] = field(default_factory=dict)
    in_round: bool = False
    done: int = 0
    done_here: int = 0
    rows: int = 0
    tokens: int = 0
    training: float = 0.0
    started: float = 0.0
    first_round: float = 0.0
    last_round: float = 0.0
    mark: float = 0.0
    over: bool = False

    def take(self, event: Event) -> None:
        """Note what an event tells."""
        now = self.clock()
        match event:
            case RunStarted():
                self.run, self.done, self.started = event, event.done, now
            case RoundStarted():
                self.first_round = self.first_round if self.done_here else now
                self.round, self.cohort, self.in_round, self.mark = event.round, event.cohort, True, now
                self.finished, self.failed, self.idle = {}, {}, frozenset()
            case SurveyFinished():
                self.idle = frozenset(client for client, kept in event.record.kept.items() if not kept)
                self.mark = now
            case ClientFinished():
                self.finished[event.record.client] = event.record
                self.rows, self.tokens = self.rows + event.record.rows_seen, self.tokens + event.record.tokens
                self._count_training(now)
            case ClientFailed():
                self.failed[event.client] = event.reason
                self._count_training(now)
            case RoundFinished():
                self.done, self.done_here, self.in_round = event.record.round, self.done_here + 1, False
                self.last_round = now
                self.failed |= event.record.left_out
                if event.record.failure is None and event.record.clients:
                    self.losses.append(event.record.loss)
            case Evaluated():
                self._evaluated(event.record)
            case RunFinished():
                self.over = True

    @property
    def elapsed(self) -> float:
        """Seconds since this process began the run."""
        return self.clock() - self.started

    @property
    def rows_per_second(self) -> float | None:
        """Rows trained per second of training, in this process; None before the first."""
        return self.rows / self.training if self.training > 0 and self.rows else None

    @property
    def remaining(self) -> float | None:
        """Estimated seconds until the last round is done; None before a round was timed."""
        if self.run is None or not self.done_here:
            return None
        pace = (self.last_round - self.first_round) / self.done_here
        return max(0.0, pace * (self.run.rounds - self.done) - (self.clock() - self.last_round))

    def _count_training(self, now: float) -> None:
        """Count the time since the round began or the client before answered."""
        self.training += now - self.mark
        self.mark = now

    def _evaluated(self, record: EvaluationRecord) -> None:
        """Keep the first and the newest scores of each part."""
        self.base.setdefault(record.part, record)
        self.now[record.part] = record


# Plain lines --------------------------------------------------------------------------------------


def plain_lines(write: Callable[[str], None], clock: Clock = time.monotonic) -> Watcher:
    """Return a watcher that writes one line per round, evaluation and note.

    Args:
        write: takes one line without its end.
        clock: seconds that only grow.
    """
    status = RunStatus(clock=clock)

    def watcher(event: Event) -> None:
        status.take(event)
        for line in _lines(event, status):
            write(line)

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
        case RunFinished():
            return [f"run ends after {duration(event.seconds)}"]
    return []


def _round_line(record: RoundRecord, status: RunStatus) -> str:
    """Return the line of a round."""
    total = f" of {status.run.rounds}" if status.run else ""
    left = status.remaining
    times = "" if not left else f"; about {duration(left)} left"
    if record.failure is not None:
        return f"round {record.round}{total} failed, the adapter stays as it was: {clean(record.failure)}{times}"
    if not record.clients:
        return f"round {record.round}{total}: no row was selected, the adapter stays as it was{times}"
    speed = status.rows_per_second
    pace = "" if speed is None else f", {speed:,.0f} rows/s"
    return (
        f"round {record.round}{total}: loss {record.loss:.4f}, {len(record.clients)} of "
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
    table = _table(title, "category", ascii_only)
    # The mean stands first, since it is what most people look for.
    mean = macro(base.categories), macro(final.categories)
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
    table = _table(title, "group (mean of rows)", ascii_only)
    _add_rows(table, base.groups, final.groups, ascii_only)
    return table


def _table(title: str, first: str, ascii_only: bool) -> Table:
    """Return an empty table of scores."""
    table = Table(title=title, box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD, title_style="bold")
    table.add_column(first, overflow="fold", min_width=8)
    table.add_column("rows", justify="right", no_wrap=True)
    for heading in ("loss", "ROUGE-L", "exact match"):
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
    """Return name, format, old and new value, and the sign of an improvement, per score."""
    return [
        ("loss", _plain_number, before.loss, after.loss, -1),
        ("ROUGE-L", _percent, before.rouge_l, after.rouge_l, 1),
        ("exact", _percent, before.exact, after.exact, 1),
    ]


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
