"""What a page says of clients: who holds what, who took part in which round."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from bellwether.exchange.records import RoundRecord
from bellwether.report.page.axes import ROWS
from bellwether.report.page.charts import Series, bars, histogram
from bellwether.report.page.grid import Tint, grid
from bellwether.report.page.parts import Cell, Figure, Part, Section, Table, Text, one_line, words
from bellwether.store.holdings import ClientSummary, Description
from bellwether.tools.words import counted

_NUMBERED = 30  # clients whose rows are a table of numbers
_COLUMNS = 12  # categories with a column of their own
_CELLS = 6000  # of a grid, at most
_SHADES = 6


def holdings(description: Description, lead: str = "") -> Section:
    """Return the section on who holds what: a table of clients and categories, or a grid where they are many.

    Args:
        description: what each client holds.
        lead: a sentence on whose rows these are; empty where there is only one answer.
    """
    clients = description.clients
    intro = Markup("{} {} {} of {}. Their mean label skew is {} (0: each like the whole, 1: disjoint).{}")
    sizes = [client.rows for client in clients]
    parts: list[Part] = [
        _numbers(description) if len(clients) <= _NUMBERED else _shades(description),
    ]
    if len(clients) > _NUMBERED:
        label = f"Histogram of training rows per client, {min(sizes):,} to {max(sizes):,}."
        parts.append(Figure("Rows per client", histogram("sizes", label, sizes, "training rows", "clients")))
        skews = [client.skew for client in clients]
        label = f"Histogram of label skew per client, {min(skews):.2f} to {max(skews):.2f}."
        parts.append(Figure("Label skew per client", histogram("skews", label, skews, "total variation", "clients")))
    if len(set(_groups(description))) > 1:
        parts.append(_group_table(description))
    parts += [Text(Markup("{}").format(one_line(note, 400))) for note in description.notes]
    text = intro.format(
        counted(len(clients), "client"),
        "holds" if len(clients) == 1 else "hold",
        counted(description.rows, "row"),
        counted(len(description.categories), "category", "categories"),
        f"{description.skew:.2f}",
        lead and f" {lead}",
    )
    return Section("clients", "Who holds what", parts, text)


def _columns(description: Description) -> tuple[list[str], list[str]]:
    """Return the categories with a column of their own in alphabetical order, and the others."""
    ranked = list(description.categories)
    shown = ranked if len(ranked) <= _COLUMNS else ranked[: _COLUMNS - 1]
    return sorted(shown), ranked[len(shown) :]


def _rows_of(client: ClientSummary, shown: Sequence[str], others: Sequence[str]) -> list[int]:
    """Return a client's rows by category, those of the others together at the end where there are any."""
    counts = [client.categories.get(name, 0) for name in shown]
    return counts + ([sum(client.categories.get(name, 0) for name in others)] if others else [])


def _numbers(description: Description) -> Table:
    """Return the table of clients and categories."""
    shown, others = _columns(description)
    heads = [one_line(name, 28) for name in shown] + ([counted(len(others), "other")] if others else [])
    held_out = any(client.held_out for client in description.clients)
    most = max((count for one in description.clients for count in _rows_of(one, shown, others)), default=1)

    def line(client: ClientSummary) -> list[Cell]:
        counts = _rows_of(client, shown, others)
        cells = [Cell(f"{count:,}" if count else "", heat=round(9 * (count / most) ** 0.7)) for count in counts]
        own = [Cell(f"{client.held_out:,}")] if held_out else []
        return [words(client.client), *cells, Cell(f"{client.rows:,}"), *own, Cell(f"{client.skew:.2f}")]

    return Table(
        "Training rows by client and category",
        ["client", *heads, "all", *(["held out"] if held_out else []), "skew"],
        [line(client) for client in description.clients],
        note="The darker, the more rows. Skew is the total variation distance between a client's categories and those "
        "of all clients together." + (" Held out: rows that the client keeps for its own test." if held_out else ""),
    )


