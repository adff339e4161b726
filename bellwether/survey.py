"""The survey before a round's training, on the server's side: ask for centroids, check them, keep one of each group.

FedHDS (Qin et al. 2024, arXiv 2410.10926). Of a client's rows nothing but centroids arrives here; which rows stand
nearest to them, only the client knows.

Shape legend: C centroids of a client, d dimensions of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bellwether.errors import UpdateRejected
from bellwether.messages import Reply, SurveyTask
from bellwether.records import SurveyRecord
from bellwether.select.groups import keep
from bellwether.wire import adapter_bytes, check_survey

NUMBER_BYTES = 4  # of a kept centroid's number on its way back


@dataclass(frozen=True)
class Surveyed:
    """What came of a survey.

    Args:
        kept: for each client that answered, the numbers of its centroids that were kept; often none.
        left_out: client and reason of those that gave nothing that can be used.
        record: what is written of it.
        duration: how long the slowest client took, in seconds; simulated where speed is simulated.
    """

    kept: Mapping[str, Sequence[int]]
    left_out: Mapping[str, str]
    record: SurveyRecord
    duration: float


def survey(
    ask: Callable[[Sequence[str], SurveyTask], Iterator[Reply]], cohort: Sequence[str], task: SurveyTask
) -> Surveyed:
    """Ask a cohort for its centroids and keep some of them.

    Args:
        ask: gives the task to clients and yields their replies.
        cohort: the clients of the round.
        task: what they are asked.
    """
    arrived: dict[str, Reply] = {}
    left_out = dict.fromkeys(cohort, "it did not answer")
    reached, duration = len(cohort), 0.0
    # Features as they are have as many dimensions as the model or the proxy makes them.
    width = None if task.selection.space == "none" else task.selection.dimensions
    for reply in ask(cohort, task):
        reached, duration = reached - (not reply.reached), max(duration, reply.seconds)
        try:
            width = check_survey(reply, task, cohort, arrived, width)
        except UpdateRejected as reason:
            if reply.client not in arrived:  # what came first counts, whatever comes after it
                left_out[reply.client] = str(reason)
            continue
        arrived[reply.client] = reply
        left_out.pop(reply.client)
    # The order of the cohort, not of arrival, so that the same centroids make the same groups.
    centroids = {c: arrived[c].survey.centroids_Cd for c in cohort if c in arrived}  # type: ignore[union-attr]
    settings = task.selection
    least = settings.min_group_centroids
    found = keep(centroids, least, lone=settings.keep_lone, min_samples=settings.min_samples(least))
    sent_down = adapter_bytes(task.adapter.tensors) * reached if settings.features == "model" else 0
    record = SurveyRecord(
        {c: tuple(tuple(point) for point in points.astype(float).tolist()) for c, points in centroids.items()},
        {c: tuple(groups) for c, groups in found.groups.items()},
        {c: tuple(numbers) for c, numbers in found.numbers.items()},
        sent_down + NUMBER_BYTES * sum(map(len, found.numbers.values())),
        sum(int(np.asarray(points).nbytes) for points in centroids.values()),
    )
    return Surveyed(found.numbers, left_out, record, duration)
