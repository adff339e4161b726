"""What a recipe means before any weights are loaded: rows, clients, tokens, and a base that fits.

``run``, ``plan`` and ``data`` begin here, so that every mistake in recipe, data or model folder is found
before the base model is loaded.
"""

from __future__ import annotations

import collections
import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellwether.data.encoding import encode
from bellwether.data.federated import load_federated, rows_fingerprint
from bellwether.data.prompts import Template, end_of_turn, resolve_template
from bellwether.data.records import Problems
from bellwether.data.rows import Federated, Row, Tokenised, TokenRow
from bellwether.data.trace import read_trace
from bellwether.errors import RecipeError
from bellwether.method.cohort import Trace, cohort_size, make_trace
from bellwether.recipe.contradictions import check_recipe
from bellwether.recipe.recipe import Model, Recipe, Selection
from bellwether.runner.checks import (
    check_answers,
    check_clients,
    check_cohort_size,
    check_features,
    check_methods,
    check_scored,
    doubled_warnings,
    embedded_warnings,
    length_warnings,
    method_warnings,
    selection_warnings,
)
from bellwether.runner.opened import Opened
from bellwether.tell.trackers import check_trackers
from bellwether.tools.progress import advance
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted, listed

if TYPE_CHECKING:
    from bellwether.model.base import OpenedBase
    from bellwether.model.facts import ModelFacts

NOTHING_SCORED = "No rows are held out (data.test_rows_per_category), so nothing will be scored."


@dataclass(frozen=True)
class Prepared:
    """A recipe with its rows dealt out and tokenised.

    Args:
        recipe: the recipe.
        base: the base model, without its weights.
        template: the format of prompts; None is Alpaca's.
        federated: all rows as text.
        clients: token rows for training, by client.
        held_out: token rows that clients hold out of their own, by client.
        scored: the coordinator's token rows to score: test or validation.
        public: token rows of public text that the space of a selection is fitted on.
        trace: the simulated resources of the clients; None where all are there and equally fast.
        stop: token ids and texts that end an answer beside the model's own, such as a chat template's end of turn.
        notes: sentences for the log.
        warnings: sentences for the log that a person should look at.
        untuned: what the untuned base scored, by how and on which rows it was scored; filled as it is found.
    """

    recipe: Recipe
    base: OpenedBase
    template: Template
    federated: Federated
    clients: Mapping[str, Tokenised]
    held_out: Mapping[str, Tokenised]
    scored: Tokenised
    public: Sequence[TokenRow]
    trace: Trace | None
    stop: Sequence[int | str]
    notes: Sequence[str]
    warnings: Sequence[str]
    untuned: dict[Hashable, Sequence[Any]] = field(default_factory=dict)


def prepare(recipe: Recipe, opened: Opened | None = None, *, unscored: str = NOTHING_SCORED) -> Prepared:
    """Read and check all that a run needs short of the weights.

    Args:
        recipe: the recipe.
        opened: what others have opened already; None opens everything anew.
        unscored: what the notes say where no rows are held out.

    Raises:
        RecipeError: fields of the recipe contradict each other or the data.
        DataError: rows cannot be read, dealt out or tokenised.
        ModelError: the base model's folder cannot be used, or the adapter does not fit it.
    """
    check_recipe(recipe)  # before rows are read, and trackers are missed at the end of it
    check_trackers(recipe.output.trackers)
    opened = opened or Opened()
    advance("reading rows")
    federated = load_federated(recipe.data, recipe.partition, Randomness(recipe.seed), opened.read)
    return prepare_with(recipe, federated, opened, here=True, unscored=unscored)


