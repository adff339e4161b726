"""The live view of a run: on a terminal drawn anew in place, elsewhere one plain line per round and evaluation."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bellwether.exchange.records import (
    ArmFinished,
    Evaluated,
    EvaluationRecord,
    Event,
    Note,
    RoundFinished,
    RunFinished,
    Watcher,
)
from bellwether.exchange.scores import Totals, macro, means
from bellwether.tell.narrate import change, note_line, pairs, phase_line, plain_lines, summary, verdict
from bellwether.tell.status import Clock, RunStatus
from bellwether.tools.words import clean, counted, duration

__all__ = ["summary", "view", "watching"]

TREND = 24  # rounds in the trend of the loss
BARS = "▁▂▃▄▅▆▇█"


@contextlib.contextmanager
def watching(
    console: Console | None = None, *, live: bool | None = None, clock: Clock = time.monotonic
) -> Iterator[Watcher]:
    """Show a run: a live view on a terminal, plain lines elsewhere.

    Args:
        console: where to; None takes standard output.
        live: whether to draw the live view; None asks the console.
        clock: seconds that only grow.

    Yields:
        The watcher to hand to the run.
    """
    console = console or Console()
    status = RunStatus(clock=clock)

    def draw() -> RenderableType:
        return view(status, console.width, console.height, console.options.ascii_only)

    with drawn_or_written(console, live, status.take, draw, lambda write: plain_lines(write, clock)) as watcher:
        yield watcher


@contextlib.contextmanager
def drawn_or_written(
    console: Console,
    live: bool | None,
    take: Watcher,
    draw: Callable[[], RenderableType],
    lines: Callable[[Callable[[str], None]], Watcher],
) -> Iterator[Watcher]:
    """Yield a watcher: of a view that is drawn again and again on a terminal, of plain lines elsewhere.

    Args:
        console: where to.
        live: whether to draw; None asks the console.
        take: what the view is drawn of takes an event.
        draw: returns the view.
        lines: returns a watcher that writes lines.
    """
    if live is None:
        live = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter and _is_tty(console)
    if not live:
        # A character that the output's encoding lacks is escaped: printing shall never end a run.
        def write(text: str) -> None:
            shown = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
            console.print(Text(shown), soft_wrap=True, highlight=False)

        yield lines(write)
        return
    guard = threading.Lock()

    def guarded() -> RenderableType:
        with guard:
            return draw()

    with Live(console=console, get_renderable=guarded, refresh_per_second=4, vertical_overflow="crop") as screen:

        def watcher(event: Event) -> None:
            with guard:
                take(event)
            if isinstance(event, Note):
                console.print(Text(note_line(event), style="yellow" if event.warning else "dim"), highlight=False)
            if isinstance(event, RoundFinished | Evaluated | RunFinished | ArmFinished):
                screen.refresh()

        yield watcher


def view(status: RunStatus, width: int, height: int, ascii_only: bool = False) -> RenderableType:
    """Return the live view.

    Args:
        status: what is known.
        width: columns of the terminal.
        height: lines of the terminal.
        ascii_only: whether only ASCII can be shown.
    """
    if status.run is None:
        return getting_ready(status.elapsed, phase_line(status), ascii_only)
    wrapped = 1 if width >= 80 else 2  # lines that a line of scores or speed takes
    grouped = [record for record in status.now.values() if record.groups]
    room = max(1, height - 9 - len(grouped) - wrapped * (1 + len(status.now)))
    parts: list[RenderableType] = [_rounds(status), _pace(status, ascii_only)]
    parts += [_scores(status.base[part], record, ascii_only) for part, record in status.now.items()]
    parts += [_groups(status.base[record.part], record, ascii_only) for record in grouped]
    if not status.over:
        parts.append(Text(phase_line(status), no_wrap=True, overflow="ellipsis"))
        parts.append(_clients(status, room, ascii_only))
    title = Text(f" {clean(status.run.name)} ", style="bold")
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=Text(f" {clean(status.run.folder, ascii_only)} ", style="dim"),
        subtitle_align="right",
        width=min(width, 120),
        box=box.ASCII if ascii_only else box.ROUNDED,
    )


def _rounds(status: RunStatus) -> RenderableType:
    """Return the line with the bar over rounds and the times."""
    assert status.run is not None
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    rounds = status.run.rounds
    here = status.round if status.in_round else status.done
    answered = len(status.finished) + len(status.failed) + len(status.idle)
    part = min(1.0, answered / len(status.cohort)) if status.in_round and status.cohort else 0.0
    bar = ProgressBar(total=rounds, completed=min(rounds, status.done + part))
    told = times(status.elapsed, status.remaining, status.over)
    line.add_row(Text(f"round {here} of {rounds}" if here else f"{rounds} rounds"), bar, Text(told))
    return line


def getting_ready(elapsed: float, what: str, ascii_only: bool) -> Text:
    """Return what is shown before anything can be counted."""
    shown = f"Getting ready ({duration(elapsed)}): {what or 'loading'}"
    return Text(shown + ("..." if ascii_only else " …"), style="dim")


def times(elapsed: float, left: float | None, over: bool) -> str:
    """Return the time that has passed, and, unless all is over, about how much is left."""
    if over:
        return duration(elapsed)
    return f"{duration(elapsed)}, {'estimating' if left is None else f'about {duration(left)} left'}"


def _pace(status: RunStatus, ascii_only: bool) -> Text:
    """Return the line with loss, its trend, and the speed."""
    parts = []
    if status.losses:
        trend = "" if ascii_only else f" {sparkline(status.losses[-TREND:])}"
        parts.append(f"training loss {status.losses[-1]:.3f}{trend}")
    speed = status.rows_per_second
    if speed is not None:
        parts.append(f"{speed:,.0f} rows/s, {status.tokens / status.training:,.0f} tokens/s")
    return Text(("; " if ascii_only else " · ").join(parts) or "no round yet", style="cyan")


def _scores(base: EvaluationRecord, now: EvaluationRecord, ascii_only: bool) -> Text:
    """Return the line with a part's macro scores, base and now."""
    before, after = macro(base.categories), macro(now.categories)
    when = "untuned" if now.round == 0 else f"round {now.round}"
    text = Text(f"{clean(now.part, ascii_only)}, {when}:")
    for name, show, old, new, sign in pairs(before, after):
        shown = show(new) if now is base else change(show, old, new, ascii_only)
        text.append(f"  {name} {shown}", style=verdict(old, new, sign))
    return text


