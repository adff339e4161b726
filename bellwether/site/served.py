"""The adapter that a site serves, made of the federation's and of what the site keeps."""

from __future__ import annotations

from pathlib import Path

from bellwether.errors import CheckpointError, FederationError
from bellwether.exchange.adapter import Adapter, read_adapter
from bellwether.method.method import Known, State
from bellwether.runner.served import own_adapter, with_own_adapters
from bellwether.site.result import federation_of
from bellwether.site.trained import kept_for
from bellwether.store.client_state import METHOD, kept_rounds, recall_state
from bellwether.store.run_folder import ADAPTER
from bellwether.tools.atomic import slug


def served(folder: Path, client: str) -> Adapter:
    """Return the adapter that a site serves after the last round that it trained in.

    Args:
        folder: the site's own, with its federation's result.
        client: the site's name.

    Raises:
        RecipeError: clients serve what all share.
        FederationError: it is no site's folder or another one's, or the adapter cannot be made of what is there.
        CheckpointError: what was kept is not there or cannot be read.
    """
    federation = federation_of(folder)
    if federation is None:
        raise FederationError(f"{folder} holds no result of a federation; give a site's own folder.")
    recipe, method = with_own_adapters(folder)
    if method.folds or recipe.lora.ranks:
        raise FederationError(
            f"What {client} serves cannot be made at a site: the method {recipe.method.name} folds updates into the "
            "base, or clients have unlike ranks, which the federation's adapter does not tell apart any more."
        )
    kept = kept_for(folder, federation) / slug(client)
    if not kept.is_dir():
        raise FederationError(f"{folder} is not the site {client!r}: it keeps nothing of it.")
    rounds = kept_rounds(kept, METHOD)
    arrays = recall_state(kept, METHOD, rounds[-1]) if rounds else None
    if arrays is None:
        raise CheckpointError(f"{kept / METHOD} is empty: {client} has trained nothing of its own, or it is gone.")
    known = Known(client, recipe.lora.rank)
    return own_adapter(method, State(read_adapter(folder / ADAPTER)), known, recipe.federation.rounds, arrays)