def prepare_with(
    recipe: Recipe,
    federated: Federated,
    opened: Opened | None = None,
    *,
    here: bool = False,
    unscored: str = NOTHING_SCORED,
) -> Prepared:
    """Check all that a run needs short of the weights, and tokenise its rows.

    Args:
        recipe: the recipe.
        federated: all rows that are on this machine, and the names of all clients.
        opened: what others have opened already; None opens everything anew.
        here: whether the clients' rows are among them.
        unscored: what the notes say where no rows are held out.

    Raises:
        RecipeError: fields of the recipe contradict each other or the data.
        DataError: rows cannot be tokenised.
        ModelError: the base model's folder cannot be used, or the adapter does not fit it.
    """
    check_recipe(recipe)
    check_trackers(recipe.output.trackers)
    opened = opened or Opened()
    check_scored(recipe, federated)
    check_answers(recipe, federated)
    check_cohort_size(recipe, len(federated.clients))
    trace = _trace(recipe, list(federated.clients))
    check_methods(recipe, list(federated.clients), trace)
    advance("opening the base")
    base = opened.base(recipe.model)
    _check_adapter(recipe, base.facts)
    template = resolve_template(recipe.data, base.tokenizer)

    def tokens(rows: Sequence[Row]) -> Tokenised:
        return opened.tokenise(rows, recipe, template)

    to_score = _to_score(recipe, federated)
    # All at once first, so that whoever watches is told of how many; what follows looks them up.
    parts = (*federated.clients.values(), *federated.held_out.values(), to_score)
    whole_set = tokens([row for part in parts for row in part])
    clients = {client: tokens(rows) for client, rows in federated.clients.items()}
    warnings = length_warnings("training rows", clients.values(), recipe, base.facts.max_positions, trained=True)
    held_out = {client: tokens(rows) for client, rows in federated.held_out.items()}
    if here:
        check_clients(clients, recipe)
        held_out = {client: tokenised for client, tokenised in held_out.items() if tokenised.rows}
    whole = tokens(to_score)
    warnings += length_warnings(f"{recipe.evaluation.part} rows", [whole], recipe, base.facts.max_positions)
    warnings += doubled_warnings(federated, recipe.evaluation.part)
    scored = _limited(whole, recipe)
    public_text = tokens(opened.read(recipe.selection.projection_sources, recipe.data, None)[0])
    public = public_text.rows
    check_features(recipe.selection, base.facts, len(public))
    stop = end_of_turn(template, base.tokenizer)
    notes = [*filter(None, [base.folder.remark]), *federated.notes]
    notes += _counts("training rows", clients.values()) if here else ()
    notes += _skipped([whole_set, public_text])
    notes += _scored_notes(recipe, whole, scored)
    if not scored.rows and not held_out:
        notes.append(unscored)
    if len(clients) > 1 and cohort_size(recipe.federation, len(clients)) == 1:
        notes.append(
            f"Each round asks 1 of {counted(len(clients), 'client')}, so nothing is averaged; see federation.fraction."
        )
    rows = {client: len(clients[client].rows) for client in clients} if here else {}
    warnings += selection_warnings(recipe.selection, rows)
    warnings += method_warnings(recipe)
    if recipe.model.path == "starter":
        held = [row for client in federated.clients.values() for row in client]
        warnings += embedded_warnings(held, lambda texts: [one.ids_T.tolist() for one in encode(texts, base.tokenizer)])
    return Prepared(
        recipe,
        base,
        template,
        federated,
        clients,
        held_out,
        scored,
        public,
        trace,
        stop,
        notes,
        warnings,
        opened.untuned,
    )


def prepared_fingerprint(prepared: Prepared) -> str:
    """Return the SHA-256 of all that a run makes of data, tokenizer, template and availability trace."""
    digest = hashlib.sha256(rows_fingerprint(prepared.federated).encode())
    parts = (*prepared.clients.items(), *prepared.held_out.items(), ("", prepared.scored))
    if prepared.public:
        parts = (*parts, ("public", Tokenised(prepared.public)))
    for name, tokenised in parts:
        digest.update(f"{len(name)}|{name}|{len(tokenised.rows)}".encode())
        for answer in (one for row in tokenised.rows for one in row.answers):
            digest.update(f"|{len(answer)}|{answer.prompt_length}|".encode())
            digest.update(answer.ids_T.tobytes() + answer.trained_T.tobytes() + answer.response_T.tobytes())
    digest.update(repr(sorted(prepared.stop, key=lambda end: (isinstance(end, str), end))).encode())
    availability = prepared.recipe.federation.availability
    if availability is not None and availability.trace is not None:
        digest.update(Path(availability.trace).read_bytes())
    return digest.hexdigest()


