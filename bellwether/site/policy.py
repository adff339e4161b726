"""What a site allows, from its own ``policy.yaml``; what is not mentioned there is allowed, code of others never.

rounds: 50                    the most rounds of a federation
minutes_per_day: 120          of work for the coordinator; beyond, no task begins until the next day (UTC); none is cut
methods: [fedavg, scaffold]   names of methods
megabytes_per_round: 20       the most that leaves the site for a round: survey, update, scores, and where it is redone
noise: 1.0                    the least selection.noise, where centroids leave the site
epsilon: 8                    the most that may be spent: privacy.epsilon where clients are hidden, what this site's
                              rows spend where rows are; recipes without either are forbidden
code: [0123...]               SHA-256 of files whose functions a recipe may name
trust_remote_code: [my-model] models whose own code may be run: folders here, or on the hub as org/model@COMMIT
"""

from __future__ import annotations

import datetime
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bellwether.errors import FederationError, first_line
from bellwether.exchange.messages import Task, TrainTask
from bellwether.exchange.seal import Header
from bellwether.exchange.secure_checks import masked_bytes
from bellwether.exchange.secure_codec import SECURE_KINDS
from bellwether.exchange.sizes import due_bytes
from bellwether.method.accounting import epsilon
from bellwether.model.folder import on_hub
from bellwether.recipe.consent import TRUST, code_in
from bellwether.recipe.recipe import Model, Recipe
from bellwether.runner.guarantee import guarantee
from bellwether.site.ledger import entries, federation_of
from bellwether.tools.functions import file_of
from bellwether.tools.words import byte_size

