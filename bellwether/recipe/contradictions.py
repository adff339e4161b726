"""What no single field of a recipe can know: fields that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bellwether.errors import RecipeError
from bellwether.recipe.plain import Location
from bellwether.recipe.privacy import Privacy
from bellwether.recipe.recipe import (
    Arm,
    Compare,
    Compression,
    Partition,
    Recipe,
    SecureAggregation,
    Selection,
    Training,
    Tune,
)
from bellwether.recipe.secure import LEAST_COHORT
from bellwether.tools.words import counted, cut


def check_recipe(recipe: Recipe) -> None:
    """Check what no single field can know, for recipes that were built in Python.

    Raises:
        RecipeError: fields contradict each other.
    """
    problems = [f"{'.'.join(map(str, location))}: {text}" for location, text in contradictions(recipe)]
    if problems:
        raise RecipeError(problems)


def contradictions(recipe: Recipe) -> list[tuple[Location, str]]:
    """Return location and sentence of every pair of fields that cannot stand together."""
    found: list[tuple[Location, str]] = [(tuple(field.split(".")), text) for field, text in _between_sections(recipe)]
    found += _partition_contradictions(recipe.partition)
    if recipe.compare is not None:
        if recipe.engine.processes != 1:
            text = f"engine.processes is {recipe.engine.processes}, but a comparison runs its arms side by side instead"
            found.append((("engine", "processes"), f"{text} (--jobs); set it to 1."))
        found += _compare_contradictions(recipe.compare, recipe.evaluation.generate)
        tune = recipe.compare.tune
        if tune is not None and tune.choose_by == "preferred" and recipe.training.loss != "dpo":
            text = (
                "compare.tune.choose_by is preferred, but rows have one answer unless training.loss is dpo; choose by"
            )
            found.append((("compare", "tune", "choose_by"), f"{text} loss."))
        if tune is not None and tune.choose_by == "clients_loss" and recipe.training.loss == "dpo":
            text = "compare.tune.choose_by is clients_loss, the cross-entropy of chosen answers, which says little of"
            found.append((("compare", "tune", "choose_by"), f"{text} preferences (dpo); choose by preferred."))
    return found


def _between_sections(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield field and sentence of what contradicts another field; of partitions, only what names clients."""
    partition, federation, warmup = recipe.partition, recipe.federation, recipe.training.warmup_rounds
    method, size = cut(partition.method), federation.cohort_size
    if method == "column" and not partition.column:
        yield "partition.column", "partition.method is column, so name the column in partition.column."
    if partition.column and method != "column":
        text = f"partition.column is given, but partition.method is {method}; set it to column."
        yield "partition.column", text
    known = method not in ("column", "files", "auto") or partition.clients_per_group is not None
    if size and known and size > partition.clients:
        text = f"federation.cohort_size is {size}, but there are {counted(partition.clients, 'client')}; give at most"
        yield "federation.cohort_size", f"{text} {partition.clients}."
    if recipe.engine.processes > 1 and ":" in recipe.model.device:
        text = (
            f"engine.processes is {recipe.engine.processes}, but model.device is {cut(recipe.model.device)}, one device"
        )
        yield "engine.processes", f"{text}; set it to cuda, which spreads the processes."
    if federation.sampler == "available" and federation.availability is None:
        text = "federation.sampler is available, but federation.availability is null; say there who is away when."
        yield "federation.sampler", text
    if federation.deadline is not None and federation.availability is None:
        text = "federation.deadline is given, but nobody's speed is simulated; set it, such as"
        yield "federation.deadline", f"{text} federation.availability.rows_per_second=50."
    ranks = recipe.lora.ranks or ()
    largest = max(ranks.values() if isinstance(ranks, Mapping) else ranks, default=0)
    if largest > recipe.lora.rank:
        text = f"lora.ranks goes up to {largest}, but lora.rank, the server's, is {recipe.lora.rank}; raise lora.rank"
        yield "lora.ranks", f"{text} to {largest}, or lower the others."
    yield from _of_selection(recipe.selection)
    yield from _of_pairs(recipe)
    yield from _of_compression(recipe.compression)
    yield from _of_privacy(recipe)
    yield from _of_secure_aggregation(recipe)
    if warmup >= federation.rounds:
        text = (
            f"training.warmup_rounds is {warmup}, which leaves none of the "
            f"{counted(federation.rounds, 'round')} at the full"
        )
        yield "training.warmup_rounds", f"{text} learning rate; give fewer."


