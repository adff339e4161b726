"""What leaves the clients of a run, what protects it, and what is promised of that."""

from __future__ import annotations

from markupsafe import Markup

from bellwether.report.page.parts import Cell, Part, Section, Table, Text, words
from bellwether.store.finished import FinishedRun
from bellwether.store.privacy import Promise
from bellwether.tools.words import counted

_RELATIONS = {
    "add_or_remove": "whether one {} is there, or contributed, at all",
    "replace": "which of two {}s it is",
}
_UNITS = {"client": "client", "example": "row"}


def privacy_section(run: FinishedRun) -> list[Section]:
    """Return the section of what leaves clients; none where the run's folder does not say.

    Args:
        run: what its folder keeps.
    """
    given = run.given_away
    if given is None:
        return []
    rows = [[words(one.what), words(one.when), words(one.mechanism), words(one.charge)] for one in given.leaves]
    parts: list[Part] = []
    if given.promise is not None:
        parts += _promised(given.promise)
    parts.append(Table("Everything that leaves a client", ["what", "when", "protection", "spends"], rows))
    lead = (
        "No text leaves a client. What does is listed here; where it says not protected, it is sent as it is, and can "
        "reveal something of the rows."
    )
    return [Section("privacy", "Privacy", parts, lead)]


def _promised(promise: Promise) -> list[Part]:
    """Return the promise in a sentence, and its epsilons in a table."""
    unit = _UNITS[promise.unit]
    whose = f" (of the client {promise.client}, whose rows have the largest epsilon)" if promise.client else ""
    text = Markup(
        "Differential privacy of every single {}{}: {} of clipped values, cut to a norm of {} at first, with a noise "
        "multiplier of {}, at a delta of {}.{}{}"
    ).format(
        unit,
        whose,
        counted(promise.releases, "noisy sum"),
        f"{promise.clip_norm:g}",
        f"{promise.noise:.4g}",
        f"{promise.delta:g}",
        f" It counts on nobody's seeing who is asked, with a probability of {promise.rate:.3g} each time."
        if promise.rate < 1
        else "",
        ""
        if promise.secret
        else " This run was a simulation: its noise derives from the recipe's seed, and whoever knows that can take it "
        "off. The figures are those of a federation in which it is drawn from a secret.",
    )
    rows = [
        [words(_RELATIONS[one.relation].format(unit)), words(one.accountant), Cell(f"{one.value:.3f}")]
        for one in promise.epsilons
    ]
    return [
        Text(text),
        Table("Epsilon, by what cannot be told", ["what cannot be told", "accountant", "epsilon"], rows),
    ]
