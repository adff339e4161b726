"""The runs of an audit: each is run once, scored at once, and kept as a file of what was seen of it.

Shape legend: N rows in the game, K canaries, R candidates.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bellwether.arms.audit.game import Eavesdropper, Settings, Watched, World, coins, dealt, secret_row, watched
from bellwether.arms.audit.leaks import UpdateScores, named_rows, update_scores
from bellwether.arms.audit.ranks import exposure
from bellwether.data.rows import Federated, TokenRow
from bellwether.errors import DataError
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.records import Watcher
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import Prepared
from bellwether.store.audit import Named
from bellwether.store.privacy import given_away
from bellwether.tools.atomic import make_folder, remove, write_atomic
from bellwether.tools.json_text import KEPT, Amount, Loss, plain, read_json, reading
from bellwether.tools.randomness import Randomness

if TYPE_CHECKING:
    from bellwether.runner.run import Result

Floats = NDArray[np.float64]

SEEN, RUN = "seen.json", "run"
_TOGETHER = 32  # rows whose loss is taken in one pass
_REMEDY = "remove it, and this run is run anew"

# What an audit leaves out of its runs: it scores rows of its own, and trains nothing else.
_SHORT: dict[str, Any] = {
    "compare": None,
    "evaluation.generate": False,
    "evaluation.every": 0,
    "evaluation.max_rows_per_category": 1,
    "evaluation.samples": 0,
    "output.trackers": [],
}


@dataclass(frozen=True)
class RowsSeen:
    """What was seen of a run of the game of rows.

    Args:
        rows_in: whether each row in the game was trained on.
        gains: how far the run lowered its loss, in nats.
        canaries_in: whether each canary was planted.
        canary_gains: how far the run lowered the loss of its secret, in nats.
        exposures: of each canary's secret, in bits.
        epsilon: that the run's accountant states; None where it states none.
        updates: what single updates tell; None where none can be read, or it is not looked at.
        named: what centroids name; None where none is released, or it is not looked at.
    """

    __pydantic_config__ = KEPT

    rows_in: tuple[bool, ...]
    gains: tuple[Loss, ...]
    canaries_in: tuple[bool, ...]
    canary_gains: tuple[Loss, ...]
    exposures: tuple[Amount, ...]
    epsilon: Amount | None
    updates: UpdateScores | None = None
    named: Named | None = None


@dataclass(frozen=True)
class ClientsSeen:
    """What was seen of a run of the game of clients.

    Args:
        clients_in: whether each client was there.
        gains: how far the run lowered the loss of its rows, their mean in nats.
        epsilon: that the run's accountant states; None where it states none.
    """

    __pydantic_config__ = KEPT

    clients_in: tuple[bool, ...]
    gains: tuple[Loss, ...]
    epsilon: Amount | None


def stated_epsilon(folder: Path) -> float | None:
    """Return the epsilon that a run's accountant states for the whole run; None where it states none.

    Args:
        folder: the run folder.

    Raises:
        CheckpointError: what it says of privacy cannot be read.
    """
    given = given_away(folder)
    return given.promise.epsilon if given is not None and given.promise is not None else None


LossesOf = Callable[[Adapter | None, Adapter | None, Sequence[TokenRow]], Floats]


@contextlib.contextmanager
def scoring(prepared: Prepared) -> Iterator[LossesOf]:
    """Load the base, and yield what scores rows with an adapter and what is folded into the base, None for neither.

    A row's loss is its answer's, in nats; of a preference row that of the chosen answer less that of the rejected one.

    Args:
        prepared: the recipe and its base.
    """
    from bellwether.client.score import answer_losses
    from bellwether.model.base import load_base
    from bellwether.model.lora import LoraLayers, adapter_config

    base = load_base(prepared.recipe.model, prepared.base)
    layers = LoraLayers(base.model, adapter_config(base, prepared.recipe.lora))

    def losses(adapter: Adapter | None, folded: Adapter | None, rows: Sequence[TokenRow]) -> Floats:
        if adapter is not None:
            layers.fit(adapter.config)
            layers.load(0, adapter.tensors)
        with layers.folded(folded), contextlib.nullcontext() if adapter is not None else layers.disabled():
            found = answer_losses(base, layers, rows, _TOGETHER)
        return np.array([of_row[0] - sum(of_row[1:]) for of_row in found], np.float64)

    try:
        yield losses
    finally:
        layers.detach()


@dataclass(frozen=True)
class Bench:
    """What all runs of an audit need.

    Args:
        world: what is played over.
        settings: how much is done.
        secrets: candidates of all canaries as tokens, those of a canary one after the other, its own first.
        rows_N: losses of the rows in the game with the untuned base.
        secrets_KR: losses of the candidates with the untuned base.
        clients: mean losses of each client's rows with the untuned base, where the game of clients is played.
        opened: models and tokens that the runs share.
        watch: is told what happens in runs.
    """

    world: World
    settings: Settings
    secrets: Sequence[TokenRow]
    rows_N: Floats
    secrets_KR: Floats
    clients: Floats
    opened: Opened
    watch: Watcher


def make_bench(world: World, settings: Settings, opened: Opened, watch: Watcher) -> Bench:
    """Score the untuned base, with which all runs are compared.

    Args:
        world: what is played over.
        settings: how much is done.
        opened: models and tokens that the runs share.
        watch: is told what happens in runs.

    Raises:
        DataError: a secret does not fit into the recipe's tokens.
    """
    recipe, template = world.prepared.recipe, world.prepared.template
    texts = [
        secret_row(world, canary, secret, likely)
        for canary, likely in zip(world.canaries, world.likely, strict=True)
        for secret in likely
    ]
    secrets = list(opened.tokenise(texts, recipe, template).rows)
    if len(secrets) < len(texts):
        raise DataError(
            f"data.max_tokens is {recipe.data.max_tokens}, too few for a planted secret; raise it for the audit, or "
            "plant none with --canaries 0."
        )
    with scoring(world.prepared) as losses:
        rows_N = losses(None, None, world.tokens)
        secrets_KR = losses(None, None, secrets).reshape(len(world.canaries), settings.candidates)
        clients = _by_client(world, losses, None) if settings.clients else np.zeros(0)
    return Bench(world, settings, secrets, rows_N, secrets_KR, clients, opened, watch)


def _by_client(world: World, losses: LossesOf, adapter: Adapter | None) -> Floats:
    """Return the mean loss of each client's rows."""
    held = [tokenised.rows for tokenised in world.prepared.clients.values()]
    flat_M = losses(adapter, None, [row for rows in held for row in rows])
    return np.array([part.mean() for part in np.split(flat_M, np.cumsum([len(rows) for rows in held])[:-1])])


