"""What each client holds, for people: a table, and a picture of the categories per client."""

from __future__ import annotations

import collections
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bellwether.store.holdings import ClientSummary, Description
from bellwether.tools.atomic import write_atomic
from bellwether.tools.words import clean, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


# Paul Tol's muted scheme, told apart with any colour vision, in the order in which it is best used.
_COLOURS = ("#332288", "#DDCC77", "#CC6677", "#88CCEE", "#117733", "#882255", "#44AA99", "#999933", "#AA4499")


_OTHERS = "#BBBBBB"


_LONGEST_UPRIGHT_NAME = 12


_MOST_NAMES = 120


# Columns of the table that are shown where they count anything.
_COUNTS = ("held_out", "shortened", "cut", "left_out")


def table(description: Description) -> Table:
    """Return one line per client, and one for all."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title="What each client holds", caption=_caption(description), box=box.SIMPLE_HEAD)
    total = _total(description)
    shown = [name for name in _COUNTS if getattr(total, name)]  # 80 columns have no room for zeros
    made.add_column("client", no_wrap=True, max_width=24)
    made.add_column("rows", justify="right")
    for name in shown:
        made.add_column(name.replace("_", "\n"), justify="right")
    for header in ["label\nskew", *(["median\ntokens", "longest"] if description.tokenised else [])]:
        made.add_column(header, justify="right")
    grouped = len(total.groups) > 1
    if grouped:
        made.add_column("group", overflow="fold", max_width=16)
    made.add_column("categories", min_width=8 if grouped else 20, overflow="fold")
    for client in [*description.clients, total]:
        if client is total:
            made.add_section()
        held = [_names(client.groups), _largest(client.categories)] if grouped else [_largest(client.categories)]
        cells = _cells(client, shown, description.tokenised)
        made.add_row(Text(clean(client.client)), *cells, *(Text(clean(text)) for text in held))
    return made


def _cells(client: ClientSummary, shown: Sequence[str], tokenised: bool) -> list[str]:
    """Return the numbers of a line."""
    cells = [f"{client.rows:,}", *(f"{getattr(client, name):,}" for name in shown), f"{client.skew:.2f}"]
    if tokenised:
        median = "–" if client.median_tokens is None else f"{client.median_tokens:.0f}"
        longest = "–" if client.longest_tokens is None else f"{client.longest_tokens:,}"
        cells += [median, longest]
    return cells


def _total(description: Description) -> ClientSummary:
    """Return the line for all clients; the median is that of the clients' medians."""
    clients = description.clients
    medians = [client.median_tokens for client in clients if client.median_tokens is not None]
    return ClientSummary(
        "all",
        description.rows,
        sum(client.held_out for client in clients),
        description.categories,
        description.skew,
        float(np.median(medians)) if medians else None,
        max((client.longest_tokens for client in clients if client.longest_tokens is not None), default=None),
        sum(client.shortened for client in clients),
        sum(client.cut for client in clients),
        sum(client.left_out for client in clients),
        sum((collections.Counter(client.groups) for client in clients), collections.Counter()),
    )


def _names(groups: Mapping[str, int]) -> str:
    """Return a client's group, or the largest of its groups with their rows."""
    return next(iter(groups)) or "(none)" if len(groups) == 1 else _largest(groups)


def _largest(counts: Mapping[str, int], shown: int = 3) -> str:
    """Return the largest categories or groups with their rows."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{name or '(none)'} {rows:,}" for name, rows in ranked[:shown]]
    more = len(ranked) - shown
    return ", ".join(texts) + (f", {more} more" if more > 0 else "")


def _caption(description: Description) -> str:
    text = (
        f"{counted(len(description.clients), 'client')}, {counted(description.rows, 'training row')}; held out for "
        f"all: {description.validation:,} validation, {counted(description.test, 'test row')}. "
        "Label skew: total variation distance to the categories of all clients (0 alike, 1 disjoint; "
        "for all: mean over rows)."
    )
    if description.tokenised:
        text += " Tokens as trained (for all: median of the clients' medians)."
        fitted = not any(client.shortened + client.cut + client.left_out for client in description.clients)
        text += (
            " No row is too long."
            if fitted
            else " Shortened: context or history; cut: response; left out: no response token kept."
        )
    return text


def draw(description: Description, folder: Path) -> list[Path]:
    """Draw the clients' rows as stacked bars of categories, and return the PNG's and the SVG's path.

    Args:
        description: what the clients hold.
        folder: an existing folder; ``clients.png`` and ``clients.svg`` are written there.

    Raises:
        CheckpointError: the files cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    paths = []
    # The salt and the absent date make equal data draw equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "clients", "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _figure(description)
        FigureCanvasAgg(figure)
        for suffix in ("png", "svg"):
            buffer = io.BytesIO()
            metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {}
            figure.savefig(buffer, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)
            path = folder / f"clients.{suffix}"
            write_atomic(path, buffer.getvalue())
            paths.append(path)
    return paths