def proxy_facts(selection: Selection) -> dict[str, str]:
    """Return the fingerprint of the proxy that gives a selection its features, as ``proxy``; nothing where none does.

    Args:
        selection: the recipe's selection section.

    Raises:
        ModelError: as ``proxy_fingerprint``.
    """
    if selection.method == "full" or selection.proxy is None:
        return {}
    from bellwether.model.proxy import proxy_fingerprint

    return {"proxy": proxy_fingerprint(Model(path=selection.proxy))}


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths for what is on this machine, so that it can be resumed from anywhere."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if path != "starter" and Path(path).exists() else path

    availability = recipe.federation.availability
    if availability is not None and availability.trace is not None:
        availability = availability.model_copy(update={"trace": absolute(availability.trace)})
    sources = {
        field: tuple(map(absolute, getattr(recipe.data, field)))
        for field in ("sources", "test_sources", "validation_sources")
    }
    selection: dict[str, Any] = {"projection_sources": tuple(map(absolute, recipe.selection.projection_sources))}
    if recipe.selection.proxy is not None:
        selection["proxy"] = absolute(recipe.selection.proxy)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": absolute(recipe.model.path)}),
            "data": recipe.data.model_copy(update=sources),
            "selection": recipe.selection.model_copy(update=selection),
            "federation": recipe.federation.model_copy(update={"availability": availability}),
        }
    )


def _check_adapter(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse an adapter or rows that do not fit the base model."""
    from bellwether.model.lora import check_lora

    check_lora(facts, recipe.lora)
    if facts.max_positions is not None and recipe.data.max_tokens > facts.max_positions:
        raise RecipeError(
            f"data.max_tokens is {recipe.data.max_tokens}, but the base model {recipe.model.path} has "
            f"{facts.max_positions} positions; set data.max_tokens={facts.max_positions} or less."
        )


def _trace(recipe: Recipe, clients: Sequence[str]) -> Trace | None:
    """Return the simulated resources of a recipe's clients; None where all are there and equally fast."""
    availability = recipe.federation.availability
    if availability is None:
        return None
    lines = read_trace(Path(availability.trace), clients) if availability.trace else None
    return make_trace(availability, Randomness(recipe.seed), lines)


def _scored_notes(recipe: Recipe, whole: Tokenised, scored: Tokenised) -> list[str]:
    """Return what a person should know of the rows that are scored."""
    notes = _counts(f"{recipe.evaluation.part} rows", [whole])
    if recipe.evaluation.categories is not None:
        names = listed(recipe.evaluation.categories)
        notes.append(f"evaluation.categories: {counted(len(whole.rows), 'row')} of {names} are scored, and no others.")
    if len(scored.rows) < len(whole.rows):
        notes.append(
            f"evaluation.max_rows_per_category: {len(scored.rows)} of {counted(len(whole.rows), 'row')} are scored."
        )
    return notes


def _to_score(recipe: Recipe, federated: Federated) -> Sequence[Row]:
    """Return the held-out rows of the part and the categories that are to be scored.

    Raises:
        RecipeError: there are no such rows of a category that the recipe names.
    """
    part, wanted = recipe.evaluation.part, recipe.evaluation.categories
    rows = federated.test if part == "test" else federated.validation
    if wanted is None or not rows:
        return rows
    known = sorted({row.category for row in rows})
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise RecipeError(
            f"evaluation.categories names {unknown[0]!r:.40}, but no {part} row is of that category; there are "
            f"{listed(known) or 'none'}."
        )
    return [row for row in rows if row.category in wanted]


def _limited(tokenised: Tokenised, recipe: Recipe) -> Tokenised:
    """Return the rows to score, at most ``evaluation.max_rows_per_category`` of each category of a group."""
    most = recipe.evaluation.max_rows_per_category
    if most is None:
        return tokenised
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    rows: list[TokenRow] = []
    for row in tokenised.rows:
        counts[row.group, row.category] += 1
        if counts[row.group, row.category] <= most:
            rows.append(row)
    return replace(tokenised, rows=rows)


def _skipped(parts: Sequence[Tokenised]) -> list[str]:
    """Return the sentence on rows that cannot be rendered and are skipped, or none."""
    problems = Problems()
    for place, sentence in dict.fromkeys(bad for part in parts for bad in part.bad):
        problems.add(place, sentence)
    return problems.skipped("Rows that cannot be rendered")


def _counts(what: str, parts: Iterable[Tokenised]) -> list[str]:
    """Return a sentence about rows that do not fit, or none."""
    parts = list(parts)
    shortened, cut, left_out = (
        sum(getattr(part, count) for part in parts) for count in ("shortened", "cut", "left_out")
    )
    rows = sum(len(part.rows) for part in parts) + left_out
    remarks = sum((Counter(part.remarks) for part in parts), Counter[str]())
    notes = [f"Of {rows} {what}, in {count}: {remark}." for remark, count in remarks.items()]
    if shortened or cut or left_out:
        notes.append(
            f"Of {rows} {what}, {shortened} had their context shortened, {cut} their response cut, and {left_out} "
            "were left out, since no token of their response would fit into data.max_tokens."
        )
    return notes
