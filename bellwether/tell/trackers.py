"""Experiment trackers: TensorBoard, MLflow, Weights & Biases and trackio, through accelerate's classes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bellwether.errors import RecipeError, first_line
from bellwether.exchange.records import Evaluated, EvaluationRecord, Event, Note, RoundFinished, RoundRecord, Watcher
from bellwether.exchange.scores import Scores, macro, means
from bellwether.recipe.recipe import Recipe


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed, importing none of them.

    Args:
        names: from ``tensorboard``, ``mlflow``, ``wandb``, ``trackio``.

    Raises:
        RecipeError: one is not; says how to install it.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            [
                f"output.trackers names {name}, which is not installed: "
                f"in the clone of this project, run pip install -e '.[{name}]', or leave it out."
                for name in missing
            ]
        )


@contextlib.contextmanager
def open_trackers(recipe: Recipe, folder: Path, report: Watcher, done: int = 0) -> Iterator[Watcher]:
    """Log the scalars of a run to the trackers that its recipe names.

    A tracker that fails while the run goes on is reported once and then left alone: hours of training
    shall not end because a server for curves is down.

    Args:
        recipe: ``output.trackers`` says which; its fields become the run's parameters.
        folder: the run folder; TensorBoard's files go to ``tensorboard`` in it.
        report: is told when a tracker fails.
        done: rounds that are committed already; TensorBoard forgets what it has of later ones.

    Yields:
        The watcher to hand to the run.

    Raises:
        RecipeError: a tracker is not installed or cannot be started.
    """
    check_trackers(recipe.output.trackers)
    trackers: dict[str, Any] = {name: _start(name, recipe, folder, done) for name in recipe.output.trackers}

    def attempt(name: str, verb: str, *arguments: Any, **options: Any) -> None:
        try:
            getattr(trackers[name], verb)(*arguments, **options)
        except Exception as error:
            del trackers[name]
            report(Note(f"The tracker {name} failed and gets nothing more: {first_line(error)}", warning=True))

    def watcher(event: Event) -> None:
        if isinstance(event, RoundFinished | Evaluated):
            values = scalars(event.record)
            for name in list(trackers):
                attempt(name, "log", values, step=event.record.round)

    try:
        yield watcher
    finally:
        for name in list(trackers):
            attempt(name, "finish")


def scalars(record: RoundRecord | EvaluationRecord) -> dict[str, float]:
    """Return the numbers of a record under the names that trackers show.

    A round gives ``train/loss`` and the like, an evaluation ``PART/loss`` for the macro mean and
    ``PART/CATEGORY/loss`` for each category, and ``PART/group/GROUP/loss`` where there are groups.
    """
    if isinstance(record, EvaluationRecord):
        return _evaluation_scalars(record)
    values = {
        "train/learning_rate": record.learning_rate,
        "train/rows": record.rows_seen,
        "train/tokens": record.tokens,
        "train/clients": len(record.clients),
        "train/left_out": len(record.left_out),
        "traffic/bytes_up": record.bytes_up,
        "traffic/bytes_down": record.bytes_down,
        **{f"seconds/{_name(phase)}": seconds for phase, seconds in record.seconds.items()},
    }
    if record.failure is not None or not record.clients:
        return values
    figures = {"loss": record.loss, "preferred": record.preferred, "margin": record.margin}
    return {f"train/{name}": value for name, value in figures.items() if value is not None} | values


def _evaluation_scalars(record: EvaluationRecord) -> dict[str, float]:
    """Return the scores of an evaluation, macro, per category and per group; what was not scored is absent."""
    part = _name(record.part)
    places = {part: macro(record.categories)}
    places |= {f"{part}/{_name(name)}": means(totals) for name, totals in record.categories.items()}
    places |= {f"{part}/group/{_name(name)}": means(totals) for name, totals in record.groups.items()}
    return {f"{place}/{key}": value for place, scores in places.items() for key, value in _known(scores).items()}


def _known(scores: Scores) -> Mapping[str, float]:
    """Return the scores that are known."""
    names = ("loss", "perplexity", "rouge_l", "exact", "preferred")
    values = {name: getattr(scores, name) for name in names}
    return {key: value for key, value in values.items() if value is not None}


def _start(name: str, recipe: Recipe, folder: Path, done: int) -> Any:
    """Start one tracker and hand it the recipe."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    try:
        if name == "tensorboard":
            tracker = tracker_class("tensorboard", folder, purge_step=done + 1 if done else None)
        elif name == "mlflow":
            tracker = tracker_class(experiment_name=recipe.name, run_name=folder.name)
        else:
            tracker = tracker_class(recipe.name, name=folder.name)
        tracker.start()
        tracker.store_init_configuration(_parameters(recipe))
    except Exception as error:
        raise RecipeError(
            f"output.trackers names {name}, which cannot be started ({first_line(error)}): mend that or leave it out."
        ) from error
    return tracker


def _parameters(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Return the recipe as dotted names with values that every tracker takes."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, bool | int | float | str]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else json.dumps(value)

    return dict(walk(recipe.model_dump(mode="json"), ""))


def _name(text: str) -> str:
    """Return a text as a part of a metric's name, in the characters that all trackers take."""
    return re.sub(r"[^\w. -]", "_", text, flags=re.ASCII).strip(". ") or "_"
