"""The page of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from bellwether.exchange.records import RoundRecord
from bellwether.exchange.scores import macro
from bellwether.report.page.appendix import answers_section, appendix, exchange
from bellwether.report.page.charts import Series, stacks
from bellwether.report.page.clients import holdings, participation
from bellwether.report.page.metrics import METRICS, capital, changes, spell_time
from bellwether.report.page.parts import Cell, Figure, Page, Part, Section, Table, Tile, named, words
from bellwether.report.page.privacy import privacy_section
from bellwether.report.page.scores import BASE, OWN, Changes, categories, gains, headline, learning, main_scores
from bellwether.report.page.selection import selection_section, used_tile
from bellwether.store.finished import FinishedRun
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import byte_size, counted

_PHASES = ("survey", "train", "aggregate", "evaluate")


def run_page(run: FinishedRun, *, smooth: bool = True) -> Page:
    """Return the page of a finished run.

    Args:
        run: what its folder keeps.
        smooth: whether curves of many points are smoothed.
    """
    found = changes(run.before, run.after, Randomness(run.recipe.seed))
    clients = [client.client for client in run.description.clients]
    return Page(
        kind="run",
        name=run.recipe.name,
        summary=_summary(run),
        result=_result(run, found),
        tiles=[*_score_tiles(run, found), *_cost_tiles(run), *used_tile(run)],
        sections=[
            learning(run, smooth),
            *categories(run, found),
            holdings(run.description),
            *gains(run),
            participation(run.rounds, clients),
            *selection_section(run),
            _cost(run.rounds),
            *privacy_section(run),
            *_answers(run),
            *appendix(run.recipe, run.environment),
        ],
    )


# What was run, and what came out ------------------------------------------------------------------


def _summary(run: FinishedRun) -> Markup:
    """Return what was run, in one paragraph."""
    recipe, training = run.recipe, run.recipe.training
    work = (
        counted(training.local_steps, "optimizer step")
        if training.local_steps
        else f"{counted(training.local_epochs, 'pass', 'passes')} over their rows"
    )
    if recipe.selection.method != "full":
        work += f", chosen by the method {recipe.selection.method},"
    sizes = sorted({len(record.cohort) for record in run.rounds}) or [0]
    cohort = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    scored = (
        f" {counted(len(run.after), f'{recipe.evaluation.part} row')} {'was' if len(run.after) == 1 else 'were'} held "
        "out of training and scored."
        if run.after
        else ""
    )
    return Markup(
        "The recipe {} tuned the base model {} to follow instructions, with LoRA adapters of rank {}. {} {} {} of {}; "
        "in {} {} of them trained {} with {} at a learning rate "
        "of {}, and a server aggregated their adapters ({}). No text of clients' rows travelled{}, and the base stayed "
        "frozen.{}{} Seed {}."
    ).format(
        named(recipe.name),
        named(recipe.model.path),
        recipe.lora.rank,
        counted(len(run.description.clients), "simulated client"),
        "holds" if len(run.description.clients) == 1 else "hold",
        counted(run.description.rows, "row"),
        counted(len(run.description.categories), "category", "categories"),
        f"each of {len(run.rounds):,} rounds" if len(run.rounds) > 1 else "one round",
        cohort,
        work,
        "plain SGD" if training.optimizer == "sgd" else "AdamW",
        f"{training.learning_rate:g}",
        named(recipe.method.name),
        ", only centroids of their clusters" if recipe.selection.surveys else "",
        _secured(run),
        scored,
        recipe.seed,
    )


def _secured(run: FinishedRun) -> str:
    """Return what of updates the server saw, where they were masked, as a sentence."""
    if not any(record.secure for record in run.rounds):
        return ""
    return " Updates were masked (secure aggregation), so that the server saw their weighted sums alone."


def _result(run: FinishedRun, found: Changes) -> Markup:
    """Return what came out, in one sentence with its uncertainty."""
    scored = main_scores(run)
    if not scored:
        return Markup("Nothing was scored: the recipe holds no rows out.")
    before, after = (macro(record.categories) for record in (scored[0], scored[-1]))
    metric = headline(before, after)
    old, new = metric.value(before), metric.value(after)
    went = "rose" if new > old else "fell" if new < old else "stayed"
    between = found[metric.key].gap if metric.key in found else None
    gap, digits = metric.step(old, new, between.mean * metric.scale if between else new - old)
    moved = f"{capital(metric.name)} {went} from {metric.text(old, digits)} to {metric.text(new, digits)}"
    rows = f"{counted(len(run.after), f'held-out {run.recipe.evaluation.part} question')}{_doubled(run)}"
    if scored[-1].part == OWN:
        return Markup(
            "{} on the rows that clients hold out of their own; only totals leave a client, so no interval."
        ).format(moved)
    of = f"the mean of {counted(len(scored[-1].categories), 'category', 'categories')} over {rows}"
    if between is None:
        return Markup("{}, {}; not all scores are finite, so there is no interval.").format(moved, of)
    doubt = " It cannot be told from no change." if between.low <= 0 <= between.high else ""
    return Markup("{}: {} {} (95 % interval over questions {}), {}.{}").format(
        moved,
        metric.number(gap, sign=True, digits=digits),
        metric.gap,
        metric.range(between, sign=True, digits=digits),
        of,
        doubt,
    )


def _score_tiles(run: FinishedRun, found: Changes) -> list[Tile]:
    """Return a tile for each score."""
    scored = main_scores(run)
    if not scored:
        return []
    before, after = (macro(record.categories) for record in (scored[0], scored[-1]))
    tiles = []
    for metric in METRICS:
        old, new = metric.value(before), metric.value(after)
        if math.isnan(new):
            continue
        between = found[metric.key].gap if metric.key in found else None
        gap, digits = metric.step(old, new, between.mean * metric.scale if between else new - old)
        note = metric.unit
        if between:
            ends = metric.range(between, sign=True, digits=digits)
            note = f"{metric.number(gap, sign=True, digits=digits)} ({ends}) {metric.gap}"
        went = f"{metric.number(old, digits=digits)} → {metric.text(new, digits)}"
        tiles.append(Tile(capital(metric.name), went, note))
    return tiles


def _cost_tiles(run: FinishedRun) -> list[Tile]:
    """Return tiles for what was sent, trained and waited for."""
    rounds = run.rounds
    up, down = sum(record.bytes_up for record in rounds), sum(record.bytes_down for record in rounds)
    seconds = sum(sum(record.seconds.values()) for record in rounds)
    rows, tokens = sum(record.rows_seen for record in rounds), sum(record.tokens for record in rounds)
    return [
        Tile(
            "Sent", byte_size(up + down), f"{byte_size(up)} up, {byte_size(down)} down, {counted(len(rounds), 'round')}"
        ),
        Tile("Trained", counted(tokens, "token"), f"{counted(rows, 'row')}, repetitions counted"),
        Tile("Time in rounds", spell_time(seconds), f"{seconds / max(1, len(rounds)):.2f} s a round"),
    ]


# Cost, answers ------------------------------------------------------------------------------------


def _cost(rounds: Sequence[RoundRecord]) -> Section:
    """Return what rounds took: seconds by phase, bytes."""
    x = [record.round for record in rounds]
    phases = [name for name in _PHASES if any(name in record.seconds for record in rounds)]
    seconds = [
        Series(name, [], [record.seconds.get(name, 0.0) for record in rounds], look=look)
        for look, name in enumerate(phases)
    ]
    down = Series("down, to clients", [], [record.bytes_down for record in rounds], look=4)
    up = Series("up, from clients", [], [record.bytes_up for record in rounds], look=0)
    sums = [[words(f"seconds: {one.name}"), *_sum_cells(one.y, 2)] for one in seconds]
    sums += [[words(f"bytes {one.name}"), *_sum_cells(one.y, 0)] for one in (down, up)]
    sums += [
        [words(what), *_sum_cells(values, 0)]
        for what, values in (
            ("rows trained", [record.rows_seen for record in rounds]),
            ("tokens trained", [record.tokens for record in rounds]),
        )
    ]
    parts: list[Part] = [
        Figure(
            "Seconds by phase",
            stacks("seconds", "Stacked bars of seconds per round by phase.", x, seconds, ("round", "s")),
        ),
        Figure(
            "Bytes per round", stacks("bytes", "Stacked bars of bytes per round.", x, [down, up], ("round", "bytes"))
        ),
        Table("Sums over all rounds", ["what", "sum", "mean of a round"], sums),
    ]
    return Section(
        "cost",
        "Cost",
        parts,
        "Seconds are of this machine; bytes are those of adapters, and of the centroids where there were surveys.",
    )


def _sum_cells(values: Sequence[float], digits: int) -> list[Cell]:
    total = sum(values)
    return [Cell(f"{total:,.{digits}f}"), Cell(f"{total / max(1, len(values)):,.{digits}f}")]


def _answers(run: FinishedRun) -> list[Section]:
    """Return some answers of the untuned base and of the tuned model."""
    exchanges = [
        exchange(one.category, one.instruction, one.context, one.reference, {BASE: one.before, "tuned": one.after})
        for one in run.samples
    ]
    return answers_section(exchanges, f"Held-out rows{_doubled(run)}, categories in turn; nothing is chosen by hand.")


def _doubled(run: FinishedRun) -> str:
    """Return how many held-out rows clients hold as well, as part of a sentence."""
    part = run.recipe.evaluation.part
    doubled = run.description.doubled.get(part, 0)
    total = run.description.test if part == "test" else run.description.validation
    return f" ({doubled:,} of all {total:,} stand among the training rows as well)" if doubled else ""