def _groups(base: EvaluationRecord, now: EvaluationRecord, ascii_only: bool) -> Text:
    """Return the line with ROUGE-L of a part's groups over all their rows, or with their loss where none is known."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, totals in now.groups.items():
        before, after = means(base.groups.get(name, Totals())), means(totals)
        scores = [pair for pair in pairs(before, after) if pair[4] > 0 and pair[3] is not None] or pairs(before, after)
        label, show, old, new, sign = scores[0]
        text.append("  " if text else f"{clean(now.part, ascii_only)}, {label} by group:  ")
        shown = show(new) if now is base else change(show, old, new, ascii_only)
        text.append(f"{clean(name, ascii_only) or '(none)'} {shown}", style=verdict(old, new, sign))
    return text


def _clients(status: RunStatus, room: int, ascii_only: bool) -> RenderableType:
    """Return the table of the cohort's clients, as many as there is room for."""
    done, waiting = "+" if ascii_only else "✓", "." if ascii_only else "·"
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=1)
    table.add_column(ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column(ratio=3, no_wrap=True, overflow="ellipsis")
    names = _shown(status, room)
    for name in names:
        record = status.finished.get(name)
        if name in status.failed:
            mark, text, style = "!", f"left out: {clean(status.failed[name], ascii_only)}", "yellow"
        elif record is not None:
            mark, style = done, "green"
            text = f"loss {record.loss:.3f}, {counted(record.rows_seen, 'row')}, {record.seconds:.1f} s"
        elif name in status.idle:
            mark, text, style = done, "no row was selected", "dim"
        else:
            mark, text, style = waiting, "asked", "dim"
        table.add_row(Text(mark, style=style), Text(clean(name, ascii_only), style=style), Text(text, style=style))
    hidden = len(status.cohort) - len(names)
    if hidden > 0:
        asked = len(set(status.cohort) - {*status.finished, *status.failed, *status.idle})
        counts = f"{len(status.finished)} done, {len(status.failed)} left out, {asked} asked"
        counts += f", {len(status.idle)} of no selected row" if status.idle else ""
        table.add_row(Text(), Text(f"and {hidden} more", style="dim"), Text(counts, style="dim"))
    return table


def _shown(status: RunStatus, room: int) -> list[str]:
    """Return the clients to show: all, or those that answered last and then those still asked."""
    if len(status.cohort) <= room:
        return list(status.cohort)
    answered = [name for name in (*status.idle, *status.finished, *status.failed) if name in set(status.cohort)]
    last = answered[-max(1, (room - 1) // 2) :]
    waiting = [name for name in status.cohort if name not in set(answered)]
    return (last + waiting)[: room - 1] if waiting else answered[-(room - 1) :] if room > 1 else []


def sparkline(values: Sequence[float]) -> str:
    """Return a row of bars, one per value, from the smallest to the largest; a blank where undefined."""
    known = [value for value in values if abs(value) < float("inf")]
    if not known:
        return ""
    low, high = min(known), max(known)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] if abs(value) < float("inf") else " " for value in values)


def _is_tty(console: Console) -> bool:
    """Return whether the console's file itself is a terminal, whatever FORCE_COLOR says."""
    try:
        return console.file.isatty()
    except (AttributeError, ValueError):
        return False
