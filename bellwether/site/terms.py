"""What a site agrees to, and what of a federation's recipe is the site's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bellwether.data.rows import TokenRow
from bellwether.data.sources import is_hub_name
from bellwether.engine.remote import terms_of
from bellwether.errors import FederationError
from bellwether.exchange.packing import packed_bytes
from bellwether.exchange.scores import Totals
from bellwether.method.named import make_method
from bellwether.method.select.budget import budget
from bellwether.model.base import Base
from bellwether.model.folder import on_hub
from bellwether.model.lora import adapter_config
from bellwether.recipe.consent import code_in
from bellwether.recipe.privacy import Privacy
from bellwether.recipe.recipe import Data, Federation, Lora, Model, Partition, Recipe, Selection
from bellwether.site.facts import AGREED_DATA, ON_THIS_MACHINE
from bellwether.site.invitation import OWN_DATA, Invitation
from bellwether.site.protection import LEAST, OTHER, lumped
from bellwether.tools.words import byte_size, clean, counted, listed

# How files of rows are read, and where files are whose content the terms name by its hash.
OWN_FIELDS = (*(f"data.{name}" for name in OWN_DATA), *ON_THIS_MACHINE)

# Columns that labels of rows come from where a site names none.
_USUAL = {"category": "category", "group": "language or domain"}


@dataclass(frozen=True)
class Terms:
    """What a site agrees to.

    Args:
        hash: of everything that was checked, and of the text.
        text: in plain words; what it says is what a person agrees to.
    """

    hash: str
    text: str


def check_own_fields(fields: Sequence[str]) -> None:
    """Refuse fields that a site sets, unless they say how its own files are read, or where they are.

    Args:
        fields: such as ``data.columns.response=reply``.

    Raises:
        FederationError: one would change what is agreed, or is none.
    """
    for field in fields:
        name, separator, _ = field.partition("=")
        if not separator:
            raise FederationError(
                f"{field[:80]!r} is not understood; give rows with --data, and fields as FIELD=VALUE."
            )
        if not any(f"{name}.".startswith(f"{known}.") for known in OWN_FIELDS):
            raise FederationError(
                f"{name[:80]} is the same for all who take part, so a site cannot set it; it may set "
                f"{listed(OWN_FIELDS)}."
            )


def own_recipe(
    recipe: Recipe, data: Sequence[str], test: Sequence[str], model: str | None, device: str | None
) -> Recipe:
    """Return the recipe as a site runs it: with its own rows, all of them one client's.

    Args:
        recipe: the federation's.
        data: files of rows.
        test: files of rows that are never trained on, for the comparison at the end.
        model: folder of the base model here; None takes the recipe's.
        device: where to compute; None takes the recipe's.
    """
    rows = {name: getattr(recipe.data, name) for name in (*AGREED_DATA, *OWN_DATA, "seed")}
    rows |= {"sources": tuple(data), "test_sources": tuple(test)}
    # With rows of its own the test takes none of the others, and a number that differs would be noted.
    rows["test_rows_per_category"] = Data().test_rows_per_category if test else 0
    held_out = recipe.partition.client_test_fraction
    place: dict[str, str | None] = {"device": device or recipe.model.device}
    if model is not None:  # which is the same is told by its weights, and a revision on the hub is none of a folder's
        place |= {"path": model, "revision": None}
    engine = {"processes": 1, "fuse": 1}
    # Whom it asks, and where it tells of it, is the coordinator's business, and nothing of it is wanted here.
    federation = {"sampler": Federation().sampler, "availability": None}
    return recipe.model_copy(
        update={
            "data": Data().model_copy(update=rows),
            "partition": Partition(method="iid", clients=1, client_test_fraction=held_out),
            "model": recipe.model.model_copy(update=place),
            "engine": recipe.engine.model_copy(update=engine),
            "federation": recipe.federation.model_copy(update=federation),
            "output": recipe.output.model_copy(update={"trackers": ()}),
        }
    )


def own_lora(lora: Lora, site: str) -> Lora:
    """Return the adapter as a site trains it: of the rank that the recipe gives to it.

    Args:
        lora: the federation's, whose ranks may name sites.
        site: the site's name.
    """
    ranks = lora.ranks if isinstance(lora.ranks, Mapping) else {}
    return lora.model_copy(update={"rank": ranks.get(site, lora.rank), "ranks": None})


def terms_for(
    invited: Invitation,
    recipe: Recipe,
    base: Base,
    rows: int,
    held_out: Sequence[TokenRow],
    test: int,
    peers: Collection[str] = (),
) -> Terms:
    """Return what a site agrees to, in plain words.

    Args:
        invited: its invitation.
        recipe: what it will run.
        base: the base model that it has.
        rows: how many rows it trains on.
        held_out: those that it holds out of its own and scores for the coordinator.
        test: how many others it scores at the end, for itself alone.
        peers: the sites whose keys it knows, its own name among them.
    """
    config = adapter_config(base, own_lora(recipe.lora, invited.site))
    shapes = {shape.path: (shape.inputs, shape.outputs) for shape in base.facts.linears}
    numbers = sum(config.rank * sum(shapes[module]) for module in config.modules)
    federation, selection, compression = recipe.federation, recipe.selection, recipe.compression
    masked = recipe.secure_aggregation.enabled
    size = byte_size(8 * numbers if masked else packed_bytes(compression.up, numbers, compression.keep))
    leaves = [f"an update of the adapter, {size}, and what the method {recipe.method.name} adds to it"]
    leaves += ["the number of rows and tokens trained on, and their mean loss"]
    if recipe.training.loss == "dpo":
        leaves.append(
            "for how large a share of your pairs the chosen answer came to be preferred, and by how much in the mean; "
            "also of those that you hold out"
        )
    leaves += [
        "which versions and settings here are others than the coordinator's; how long a task took; and where one "
        "fails, of what kind the failure was"
    ]
    if selection.surveys:
        noise = f"with noise of {selection.noise:g}" if selection.noise else "without noise"
        leaves.append(f"before it, the centres of clusters of your rows' hidden states, {noise}")
    if held_out:
        leaves.append(
            f"sums of scores on {counted(len(held_out), 'row')} that you hold out of these, at each evaluation, and "
            f"for each of their categories (of {_column(recipe.data, 'category')}) and groups (of "
            f"{_column(recipe.data, 'group')}), {_names(held_out)}"
        )
    lines = [
        f"You are asked to take part in the federation {invited.federation[:12]} at {clean(invited.address)} as "
        f"{invited.site}.",
        f"Base model: {model_named(recipe)}, weights {base.fingerprint[:16]}; it stays as it is.",
        f"Trained: a LoRA adapter of {numbers:,} numbers, by {recipe.method.name}, on {counted(rows, 'row')} of yours"
        f"{_chosen(rows, selection)}.",
        f"How often: {counted(federation.rounds, 'round')}; you are asked in {_share(federation)}"
        f"{', and in the last one in any case' if make_method(recipe.method).last else ''}.",
        "What leaves this machine each time:",
        *(f"  - {one}" for one in leaves),
        f"What never leaves it: rows, their text and tokens{' but such names' if held_out else ''}, the base model, "
        "your private keys" + (f", and anything of the {counted(test, 'test row')}." if test else "."),
        f"Protection: all is signed, and encrypted on the way; {_seen(recipe, invited.site, peers)}."
        f"{_hidden(recipe.privacy)}",
        f"Code: none is sent; what runs is bellwether, which is installed here{_own_code(recipe)}.",
    ]
    facts = {**invited.facts, "federation": invited.federation, "coordinator": invited.coordinator}
    text = "\n".join(map(clean, lines))  # no word of the coordinator's or of a file makes a line of its own
    return Terms(terms_of({**facts, "text": text}), text)


def _hidden(privacy: Privacy) -> str:
    """Return what differential privacy adds, as sentences after others."""
    if privacy.hides_rows:
        return (
            f" Each row's gradient is cut to a norm of {privacy.clip_norm:g} here, and noise of {privacy.noise:g} "
            "times that is added to their sum in every step, drawn from a secret of this site: that hides single rows "
            "of yours from the coordinator as well, in the update alone."
        )
    if not privacy.hides_clients:
        return ""
    found = [f"an epsilon of {privacy.epsilon:g} over all rounds"] if privacy.epsilon is not None else []
    found += [f"a noise multiplier of {privacy.noise:g}"] if privacy.noise is not None else []
    moves = " at first, and to what the coordinator says later," if privacy.clip_quantile is not None else ""
    return (
        f" Your update is cut to a norm of {privacy.clip_norm:g}{moves} here, if it is longer, and the coordinator "
        f"adds noise to the sum of all: {' and '.join(found)}, at a delta of {privacy.delta:g}. That hides whether you "
        "contributed from whoever sees the results, and nothing from the coordinator."
    )


def _seen(recipe: Recipe, site: str, peers: Collection[str]) -> str:
    """Return what the coordinator sees of an update, as the end of a sentence."""
    settings = recipe.secure_aggregation
    if not settings.enabled:
        return (
            "the coordinator sees each update of yours as it is, and an update can reveal some of the text that it was "
            "trained on"
        )
    others = clean(listed(sorted(set(peers) - {site})))
    return (
        f"each update of yours is masked, so that the coordinator sees the sum of the updates of at least "
        f"{settings.threshold:.0%} of the sites that it asked, and none of them alone, unless it lies and other sites "
        f"help it; the sites whose keys were entered here are {others}. Such a sum, and the adapter that is made of "
        "it, can still reveal some of the text that they were trained on"
    )


def _column(data: Data, label: str) -> str:
    """Return which of a site's columns labels of its rows are taken from, in words."""
    others = (getattr(one, label) for one in data.source_columns)
    found = [getattr(data.columns, label), *(one for one in others if one is not None)]
    named = dict.fromkeys(clean(_USUAL[label] if one is None else one) for one in found if one != "")
    return f"column {' or '.join(named)}" if named else "no column"


