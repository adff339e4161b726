"""The adapter that one client of a finished run serves, made again of what server and client keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bellwether.errors import CheckpointError, RecipeError
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.records import RoundRecord
from bellwether.method.cohort import client_ranks, what_is_known
from bellwether.method.method import Known, Method, State, serve_sent
from bellwether.method.named import make_method
from bellwether.method.returned import served
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.runner.wiring import newest_state, result_of
from bellwether.store.checkpoint import RECIPE
from bellwether.store.client_state import METHOD, recall_state
from bellwether.store.holdings import load_description
from bellwether.store.run_folder import CLIENTS, OWN, client_folders
from bellwether.tools.json_text import reading
from bellwether.tools.randomness import Randomness


def served_by(folder: Path, client: str) -> Adapter:
    """Return the adapter that a client serves at the end of a run, with what the method folded into the base.

    Args:
        folder: of a finished run of a simulation.
        client: the client's name.

    Raises:
        RecipeError: there is no such client, or clients serve what all share.
        CheckpointError: what server or client kept is not there or cannot be read, such as that of clients at sites.
    """
    recipe, method = with_own_adapters(folder)
    with reading(folder / CLIENTS, f"bellwether run --resume {folder} makes it anew"):
        clients = [one.client for one in load_description((folder / CLIENTS).read_bytes()).clients]
    if client not in clients:
        shown = ", ".join(clients[:3]) + (f" to {clients[-1]}" if len(clients) > 3 else "")
        raise RecipeError(f"There is no client {client!r} in {folder}; there are {shown}.")
    if not (folder / OWN).is_dir():
        raise CheckpointError(
            f"{folder} holds nothing that clients keep: adapters of the clients of a federation over sites lie at the "
            "sites; there bellwether export takes the site's folder, with --client."
        )
    round, state, history = newest_state(folder)
    ranks = client_ranks(recipe.lora, clients, Randomness(recipe.seed))
    known = what_is_known(ranks, [record for record in history if isinstance(record, RoundRecord)])[client]
    kept = recall_state(client_folders(folder, clients)[client], METHOD, known.settled) if known.settled else {}
    if kept is None:
        raise CheckpointError(
            f"What {client} kept of round {known.settled} is gone from {folder / OWN}; restore it, or run anew."
        )
    return own_adapter(method, state, known, round, kept)


def with_own_adapters(folder: Path) -> tuple[Recipe, Method]:
    """Return recipe and method of a folder, once its clients are known to serve adapters of their own.

    Raises:
        RecipeError: they serve what all share.
        CheckpointError: there is no recipe that can be read.
    """
    with reading(folder / RECIPE, "give the folder of a finished run"):
        recipe = load_recipe(folder / RECIPE)
    method = make_method(recipe.method, recipe.privacy)
    if method.serves is serve_sent:
        raise RecipeError(
            f"With the method {recipe.method.name} clients serve the adapter that all share: export {folder} without "
            "--client, or let them serve their own by fedsa_lora, ditto, feddpa or method.fine_tune=true."
        )
    return recipe, method


def own_adapter(method: Method, state: State, client: Known, round: int, kept: Mapping[str, Any]) -> Adapter:
    """Return what a client makes of the last state and of what it keeps, with what was folded into the base.

    Args:
        method: says what it is sent, and what it serves.
        state: the server's last.
        client: what the server knows of it.
        round: the last one.
        kept: arrays that the client keeps of the last round that counted.
    """
    return result_of(replace(state, adapter=served(method, method.give(state, client, round), kept)))
