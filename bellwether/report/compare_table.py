"""The table of a comparison: every arm's scores with their intervals, and how far a federated arm is above them.

Each score is macro: the mean over categories. An arm that makes an adapter for each client is the mean over its
clients. Intervals are of 95 %, over seeds and prompts (``bellwether.tools.intervals``); p-values of the
differences are adjusted by Holm's method over all those shown. Arms that count optimizer steps are compared with a
federation that does, the others with one that does not.

Shape legend: S seeds, P prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.scores import fraction
from bellwether.recipe.recipe import Arm
from bellwether.store.comparison import Comparison, Costs, Outcome
from bellwether.tools.intervals import Interval, by_category, difference, holm, interval
from bellwether.tools.json_text import KEPT, Finite
from bellwether.tools.randomness import Randomness

Floats = NDArray[np.float64]

METRICS = ("loss", "rouge_l", "exact", "preferred")
OWN = "own categories"
SAMPLES, SAMPLES_BY_CATEGORY = 10_000, 2_000  # resamples; of intervals by category and client there are many


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        name: of the arm, and of what it is scored on where that is not everything.
        scores: interval by metric; a metric that the arm does not have is absent.
        gaps: how much higher the arm that is referred to scores, by metric, with adjusted p-values.
        categories: interval by category and metric.
        groups: interval by group (language or domain) and metric, over all rows of the group; empty where rows name
            fewer than two.
        cost: mean over seeds and adapters of what it cost.
        ratios: mean score of the arm that is referred to over this one's, by metric, as FedIT has it for judged scores
            (Zhang et al. 2023, arXiv 2305.05644); absent for the loss, and where this one's is 0.
    """

    __pydantic_config__ = KEPT

    name: str
    scores: Mapping[str, Interval]
    gaps: Mapping[str, Interval]
    categories: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    cost: Costs = field(default_factory=dict)
    ratios: Mapping[str, Finite] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientGain:
    """What a client gains by the federation: the shared model against the one that it trains alone.

    Args:
        arm: the arm that trains it alone.
        reference: the federated arm.
        client: its name.
        alone: mean scores of its own model on the shared test rows, by metric.
        shared: how much higher the federated model scores there, with adjusted p-values.
        own: how much higher the federated model scores on the rows that the client holds out of its own, means over
            all of them; empty where none are held out. Under every seed these may be other rows, so the interval
            speaks of seeds; with one seed its ends and p-value are no numbers.
    """

    __pydantic_config__ = KEPT

    arm: str
    reference: str
    client: str
    alone: Mapping[str, Finite]
    shared: Mapping[str, Interval]
    own: Mapping[str, Interval]


@dataclass(frozen=True)
class _Scored:
    """An arm's rows under all seeds, for one metric, clients averaged within a seed."""

    numerators_SP: Floats
    denominators_P: Floats


# An outcome, and the categories on which it counts; None for all.
_Counted = tuple[Outcome, Sequence[str] | None]


def make_lines(comparison: Comparison) -> list[Line]:
    """Return one line per arm, and further ones on the own categories of clients that train alone.

    The arms that others are compared with are those of ``comparison.reference``.
    """
    by_arm = _by_arm(comparison)
    first, randomness = comparison.outcomes[0], Randomness(comparison.recipe.seed)
    strata = first.categories

    def line(name: str, counted: Sequence[_Counted], referred: Sequence[_Counted]) -> Line:
        return _line(name, counted, referred, strata, randomness)

    lines, on_own = [], []
    for name, arm in comparison.arms.items():
        reference = comparison.reference(arm.counts_steps)
        counted = _everywhere(by_arm[name])
        main = line(name, counted, _everywhere(by_arm[reference]) if reference not in (None, name) else [])
        categories = _by_stratum(name, counted, strata, randomness)
        groups = _by_stratum(f"{name}, by group", counted, first.groups, randomness) if first.groups else {}
        lines.append(replace(main, categories=categories, groups=groups, cost=_cost(by_arm[name])))
        if arm.trains != "alone":
            continue
        referred = _on_own(by_arm[name], by_arm[reference]) if reference is not None else []
        on_own.append(line(f"{name}, {OWN}", [(owner, owner.own) for owner in by_arm[name]], referred))
        for other in _shared(comparison.arms, arm.counts_steps):
            counted = _on_own(by_arm[name], by_arm[other])
            on_own.append(line(f"{other}, {OWN} of {name}", counted, referred if other != reference else []))
    return _adjusted(lines + on_own)


