"""The survey before a round's training, on the server's side: ask for centroids, check them, keep one of each group.

FedHDS (Qin et al. 2024, arXiv 2410.10926). Of a client's rows nothing but centroids arrives here; which rows stand
nearest to them, only the client knows.

Shape legend: C centroids of a client, d dimensions of the space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from bellwether.errors import UpdateRejected
from bellwether.exchange.checks import adapter_bytes, check_survey
from bellwether.exchange.messages import Reply, SurveyTask
from bellwether.exchange.records import RoundRecord, SurveyRecord
from bellwether.method.select.groups import keep

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
    ask: Callable[[Sequence[str], SurveyTask], Iterator[Reply]], cohort: Sequence[str], task: SurveyTask
) -> Surveyed:
    """Ask a cohort for its centroids and keep some of them.

    Args:
        ask: gives the task to clients and yields their replies.
        cohort: the clients of the round.
        task: what they are asked.
    """
    settings = task.selection
    replies = list(ask(cohort, task))
    reached = len(cohort) - sum(not reply.reached for reply in replies)
    duration = max((reply.seconds for reply in replies), default=0.0)
    arrived: dict[str, NDArray[Any]] = {}
    left_out = dict.fromkeys(cohort, "it did not answer")
    width = _most_frequent_width(replies) if settings.space == "none" else settings.dimensions
    for reply in replies:
        try:
            found_Cd = check_survey(reply, task, cohort, arrived, width)
        except UpdateRejected as reason:
            if reply.client not in arrived:  # what came first counts, whatever comes after it
                left_out[reply.client] = str(reason)
            continue
        arrived[reply.client] = found_Cd
        left_out.pop(reply.client)
    # The order of the cohort, not of arrival, so that the same centroids make the same groups.
    centroids = {client: arrived[client] for client in cohort if client in arrived}
    least = settings.min_group_centroids
    found = keep(centroids, least, lone=settings.keep_lone, min_samples=settings.min_samples(least))
    sent_down = 0 if task.adapter is None else adapter_bytes(task.adapter.tensors) * reached
    record = SurveyRecord(
        {c: tuple(tuple(point) for point in points.astype(float).tolist()) for c, points in centroids.items()},
        {c: tuple(groups) for c, groups in found.groups.items()},
        {c: tuple(numbers) for c, numbers in found.numbers.items()},
        sent_down + NUMBER_BYTES * sum(map(len, found.numbers.values())),
        _sent(replies),
    )
    return Surveyed(found.numbers, left_out, record, duration)


def _sent(replies: Sequence[Reply]) -> dict[str, int]:
    """Return the bytes of each client's first centroids, also where they were refused: they have left it.

    Clients stand in the order of their names, since they answer in any order.
    """
    found: dict[str, int] = {}
    for reply in replies:
        if reply.survey is not None:
            found.setdefault(reply.client, int(getattr(reply.survey.centroids_Cd, "nbytes", 0)))
    return dict(sorted(found.items()))


def _most_frequent_width(replies: Sequence[Reply]) -> int | None:
    """Return how many dimensions most clients' centroids have, so that one wrong client does not shut out the others.

    Features as they are have as many as the model or the proxy makes them.
    """
    arrays = [reply.survey.centroids_Cd for reply in replies if reply.survey is not None]
    widths = Counter(array.shape[1] for array in arrays if getattr(array, "ndim", 0) == 2 and len(array))
    return widths.most_common(1)[0][0] if widths else None
