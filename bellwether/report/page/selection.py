"""What a page says of the rows that clients chose: where they lie, how many they are, and what that saves.

Shape legend: N rows of all clients, M centroids, d dimensions of the space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from bellwether.exchange.records import RoundRecord, SurveyRecord
from bellwether.recipe.recipe import Selection
from bellwether.report.page.axes import ROWS
from bellwether.report.page.charts import Series, bars, histogram, lines, stacks
from bellwether.report.page.parts import Cell, Figure, Part, Section, Table, Text, Tile, named, one_line
from bellwether.report.page.space import Space, space
from bellwether.store.chosen import Chosen, last_survey
from bellwether.store.finished import FinishedRun
from bellwether.tools.words import counted

_DOTS = 2000  # rows that are drawn, at most
_KINDS = 8  # of rows that colour and shape tell apart
_CATEGORIES = 30  # with bars of their own
_FOLDED = 12  # rounds whose table is still open


def selection_section(run: FinishedRun) -> list[Section]:
    """Return the section on the rows that clients chose; none where they train on all.

    Args:
        run: the finished run.
    """
    if run.recipe.selection.method == "full":
        return []
    surveyed = last_survey(run.rounds)
    parts: list[Part] = []
    if surveyed is not None and surveyed.survey is not None and any(surveyed.survey.centroids.values()):
        parts.append(_picture(run, surveyed, surveyed.survey))
    if run.chosen:
        parts += [_by_client(run), *_used_by_category(run), *_by_category(run)]
    else:
        parts.append(Text("Which rows were chosen stands in the clients' own folders, which are not here."))
    parts += [_saved(run), *_seconds(run), _by_round(run)]
    return [Section("selection", "Rows chosen for training", parts, _lead(run))]


def used_tile(run: FinishedRun) -> list[Tile]:
    """Return the tile with the share of rows that were ever chosen; none where clients choose none, or it is not known.

    Args:
        run: the finished run.
    """
    held, used = _held(run), sum(one.distinct for one in run.chosen.values())
    if not run.chosen:
        return []
    note = f"{used:,} of {counted(sum(held.values()), 'row')}, chosen in any round"
    return [Tile("Rows used", f"{100 * used / max(1, sum(held.values())):.1f} %", note)]


# What was chosen, and what it saved ----------------------------------------------------------------


def _held(run: FinishedRun) -> dict[str, int]:
    """Return how many rows each client has to train on; those that no token fits of are left out."""
    return {one.client: one.rows - one.left_out for one in run.description.clients}


def _asked(record: RoundRecord) -> list[str]:
    """Return the clients of a cohort that could have trained: of some of them no row was chosen."""
    return [client for client in record.cohort if client not in record.left_out]


def _of_all(run: FinishedRun) -> list[int]:
    """Return, by round, the rows that the cohort would have trained, had it taken all, by the same passes."""
    held, passes = _held(run), run.recipe.training.local_epochs
    return [passes * sum(held[client] for client in _asked(record)) for record in run.rounds]


def _lead(run: FinishedRun) -> Markup:
    """Return what was trained beside what all rows would have been, and what the survey took."""
    training, seen, of_all = run.recipe.training, sum(one.rows_seen for one in run.rounds), sum(_of_all(run))
    if training.local_steps is not None:
        saved = (
            f"{seen:,} rows were trained, repetitions counted. Every client takes "
            f"{counted(training.local_steps, 'step')} a round, however many rows it chooses, so choosing shortens no "
            "training."
        )
    else:
        passes = counted(training.local_epochs, "pass", "passes")
        saved = (
            f"{seen:,} rows were trained, repetitions counted; all rows of the same cohorts, with the same {passes}, "
            f"would have been {of_all:,}: so it is {100 * seen / of_all if of_all else 0:.1f} % of them."
        )
    survey, train = (sum(one.seconds.get(name, 0.0) for one in run.rounds) for name in ("survey", "train"))
    surveyed = last_survey(run.rounds) is not None
    took = f"Surveys took {survey:.1f} s, training {train:.1f} s" if surveyed else f"Training took {train:.1f} s"
    gained = "" if training.local_steps is not None or not seen else _gained(survey + train, train * of_all / seen)
    return Markup(
        "Clients chose the rows that they trained on: selection.method {}. {} {}, choosing included.{}"
    ).format(named(run.recipe.selection.method), saved, took, gained)


def _gained(spent: float, whole: float) -> str:
    """Return what choosing saved at most: all rows at the pace of those that were trained, which fill batches badly.

    Args:
        spent: seconds of surveys and training.
        whole: seconds that training on all rows would have taken.
    """
    came = f"saved {whole - spent:.1f} s at most" if whole > spent else f"cost {spent - whole:.1f} s at least"
    return f" At that pace all rows would have taken {whole:.1f} s; full batches go faster, so choosing {came}."


def _saved(run: FinishedRun) -> Figure:
    """Return the curves of rows trained beside all rows."""
    x, of_all = [record.round for record in run.rounds], _of_all(run)
    seen = [record.rows_seen for record in run.rounds]
    series = [Series("chosen rows", x, seen), Series("all rows of the cohort", x, of_all, look=1)]
    rows, every = counted(sum(seen), "row"), counted(len(x), "round")
    label = f"Curves over {every}: {rows} trained, and {sum(of_all):,} where all had been taken."
    note = "Repetitions counted. Of a cohort all are counted that answered, also those of whom no row was chosen."
    return Figure("Rows trained per round", lines("saved", label, series, "round", "rows"), note)


def _seconds(run: FinishedRun) -> list[Part]:
    """Return the seconds of surveys and training by round; nothing where there are no surveys."""
    if last_survey(run.rounds) is None:
        return []
    names = {"survey": "survey", "train": "training"}
    series = [
        Series(title, [], [one.seconds.get(name, 0.0) for one in run.rounds], look=look)
        for look, (name, title) in enumerate(names.items())
    ]
    sums = " and ".join(f"{sum(one.y):.1f} s of {one.name}" for one in series)
    chart = stacks("surveys", f"Stacked bars: {sums}.", [one.round for one in run.rounds], series, ("round", "s"))
    return [Figure("Seconds of survey and training per round", chart, "Seconds are of this machine.")]


def _by_round(run: FinishedRun) -> Table:
    """Return the table of what was chosen and trained in each round, and how long it took."""
    held = _held(run)
    surveyed = last_survey(run.rounds) is not None
    rows = []
    for one in run.rounds:
        chose = sum(client.selected or 0 for client in one.clients)
        counts = [
            len(one.clients),
            sum(held[client] for client in _asked(one)),
            chose,
            one.rows_seen,
            one.tokens,
        ]
        cells = [Cell(f"{count:,}") for count in counts]
        seconds = [one.seconds.get(name) for name in (("survey", "train") if surveyed else ("train",))]
        rows.append(
            [
                Cell(f"{one.round}", number=False),
                *(_centroids(one.survey) if surveyed else ()),
                *cells,
                *(Cell("–" if second is None else f"{second:.2f}") for second in seconds),
            ]
        )
    sent = ["centroids sent", "kept"] if surveyed else []
    heads = [
        "round",
        *sent,
        "clients that trained",
        "rows of the cohort",
        "rows chosen",
        "rows trained",
        "tokens trained",
    ]
    heads += ["survey, s", "training, s"] if surveyed else ["training, s"]
    return Table("What was chosen and trained", heads, rows, folded=len(rows) > _FOLDED)


def _centroids(survey: SurveyRecord | None) -> list[Cell]:
    """Return how many centroids were sent and kept."""
    if survey is None:
        return [Cell("–"), Cell("–")]
    return [Cell(f"{sum(map(len, found.values())):,}") for found in (survey.centroids, survey.kept)]


# Shares ------------------------------------------------------------------------------------------


def _by_client(run: FinishedRun) -> Figure:
    """Return the share of each client's rows that it ever trained on."""
    shares = {name: 100 * one.distinct / max(1, len(one.categories)) for name, one in run.chosen.items()}
    title, axis = "Share of its rows that a client ever trained on", "% of its rows"
    low, high = min(shares.values()), max(shares.values())
    label = f"Shares of rows used by {counted(len(shares), 'client')}, {low:.1f} to {high:.1f} %."
    if len(shares) <= ROWS:
        chart = bars("used", label, list(shares), [Series("", [], list(shares.values()))], axis)
    else:
        chart = histogram("used", label, list(shares.values()), axis, "clients")
    never = sum(not one.distinct for one in run.chosen.values())
    return Figure(title, chart, f"{never:,} of {counted(len(shares), 'client')} trained on none." if never else "")