def seen_rows(bench: Bench, recipe: Recipe, number: int, folder: Path) -> RowsSeen:
    """Return what was seen of a run of the game of rows; what is finished already is read.

    Args:
        bench: what all runs need.
        recipe: of the run, but for seed and folder.
        number: of the run; the coins of both sides are the same.
        folder: of the run.

    Raises:
        BellwetherError: it cannot be run, or what was kept of it cannot be read.
    """
    if (folder / SEEN).exists():
        kept: RowsSeen = read_json(folder / SEEN, RowsSeen, _REMEDY)
        _check_kept(folder, len(kept.gains) == len(bench.world.rows) == len(kept.rows_in))
        _check_kept(folder, len(kept.canary_gains) == len(bench.world.canaries) == len(kept.exposures))
        return kept
    world = bench.world
    rows_in = coins(recipe, "rows", number, len(world.rows))
    canaries_in = coins(recipe, "canaries", number, len(world.canaries))
    holder = Watched()
    result = _run(bench, recipe, "rows", number, folder, dealt(world, rows_in, canaries_in), holder)
    adapter, seen = result.adapter, holder.seen
    with scoring(world.prepared) as losses:
        gains_N = bench.rows_N - losses(adapter, None, world.tokens)
        secrets_KR = losses(adapter, None, bench.secrets).reshape(bench.secrets_KR.shape)
        # Single updates take a pass over all rows for each client, so they are looked at once.
        updates = None
        if number == 0:
            updates = update_scores(
                seen, adapter, recipe, world.owners, rows_in, lambda one, folded: losses(one, folded, world.tokens)
            )
    found = RowsSeen(
        rows_in=tuple(rows_in),
        gains=tuple(gains_N.tolist()),
        canaries_in=tuple(canaries_in),
        canary_gains=tuple((bench.secrets_KR[:, 0] - secrets_KR[:, 0]).tolist()) if world.canaries else (),
        exposures=tuple(exposure(losses_R, 0) for losses_R in secrets_KR),
        epsilon=stated_epsilon(result.folder),
        updates=updates,
        named=_named(seen, dealt(world, rows_in, canaries_in)) if seen.released and number == 0 else None,
    )
    write_atomic(folder / SEEN, (json.dumps(plain(found)) + "\n").encode())
    return found


