"""What a federation leaves with a site: the adapter, its card, and a page that is for the site alone.

FOLDER/adapter/        adapter and card, with the federation that they are of
FOLDER/recipe.yaml     the recipe as this site ran it, by which other commands know base model and prompts
FOLDER/report.html     the page, which its owner alone can read

The page is made once the federation has ended, also by a process that was begun after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bellwether.errors import FederationError, UpdateRejected, first_line
from bellwether.exchange.adapter import Adapter, AdapterConfig, adapter_files, decode_adapter
from bellwether.exchange.checks import check_array
from bellwether.model.base import Base
from bellwether.recipe.file import dump_recipe
from bellwether.report.compare_table import make_lines
from bellwether.report.page.comparison import Compared as ComparedPage
from bellwether.report.page.render import render
from bellwether.report.page.site import AtSite, HeldOut, Sent, site_page
from bellwether.report.report import REPORT
from bellwether.runner.answers import in_turn
from bellwether.runner.prepare import Prepared, with_absolute_paths
from bellwether.site.compared import CALLED, Compared, compare_here, held_out_here
from bellwether.site.federation_folder import RECIPE
from bellwether.site.invitation import Invitation
from bellwether.site.ledger import Entry, entries
from bellwether.site.resident import tensor_shapes
from bellwether.site.trained import TrainedRows, check_same_rows, read_trained
from bellwether.store.run_folder import ADAPTER, JOINED, describe_environment
from bellwether.tools.atomic import write_atomic, write_folder_atomic
from bellwether.tools.json_text import from_json, json_lines, read_json, typed


def has_ended(folder: Path, federation: str) -> bool:
    """Return whether a site has the result of a federation.

    Args:
        folder: the site's own.
        federation: the federation's identifier.

    Raises:
        CheckpointError: what is there cannot be read.
    """
    return federation_of(folder) == federation


def federation_of(folder: Path) -> str | None:
    """Return the identifier of the federation whose result a folder has; None where it has none.

    Args:
        folder: a site's own, or any other.

    Raises:
        CheckpointError: what is there cannot be read.
    """
    return _read_joined(folder).federation if (folder / ADAPTER / JOINED).exists() else None


def check_result_of(folder: Path, federation: str) -> None:
    """Refuse a folder that has the result of another federation, which would be lost.

    Args:
        folder: the site's own.
        federation: the federation's identifier.

    Raises:
        FederationError: it has.
        CheckpointError: what is there cannot be read.
    """
    found = federation_of(folder)
    if found not in (None, federation):
        raise FederationError(
            f"{folder} has the result of the federation {found[:12]}, which would be "
            f"replaced: move {ADAPTER}, comparison and {REPORT} away from there first, and keep the rest."
        )


@dataclass(frozen=True)
class _Joined:
    """The federation that an adapter is of, and in how many of its rounds what this site sent was counted."""

    federation: str
    rounds: int


def _read_joined(folder: Path) -> _Joined:
    """Return what the adapter that a site has is of.

    Raises:
        CheckpointError: it cannot be read.
    """
    joined: _Joined = read_json(folder / ADAPTER / JOINED, _Joined, "remove it")
    return joined


def keep_result(
    folder: Path,
    federation: str,
    about: bytes,
    values: bytes,
    due: AdapterConfig,
    shapes: Mapping[str, tuple[int, int]],
) -> None:
    """Keep what came with the end of a federation, once all of it is found to be what this site agreed to.

    Args:
        folder: the site's own.
        federation: the federation's identifier.
        about: the adapter's configuration, its card, and in how many rounds this site was counted.
        values: its values.
        due: the configuration that the site's own recipe gives the federation's adapter.
        shapes: inputs and outputs of each adapted module of the site's base.

    Raises:
        UpdateRejected: it is no such adapter, and nothing is written.
        CheckpointError: it cannot be written.
    """
    try:
        said: _About = typed(from_json(about), _About)
        card = said.card.encode()
        adapter = decode_adapter(said.config.encode(), values)
    except ValueError as error:
        raise UpdateRejected(f"the result cannot be read ({first_line(error)})") from error
    files = {**adapter_files(_as_agreed(adapter, due, shapes)), "README.md": card}
    write_folder_atomic(folder / ADAPTER, {**files, JOINED: json_lines([_Joined(federation, said.rounds)])})


@dataclass(frozen=True)
class _About:
    """What is said of a result: PEFT's configuration, the card, and in how many rounds this site was counted."""

    config: str
    card: str
    rounds: int