def _shades(description: Description) -> Figure:
    """Return the grid of categories and very many clients, those of like categories side by side."""
    shown, others = _columns(description)
    clients = sorted(description.clients, key=lambda client: _place(client, shown, others))
    found: dict[int, list[tuple[int, int]]] = {}
    for column, client in enumerate(clients):
        for row, count in enumerate(_rows_of(client, shown, others)):
            if count:
                found.setdefault(-(-count * _SHADES // max(1, client.rows)), []).append((row, column))
    tints = [
        Tint(f"to {100 * level / _SHADES:.0f} %", found.get(level, []), strength=0.15 + 0.8 * level / _SHADES)
        for level in range(1, _SHADES + 1)
    ]
    names = [*shown, *([counted(len(others), "other")] if others else [])]
    label = (
        f"Grid of {counted(len(names), 'category', 'categories')} and {counted(len(clients), 'client')}: "
        "the share of a client's rows in a category."
    )
    return Figure(
        "Share of a client's rows in each category",
        grid("holdings", label, names, len(clients), tints, ("clients, in the order of their largest category", "")),
        wide=True,
    )


def _place(client: ClientSummary, shown: Sequence[str], others: Sequence[str]) -> tuple[int, float]:
    """Return by what clients are sorted: their largest category, then how large a share it has."""
    counts = _rows_of(client, shown, others)
    largest = max(range(len(counts)), key=counts.__getitem__)
    return largest, -counts[largest] / max(1, client.rows)


def _groups(description: Description) -> list[str]:
    return [group for client in description.clients for group in client.groups]


def _group_table(description: Description) -> Table:
    """Return the table of clients and rows by group."""
    rows: Counter[str] = Counter()
    for client in description.clients:
        rows.update(client.groups)
    clients = Counter(_groups(description))
    lines = [[words(name or "(none)"), Cell(f"{clients[name]:,}"), Cell(f"{rows[name]:,}")] for name in sorted(rows)]
    return Table("Training rows by group", ["group", "clients", "training rows"], lines)


def participation(rounds: Sequence[RoundRecord], clients: Sequence[str], lead: str = "") -> Section:
    """Return the section on who took part in which round.

    Args:
        rounds: one record per round.
        clients: all clients, in their order.
        lead: a sentence on whose rounds these are; empty where there is only one answer.
    """
    times = Counter(one.client for record in rounds for one in record.clients)
    counts = [times[client] for client in clients]
    parts: list[Part] = []
    if len(clients) * len(rounds) <= _CELLS:
        parts.append(_cohorts(rounds, clients))
    if len(clients) > _NUMBERED:
        label = f"Histogram of how often clients took part, {min(counts)} to {max(counts)} times."
        parts.append(Figure("How often clients took part", histogram("times", label, counts, "rounds", "clients")))
        rows = Counter({one.client: 0 for record in rounds for one in record.clients})
        for one in (one for record in rounds for one in record.clients):
            rows[one.client] += one.rows_seen
        label = "Histogram of the rows that clients trained in all rounds, repetitions counted."
        chart = histogram(
            "trained", label, [rows[client] for client in clients], "rows, repetitions counted", "clients"
        )
        parts.append(Figure("Rows trained by each client", chart))
    elif len(clients) * len(rounds) > _CELLS:
        label = "Bars: in how many rounds each client took part."
        chart = bars("times", label, clients, [Series("", [], counts)], "rounds")
        parts.append(Figure("In how many rounds each client took part", chart))
    if any(record.left_out for record in rounds):
        parts.append(_left_out(rounds))
    text = Markup("Clients took part in {} of {} at the median ({} to {}){}.{}").format(
        f"{statistics.median(counts):g}",
        counted(len(rounds), "round"),
        f"{min(counts):,}",
        f"{max(counts):,}",
        f"; {counts.count(0):,} of {len(clients):,} never did" if 0 in counts else "",
        lead and f" {lead}",
    )
    return Section("participation", "Cohorts", parts, text)


def _cohorts(rounds: Sequence[RoundRecord], clients: Sequence[str]) -> Figure:
    """Return the grid of clients and rounds; very many clients are its columns, where rounds fit as rows."""
    number = {client: number for number, client in enumerate(clients)}
    took = [(number[one.client], place) for place, record in enumerate(rounds) for one in record.clients]
    left = [(number[client], place) for place, record in enumerate(rounds) for client in record.left_out]
    rows, columns, axis = list(clients), len(rounds), ("round", "" if len(clients) <= ROWS else "clients")
    if len(clients) > ROWS >= len(rounds):
        took, left = [(place, row) for row, place in took], [(place, row) for row, place in left]
        rows, columns, axis = [f"{record.round}" for record in rounds], len(clients), ("clients", "round")
    tints = [Tint("took part" if left else "", took)]
    tints += [Tint("asked, left out", left, look=1, hollow=True)] if left else []
    label = f"Grid of {counted(len(clients), 'client')} and {counted(len(rounds), 'round')}: who took part in which."
    return Figure("Who took part in which round", grid("cohorts", label, rows, columns, tints, axis), wide=True)


def _left_out(rounds: Sequence[RoundRecord]) -> Table:
    """Return why clients were left out, and how often."""
    reasons: Counter[str] = Counter(reason for record in rounds for reason in record.left_out.values())
    lines = [[words(reason), Cell(f"{times:,}")] for reason, times in reasons.most_common(12)]
    rest = sum(reasons.values()) - sum(times for _, times in reasons.most_common(12))
    return Table(
        "Why updates of clients that were asked are not used",
        ["reason", "times"],
        lines + ([[words("other reasons"), Cell(f"{rest:,}")]] if rest else []),
    )
