"""What a federation leaves with a site: the adapter, its card, and a page that is for the site alone.

FOLDER/adapter/        adapter and card, with the federation that they are of
FOLDER/recipe.yaml     the recipe as this site ran it, by which other commands know base model and prompts
FOLDER/report.html     the page, which its owner alone can read

The page is made once the federation has ended, also by a process that was begun after that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bellwether.exchange.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from bellwether.model.base import Base
from bellwether.recipe.file import dump_recipe
from bellwether.report.compare_table import make_lines
from bellwether.report.page.comparison import Compared as ComparedPage
from bellwether.report.page.render import render
from bellwether.report.page.site import AtSite, HeldOut, Sent, site_page
from bellwether.report.report import REPORT
from bellwether.runner.answers import in_turn
from bellwether.runner.prepare import Prepared, with_absolute_paths
from bellwether.site.compared import Compared, compare_here, held_out_here
from bellwether.site.ledger import Entry, entries
from bellwether.site.papers import RECIPE, Invitation
from bellwether.store.run_folder import ADAPTER, describe_environment
from bellwether.tools.atomic import write_atomic, write_folder_atomic
from bellwether.tools.json_text import from_json, json_lines, read_json, typed

JOINED = "federation.json"  # in the adapter's folder


def has_ended(folder: Path, federation: str) -> bool:
    """Return whether a site has the result of a federation.

    Args:
        folder: the site's own.
        federation: the federation's identifier.

    Raises:
        CheckpointError: what is there cannot be read.
    """
    path = folder / ADAPTER / JOINED
    return path.exists() and read_json(path, dict[str, str], "remove it").get("federation") == federation


def keep_result(folder: Path, federation: str, about: bytes, values: bytes) -> None:
    """Keep what came with the end of a federation.

    Args:
        folder: the site's own.
        federation: the federation's identifier.
        about: the adapter's configuration and its card.
        values: its values.

    Raises:
        ModelError: it is no adapter.
        CheckpointError: it cannot be written.
    """
    said = typed(from_json(about), dict[str, str])
    files = {CONFIG_FILE: said["config"].encode(), WEIGHTS_FILE: values, "README.md": said["card"].encode()}
    write_folder_atomic(folder / ADAPTER, {**files, JOINED: json_lines([{"federation": federation}])})
    read_adapter(folder / ADAPTER)


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
    write_atomic(folder / RECIPE, dump_recipe(with_absolute_paths(prepared.recipe)).encode())
    mine = [one for one in entries(folder) if one.run.startswith(f"{invited.federation}/")]
    rounds = len({(one.run, one.round) for one in mine if (one.way, one.kind, one.failure) == ("reply", "train", "")})
    scored = held_out_here(prepared)
    compared = compare_here(folder, scored, rounds, load, tell) if scored.scored.rows else None
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
        shown=_shown(scored, compared) if compared else (),
        notes=compared.notes if compared else (),
        environment=describe_environment(),
    )
    page = site_page(at_site)
    write_atomic(folder / REPORT, render(page))
    (folder / REPORT).chmod(0o600)
    tell(page.result.striptags())
    return folder / REPORT


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
