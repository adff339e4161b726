"""How good a coreset is before anything is trained on it, on rows whose topics are known.

python -m benchmarks.coreset default selection.min_cluster_rows=2 [--seeds 0 1 2]

Of the first round's survey, by all clients: do the server's groups agree with the topics (adjusted Rand index and
normalised mutual information of the centroids that are in a group with others, and the share of these), are rows chosen
of the topic that their cluster stands for, and how many topics do they cover, against as many drawn at random.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bellwether import load_recipe
from bellwether.chosen import SURVEY
from bellwether.client.choose import Chooser
from bellwether.client.memory import recall
from bellwether.messages import Reply, SurveyTask, TrainTask
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.prepare import prepare
from bellwether.randomness import Randomness
from bellwether.recipe import Recipe
from bellwether.run_folder import client_folders
from bellwether.select.measure import agreement, expected_cover, topics_covered
from bellwether.survey import survey

FIGURES = ("centroids", "kept", "rows", "grouped", "ari", "nmi", "wrong topic", "topics", "topics of random rows")


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

    def ask(cohort: Sequence[str], task: SurveyTask) -> Iterator[Reply]:
        return (chooser.survey(client, rows[client], task) for client in cohort)

    surveyed = survey(ask, list(rows), SurveyTask(1, adapter, recipe.selection, recipe.seed))
    task = TrainTask(1, adapter, recipe.training, 1, recipe.seed, None, recipe.selection, surveyed.kept)
    topics = {client: [row.category for row in some] for client, some in rows.items()}
    groups, labels, wrong, chosen = [], [], [], []
    for client, kept in surveyed.kept.items():
        memory = recall(folders[client] / SURVEY)
        if memory is None or memory.clusters is None:  # it could not be surveyed
            continue
        clusters_N, named = memory.clusters.labels_N, {}
        for number in memory.released:
            named[number] = main_topic(topics[client], clusters_N, number)
        groups += surveyed.record.groups[client]
        labels += [named[number] for number in memory.released]
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


def main() -> None:
    """Measure a recipe under some seeds, and print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coreset", description="Measure a coreset's quality.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for seed in given.seeds:
        recipe = load_recipe(given.recipe, ["selection.method=hierarchical", *given.overrides, f"seed={seed}"])
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(recipe, Path(folder)))
    means = {name: round(float(np.nanmean([one[name] for one in found])), 3) for name in FIGURES}
    print(json.dumps({"seeds": list(given.seeds), "means": means}))


if __name__ == "__main__":
    main()
