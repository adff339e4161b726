"""The survey before a round's training, on the server's side: ask for centroids, check them, keep one of each group.

FedHDS (Qin et al. 2024, arXiv 2410.10926). Of a client's rows nothing but centroids arrives here; which rows stand
nearest to them, only the client knows.

Shape legend: C centroids of a client, d dimensions of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import UpdateRejected
from bellwether.exchange.checks import check_seconds, check_survey
from bellwether.exchange.messages import Reply, SurveyTask
from bellwether.exchange.records import RoundRecord, SurveyRecord
from bellwether.exchange.sizes import task_bytes
from bellwether.method.select.groups import keep
from bellwether.recipe.recipe import Selection
from bellwether.tools.progress import advance

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

    def added_to(self, record: RoundRecord) -> RoundRecord:
        """Return a round's record with its survey, and with the bytes and seconds of it."""
        return replace(
            record,
            survey=self.record,
            bytes_down=record.bytes_down + self.record.bytes_down,
            bytes_up=record.bytes_up + self.record.bytes_up,
            duration=record.duration + self.duration,
        )


def survey(
    ask: Callable[[Mapping[str, SurveyTask]], Iterator[Reply]],
    tasks: Mapping[str, SurveyTask],
    settings: Selection,
    round: int,
    width: int,
) -> Surveyed:
    """Ask a cohort for its centroids and keep some of them.

    Args:
        ask: gives clients their tasks and yields their replies.
        tasks: what each client of the cohort is asked, in the order of the cohort.
        settings: the recipe's selection section.
        round: the round, counted from 1.
        width: how many dimensions the space has.
    """
    replies = list(ask(tasks))
    arrived: dict[str, NDArray[Any]] = {}
    left_out = dict.fromkeys(tasks, "it did not answer")
    duration = 0.0
    for reply in replies:
        if reply.client not in tasks or reply.client in arrived:  # what came first counts, whatever comes after it
            continue
        try:
            check_seconds(reply, None)
            duration = max(duration, reply.seconds)
            arrived[reply.client] = check_survey(reply, round, width)
        except UpdateRejected as reason:
            left_out[reply.client] = str(reason)
            continue
        left_out.pop(reply.client)
    # The order of the cohort, not of arrival, so that the same centroids make the same groups.
    centroids = {client: arrived[client] for client in tasks if client in arrived}
    least = settings.min_group_centroids
    advance("grouping centroids")
    found = keep(centroids, least, lone=settings.keep_lone, min_samples=settings.min_samples(least))
    heard = {reply.client: reply for reply in reversed(replies)}
    sent_down = sum(task_bytes(task, heard.get(client, Reply(client, 0.0))) for client, task in tasks.items())
    # Where messages travel, the answers are part of the tasks to train.
    answers = 0 if any(reply.bytes_down is not None for reply in replies) else sum(map(len, found.numbers.values()))
    record = SurveyRecord(
        {c: tuple(tuple(point) for point in points.astype(float).tolist()) for c, points in centroids.items()},
        {c: tuple(groups) for c, groups in found.groups.items()},
        {c: tuple(numbers) for c, numbers in found.numbers.items()},
        sent_down + NUMBER_BYTES * answers,
        _sent(replies, tasks),
    )
    return Surveyed(found.numbers, left_out, record, duration)


def _sent(replies: Sequence[Reply], asked: Collection[str]) -> dict[str, int]:
    """Return the bytes of each client's first answer or its centroids, also where they were refused: they have left it.

    Clients stand in the order of their names, since they answer in any order.
    """
    found: dict[str, int] = {}
    for reply in replies:
        points = getattr(reply.survey, "centroids_Cd", None)
        if reply.client in asked and isinstance(points, np.ndarray):
            found.setdefault(reply.client, int(points.nbytes) if reply.bytes_up is None else reply.bytes_up)
    return dict(sorted(found.items()))