def _of_pairs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield field and sentence of what contradicts a loss of pairs, or means nothing without one."""
    training, method = recipe.training, recipe.selection.method
    if training.loss != "dpo":
        if training.beta != Training().beta:
            text = f"training.beta is given, but training.loss is {cut(training.loss)}, which knows none; leave it out"
            yield "training.beta", f"{text}, or set training.loss=dpo."
        return
    if recipe.data.loss_on != "response":
        text = f"data.loss_on is {recipe.data.loss_on}, but training.loss dpo compares answers; set it to response."
        yield "data.loss_on", text
    if method not in ("full", "random"):
        text = f"selection.method is {cut(method)}, which looks at one answer of a row, but with training.loss dpo rows"
        yield "selection.method", f"{text} have two; set it to full or random."


def _of_privacy(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield field and sentence of what privacy cannot go together with."""
    privacy = recipe.privacy
    if privacy.amplification and recipe.federation.sampler != "poisson":
        text = (
            f"privacy.amplification counts on Poisson sampling, but federation.sampler is {recipe.federation.sampler}"
        )
        yield "privacy.amplification", f"{text}; set it to poisson."
    for field, given in (("amplification", privacy.amplification), ("clip_quantile", privacy.clip_quantile)):
        if given and privacy.unit == "example":
            text = f"privacy.{field} is for clients, but privacy.unit is example; leave it out, or set privacy.unit to"
            yield f"privacy.{field}", f"{text} client."
    if not privacy.on:
        for field in sorted(privacy.model_fields_set - {"unit", "epsilon", "noise"}):
            if getattr(privacy, field) != Privacy.model_fields[field].default:
                text = f"privacy.{field} is given, but neither privacy.epsilon nor privacy.noise, so nothing is hidden"
                yield f"privacy.{field}", f"{text}; give one of them."
        return
    if privacy.hides_rows:
        yield from _of_examples(recipe)
        return
    if recipe.selection.surveys:
        text = (
            f"selection.method is {cut(recipe.selection.method)}, by which one client decides on what others train, and"
        )
        yield "selection.method", f"{text} nothing bounds that; set it to full or random."
    if ":" in recipe.federation.sampler:
        text = f"federation.sampler is {cut(recipe.federation.sampler)}, which may ask clients by what others told, and"
        yield "federation.sampler", f"{text} nothing bounds that; set it to uniform or poisson."
    if recipe.federation.sampler == "poisson" and recipe.secure_aggregation.enabled:
        text = (
            "federation.sampler is poisson, but a cohort that is too small for secure aggregation would show; set it to"
        )
        yield "federation.sampler", f"{text} uniform."
    if recipe.compression.up != "none":
        text = f"compression.up is {recipe.compression.up}, which changes updates after they were clipped; set it to"
        yield "compression.up", f"{text} none, or leave privacy.epsilon and privacy.noise out."