def _figure(description: Description) -> Figure:
    """Return the picture: bars upright where names are short, else lying so that names can be read."""
    from matplotlib.figure import Figure

    names = [client.client for client in description.clients]
    upright = max(map(len, names)) <= _LONGEST_UPRIGHT_NAME
    extent = min(20.0, max(5.0 if upright else 2.5, 0.16 * len(names) + 1.5))
    figure = Figure(figsize=(extent, 4.8) if upright else (7.5, extent))
    axes = figure.add_subplot()
    _bars(axes, description, upright)
    _name_clients(axes, names, upright)
    axes.set_title(
        f"Rows per client and category\n{counted(len(names), 'client')}, {counted(description.rows, 'row')}, "
        f"mean label skew {description.skew:.2f} (total variation)",
        fontsize=11,
        loc="left",
    )
    most = max(client.rows for client in description.clients)
    (axes.set_ylim if upright else axes.set_xlim)(0, 1.04 * max(most, 1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _bars(axes: Axes, description: Description, upright: bool) -> None:
    """Draw the stacked bars, with a legend outside."""
    largest, others = (
        list(description.categories)[: len(_COLOURS)],
        list(description.categories)[len(_COLOURS) :],
    )
    # In the order of their names, so that a category has one colour in the pictures of several partitions.
    groups = [
        ([name], name or "(no category)", colour) for name, colour in zip(sorted(largest), _COLOURS, strict=False)
    ]
    if others:
        groups.append((others, counted(len(others), "other category", "other categories"), _OTHERS))
    positions = np.arange(len(description.clients))
    reached = np.zeros(len(positions))
    handles = []
    for members, _, colour in groups:
        rows = np.array([sum(client.categories.get(name, 0) for name in members) for client in description.clients])
        bar: dict[str, Any] = {
            "color": colour,
            "edgecolor": "white",
            "linewidth": 0.4 if len(positions) <= _MOST_NAMES else 0,
        }
        if upright:
            handles.append(axes.bar(positions, rows, 0.85, bottom=reached, **bar))
        else:
            handles.append(axes.barh(positions, rows, 0.85, left=reached, **bar))
        reached += rows
    # The first part of a stack stands at the bottom, so an upright stack reads like a reversed legend.
    # matplotlib hides labels that begin with an underscore.
    labels = [_short(f" {label}" if label.startswith("_") else label) for _, label, _ in groups]
    order = slice(None, None, -1 if upright else 1)
    axes.legend(
        handles[order],
        labels[order],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=9,
        title="category",
        alignment="left",
    )


def _name_clients(axes: Axes, names: Sequence[str], upright: bool) -> None:
    """Label the axes; of very many clients only some are named."""
    from matplotlib.ticker import MaxNLocator

    step = -(-len(names) // _MOST_NAMES)
    ticks = list(range(0, len(names), step))
    labels = [_short(names[tick]) for tick in ticks]
    size = 8 if len(ticks) <= 60 else 6.5
    client_axis = "client" if step == 1 else f"client (one in {step} is named)"
    if upright:
        axes.set_xticks(ticks, labels, rotation=90 if len(names) > 8 else 0, fontsize=size)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_xlabel(client_axis)
        axes.set_ylabel("training rows")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_yticks(ticks, labels, fontsize=size)
        axes.set_ylim(len(names) - 0.3, -0.7)
        axes.set_ylabel(client_axis)
        axes.set_xlabel("training rows")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _short(text: str, longest: int = 48) -> str:
    text = clean(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