def _used_by_category(run: FinishedRun) -> list[Part]:
    """Return the share of each category's rows that was ever trained on; nothing where rows name none."""
    held = Counter(name for one in run.chosen.values() for name in one.categories)
    used: Counter[str] = Counter()
    for one in run.chosen.values():
        used.update(one.categories[number] for number in set().union(*one.rounds.values()))
    if len(held) < 2:
        return []
    shown = sorted(held, key=lambda name: (-held[name], name))[:_CATEGORIES]
    shares = [100 * used[name] / held[name] for name in shown]
    several = counted(len(shown), "category", "categories")
    label = f"Shares of rows used of {several}, {min(shares):.1f} to {max(shares):.1f} %."
    more = f"Shown are the {len(shown)} largest of {len(held)} categories." if len(shown) < len(held) else ""
    chart = bars(
        "used-of", label, [one_line(name) for name in shown], [Series("", [], shares)], "% of the category's rows"
    )
    return [Figure("Share of a category's rows that was ever trained on", chart, more)]


def _by_category(run: FinishedRun) -> list[Part]:
    """Return categories' shares of what was chosen beside all rows, with entropies; nothing where rows name none."""
    chosen: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for record in run.rounds:
        for client in run.chosen.keys() & set(_asked(record)):
            one = run.chosen[client]
            every.update(one.categories)
            chosen.update(one.categories[number] for number in one.rounds.get(record.round, ()))
    if len(every) < 2 or not chosen:
        return []
    names = sorted(every, key=lambda name: (-every[name], name))
    shown = names[:_CATEGORIES]
    series = [
        Series(title, [], [100 * counts[name] / counts.total() for name in shown], look=look)
        for look, (title, counts) in enumerate((("all rows", every), ("chosen rows", chosen)))
    ]
    evenness = [normalised_entropy([counts[name] for name in names]) for counts in (chosen, every)]
    label = (
        f"Paired bars: shares of {counted(len(shown), 'category', 'categories')} among all rows and among chosen rows."
    )
    more = (
        f" Shown are the {len(shown)} largest of {counted(len(names), 'category', 'categories')}."
        if len(shown) < len(names)
        else ""
    )
    note = (
        f"Normalised entropy over {counted(len(names), 'category', 'categories')} (1: all equally often, 0: one "
        f"alone): {evenness[0]:.3f} of "
        f"chosen rows, {evenness[1]:.3f} of all rows. Rows count once for each round: all rows of its cohort, and "
        f"those chosen.{more}"
    )
    chart = bars("evened", label, [one_line(name) for name in shown], series, "% of rows")
    return [Figure("Categories among chosen rows and among all", chart, note)]