def _of_examples(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield field and sentence of what does not go together with hiding single rows."""
    method, fuse = recipe.selection.method, recipe.engine.fuse
    if recipe.partition.copies > 1:
        text = (
            f"partition.copies is {recipe.partition.copies}, but a row that stands at several clients shows at each of"
        )
        yield "partition.copies", f"{text} them, where privacy.unit example counts one; set it to 1."
    if method != "full":
        text = f"selection.method is {cut(method)}, but with privacy.unit example every row joins a step by a chance of"
        yield "selection.method", f"{text} its own, whatever the other rows are; set selection.method to full."
    if fuse != 1:
        text = f"engine.fuse is {fuse}, but with privacy.unit example clients are trained one by one, with a slot for"
        yield "engine.fuse", f"{text} each row; set engine.fuse to 1."


def _of_compression(settings: Compression) -> Iterator[tuple[str, str]]:
    """Yield field and sentence of what has no effect as updates travel."""
    if settings.keep != Compression().keep and settings.up != "top_k":
        text = f"compression.keep is given, but compression.up is {settings.up}, which keeps all entries; leave it out."
        yield "compression.keep", text
    if not settings.error_feedback and settings.up == "none":
        text = "compression.error_feedback is false, but compression.up is none, which leaves nothing unsent; leave it"
        yield "compression.error_feedback", f"{text} out."


def _of_secure_aggregation(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield field and sentence of what masked updates cannot be, and of what has no effect without them."""
    settings, size = recipe.secure_aggregation, recipe.federation.cohort_size
    if not settings.enabled:
        for field in ("threshold", "range"):
            if getattr(settings, field) != getattr(SecureAggregation(), field):
                text = f"secure_aggregation.{field} is given, but secure_aggregation.enabled is false; leave it out,"
                yield f"secure_aggregation.{field}", f"{text} or set secure_aggregation.enabled=true."
        return
    if recipe.compression.up != "none":
        text = f"compression.up is {recipe.compression.up}, but masked updates cannot be added up in few bits; set it"
        yield "compression.up", f"{text} to none, or secure_aggregation.enabled=false."
    if size is not None and size < LEAST_COHORT:
        text = f"federation.cohort_size is {size}, which masks nothing; give at least {LEAST_COHORT}"
        yield "federation.cohort_size", f"{text}, or set secure_aggregation.enabled=false."


def _of_selection(selection: Selection) -> Iterator[tuple[str, str]]:
    """Yield field and sentence of what contradicts another field of the selection."""
    method = cut(selection.method)
    if method == "full":
        return
    if selection.rows is not None and selection.fraction is not None:
        yield "selection.fraction", "selection.rows and selection.fraction are both given; give one of them."
    if method != "hierarchical" and selection.rows is None and selection.fraction is None:
        text = f"selection.method is {method}, which must be told how many rows; give a number, hierarchical, or"
        yield "selection.rows", f"{text} selection.fraction."
    if method == "hierarchical" and selection.rows == "hierarchical":
        yield "selection.rows", "selection.rows hierarchical is for other methods; give a number or null."
    told = selection.rows is not None or selection.fraction is not None
    if method == "hierarchical" and told and selection.rows_per_cluster > 1:
        text = "selection.rows_per_cluster is given, but selection.rows or selection.fraction says how many to take"
        yield "selection.rows_per_cluster", f"{text}; leave one of them out."
    if (selection.features == "proxy") != (selection.proxy is not None):
        text = f"selection.features is {selection.features}, and selection.proxy {cut(selection.proxy or 'null')}"
        yield "selection.proxy", f"{text}; give both or neither."
    if selection.rotate and method not in ("hierarchical", "random"):
        yield (
            "selection.rotate",
            f"selection.rotate is given, but selection.method {method} chooses by itself; leave it out.",
        )
    if selection.noise and not selection.surveys:
        text = f"selection.noise is given, but with selection.method {method} clients send no centroids; leave it out."
        yield "selection.noise", text
    if selection.projection_sources and selection.space != "shared":
        text = f"selection.projection_sources are given, but selection.space is {selection.space}; set it to shared."
        yield "selection.projection_sources", text
    if selection.noise and selection.clip_norm is None:
        text = "selection.noise is given, but without selection.clip_norm no amount of noise is enough; give both."
        yield "selection.noise", text
    if selection.noise and selection.space == "per_client_tsne":
        text = "selection.noise is given, but a t-SNE may move a centroid anywhere, whatever its rows' norms; set"
        yield "selection.noise", f"{text} selection.space to shared."


def _partition_contradictions(partition: Partition) -> list[tuple[Location, str]]:
    """Return what cannot stand together of ranges and of clients per group."""
    found: list[tuple[str, str]] = []
    for name in ("categories_per_client", "rows_per_client"):
        value = getattr(partition, name)
        if isinstance(value, tuple) and value[0] > value[1]:
            found.append((name, f"partition.{name} is {list(value)}; give the smaller number first."))
    if partition.rows_per_client and partition.rows_per_client[0] < partition.min_rows:
        found.append(
            (
                "rows_per_client",
                f"partition.rows_per_client begins at {partition.rows_per_client[0]}, but partition.min_rows is "
                f"{partition.min_rows}; begin there or higher, or lower min_rows.",
            )
        )
    if partition.clients_per_group is not None:
        total = sum(partition.clients_per_group.values())
        if partition.method in ("column", "files") or ":" in partition.method:
            found.append(
                (
                    "clients_per_group",
                    f"partition.clients_per_group is given, but partition.method {cut(partition.method)} makes the "
                    "clients itself; set it to auto, iid, dirichlet, categories, shards or quantity.",
                )
            )
        elif total != partition.clients:
            found.append(
                (
                    "clients_per_group",
                    f"partition.clients_per_group adds up to {counted(total, 'client')}, but partition.clients is "
                    f"{partition.clients}; set partition.clients to {total}.",
                )
            )
    return [(("partition", name), text) for name, text in found]


def _compare_contradictions(compare: Compare, generate: bool) -> list[tuple[Location, str]]:
    """Return what cannot stand together of a comparison's seeds, arms and trials."""
    tune = compare.tune
    lists: list[tuple[Location, Sequence[Any]]] = [(("seeds",), compare.seeds)]
    if tune is not None:
        lists += [(("tune", name), getattr(tune, name) or ()) for name in ("seeds", "learning_rates", "passes")]
    for name, arm in compare.arms.items():
        lists += [(("arms", name, field), getattr(arm, field) or ()) for field in ("clients", "learning_rates")]
    found = [
        (place, f"compare.{'.'.join(map(str, place))} names {cut(str(twice[0]))} twice; once is enough.")
        for place, values in lists
        if (twice := [value for value, count in Counter(values).items() if count > 1])
    ]
    if tune is not None and tune.answers and not generate:
        found.append(
            (
                ("tune", "choose_by"),
                f"compare.tune.choose_by is {tune.choose_by}, but evaluation.generate is false, so there are no "
                "answers; choose by loss.",
            )
        )
    if tune is not None and not compare.tuned:
        found.append((("tune",), "compare.tune is given, but no arm trains passes that it could choose; leave it out."))
    for name, arm in compare.arms.items():
        tried = _tried_contradictions(arm, compare.tune if name in compare.tuned else None)
        for field, text in (*_arm_contradictions(arm, compare.tune if name in compare.tuned else None), *tried):
            found.append((("arms", name, field), f"compare.arms.{name}.{field} {text}"))
    return [(("compare", *place), text) for place, text in found]


def _tried_contradictions(arm: Arm, tune: Tune | None) -> Iterator[tuple[str, str]]:
    """Yield field and sentence, without its subject, of what an arm says of its trials; without any, of saying so."""
    if arm.learning_rates is not None and tune is None:
        yield "learning_rates", "is given, but the arm has no trials (compare.tune); give learning_rate."
    elif arm.learning_rates is not None and tune is not None and len(arm.learning_rates) != len(tune.learning_rates):
        tries = counted(len(tune.learning_rates), "learning rate")
        yield "learning_rates", f"names {len(arm.learning_rates)}, but trials try {tries} with each arm; name as many."
    if tune is not None and tune.passes is None and arm.passes is None:
        yield "passes", "is not given, but compare.tune.passes is null, so that each arm says its own; give it."


def _arm_contradictions(arm: Arm, tune: Tune | None) -> Iterator[tuple[str, str]]:
    """Yield field and sentence, without its subject, of what an arm says twice or in vain."""
    tuned = tune is not None
    length = "passes" if arm.passes is not None else "steps" if arm.steps is not None else None
    if arm.clients is not None and arm.trains != "alone":
        yield "clients", f"is given, but trains is {arm.trains}; only an arm that trains alone names clients."
    if arm.passes is not None and arm.steps is not None:
        yield "steps", "is given as well as passes; leave one of them out."
    if arm.steps is not None and arm.trains == "federation":
        yield "steps", "is given, but a federation counts rounds; give passes, or set federation.rounds."
    for field in ("learning_rate", "passes", "steps"):
        if getattr(arm, field) is None:
            continue
        if not arm.learns:
            yield field, f"is given, but trains is {arm.trains}, which trains nothing; leave it out."
        elif tune is not None and (field != "passes" or tune.passes):
            yield field, "is given, but compare.tune chooses it; leave one of them out."
    counted = length is None and not tuned  # by the recipe's rounds
    lengths = {"federation.rounds", "training.local_epochs", "training.local_steps"}
    told = {"training.learning_rate": "learning_rate" if arm.learning_rate is not None else None}
    told |= dict.fromkeys({"federation.rounds"} if arm.trains == "federation" else lengths, length)
    for field in arm.set:
        by = "compare.tune" if tuned and field in told else told.get(field)
        if by:
            yield "set", f"names {cut(field)}, but {by} decides it; leave one of them out."
        elif _is_idle(field, arm, counted):
            yield "set", f"names {cut(field)}, which has no effect, since trains is {arm.trains}; leave it out."
        if field.partition(".")[0] in ("seed", "compare", "output") or field == "evaluation.part":
            yield "set", f"names {cut(field)}, which is the same for all arms of a comparison; leave it out."


def _is_idle(field: str, arm: Arm, counted: bool) -> bool:
    """Return whether a field that an arm sets decides nothing, since no rounds or no training use it.

    Without a federation only what counts the passes of the recipe's rounds is used, where nothing else counts them.
    """
    section = field.partition(".")[0]
    if arm.trains != "federation" and field.startswith("lora.ranks"):
        return True
    rounds_alone = ("method", "compression", "privacy", "secure_aggregation")
    if arm.trains == "federation" or section not in ("training", "federation", *rounds_alone):
        return False
    if not arm.learns or field == "training.warmup_rounds":
        return True
    passes = ("federation.rounds", "federation.fraction", "federation.cohort_size")
    return section in rounds_alone or (section == "federation" and not (counted and field in passes))
