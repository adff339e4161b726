"""Simulated resources, over any engine: which clients are away, drop out, or are too slow for the deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from bellwether.data.rows import TokenRow
from bellwether.exchange.messages import EvaluateTask, Reply, Task, TrainTask
from bellwether.method.cohort import Trace
from bellwether.method.select.budget import budget
from bellwether.recipe.recipe import Selection

Ask = Callable[[Mapping[str, Task], float | None], Iterator[Reply]]


class UnevenClients:
    """Delivers tasks to simulated clients that are not always there nor equally fast.

    Args:
        ask: gives tasks to clients that are there and fast: the ``ask`` of another engine.
        rows: training rows by client.
        trace: each client's resources by round.
        passes: how often the method lets a client go through its training in a round, of the task.
    """

    def __init__(
        self,
        ask: Ask,
        rows: Mapping[str, Sequence[TokenRow]],
        trace: Trace,
        passes: Callable[[TrainTask], int] = lambda task: 1,
    ) -> None:
        self._ask, self._rows, self._trace, self._passes = ask, rows, trace, passes

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Let those clients train whose resources let them finish; the others' replies say why not.

        Args:
            tasks: what each client is asked; every client can evaluate at any time, and those that are there answer a
                survey and take the steps of secure aggregation, which takes them no simulated time.
            deadline: simulated seconds after which nobody is waited for; None waits.

        Yields:
            One reply per client, those of the others first; seconds of training are simulated ones.
        """
        fates = {client: self._fate(client, task, deadline) for client, task in tasks.items()}
        yield from (fate for fate in fates.values() if fate is not None and fate.failure is not None)
        able = {client: task for client, task in tasks.items() if (fate := fates[client]) is None or not fate.failure}
        for reply in self._ask(able, deadline) if able else ():
            fate = fates[reply.client]
            yield reply if fate is None else replace(reply, seconds=fate.seconds)

    def _fate(self, client: str, task: Task, deadline: float | None) -> Reply | None:
        """Return the reply of a client that will not answer in time, or else one with its simulated seconds only."""
        if isinstance(task, EvaluateTask):
            return None
        condition = self._trace(client, task.round)
        if not condition.available:
            return Reply(client, 0.0, failure="it is away", reached=False)
        if not isinstance(task, TrainTask):
            return Reply(client, 0.0)
        rows = selected_rows(len(self._rows[client]), len(task.kept or ()), task.selection)
        seconds = self._passes(task) * rows_to_train(rows, task) / condition.rows_per_second
        if condition.drops_out:
            return Reply(client, seconds, failure="it dropped out in mid-round")
        if deadline is not None and seconds > deadline:
            late = f"it would need {seconds:.1f} s, and the deadline is {deadline:g} s"
            return Reply(client, seconds, failure=late)
        return Reply(client, seconds)


def selected_rows(rows: int, clusters: int, selection: Selection) -> int:
    """Return how many of a client's rows it will train on, at most.

    Args:
        rows: how many it has.
        clusters: how many of its clusters the server kept.
        selection: the recipe's selection section.
    """
    if selection.method == "full":
        return rows
    return budget(rows, selection) or min(rows, clusters * selection.rows_per_cluster)


def rows_to_train(rows: int, task: TrainTask) -> int:
    """Return how many of so many rows a client will go through in one pass of a round, repetitions counted."""
    training = task.training
    if training.local_steps is None:
        return rows * training.local_epochs
    return min(rows, training.batch_size) * training.accumulation * training.local_steps
