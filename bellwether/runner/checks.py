"""What can be found wrong of a recipe once its rows and its model's facts are known, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bellwether.data.rows import Federated, Row, Tokenised
from bellwether.errors import DataError, RecipeError
from bellwether.exchange.masks import require_cryptography
from bellwether.method.cohort import Trace, client_ranks, cohort_size, make_sampler
from bellwether.method.method import serve_sent
from bellwether.method.named import make_method
from bellwether.recipe.recipe import Model, Recipe, Selection
from bellwether.recipe.secure import LEAST_COHORT
from bellwether.runner.compatible import refusals
from bellwether.tools.functions import load_function
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted

if TYPE_CHECKING:
    from bellwether.model.facts import ModelFacts


SAFE_ROWS = 5  # centroids of fewer rows are warned of


def feature_width(selection: Selection, facts: ModelFacts) -> int:
    """Return how many features a row has.

    Args:
        selection: which features there shall be.
        facts: of the model.

    Raises:
        RecipeError: layers are chosen that the model or proxy does not have.
        ModelError: the proxy cannot be used.
    """
    chosen = None if selection.layers == "all" else selection.layers
    if selection.proxy is not None:
        from bellwether.model.proxy import proxy_width

        return proxy_width(Model(path=selection.proxy), chosen)
    from bellwether.model.features import state_numbers

    return len(state_numbers(facts.layers, chosen)) * facts.hidden_size


def survey_width(selection: Selection, facts: ModelFacts) -> int:
    """Return how many dimensions the centroids of a survey have; 0 where nobody is surveyed."""
    if not selection.surveys:
        return 0
    return feature_width(selection, facts) if selection.space == "none" else selection.dimensions


def check_features(selection: Selection, facts: ModelFacts, public: int) -> None:
    """Refuse layers that the model or proxy does not have, and a shared space of too many dimensions.

    Args:
        selection: which features there shall be.
        facts: of the model.
        public: rows of public text.
    """
    if selection.method == "full":
        return
    width = feature_width(selection, facts)
    if selection.space == "shared" and selection.dimensions > width:
        raise RecipeError(
            f"selection.dimensions is {selection.dimensions}, but a row has {width} features; give at most that."
        )
    if selection.projection_sources and selection.dimensions >= public:
        raise RecipeError(
            f"selection.projection_sources: a space of {counted(selection.dimensions, 'dimension')} cannot be "
            f"fitted on {public} "
            f"rows of public text; name more, or set selection.dimensions to at most {max(0, public - 1)}."
        )


def selection_warnings(selection: Selection, rows: Mapping[str, int]) -> list[str]:
    """Return what a person should know of a choice of rows by clients with so many rows."""
    if selection.method == "full":
        idle = [field for field in ("rows", "fraction", "proxy") if getattr(selection, field) is not None]
        why = "has no effect, since selection.method is full: clients train on all their rows."
        return [f"selection.{field} {why}" for field in idle]
    if not selection.surveys:
        return []
    warnings, least = [], selection.min_cluster_rows
    if least < SAFE_ROWS:
        warnings.append(
            f"selection.min_cluster_rows is {least}: a centroid of fewer than {counted(SAFE_ROWS, 'row')} may "
            "reveal what stands "
            "in one of them to whoever gets it."
        )
    # Two clusters need twice the rows, and HDBSCAN as many as it looks at.
    needed = least if selection.whole_client else max(2 * least, selection.min_samples(least))
    few = [client for client, count in rows.items() if count < needed]
    if few:
        warnings.append(
            f"{len(few)} of {counted(len(rows), 'client')} have fewer than the {counted(needed, 'row')} that "
            f"selection.min_cluster_rows={least} needs ({', '.join(few[:3])}{', …' if len(few) > 3 else ''}), so that "
            "nothing of theirs is ever selected."
        )
    return warnings


# The embedded tokenizer has 1.2 tokens a word in its own world, whose words it knows; English has 3.1 (Dolly), and text
# of other scripts more. Above two, most words are spelt out of pieces that the embedded base knows no use of.
MOST_TOKENS_PER_WORD = 2.0
_COUNTED_ROWS = 200


def embedded_warnings(rows: Sequence[Row], ids: Callable[[Sequence[str]], Sequence[Sequence[int]]]) -> list[str]:
    """Return what a person should know who tunes the embedded base on these rows.

    Args:
        rows: rows to train on, of which some, evenly taken, are counted.
        ids: gives texts as tokens of the embedded base.
    """
    taken = rows[:: -(-len(rows) // _COUNTED_ROWS)] if rows else rows
    texts = [f"{row.instruction} {row.context} {row.response}"[:2000] for row in taken]
    words = sum(len(text.split()) for text in texts)
    tokens = sum(map(len, ids(texts)))
    if tokens <= MOST_TOKENS_PER_WORD * words:
        return []
    return [
        f"the embedded base (model.path starter) spells these rows with {tokens / words:.1f} tokens a word, and those "
        "of its own made-up world with 1.2: it knows few of their words and learns little; give your own model with "
        "--model."
    ]


# From this share of rows on that are left out, or cut, a person is warned; from the last one on nothing is trained:
# what is learned of so few rows says nothing of the others.
_LEFT_OUT, _CUT, _NEARLY_ALL = 0.05, 0.25, 0.9
_DOUBLED = 0.05  # of the rows that are scored


def length_warnings(
    what: str, parts: Iterable[Tokenised], recipe: Recipe, positions: int | None, *, trained: bool = False
) -> list[str]:
    """Return what a person should know where many rows are too long.

    Args:
        what: how the rows are called, such as ``training rows``.
        parts: the rows.
        recipe: whose ``data.max_tokens`` they are too long for.
        positions: tokens that the base takes at most; None where there is no limit.
        trained: whether they are trained on.

    Raises:
        DataError: nearly all rows that were to be trained on are left out.
    """
    parts = list(parts)
    left_out, cut = sum(part.left_out for part in parts), sum(part.cut for part in parts)
    rows, most = sum(len(part.rows) for part in parts) + left_out, recipe.data.max_tokens
    if not left_out + cut or (left_out < _LEFT_OUT * rows and left_out + cut < _CUT * rows):
        return []
    lengths = sorted(length for part in parts for length in part.too_long)
    needed = -(-max(lengths[int(0.95 * (len(lengths) - 1))], most + 1) // 64) * 64
    remedy = f"data.max_tokens={needed} would hold most of them"
    if positions is not None and needed > positions:
        limit = f"the base takes at most {counted(positions, 'token')}"
        remedy = f"set data.max_tokens={positions}: {limit}" if positions > most else f"{limit}; take another base"
    told = [
        f"{count:,} of {rows:,} {what} ({count / rows:.0%}) {become}"
        for count, become in (
            (left_out, f"are left out, since no token of their response fits into data.max_tokens={most}"),
            (cut, f"have their response cut at data.max_tokens={most}"),
        )
        if count
    ]
    sentence = f"{', and '.join(told)}; {remedy}, or leave long rows out."
    if trained and left_out >= _NEARLY_ALL * rows:
        raise DataError(f"{sentence} Nothing is trained on so few.")
    return [sentence]


def doubled_warnings(federated: Federated, part: str) -> list[str]:
    """Return what a person should know where many of the rows that are scored are trained on, too.

    Args:
        federated: all rows.
        part: the one that is scored, ``test`` or ``validation``.
    """
    rows = len(federated.test if part == "test" else federated.validation)
    doubled = federated.doubled.get(part, 0)
    if doubled <= _DOUBLED * rows:
        return []
    return [
        f"{doubled:,} of {counted(rows, f'{part} row')} ({doubled / rows:.0%}) stand among the training rows as well, "
        "so scores on them say little of new questions; remove rows that stand twice, or give other "
        f"{part} rows."
    ]


def check_scored(recipe: Recipe, federated: Federated) -> None:
    """Refuse to score validation rows where there are none; who sets no test rows aside wants no scores."""
    if recipe.evaluation.part == "validation" and not federated.validation:
        data = recipe.data
        why = "; set data.validation_rows_per_category or data.validation_sources."
        if data.validation_rows_per_category:
            why = (
                ": no category has rows left for data.validation_rows_per_category "
                f"({data.validation_rows_per_category}) beside the test's, as half of each stays for training; lower "
                f"data.test_rows_per_category, which is {data.test_rows_per_category}."
            )
        raise RecipeError(f"evaluation.part is validation, but no rows are held out for it{why}")


def check_answers(recipe: Recipe, federated: Federated) -> None:
    """Refuse rows with one answer where the loss compares two, and rows with two where it looks at one."""
    pairs = recipe.training.loss == "dpo"
    parts = (*federated.clients.values(), *federated.held_out.values(), federated.validation, federated.test)
    wrong = next((row for part in parts for row in part if (row.rejected is not None) != pairs), None)
    if wrong is None:
        return
    place = wrong.place or "a row"
    if pairs:
        raise DataError(
            f"{place}: training.loss is dpo, but this row has one answer; name the columns of both in "
            "data.columns.chosen and data.columns.rejected, or set training.loss=cross_entropy."
        )
    raise DataError(
        f"{place}: this row has a chosen and a rejected answer, but training.loss is {recipe.training.loss}; set "
        "training.loss=dpo, or train on the chosen answers alone by data.columns.response=chosen."
    )


def check_cohort_size(recipe: Recipe, clients: int) -> None:
    """Refuse a cohort larger than the federation that the data makes, or too small for processes or masks."""
    size = recipe.federation.cohort_size
    if size is not None and size > clients:
        raise RecipeError(
            f"federation.cohort_size is {size}, but the data makes {counted(clients, 'client')}; give at most that."
        )
    if recipe.secure_aggregation.enabled:
        require_cryptography()
        asked = cohort_size(recipe.federation, clients)
        if asked < LEAST_COHORT:
            raise RecipeError(
                f"secure_aggregation.enabled hides nothing where a round asks {counted(asked, 'client')}: at least "
                f"{LEAST_COHORT} are needed; raise federation.fraction or federation.cohort_size, or take more clients."
            )
    processes, cohort = recipe.engine.processes, cohort_size(recipe.federation, clients)
    if processes > cohort:
        raise RecipeError(
            f"engine.processes is {processes}, but a round asks {counted(cohort, 'client')}; give at most that."
        )


def check_methods(recipe: Recipe, clients: Sequence[str], trace: Trace | None) -> None:
    """Refuse methods that cannot be had, such as a person's own that is not there or a broken trace."""
    make_sampler(recipe.federation, trace)
    for name in (recipe.training.loss, recipe.selection.method):
        if ":" in name:
            load_function(name)
    problems = refusals(recipe, make_method(recipe.method))
    client_ranks(recipe.lora, clients, Randomness(recipe.seed))
    if problems:
        raise RecipeError(problems)


