"""How good a coreset is before anything is trained on it, on rows whose topics are known.

    python -m benchmarks.coreset [--results benchmarks/results]
    python -m benchmarks.coreset RECIPE selection.min_cluster_rows=2 --seeds 0 1 2

The first makes the README's table, on the embedded rows; the second measures a recipe of yours.

Of the first round's survey, by all clients: do the server's groups agree with the topics (adjusted Rand index and
normalised mutual information of the centroids that are in a group with others, and the share of these), are rows chosen
of the topic that their cluster stands for, and how many topics do they cover, against as many drawn at random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bellwether import load_recipe
from bellwether.client.choose import Chooser
from bellwether.client.memory import recall
from bellwether.exchange.messages import Payload, Reply, SurveyTask, TrainTask, client_draws
from bellwether.method.survey import survey
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.runner.checks import survey_width
from bellwether.runner.prepare import prepare
from bellwether.store.run_folder import client_folders
from bellwether.tools.randomness import Randomness
from benchmarks import choosing, machine, report
from benchmarks.measure import agreement, expected_cover, topics_covered

FIGURES = ("centroids", "kept", "rows", "grouped", "ari", "nmi", "wrong topic", "topics", "topics of random rows")
SEEDS = (10, 11, 12, 13, 14)


def measure(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Survey all clients of a recipe once, let them choose, and measure what they chose.

    Args:
        recipe: with a selection of two levels.
        folder: where clients may keep what they remember.
    """
    prepared = prepare(recipe)
    rows = {client: tokenised.rows for client, tokenised in prepared.clients.items()}
    base = load_base(recipe.model)
    adapter = initial_adapter(base, recipe.lora, Randomness(recipe.seed).torch("initial adapter"))
    layers = LoraLayers(base.model, adapter.config)
    folders = client_folders(folder, list(rows))
    chooser = Chooser(base, layers, folders, prepared.public)

    draws = {client: client_draws(Randomness(recipe.seed), 1, client) for client in rows}

    def ask(tasks: Mapping[str, SurveyTask]) -> Iterator[Reply]:
        return (chooser.survey(client, rows[client], task) for client, task in tasks.items())

    asked = {client: SurveyTask(1, Payload(adapter), recipe.selection, draws[client]) for client in rows}
    surveyed = survey(ask, asked, recipe.selection, 1, survey_width(recipe.selection, prepared.base.facts))
    topics = {client: [row.category for row in some] for client, some in rows.items()}
    groups, labels, wrong, chosen = [], [], [], []
    for client, kept in surveyed.kept.items():
        memory = recall(folders[client], 1)
        if memory is None or memory.clusters is None:  # it could not be surveyed
            continue
        clusters_N, named = memory.clusters.labels_N, {}
        for number in memory.released:
            named[number] = main_topic(topics[client], clusters_N, number)
        groups += surveyed.record.groups[client]
        labels += [named[number] for number in memory.released]
        task = TrainTask(1, Payload(adapter), recipe.training, 1, draws[client], recipe.selection, kept)
        for row in chooser.choose(client, rows[client], task) if kept else ():
            chosen.append(topics[client][row])
            wrong.append(topics[client][row] != named[int(clusters_N[row])])
    layers.detach()
    everything = [topic for some in topics.values() for topic in some]
    share, ari, nmi = grouped(groups, labels)
    figures = (
        len(labels),
        sum(map(len, surveyed.kept.values())),
        len(chosen),
        share,
        ari,
        nmi,
        float(np.mean(wrong)) if wrong else float("nan"),
        topics_covered(chosen, everything),
        expected_cover(list(Counter(everything).values()), len(chosen)),
    )
    return dict(zip(FIGURES, figures, strict=True))


def grouped(groups: Sequence[int], topics: Sequence[str]) -> tuple[float, float, float]:
    """Return the share of centroids that are in a group with others, and how well these groups agree with the topics.

    Args:
        groups: of each centroid, -1 where it is in none; a lone one that was kept is a group of its own.
        topics: of each centroid's cluster.

    Returns:
        The share, the adjusted Rand index and the normalised mutual information; NaN where there is nothing to measure.
    """
    sizes = Counter(groups)
    pairs = [(group, topic) for group, topic in zip(groups, topics, strict=True) if group >= 0 and sizes[group] > 1]
    ari, nmi = agreement(*zip(*pairs, strict=True)) if pairs else (float("nan"), float("nan"))
    return len(pairs) / len(groups) if groups else float("nan"), ari, nmi


def main_topic(topics: Sequence[str], clusters_N: NDArray[np.int64], number: int) -> str:
    """Return the most frequent topic of the rows of a cluster.

    Args:
        topics: of each row.
        clusters_N: the cluster of each row.
        number: of the cluster.
    """
    return Counter(topics[row] for row in np.flatnonzero(clusters_N == number)).most_common(1)[0][0]


def settings() -> Iterator[dict[str, Any]]:
    """Yield what the README's table shows, by its columns, each with the fields of a recipe that make it."""
    dealt = {"iid": "all categories each", "categories": "one to three categories each"}
    spaces = {"shared": "shared", "per_client_tsne": "a t-SNE each"}
    for (method, clients), (space, name), least in itertools.product(dealt.items(), spaces.items(), (2, 3, 5)):
        fields = {
            "partition.method": method,
            "selection.space": space,
            "selection.dimensions": 2 if space == "per_client_tsne" else 16,
            "selection.min_cluster_rows": least,
            "selection.method": "hierarchical",
            "selection.pooling": "mean",
            "selection.layers": [1, 2, 3],
            "selection.keep_lone": True,
        }
        yield {"clients": clients, "space": name, "min_cluster_rows": least, "fields": fields}


def measured(recipe: Recipe, seeds: Sequence[int]) -> dict[str, list[float | None]]:
    """Return each figure of a recipe by seed; None where there was nothing to measure."""
    found: list[dict[str, float]] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(with_overrides(recipe, {"seed": seed}), Path(folder)))
    return {name: [None if math.isnan(one[name]) else one[name] for one in found] for name in FIGURES}


def main(words: Sequence[str] | None = None) -> None:
    """Measure coresets of the embedded rows, or of one recipe, and show the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coreset", description="Measure a coreset's quality.")
    parser.add_argument("recipe", nargs="?", help="one recipe, whose figures are printed as JSON; none: the table")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--results", type=Path, help="folder of the table's figures; none: only print them")
    given = parser.parse_intermixed_args(words)
    torch.set_num_threads(1)
    if given.recipe:
        recipe = load_recipe(given.recipe, ["selection.method=hierarchical", *given.overrides])
        print(json.dumps({"seeds": list(given.seeds), **measured(recipe, given.seeds)}))
        return
    base = load_recipe("default")
    rows = [one | measured(with_overrides(base, one["fields"]), given.seeds) for one in settings()]
    found = {**machine.describe(quick=False), "seeds": list(given.seeds), "settings": rows}
    print(choosing.coreset(found))
    if given.results:
        report.write(given.results, "coreset", found)


if __name__ == "__main__":
    main()