def normalised_entropy(counts: Sequence[int]) -> float:
    """Return the entropy of counts over the largest that so many kinds can have: 1 where all are equal, 0 where one is.

    Args:
        counts: of each kind, at least two kinds, 0 included; not all 0.
    """
    total = sum(counts)
    return -math.fsum(count / total * math.log(count / total) for count in counts if count) / math.log(len(counts))


# The space ---------------------------------------------------------------------------------------


def _picture(run: FinishedRun, record: RoundRecord, survey: SurveyRecord) -> Figure:
    """Return the picture of the space in a round: rows where clients' own folders are here, and centroids."""
    asked = {client: run.chosen[client] for client in survey.centroids if client in run.chosen}
    known = {client: one.points_Nd for client, one in asked.items() if one.points_Nd is not None}
    sent_Md = np.concatenate([np.array(found, dtype=np.float64) for found in survey.centroids.values() if found])
    width = sent_Md.shape[1]
    rows_N2, sent_M2 = _plane(np.concatenate([np.zeros((0, width)), *known.values()]), sent_Md)
    chosen_N, kept_M = _chosen(run.chosen, known, record.round), _kept(survey)
    step = max(1, -(-len(rows_N2) // _DOTS))
    drawn_N = (np.arange(len(rows_N2)) % step == 0) | chosen_N
    kinds, what = _kinds(run.chosen, list(known))
    shown = Space(
        _dots(rows_N2[drawn_N], [kind for kind, drawn in zip(kinds, drawn_N, strict=True) if drawn]),
        _series("row chosen for training", rows_N2[chosen_N]),
        _series("centroid sent", sent_M2[~kept_M]),
        _series("centroid sent and kept", sent_M2[kept_M]),
    )
    label = (
        f"Points in a plane, round {record.round}: {counted(len(rows_N2), 'row')} of "
        f"{counted(len(known), 'client')}, {chosen_N.sum()} of "
        f"them chosen, and {counted(len(kept_M), 'centroid')}, {kept_M.sum()} of them kept."
    )
    axis = "principal component" if width > 2 else "dimension"
    chart = space("space", label, shown, (f"first {axis}", f"second {axis}"))
    note = _caption(run.recipe.selection, width, what if known else "", step)
    return Figure(f"The space of the survey in round {record.round}", chart, note, wide=True)


def _chosen(clients: Mapping[str, Chosen], known: Mapping[str, NDArray[Any]], round: int) -> NDArray[np.bool_]:
    """Return which of the clients' rows, one client after the other, were chosen in a round."""
    chosen: list[bool] = []
    for client, points_Nd in known.items():
        numbers = set(clients[client].rounds.get(round, ()))
        chosen += [number in numbers for number in range(len(points_Nd))]
    return np.array(chosen, dtype=bool)


def _kept(survey: SurveyRecord) -> NDArray[np.bool_]:
    """Return which of the clients' centroids, one client after the other, were kept."""
    kept: list[bool] = []
    for client, found in survey.centroids.items():
        numbers = set(survey.kept.get(client, ()))
        kept += [number in numbers for number in range(len(found))]
    return np.array(kept, dtype=bool)


def _plane(
    rows_Nd: NDArray[np.float64], sent_Md: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points in two dimensions: by the principal components of the rows, of centroids without any."""
    width = sent_Md.shape[1]
    if width <= 2:
        beside = ((0, 0), (0, 2 - width))
        return np.pad(rows_Nd, beside), np.pad(sent_Md, beside)
    from sklearn.decomposition import PCA

    fitted_on = rows_Nd if len(rows_Nd) > 1 else sent_Md
    if len(fitted_on) < 2:
        return np.zeros((len(rows_Nd), 2)), np.zeros((len(sent_Md), 2))
    pca = PCA(2, random_state=0).fit(fitted_on.astype(np.float64))
    rows_N2 = pca.transform(rows_Nd) if len(rows_Nd) else np.zeros((0, 2))
    return rows_N2, pca.transform(sent_Md)


def _kinds(chosen: Mapping[str, Chosen], clients: Sequence[str]) -> tuple[list[str], str]:
    """Return what tells each row's dot from others, its category or, where rows name none, its client; and which."""
    categories = [name for client in clients for name in chosen[client].categories]
    if len(set(categories)) > 1:
        return [name or "(none)" for name in categories], "category"
    return [client for client in clients for _ in chosen[client].categories], "client"


def _dots(rows_N2: NDArray[np.float64], kinds: Sequence[str]) -> list[Series]:
    """Return a series for each kind of row; beyond those that can be told apart, the others are one."""
    ranked = sorted(Counter(kinds).items(), key=lambda item: (-item[1], item[0]))
    own = [name for name, _ in ranked] if len(ranked) <= _KINDS else [name for name, _ in ranked[: _KINDS - 1]]
    series = [_series(name, rows_N2[[kind == name for kind in kinds]], look) for look, name in enumerate(sorted(own))]
    rest = rows_N2[[kind not in own for kind in kinds]] if kinds else rows_N2
    others = [_series(counted(len(ranked) - len(own), "other"), rest, _KINDS - 1)] if len(ranked) > len(own) else []
    return series + others


def _series(name: str, points_N2: NDArray[np.float64], look: int = 0) -> Series:
    """Return points of a plane as a series."""
    return Series(name, points_N2[:, 0].tolist(), points_N2[:, 1].tolist(), look=look)


def _caption(selection: Selection, width: int, what: str, step: int) -> str:
    """Return how the picture was made, and what must not be read from it."""
    made = f"The first two principal components of {counted(width, 'dimension')}" if width > 2 else "The space as it is"
    sentences = [f"{made}; rows by {what}." if what else f"{made}; rows stay in the clients' own folders, not here."]
    if step > 1:
        sentences.append(f"Of the rows one in {step} is drawn, and all that were chosen.")
    sentences.append("Stars are the centroids that the server kept, diamonds the others; rings are chosen rows.")
    if width > 2:
        sentences.append("What is nearest in all dimensions need not be so in two.")
    if selection.rotate:
        sentences.append("Rows that their client has trained on least often are taken first, nearer ones or not.")
    if selection.space == "per_client_tsne":
        sentences.append("Every client has a t-SNE of its own: places of different clients cannot be compared.")
    if selection.noise:
        sentences.append("Centroids are shown as they left their clients, with noise.")
    return " ".join(sentences)