def method_warnings(recipe: Recipe) -> list[str]:
    """Return what a person should know of a method whose clients serve adapters of their own."""
    method, name = make_method(recipe.method), recipe.method.name
    warnings = []
    if method.last is not None and recipe.federation.rounds == 1:
        warnings.append(
            f"In the last round of the method {name} clients train for themselves, and federation.rounds is 1: nothing "
            "is averaged; give at least 2."
        )
    if method.serves is serve_sent:
        return warnings
    text = (
        f"With the method {name} each client serves an adapter of its own; the run's test rows, trials that choose by "
        "loss, rouge_l, exact or preferred, and the adapter at the end are of what all share"
    )
    if recipe.partition.client_test_fraction:
        return [*warnings, f"{text}."]
    return [*warnings, f"{text}: set partition.client_test_fraction to see how well clients are served."]


def check_clients(clients: Mapping[str, Tokenised], recipe: Recipe) -> None:
    """Refuse clients of whose rows none can be trained on."""
    empty = [client for client, tokenised in clients.items() if not tokenised.rows]
    if empty:
        bad = sum(len(clients[client].bad) for client in empty)
        why = f"; {counted(bad, 'row')} of theirs cannot be rendered" if bad else ""
        sizes = {client: clients[client].left_out + len(clients[client].bad) for client in empty}
        shown = ", ".join(f"{client} with {counted(sizes[client], 'row')}" for client in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise DataError(
            f"{len(empty)} of {counted(len(clients), 'client')} keep no row that can be trained on, since none "
            "fits into "
            f"data.max_tokens={recipe.data.max_tokens} ({shown}{more}){why}; raise data.max_tokens, or leave "
            "these clients out."
        )
