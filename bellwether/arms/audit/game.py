"""The games that an audit plays: who and what takes part is decided by coins, and a run is watched from the server.

In the game of rows, each of a sample of the clients' rows, and each canary, takes part in a run or not. In the game of
clients, each client answers in all rounds of a run, or in none. Everything else of the recipe is as it is.

Shape legend: N rows in the game, K canaries, C centroids, d dimensions of the space.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bellwether.arms.audit.canaries import Canary, canary_row, candidates, make_canaries
from bellwether.client.memory import Memory, recall
from bellwether.data.rows import Federated, Row, TokenRow
from bellwether.errors import DataError
from bellwether.exchange.messages import Payload, Reply, SurveyTask, Task, TrainTask
from bellwether.federate import Engine
from bellwether.recipe.recipe import Recipe
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import Prepared, prepare_with
from bellwether.runner.wiring import Deployment, Setting, make_engine
from bellwether.store.run_folder import client_folders
from bellwether.tools.randomness import Randomness


@dataclass(frozen=True)
class Settings:
    """How much an audit does.

    Args:
        runs: runs of each game, with coins and a seed of their own.
        rows: training rows in the game, at most; those of each client but one that always trains.
        canaries: planted secrets.
        repeats: how often a canary stands among its client's rows, in turn.
        candidates: among which a secret is ranked.
        clients: whether the game of clients is played, too.
    """

    runs: int = 8
    rows: int = 400
    canaries: int = 12
    repeats: tuple[int, ...] = (1, 4)
    candidates: int = 128
    clients: bool = False


@dataclass(frozen=True)
class World:
    """What is played over.

    Args:
        prepared: the recipe as it is, with all rows.
        rows: the rows in the game, as their clients have them: client, and number of the row.
        canaries: planted secrets.
        likely: candidates of each canary, its own secret first.
    """

    prepared: Prepared
    rows: Sequence[tuple[str, int]]
    canaries: Sequence[Canary]
    likely: Sequence[Sequence[str]]

    @property
    def owners(self) -> list[str]:
        """The client of each row in the game."""
        return [client for client, _ in self.rows]

    @property
    def tokens(self) -> list[TokenRow]:
        """The rows in the game, as tokens."""
        return [self.prepared.clients[client].rows[number] for client, number in self.rows]


def make_world(prepared: Prepared, settings: Settings) -> World:
    """Return who and what is in the game, drawn from the recipe's seed.

    Of rows that stand there more than once none is in the game: left out, it would still be trained on.

    Args:
        prepared: the recipe as it is.
        settings: how much an audit does.

    Raises:
        DataError: no row can be left out.
    """
    randomness = Randomness(prepared.recipe.seed)
    held = {client: [one.row for one in tokenised.rows] for client, tokenised in prepared.clients.items()}
    copies = collections.Counter(_content(row) for rows in held.values() for row in rows)
    free: list[tuple[str, int]] = []
    for client, rows in held.items():
        order = randomness.numpy("rows in the game", client=client).permutation(len(rows)).tolist()
        free += [(client, number) for number in sorted(order[1:]) if copies[_content(rows[number])] == 1]
    if not free:
        raise DataError(
            "No row can be left out of training, since each client has one row, or rows that stand there twice; an "
            "audit needs clients with several different rows."
        )
    drawn = randomness.numpy("rows in the game").permutation(len(free))[: settings.rows]
    canaries = make_canaries(list(held), settings.canaries, settings.repeats, randomness)
    likely = [candidates(canary, settings.candidates, randomness) for canary in canaries]
    return World(prepared, [free[number] for number in sorted(drawn.tolist())], canaries, likely)


def _content(row: Row) -> tuple[object, ...]:
    return row.instruction, row.context, row.response, row.turns, row.rejected


def coins(recipe: Recipe, what: str, run: int, count: int) -> list[bool]:
    """Return the fair coins of a run.

    Args:
        recipe: whose seed they come from.
        what: is in the game.
        run: number of the run.
        count: how many coins.
    """
    drawn: list[bool] = (Randomness(recipe.seed).numpy(f"audit of {what}", round=run).random(count) < 0.5).tolist()
    return drawn


def dealt(world: World, rows_in: Sequence[bool], canaries_in: Sequence[bool]) -> Federated:
    """Return the rows that clients train on in a run of the game of rows.

    Args:
        world: what is played over.
        rows_in: whether each row in the game is trained on.
        canaries_in: whether each canary is planted.
    """
    out = {row for row, inside in zip(world.rows, rows_in, strict=True) if not inside}
    clients = {
        client: [one.row for number, one in enumerate(tokenised.rows) if (client, number) not in out]
        for client, tokenised in world.prepared.clients.items()
    }
    for canary, inside, likely in zip(world.canaries, canaries_in, world.likely, strict=True):
        if inside:
            row = secret_row(world, canary, canary.secret, likely)
            clients[canary.client] = [*clients[canary.client], *[row] * canary.repeats]
    federated = world.prepared.federated
    # What clients hold out themselves takes no part: an audit scores rows of its own.
    return Federated(clients, {}, federated.validation, federated.test)


def secret_row(world: World, canary: Canary, secret: str, likely: Sequence[str]) -> Row:
    """Return the row that tells a secret under a canary's prompt; of a preference row the next candidate is rejected.

    Args:
        world: what is played over.
        canary: whose prompt it is.
        secret: its own, or a candidate.
        likely: the canary's candidates.
    """
    like = world.prepared.clients[canary.client].rows[0].row
    return canary_row(canary, secret, like, likely[(likely.index(secret) + 1) % len(likely)])


# Watching -----------------------------------------------------------------------------------------


class Eavesdropper:
    """An engine around another one, that notes what a server sees; of clients that are absent it sees nothing.

    Args:
        engine: delivers tasks and collects replies.
        folders: each client's own, where a simulation keeps what a client remembers of its survey.
        absent: clients that answer nothing.

    Attributes:
        tasks: what each client was asked in the first round in which any trained.
        replies: what each sent back in it.
        after: what the first client was sent in a later round; None where there was none.
        released: centroids_Cd that each client released in the first round with a survey.
        memories: what each client remembers of it.
    """

    def __init__(self, engine: Engine, folders: Mapping[str, Path], absent: Collection[str] = ()) -> None:
        self._engine, self._folders, self._absent = engine, folders, frozenset(absent)
        self.tasks: dict[str, TrainTask] = {}
        self.replies: dict[str, Reply] = {}
        self.after: Payload | None = None
        self.released: dict[str, NDArray[Any]] = {}
        self.memories: dict[str, Memory] = {}

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Give those clients that are there their tasks; yield the replies as they come, and note them."""
        present = {client: task for client, task in tasks.items() if client not in self._absent}
        train = {client: task for client, task in present.items() if isinstance(task, TrainTask)}
        first_survey = not self.released and any(isinstance(task, SurveyTask) for task in present.values())
        first = bool(train) and not self.replies
        if first:
            self.tasks = train
        elif train and self.after is None:
            self.after = next(iter(train.values())).payload
        for reply in self._engine.ask(present, deadline):
            if first and reply.update is not None:
                self.replies[reply.client] = reply
            if first_survey and reply.survey is not None:
                self._note_survey(reply)
            yield reply

    def _note_survey(self, reply: Reply) -> None:
        """Note the centroids that a client released, and what it remembers of the rows behind them."""
        assert reply.survey is not None
        memory = recall(self._folders[reply.client], reply.survey.round)
        if memory is not None and memory.clusters is not None:
            self.released[reply.client] = reply.survey.centroids_Cd
            self.memories[reply.client] = memory


@dataclass
class Watched:
    """Holds what was seen of a run, once its engine is made."""

    engine: Eavesdropper | None = None

    @property
    def seen(self) -> Eavesdropper:
        """What was seen."""
        assert self.engine is not None, "the run has made no engine"
        return self.engine


def watched(federated: Federated, watched: Watched, absent: Collection[str] = ()) -> Deployment:
    """Return a simulation over given rows that is watched from the server.

    Args:
        federated: the rows, dealt out, in place of what the recipe's data would give.
        watched: holds what is seen.
        absent: clients that answer nothing.
    """

    def prepare(recipe: Recipe, opened: Opened | None) -> Prepared:
        prepared = prepare_with(recipe, federated, opened, here=True)
        return replace(prepared, notes=(), warnings=())  # told once, of the recipe as it is

    @contextlib.contextmanager
    def engine(setting: Setting) -> Iterator[Engine]:
        folders = client_folders(setting.folder, list(setting.prepared.clients))
        with make_engine(setting) as inner:
            watched.engine = Eavesdropper(inner, folders, absent)
            yield watched.engine

    return Deployment(prepare, engine)
