"""The page of a site whose federation has ended: what it gained, what was sent, and on which terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from bellwether.recipe.recipe import Recipe
from bellwether.report.page.appendix import answers_section, appendix, exchange
from bellwether.report.page.comparison import Compared, part_sections, result_sentence, score_tiles, scores_section
from bellwether.report.page.parts import Cell, Page, Section, Table, Text, Tile, named, words
from bellwether.tools.words import byte_size, counted

# What is sent, by what a site is asked.
_SENT = {
    "hello": "whether anything here differs from what is agreed",
    "survey": "centres of clusters of hidden states",
    "train": "updates of the adapter, counts of rows and tokens, and mean losses",
    "evaluate": "sums of scores on rows that are held out",
    "end": "that the end was heard of",
}


@dataclass(frozen=True)
class Sent:
    """All that a site has sent of one kind.

    Args:
        kind: what it was asked.
        messages: how many.
        failures: how many of them only say why the task was not done.
        bytes: of all of them.
        protections: what was done to them before they were sent.
    """

    kind: str
    messages: int
    failures: int
    bytes: int
    protections: Sequence[str]


@dataclass(frozen=True)
class HeldOut:
    """A held-out row that is shown, with the answer of each arm."""

    category: str
    instruction: str
    context: str
    reference: str
    answers: Mapping[str, str | None]


@dataclass(frozen=True)
class AtSite:
    """What a site's page is made of.

    Args:
        site: its name.
        federation: the federation's identifier.
        address: of its coordinator.
        recipe: as the site ran it.
        rows: that it trained on.
        rounds: in which it trained.
        terms: what it agreed to, in plain words.
        sent: everything that left it, by kind.
        compared: the comparison on its held-out rows; None where it has none.
        called: what its arms are called in a sentence, by their names.
        shown: some of these rows.
        notes: sentences on how its arms were trained.
        environment: what it ran on.
    """

    site: str
    federation: str
    address: str
    recipe: Recipe
    rows: int
    rounds: int
    terms: str
    sent: Sequence[Sent]
    compared: Compared | None
    called: Mapping[str, str]
    shown: Sequence[HeldOut]
    notes: Sequence[str]
    environment: Mapping[str, Any]


def site_page(at: AtSite) -> Page:
    """Return the page of a site whose federation has ended."""
    return Page(
        kind="site",
        name=at.site,
        summary=_summary(at),
        result=_result(at),
        tiles=[*(score_tiles(at.compared) if at.compared else ()), *_tiles(at)],
        sections=[*_compared(at), _what_was_sent(at), _terms(at), *_appendix(at)],
    )


def _summary(at: AtSite) -> Markup:
    """Return what this site took part in, in one paragraph."""
    return Markup(
        "The site {} took part in the federation {} at {}, which tuned an adapter for the base model {} by {}: it "
        "trained in {} of {}, on {} of its own.{} This page is for this site alone; nothing of it was sent to anybody."
    ).format(
        named(at.site),
        named(at.federation[:12]),
        named(at.address),
        named(at.recipe.model.path),
        named(at.recipe.method.name),
        f"{at.rounds:,}",
        counted(at.recipe.federation.rounds, "round"),
        counted(at.rows, "row"),
        f" Here it is compared on {counted(_rows(at.compared), 'row')} that it held out." if at.compared else "",
    )


def _rows(compared: Compared) -> int:
    """Return how many rows are compared on."""
    return len(compared.comparison.outcomes[0].categories)


def _result(at: AtSite) -> Markup:
    """Return what came out, in one sentence."""
    if at.compared is not None:
        return result_sentence(at.compared, at.called)
    return Markup(
        "The federation has ended. Nothing is compared, since no rows are held out here: give rows that were never "
        "trained on with {}, and join again."
    ).format(Markup("<code>--test</code>"))


def _tiles(at: AtSite) -> list[Tile]:
    """Return how often this site trained, and what left it."""
    size = byte_size(sum(one.bytes for one in at.sent))
    messages = counted(sum(one.messages for one in at.sent), "message")
    rounds = Tile("trained in", counted(at.rounds, "round"), f"of {at.recipe.federation.rounds:,}")
    return [rounds, Tile("left this site", size, messages)]


def _compared(at: AtSite) -> list[Section]:
    """Return scores of all arms on this site's own rows, and answers side by side."""
    if at.compared is None:
        return []
    lead = (
        "On rows that this site held out: the untuned base; the adapter that this site tunes alone, by the "
        "same recipe; and the federation's. Means over categories, with 95 % intervals over questions."
    )
    scores = replace(scores_section(at.compared), lead=lead)
    scores = replace(scores, parts=[*scores.parts, *map(Text, at.notes)])
    exchanges = [exchange(row.category, row.instruction, row.context, row.reference, row.answers) for row in at.shown]
    said = "Held-out rows of this site, categories in turn; nothing is chosen by hand."
    return [scores, *part_sections(at.compared), *answers_section(exchanges, said)]


def _what_was_sent(at: AtSite) -> Section:
    """Return the section on all that left the site."""
    lines = [
        [
            words(one.kind),
            words(_SENT.get(one.kind, "")),
            Cell(f"{one.messages:,}"),
            Cell(f"{one.failures:,}"),
            Cell(byte_size(one.bytes)),
            words(", ".join(one.protections)),
        ]
        for one in at.sent
    ]
    heads = ["asked to", "what was sent", "messages", "of them refusals", "size", "protection"]
    note = "Everything is signed, and encrypted on the way. A refusal holds nothing but why a task was not done."
    lead = Markup("From this site's ledger, which has each message by itself: {}.").format(
        Markup("<code>bellwether site ledger</code>")
    )
    return Section("sent", "What left this site", [Table("Sent, by what was asked", heads, lines, note)], lead)


def _terms(at: AtSite) -> Section:
    """Return the section on what the site agreed to."""
    lead = "What a person at this site agreed to before anything was sent."
    return Section("terms", "Terms", [Text(line.strip()) for line in at.terms.splitlines()], lead)


def _appendix(at: AtSite) -> list[Section]:
    """Return the recipe as the site ran it, and what it ran on."""
    recipe, *others = appendix(at.recipe, at.environment)
    return [replace(recipe, lead="Every field, as this site ran it; recipe.yaml in its folder is the same."), *others]