def _by_arm(comparison: Comparison) -> dict[str, list[Outcome]]:
    """Return the outcomes of each arm."""
    by_arm: dict[str, list[Outcome]] = {name: [] for name in comparison.arms}
    for outcome in comparison.outcomes:
        by_arm[outcome.arm].append(outcome)
    return by_arm


def _shared(arms: Mapping[str, Arm], counts_steps: bool) -> list[str]:
    """Return the arms that make one adapter for all clients, of those that count steps, or of the others."""
    return [
        name
        for name, arm in arms.items()
        if arm.trains in ("together", "federation") and arm.counts_steps == counts_steps
    ]


def _everywhere(outcomes: Sequence[Outcome]) -> list[_Counted]:
    return [(outcome, None) for outcome in outcomes]


def _on_own(owners: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[_Counted]:
    """Return an arm's adapters of each seed, once for each client, on the client's own categories."""
    of_seed = {outcome.seed: outcome for outcome in outcomes}
    return [(of_seed[owner.seed], owner.own) for owner in owners]


def _line(
    name: str,
    counted: Sequence[_Counted],
    referred: Sequence[_Counted],
    strata: Sequence[str],
    randomness: Randomness,
    samples: int = SAMPLES,
) -> Line:
    """Return a line: scores, and how much higher those of what is referred to are."""
    scores, gaps, ratios = {}, {}, {}
    for metric in METRICS:
        found, other = _scored(counted, metric, strata), _scored(referred, metric, strata)
        if found is None:
            continue
        generator = randomness.numpy(f"interval of {metric} of {name}")
        scores[metric] = interval(
            found.numerators_SP, strata, generator, denominators_P=found.denominators_P, samples=samples
        )
        # Losses per token of different tokenizers have no difference.
        if other is not None and np.array_equal(other.denominators_P, found.denominators_P):
            gaps[metric] = difference(
                other.numerators_SP,
                found.numerators_SP,
                strata,
                generator,
                denominators_P=found.denominators_P,
                samples=samples,
            )
            if metric != "loss" and scores[metric].mean:
                ratios[metric] = (scores[metric].mean + gaps[metric].mean) / scores[metric].mean
    return Line(name, scores, gaps, ratios=ratios)


def _scored(counted: Sequence[_Counted], metric: str, strata: Sequence[str]) -> _Scored | None:
    """Return scores whose macro mean is the mean over adapters of the macro means over the categories that count.

    None where the arm has no such score.
    """
    known = set(strata)
    rows: dict[int, list[Floats]] = {}
    denominators_P = None
    for outcome, categories in counted:
        pairs = [fraction(totals, metric) for totals in outcome.totals]
        if any(pair is None for pair in pairs):
            return None
        values = np.array(pairs, dtype=np.float64)
        denominators_P = values[:, 1]
        mine = known if categories is None else known.intersection(categories)
        if mine:  # else nothing of what the client has is scored
            weights_P = np.isin(strata, list(mine)) * len(known) / len(mine)
            rows.setdefault(outcome.seed, []).append(values[:, 0] * weights_P)
    if denominators_P is None or not rows:
        return None
    return _Scored(np.stack([np.mean(rows[seed], axis=0) for seed in sorted(rows)]), denominators_P)


def _by_stratum(
    name: str, counted: Sequence[_Counted], strata: Sequence[str], randomness: Randomness
) -> dict[str, dict[str, Interval]]:
    """Return intervals by category, or by group, and metric."""
    found: dict[str, dict[str, Interval]] = {stratum: {} for stratum in sorted(set(strata))}
    for metric in METRICS:
        scored = _scored(counted, metric, strata)
        if scored is None:
            continue
        generator = randomness.numpy(f"intervals by category of {metric} of {name}")
        for stratum, one in by_category(
            scored.numerators_SP,
            strata,
            generator,
            denominators_P=scored.denominators_P,
            samples=SAMPLES_BY_CATEGORY,
        ).items():
            found[stratum][metric] = one
    return found


def _cost(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the mean cost per adapter."""
    names = dict.fromkeys(itertools.chain.from_iterable(outcome.cost for outcome in outcomes))
    return {name: float(np.mean([outcome.cost.get(name, 0.0) for outcome in outcomes])) for name in names}


def _adjusted(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with p-values adjusted over all differences shown."""
    adjusted = adjust([line.gaps for line in lines])
    return [replace(line, gaps=gaps) for line, gaps in zip(lines, adjusted, strict=True)]


def adjust(families: Sequence[Mapping[str, Interval]]) -> list[dict[str, Interval]]:
    """Return differences with p-values adjusted by Holm's method over all of them that have one.

    Args:
        families: differences by metric, of each line.
    """
    places = [
        (number, metric)
        for number, gaps in enumerate(families)
        for metric, gap in gaps.items()
        if not math.isnan(gap.p)
    ]
    values = holm([families[number][metric].p for number, metric in places])
    adjusted = [dict(gaps) for gaps in families]
    for (number, metric), p in zip(places, values, strict=True):
        adjusted[number][metric] = replace(adjusted[number][metric], p=p)
    return adjusted


# Clients ------------------------------------------------------------------------------------------


def client_gains(comparison: Comparison) -> list[ClientGain]:
    """Return what each client that trains alone gains by the federation that counts steps, or passes, as it does.

    Args:
        comparison: of its arms that train alone the first that has such a federation counts; without one the list is
            empty.
    """
    pairs = [
        (name, reference)
        for name, arm in comparison.arms.items()
        if arm.trains == "alone" and (reference := comparison.reference(arm.counts_steps)) is not None
    ]
    if not pairs:
        return []
    by_arm, randomness = _by_arm(comparison), Randomness(comparison.recipe.seed)
    (name, reference), strata = pairs[0], comparison.outcomes[0].categories
    federated = {outcome.seed: outcome for outcome in by_arm[reference]}
    gains = []
    for client in dict.fromkeys(outcome.client for outcome in by_arm[name]):
        mine = [outcome for outcome in by_arm[name] if outcome.client == client]
        theirs = [federated[outcome.seed] for outcome in mine]
        line = _line(
            f"{name}, {client}", _everywhere(mine), _everywhere(theirs), strata, randomness, SAMPLES_BY_CATEGORY
        )
        alone = {metric: score.mean for metric, score in line.scores.items()}
        on_own = _own_gains(client, mine, theirs, randomness)
        gains.append(ClientGain(name, reference, client, alone, line.gaps, on_own))
    shared, own = adjust([gain.shared for gain in gains]), adjust([gain.own for gain in gains])
    return [replace(gain, shared=s, own=o) for gain, s, o in zip(gains, shared, own, strict=True)]


def _own_gains(
    client: str, mine: Sequence[Outcome], theirs: Sequence[Outcome], randomness: Randomness
) -> dict[str, Interval]:
    """Return how much higher the federated model scores on rows that a client holds out."""
    held = [
        (one.clients[client], other.clients[client])
        for one, other in zip(mine, theirs, strict=True)
        if client in one.clients and client in other.clients
    ]
    gains = {}
    for metric in METRICS:
        pairs = [[fraction(totals, metric) for totals in pair] for pair in held]
        known = [[value[0] / value[1] for value in pair if value] for pair in pairs]
        if not known or any(len(pair) < 2 for pair in known):
            continue
        gains_S1 = np.array([[federated - alone] for alone, federated in known])
        generator = randomness.numpy(f"interval of {metric} of the own rows of {client}")
        found = interval(gains_S1, [client], generator, samples=SAMPLES_BY_CATEGORY)
        unknown = replace(found, low=math.nan, high=math.nan, p=math.nan)
        gains[metric] = found if len(known) > 1 else unknown
    return gains