def _names(held_out: Sequence[TokenRow]) -> str:
    """Return which names of categories and groups leave with sums of scores, in words."""
    names: list[str] = []
    for labels in ((row.category for row in held_out), (row.group for row in held_out)):
        sums = lumped({label: Totals(rows, 0, 0.0) for label, rows in Counter(labels).items()})
        names += sorted(sums.keys() - {"", OTHER})
    return (
        f"by name where they have at least {LEAST} rows: {clean(listed(names))}"
        if names
        else "without their names, since too few rows share one"
    )


def _chosen(rows: int, selection: Selection) -> str:
    """Return how few of a site's rows an update can be of, and who chooses them, as the end of a sentence."""
    asked, own = budget(rows, selection), ":" in selection.method  # a function of one's own may take fewer
    if selection.method == "full":
        return ""
    if selection.surveys:  # a cluster whose centre leaves has so many rows at least, and the coordinator may keep one
        fewest = 1 if own else min(rows, selection.min_cluster_rows, asked or selection.rows_per_cluster)
        return (
            "; in each round on those of clusters that the coordinator chooses by their centres, which can be "
            f"{'a single row' if fewest == 1 else f'{fewest} rows'}, and an update of few rows shows more of them"
        )
    taken = ("at most " if own else "") + counted(asked or rows, "row")
    return f"; in each round on {taken} of these, and an update of few rows shows more of them"