def _named(seen: Eavesdropper, federated: Federated) -> Named:
    """Return what the centroids of a run name."""
    texts = {
        name: [(row.instruction, row.context, row.response) for row in federated.clients[name]]
        for name in seen.released
    }
    return named_rows(seen.released, seen.memories, texts)


def seen_clients(bench: Bench, recipe: Recipe, number: int, folder: Path) -> ClientsSeen:
    """Return what was seen of a run of the game of clients; arguments as in ``seen_rows``."""
    world = bench.world
    if (folder / SEEN).exists():
        kept: ClientsSeen = read_json(folder / SEEN, ClientsSeen, _REMEDY)
        _check_kept(folder, len(kept.gains) == len(kept.clients_in) == len(world.prepared.clients))
        return kept
    names = list(world.prepared.clients)
    clients_in = coins(recipe, "clients", number, len(names))
    absent = {name for name, inside in zip(names, clients_in, strict=True) if not inside}
    # Whoever is absent never answers, so that rounds of few, or of nobody, must do.
    recipe = with_overrides(recipe, {"federation.quorum": 1e-6, "federation.failed_rounds": recipe.federation.rounds})
    everything = dealt(replace(world, canaries=(), likely=()), [True] * len(world.rows), [])
    result = _run(bench, recipe, "clients", number, folder, everything, Watched(), absent)
    with scoring(world.prepared) as losses:
        gains = bench.clients - _by_client(world, losses, result.adapter)
    found = ClientsSeen(tuple(clients_in), tuple(gains.tolist()), stated_epsilon(result.folder))
    write_atomic(folder / SEEN, (json.dumps(plain(found)) + "\n").encode())
    return found


def _check_kept(folder: Path, fits: bool) -> None:
    """Refuse what was seen of a run of another game."""
    with reading(folder / SEEN, _REMEDY):
        if not fits:
            raise ValueError("it is of other rows, clients or canaries")


def _run(
    bench: Bench,
    recipe: Recipe,
    game: str,
    number: int,
    folder: Path,
    federated: Federated,
    seen: Watched,
    absent: Collection[str] = (),
) -> Result:
    """Run a recipe over given rows, watched; an interrupted run begins anew, since what was seen of it is lost."""
    from bellwether.runner.run import run

    make_folder(folder)
    remove(folder / RUN)
    seed = Randomness(recipe.seed).seed_for(f"audit run of {game}", round=number)
    changed = with_overrides(recipe, {**_SHORT, "seed": seed, "output.folder": str(folder / RUN)})
    return run(changed, opened=bench.opened, watch=bench.watch, deployment=watched(federated, seen, absent))
