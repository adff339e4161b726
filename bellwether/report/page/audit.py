"""The page of an audit: a table for each attack, without protection and with it, and what that means."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from bellwether.report.page.charts import Series, dots
from bellwether.report.page.draw import Chart
from bellwether.report.page.parts import Cell, Figure, Page, Part, Section, Table, Text, Tile, named, words
from bellwether.store.audit import Audit, Exposed, Side
from bellwether.tools.intervals import Interval
from bellwether.tools.words import counted


def audit_page(audit: Audit) -> Page:
    """Return the page of a finished audit."""
    return Page(
        kind="privacy audit",
        name=audit.recipe,
        summary=_summary(audit),
        result=_result(audit),
        tiles=_tiles(audit),
        sections=[
            Section("verdicts", "What it means", [Text(_sentence(text)) for text in audit.verdicts]),
            _epsilon(audit),
            _membership(audit),
            *([_secrets(audit)] if audit.canaries else []),
            *_server(audit),
        ],
    )


def page_markdown(page: Page) -> str:
    """Return what a page says as Markdown: its sentences and tables, without its charts."""
    lines = [
        f"# {_cell(page.kind.capitalize())}: {_cell(page.name)}",
        "",
        page.result.striptags(),
        "",
        page.summary.striptags(),
    ]
    for section in page.sections:
        lines += ["", f"## {section.title}", *(["", str(section.lead)] if section.lead else [])]
        for part in section.parts:
            if isinstance(part, Text):
                lines += ["", Markup.escape(part.text).striptags()]
            elif isinstance(part, Table):
                lines += ["", f"| {' | '.join(map(_cell, part.heads))} |", f"|{' --- |' * len(part.heads)}"]
                lines += [f"| {' | '.join(_cell(cell.text) for cell in row)} |" for row in part.rows]
                lines += ["", str(part.note)] if part.note else []
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _summary(audit: Audit) -> Markup:
    """Return what was done, in one paragraph."""
    return Markup(
        "The recipe {} over the base {}, {}, was run {} on each side, with seeds of their own. In each run a coin "
        "decided of {} whether it was trained on{}. Intervals and bounds hold with {}."
    ).format(
        named(audit.recipe),
        named(audit.model),
        counted(audit.clients, "client"),
        counted(audit.runs, "time"),
        counted(audit.rows, "row"),
        f", and of {counted(audit.canaries, 'secret')} whether it was planted" if audit.canaries else "",
        f"{audit.confidence:.0%}",
    )


def _result(audit: Audit) -> Markup:
    """Return what came out, in one sentence."""
    return Markup.escape(_sentence(next((text for text in audit.verdicts if "BROKEN" in text), audit.verdicts[0])))


def _tiles(audit: Audit) -> list[Tile]:
    """Return the figures that stand out, of the recipe as it is."""
    side = audit.sides[-1]
    found = []
    best = side.best_on_result
    if best is not None:
        found.append(
            Tile("trained rows told from others", f"{best.auc.mean:.2f}", "area under the curve; a coin: 0.50")
        )
    planted = [one for one in side.exposed if one.planted is not None]
    if planted and planted[-1].planted is not None:
        found.append(
            Tile("exposure of a planted secret", f"{planted[-1].planted.mean:.1f} bits", f"chance: {audit.chance:.1f}")
        )
    shown = next((one for one in side.epsilons if one.lower == side.lower), side.epsilons[0])
    found.append(Tile("epsilon is at least", f"{shown.lower:.2f}", f"of single {shown.game}"))
    found.append(
        Tile("epsilon stated", "none" if side.stated is None else f"{side.stated:.2f}", f"for each {side.unit}")
    )
    return found


def _epsilon(audit: Audit) -> Section:
    """Return what epsilon is stated, and what the guesses refute."""
    rows = []
    for side in audit.sides:
        for one in side.epsilons:
            meant = ("clients" if side.unit == "client" else "rows") == one.game
            stated = f"{side.stated:.2f}" if side.stated is not None and meant else ""
            rows.append(
                [
                    words(side.name),
                    words(f"whether single {one.game} were there"),
                    Cell(f"{one.right:,} of {one.made:,}"),
                    Cell(f"{one.bits:,}"),
                    Cell(f"{one.lower:.2f}"),
                    Cell(stated),
                    words("BROKEN" if side.broken and meant else ""),
                ]
            )
    heads = ["", "guessed", "right", "coins", "epsilon at least", "stated", ""]
    lead = (
        "Each coin decided whether something took part. Who guesses too many coins from the result refutes every "
        "epsilon below a bound (Steinke et al. 2023)."
    )
    protected = [
        Text(f"{side.name.capitalize()}: {', '.join(side.protections) or 'nothing protects it'}.")
        for side in audit.sides
    ]
    return Section("epsilon", "Epsilon", [Table("Guesses and epsilon", heads, rows), *protected], lead)


def _membership(audit: Audit) -> Section:
    """Return how well trained rows are told from others."""
    rows = [
        [words(one.attack), words(side.name), Cell(_shown(one.auc)), Cell(_shown(one.tpr))]
        for side in audit.sides
        for one in side.memberships
    ]
    names = list(dict.fromkeys(one.attack for side in audit.sides for one in side.memberships))
    series = [
        _series(side, number, [(names.index(one.attack), one.auc) for one in side.memberships])
        for number, side in enumerate(audit.sides)
    ]
    chart = dots(
        "membership",
        "Area under the curve of each attack",
        names,
        series,
        "area under the curve; a coin has 0.5",
        wide=True,
    )
    lead = "Rows that were trained on against rows of the same clients that a coin left out."
    parts: list[Part] = [
        Figure("Trained rows against rows that were left out", chart, wide=True),
        Table(
            "Trained rows against rows that were left out",
            ["attack", "", "area under the curve", "caught with 1 % false alarms"],
            rows,
            "Of updates: the first round of one run, as its server sees it. The other attacks look at the result.",
        ),
    ]
    return Section("membership", "Membership", parts, lead)


def _series(side: Side, number: int, points: Sequence[tuple[int, Interval]]) -> Series:
    return Series(
        side.name,
        [place for place, _ in points],
        [interval.mean for _, interval in points],
        [interval.low for _, interval in points],
        [interval.high for _, interval in points],
        look=number,
    )


def _secrets(audit: Audit) -> Section:
    """Return how exposed planted secrets are."""

    def kinds(one: Exposed) -> list[tuple[str, Interval]]:
        times = "once" if one.repeats == 1 else f"{one.repeats} times"
        found = [
            (f"planted {times}", one.planted),
            (f"not planted ({times})", one.absent),
            (f"untuned base ({times})", one.base),
        ]
        return [(name, interval) for name, interval in found if interval is not None]

    rows = [
        [words(name), words(side.name), Cell(_shown(interval))]
        for side in audit.sides
        for one in side.exposed
        for name, interval in kinds(one)
    ]
    names = list(dict.fromkeys(name for side in audit.sides for one in side.exposed for name, _ in kinds(one)))
    series = [
        _series(side, number, [(names.index(name), interval) for one in side.exposed for name, interval in kinds(one)])
        for number, side in enumerate(audit.sides)
    ]
    label = f"exposure in bits; chance has {audit.chance:.2f}"
    chart: Chart = dots("exposure", "Exposure of planted secrets", names, series, label, zero=True)
    lead = (
        f"Each secret is a number of six digits, ranked by its loss among {audit.candidates} of its form: exposure is "
        f"log2 {audit.candidates} less log2 of the rank (Carlini et al. 2019)."
    )
    table = Table("Exposure of planted secrets, in bits", ["secret", "", "exposure"], rows)
    return Section("secrets", "Planted secrets", [Figure("Exposure of planted secrets", chart), table], lead)


def _server(audit: Audit) -> list[Section]:
    """Return what single updates and centroids tell the server; nothing where neither can be read."""
    parts: list[Part] = []
    rows = [
        [words(side.name), Cell(_shown(side.owner)), Cell(f"{side.owner_chance:.2f}")]
        for side in audit.sides
        if side.owner is not None
    ]
    if rows:
        parts.append(
            Table("Whose row is it? Told by the update that lowers its loss most", ["", "right", "chance"], rows)
        )
    named_by = [side for side in audit.sides if side.named is not None]
    if named_by:
        heads = ["", "centroids", "name a row of their cluster", "chance", "of one text", "name that text"]
        cells = []
        for side in named_by:
            one = side.named
            assert one is not None
            figures = [one.released, one.hits, f"{one.chance:.2f}", one.copies, one.exact]
            cells.append([words(side.name), *(Cell(str(figure)) for figure in figures)])
        parts.append(Table("Which row does a released centroid name?", heads, cells))
    lead = "One run's first round, as the server sees it."
    return [Section("server", "What the server sees", parts, lead)] if parts else []


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"