def _share(federation: Federation) -> str:
    """Return in how many of the rounds a site is asked, as the end of a sentence."""
    if federation.cohort_size is not None:
        return f"those for which you are drawn, {counted(federation.cohort_size, 'site')} at a time"
    return "each of them" if federation.fraction == 1 else f"about {federation.fraction:.0%} of them"


def from_the_hub(recipe: Recipe) -> list[str]:
    """Return what of a recipe is a name on the Hugging Face hub, each as the beginning of a sentence."""
    selection, found = recipe.selection, []
    if on_hub(recipe.model):
        found.append(f"The base model {model_named(recipe)}")
    if selection.proxy is not None and on_hub(Model(path=selection.proxy)):
        found.append(f"The proxy {clean(selection.proxy)}")
    return found + [f"The public text {clean(one)}" for one in selection.projection_sources if is_hub_name(one)]


def model_named(recipe: Recipe) -> str:
    """Return which base model a recipe names, and which of its states on the hub, for a person."""
    revision = recipe.model.revision
    return clean(recipe.model.path) + (f" at revision {clean(revision)}" if revision else "")


def _own_code(recipe: Recipe) -> str:
    """Return what else runs of what is installed here, as the end of a sentence."""
    named = [code.name for code in code_in(recipe)]
    return f", with {', '.join(map(clean, named))}, which the policy lists" if named else ""
