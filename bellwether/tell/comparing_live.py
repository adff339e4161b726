"""The live view of a comparison: arms with their scores so far, what is at work, and the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bellwether.exchange.records import Watcher
from bellwether.tell.comparing import ComparisonStatus, at_words, comparison_lines
from bellwether.tell.live import drawn_or_written, getting_ready, times
from bellwether.tell.narrate import pairs, phase_words
from bellwether.tell.status import Clock
from bellwether.tools.words import clean


@contextlib.contextmanager
def watching_comparison(
    console: Console | None = None, *, live: bool | None = None, clock: Clock = time.monotonic
) -> Iterator[Watcher]:
    """Show a comparison: a live view on a terminal, plain lines elsewhere.

    Args:
        console: where to; None takes standard output.
        live: whether to draw the live view; None asks the console.
        clock: seconds that only grow.

    Yields:
        The watcher to hand to the comparison.
    """
    console = console or Console()
    status = ComparisonStatus(clock=clock)

    def draw() -> RenderableType:
        return comparison_view(status, console.width, console.height, console.options.ascii_only)

    with drawn_or_written(console, live, status.take, draw, lambda write: comparison_lines(write, clock)) as watcher:
        yield watcher


def comparison_view(status: ComparisonStatus, width: int, height: int, ascii_only: bool = False) -> RenderableType:
    """Return the live view of a comparison.

    Args:
        status: what is known.
        width: columns of the terminal.
        height: lines of the terminal.
        ascii_only: whether only ASCII can be shown.
    """
    at = phase_words(status.phase) if status.phase is not None else ""
    if status.comparison is None:
        return getting_ready(status.elapsed, at, ascii_only)
    at_work = [
        Text(at_words(run, one), style="cyan", no_wrap=True, overflow="ellipsis")
        for run, one in list(status.running.items())[: max(1, height // 4)]
    ]
    if not at_work and len(status.finished) < len(status.runs):
        at_work = [getting_ready(status.elapsed, "starting", ascii_only)]
    room = max(1, height - 5 - len(at_work))
    return Panel(
        Group(_progress(status), _arms(status, room, ascii_only), *at_work),
        title=Text(f" {clean(status.comparison.name)} ", style="bold"),
        title_align="left",
        subtitle=Text(f" {clean(status.comparison.folder, ascii_only)} ", style="dim"),
        subtitle_align="right",
        width=min(width, 120),
        box=box.ASCII if ascii_only else box.ROUNDED,
    )


def _progress(status: ComparisonStatus) -> RenderableType:
    """Return the line with the bar over all runs and the times."""
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    done, total = len(status.finished), len(status.runs)
    bar = ProgressBar(total=total, completed=done)
    line.add_row(Text(f"{done} of {total} runs"), bar, Text(times(status.elapsed, status.remaining, done == total)))
    return line


def _arms(status: ComparisonStatus, room: int, ascii_only: bool) -> RenderableType:
    """Return the table of arms with the scores so far, as many as there is room for; trials have one line."""
    done, going, waiting = ("+", ">", ".") if ascii_only else ("✓", "▸", "·")
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(width=1)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for _ in range(4):
        table.add_column(no_wrap=True, justify="right")
    names = [name for name, *_ in pairs(status.scores(""), status.scores(""))]
    table.add_row("", "", *(Text(head, style="dim") for head in ("done", *names)))
    lines = [("trials", [run for run in status.runs if run.trial])]
    lines += [(arm, [run for run in status.runs if run.arm == arm and not run.trial]) for arm in status.arms]
    lines = [(name, runs) for name, runs in lines if runs]
    shown = lines if len(lines) < room else lines[: max(0, room - 2)]
    for name, runs in shown:
        count = sum(run in status.finished for run in runs)
        mark, style = (done, "green") if count == len(runs) else (waiting, "dim")
        if count < len(runs) and any(run in status.running for run in runs):
            mark, style = going, "cyan"
        scores = status.scores(name)
        cells = [show(value) if value is not None else "" for _, show, value, _, _ in pairs(scores, scores)]
        figures = ["", "", ""] if runs[0].trial else cells
        table.add_row(Text(mark, style=style), Text(clean(name, ascii_only)), f"{count}/{len(runs)}", *figures)
    if len(shown) < len(lines):
        table.add_row("", Text(f"and {len(lines) - len(shown)} more", style="dim"), "", "", "", "")
    return table
