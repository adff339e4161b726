"""What an audit found, in sentences for a person who decides."""

from __future__ import annotations

from collections.abc import Iterator

from bellwether.store.audit import SINGLE, SUMMED, Audit, Side
from bellwether.tools.intervals import Interval


def verdicts(audit: Audit) -> list[str]:
    """Return what the attacks mean: one sentence or two on each attack, the epsilon of each side first."""
    several = len(audit.sides) > 1
    found = []
    for side in audit.sides:
        start = f"{side.name.capitalize()}: " if several else ""
        found += [f"{start}{text}" for text in (*_epsilon(side), *_rows(side), *_secrets(audit, side), *_server(side))]
    return found


def _epsilon(side: Side) -> Iterator[str]:
    """Say whether what is stated is refuted."""
    whose = "client" if side.unit == "client" else "row"
    if side.stated is None:
        rows = next(one for one in side.epsilons if one.game == "rows")
        yield (
            f"no epsilon is stated, so nothing is promised; the attacks show that for single rows it is at least "
            f"{rows.lower:.2f}."
        )
    elif side.lower is None:
        yield (
            f"an epsilon of {side.stated:.2f} for whole clients is stated, and was not tested; add --clients to play "
            "the game that tests it."
        )
    elif side.broken:
        yield (
            f"BROKEN. An epsilon of {side.stated:.2f} for each {whose} is stated, but the attacks show that it is at "
            f"least {side.lower:.2f}: do not rely on it."
        )
    else:
        yield (
            f"not broken. An epsilon of {side.stated:.2f} for each {whose} is stated, and the attacks show no more "
            f"than that it is at least {side.lower:.2f}. That is no proof: a better attack may show more."
        )


def _rows(side: Side) -> Iterator[str]:
    """Say how well trained rows are told from others."""
    best = side.best_on_result
    if best is not None:
        yield (
            f"of a row that was trained on and one that was not, whoever has the result takes the right one with a "
            f"probability of {_shown(best.auc)}{_coin(best.auc)}."
        )


def _secrets(audit: Audit, side: Side) -> Iterator[str]:
    """Say how exposed planted secrets are."""
    planted = [one for one in side.exposed if one.planted is not None]
    if planted:
        most = planted[-1]
        assert most.planted is not None
        times = "once" if most.repeats == 1 else f"{most.repeats} times"
        learnt = most.planted.low > audit.chance
        yield (
            f"a number that stands {times} among a client's rows is {'' if learnt else 'not '}found in the result: its "
            f"exposure is {_shown(most.planted)} bits, where {audit.chance:.2f} is chance."
        )


def _server(side: Side) -> Iterator[str]:
    """Say what a server learns of single updates that it does not learn of their sum."""
    named = {one.attack: one.auc for one in side.memberships}
    single, summed = named.get(SINGLE), named.get(SUMMED)
    if single is not None and summed is not None:
        text = (
            f"a server that sees each update alone tells a client's trained rows with {_shown(single)}, one that sees "
            f"their sum with {_shown(summed)}"
        )
        if side.owner is not None:
            text += (
                f"; of {side.owner.mean:.0%} of the rows the single updates also tell whose they are "
                f"({side.owner_chance:.0%} by chance), which a sum never does"
            )
        yield f"{text}."
    if side.named is not None and side.named.released:
        share = side.named.hits / side.named.released
        yield (
            f"{share:.0%} of {side.named.released} released centroids lie nearest to a row of the very cluster behind "
            f"them ({side.named.chance:.0%} by chance)."
        )


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _coin(interval: Interval) -> str:
    """Return what is said of a probability that a coin has, too."""
    return ", no better than a coin" if interval.low <= 0.5 else ", where a coin has 0.50"