POLICY = "policy.yaml"
TASKS = ("train", "survey", "evaluate", *SECURE_KINDS)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Policy(BaseModel):
    """What a site allows; None allows anything."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int | None = Field(None, ge=1)
    minutes_per_day: float | None = Field(None, gt=0)
    methods: tuple[str, ...] | None = None
    megabytes_per_round: float | None = Field(None, gt=0)
    noise: float | None = Field(None, ge=0)
    epsilon: float | None = Field(None, gt=0)
    code: tuple[str, ...] = ()
    trust_remote_code: tuple[str, ...] = ()


def read_policy(folder: Path) -> Policy:
    """Return a site's policy; one that has none allows what needs no code of others.

    Raises:
        FederationError: the file cannot be read.
    """
    path = folder / POLICY
    if not path.exists():
        return Policy()
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return Policy.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise FederationError(f"{path}: {place}: {problem['msg']}; mend it.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FederationError(f"{path} cannot be read ({first_line(error)}); mend it.") from error


def forbids_spending(policy: Policy, recipe: Recipe, rows: int) -> list[str]:
    """Return what a policy forbids of what a recipe spends on the rows of the site, as clauses.

    Args:
        policy: the site's.
        recipe: what the site is asked to run.
        rows: how many rows the site trains on.

    Raises:
        RecipeError: dp-accounting, which rows are accounted with, is not installed.
    """
    privacy = recipe.privacy
    if policy.epsilon is None:
        return []
    if privacy.hides_rows:
        given = guarantee(recipe, {"": rows})
        assert given is not None  # the rows are known
        spent = epsilon(given.release, privacy.delta)
        found = [f"an epsilon of {spent:.3g} for rows"] if spent > policy.epsilon else []
    else:
        spent = privacy.epsilon if privacy.epsilon is not None else math.inf
        found = [f"privacy.epsilon={spent:g}" if spent < math.inf else "no privacy.epsilon"]
        found = found if spent > policy.epsilon else []
    clauses = [f"{one} is spent, where at most {policy.epsilon:g} is allowed" for one in found]
    if privacy.delta >= 1 / rows:
        clauses.append(f"privacy.delta is {privacy.delta:g}, which must be below one in the {rows:,} rows of this site")
    return clauses


def forbidden(policy: Policy, recipe: Recipe) -> list[str]:
    """Return what of a recipe a policy forbids, as clauses.

    Args:
        policy: the site's.
        recipe: what the site is asked to run.
    """
    found = []
    rounds, method, noise = recipe.federation.rounds, recipe.method.name, recipe.selection.noise
    if policy.rounds is not None and rounds > policy.rounds:
        found.append(f"federation.rounds is {rounds}, where at most {policy.rounds} are allowed")
    if policy.methods is not None and method not in policy.methods:
        found.append(f"method.name is {method}, where {', '.join(policy.methods) or 'none'} are allowed")
    if policy.noise is not None and recipe.selection.surveys and noise < policy.noise:
        found.append(f"selection.noise is {noise:g}, where at least {policy.noise:g} is asked for")
    for code in code_in(recipe):
        if code.field == TRUST:
            listed = _with_commit(recipe.model)
            if listed not in policy.trust_remote_code:
                what = f"the model {code.name} would run its own code, and trust_remote_code does not list it"
                found.append(what + _how(recipe.model))
        elif _hash_of(code.name) not in policy.code:
            found.append(f"{code.field} names {code.name}, of whose file code does not list the SHA-256")
    return found


def _with_commit(model: Model) -> str | None:
    """Return how a policy lists a model whose code may be run; None where its code could change."""
    if not on_hub(model):
        return model.path
    fixed = model.revision is not None and _COMMIT.fullmatch(model.revision)
    return f"{model.path}@{model.revision}" if fixed else None


def _how(model: Model) -> str:
    """Return how a model on the hub would have to be listed, as the end of a sentence."""
    if not on_hub(model):
        return ""
    if _with_commit(model) is None:
        return f"; its code can change, unless model.revision is a commit of 40 digits, and that is {model.revision}"
    return f" as {_with_commit(model)}"


def forbids_task(policy: Policy, folder: Path, task: Task) -> str | None:
    """Return why a policy forbids a task, or None.

    Args:
        policy: the site's.
        folder: the site's, whose ledger says how long it has worked today.
        task: what it is asked.
    """
    most = policy.megabytes_per_round
    if most is not None and isinstance(task, TrainTask):
        due = task.payload.expected
        expected = due_bytes(due, {}, task.compression) if task.masking is None else masked_bytes(due, {})
        if expected > most * 1e6:
            return f"an update has at least {byte_size(expected)}, and {byte_size(most * 1e6)} are allowed for a round"
    if policy.minutes_per_day is not None:
        minutes = minutes_worked(folder, datetime.datetime.now(datetime.UTC).date())
        if minutes >= policy.minutes_per_day:
            return f"it has worked {minutes:.0f} minutes today, where {policy.minutes_per_day:g} are allowed"
    return None


def forbids_answer(policy: Policy, folder: Path, header: Header, size: int) -> str | None:
    """Return why a policy forbids to send an answer, or None.

    Args:
        policy: the site's.
        folder: the site's, whose ledger says what has left it for this round before.
        header: what the task was.
        size: how many bytes the answer has.
    """
    most = policy.megabytes_per_round
    if most is None:
        return None
    before = bytes_sent(folder, federation_of(header.run), header.round)
    if before + size <= most * 1e6:
        return None
    gone = f", {byte_size(before)} have left for this round before" if before else ""
    return f"an answer has {byte_size(size)}{gone}, and {byte_size(most * 1e6)} are allowed for a round"


def bytes_sent(folder: Path, federation: str, round: int) -> int:
    """Return the bytes of all answers to tasks of a round that were done, each as often as it was sent."""
    return sum(
        entry.bytes
        for entry in entries(folder)
        if entry.way == "reply" and not entry.failure and entry.kind in TASKS
        if (federation_of(entry.run), entry.round) == (federation, round)
    )


def minutes_worked(folder: Path, day: datetime.date) -> float:
    """Return for how long a site has worked at tasks on a day, in UTC: from each task to its reply, as far as in it."""
    first = datetime.datetime.combine(day, datetime.time(), datetime.UTC)
    last = first + datetime.timedelta(days=1)
    begun: dict[str, datetime.datetime] = {}
    seconds = 0.0
    for entry in entries(folder):
        time = datetime.datetime.fromisoformat(entry.time)
        if entry.way == "task":
            begun[entry.number] = time
        elif entry.number in begun:
            within = min(time, last) - max(begun.pop(entry.number), first)
            seconds += max(0.0, within.total_seconds())
    return seconds / 60


def as_check(policy: Policy, folder: Path) -> Any:
    """Return the check of tasks that ``site.resident`` asks for."""

    def check(header: Header, task: Task) -> str | None:
        return forbids_task(policy, folder, task)

    return check


def as_limit(policy: Policy, folder: Path) -> Any:
    """Return the check of answers that ``site.resident`` asks for."""

    def check(header: Header, size: int) -> str | None:
        return forbids_answer(policy, folder, header, size)

    return check


def _hash_of(function: str) -> str:
    """Return the SHA-256 of the file that a function stands in; nothing where there is none."""
    place = file_of(function)
    return hashlib.sha256(Path(place).read_bytes()).hexdigest() if place else ""