def _as_agreed(adapter: Adapter, due: AdapterConfig, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return an adapter under the site's own configuration; refuse one that does not fit it."""
    config = adapter.config
    if set(config.modules) != set(due.modules):
        raise UpdateRejected("the result is for other modules than this site agreed to")
    # With what was folded into the base before it, an adapter's ranks are added up, and its scaling is 1.
    added_up = config.rank > due.rank and config.scaling == 1
    if (config.rank, config.scaling) != (due.rank, due.scaling) and not added_up:
        raise UpdateRejected(
            f"the result has rank {config.rank} and scaling {config.scaling:g}, where this site agreed to {due.rank} "
            f"and {due.scaling:g}"
        )
    own = replace(due, rank=config.rank, alpha=config.alpha, rslora=config.rslora)
    expected = tensor_shapes(own, shapes)
    for key, shape in expected.items():
        check_array(key, adapter.tensors[key], shape, np.dtype(np.float32))
    return Adapter(own, {key: adapter.tensors[key] for key in expected})


def make_page(
    invited: Invitation,
    folder: Path,
    prepared: Prepared,
    terms: str,
    load: Callable[[], Base],
    tell: Callable[[str], None],
) -> Path:
    """Compare on the site's held-out rows, where it has any, and write its page.

    Args:
        invited: the site's invitation.
        folder: the site's own, with the federation's adapter.
        prepared: its rows.
        terms: what it agreed to, in plain words.
        load: loads the base model, where that is needed.
        tell: is told of what happens, in sentences.

    Returns:
        The page.

    Raises:
        BellwetherError: it cannot be made.
    """
    mine = [one for one in entries(folder) if one.run.startswith(f"{invited.federation}/")]
    sent = {(one.run, one.round) for one in mine if (one.way, one.kind, one.failure) == ("reply", "train", "")}
    rounds = max(0, min(_read_joined(folder).rounds, len(sent)))  # what came too late for its round is in no adapter
    trained = _trained_rows(folder, invited.federation, prepared) if rounds else TrainedRows((), ())
    write_atomic(folder / RECIPE, dump_recipe(with_absolute_paths(prepared.recipe)).encode())
    scored = held_out_here(prepared)
    compared = compare_here(folder, scored, rounds, trained, load, tell) if scored.scored.rows else None
    at_site = AtSite(
        site=invited.site,
        federation=invited.federation,
        address=invited.address,
        recipe=prepared.recipe,
        rows=sum(len(part.rows) for part in prepared.clients.values()),
        rounds=rounds,
        terms=terms,
        sent=_sent(mine),
        compared=_for_page(compared) if compared else None,
        called=CALLED,
        shown=_shown(scored, compared) if compared else (),
        notes=compared.notes if compared else (),
        environment=describe_environment(),
    )
    page = site_page(at_site)
    write_atomic(folder / REPORT, render(page))
    (folder / REPORT).chmod(0o600)
    tell(page.result.striptags())
    return folder / REPORT


def _trained_rows(folder: Path, federation: str, prepared: Prepared) -> TrainedRows:
    """Return which rows this site trained on, once those that it is given now are found to be the same."""
    trained = read_trained(folder, federation)
    check_same_rows(trained, (row.row for part in prepared.clients.values() for row in part.rows))
    return trained


def _for_page(compared: Compared) -> ComparedPage:
    """Return a comparison with its intervals."""
    return ComparedPage(compared.comparison, make_lines(compared.comparison), (), None, {})


def _shown(scored: Prepared, compared: Compared) -> list[HeldOut]:
    """Return some held-out rows with all answers, categories in turn; none where no answers were written."""
    evaluation, rows = scored.recipe.evaluation, scored.scored.rows
    if not evaluation.generate:
        return []
    return [
        HeldOut(
            rows[number].category,
            rows[number].row.instruction,
            rows[number].row.context,
            rows[number].response,
            {one.arm: one.answers[number] for one in compared.comparison.outcomes},
        )
        for number in in_turn([row.category for row in rows], evaluation.samples)
    ]


def _sent(mine: Sequence[Entry]) -> list[Sent]:
    """Return all that was sent, by kind, in the order in which kinds came first."""
    replies = [one for one in mine if one.way == "reply"]
    found = []
    for kind in dict.fromkeys(one.kind for one in replies):
        of_kind = [one for one in replies if one.kind == kind]
        failures, size = sum(bool(one.failure) for one in of_kind), sum(one.bytes for one in of_kind)
        found.append(Sent(kind, len(of_kind), failures, size, tuple(sorted({one.protection for one in of_kind}))))
    return found
