"""The local engine: a whole federation in one process, over one resident base model."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from bellwether.client.score import by_category, by_group, score
from bellwether.client.train import train_cohort
from bellwether.cohort import Trace
from bellwether.data.rows import TokenRow
from bellwether.messages import EvaluateTask, Reply, Task, TrainTask
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers


class LocalEngine:
    """Delivers tasks to simulated clients that share one frozen base.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it.
        rows: training rows by client.
        held_out: rows that clients hold out of their own, by client; may be empty.
        stop: token ids that end an answer beside the model's own.
        tokens: tokens that run through the base at once where the layers have several slots.
        trace: simulated resources; None makes every client available and as fast as this machine.
    """

    def __init__(
        self,
        base: Base,
        layers: LoraLayers,
        rows: Mapping[str, Sequence[TokenRow]],
        held_out: Mapping[str, Sequence[TokenRow]],
        stop: Collection[int] = (),
        tokens: int | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._base, self._layers = base, layers
        self._rows, self._held_out = rows, held_out
        self._stop, self._tokens, self._trace = stop, tokens, trace

    def ask(self, cohort: Sequence[str], task: Task) -> Iterator[Reply]:
        """Give a task to every client of a cohort; yield their replies as they come.

        Args:
            cohort: names of clients.
            task: what they shall do.

        Yields:
            At most one reply per client.
        """
        if isinstance(task, TrainTask):
            yield from self._train(cohort, task)
        else:
            yield from self._evaluate(cohort, task)

    def _train(self, cohort: Sequence[str], task: TrainTask) -> Iterator[Reply]:
        """Train those clients whose simulated resources let them finish; the others' replies say why not."""
        fates = {client: self._fate(client, task) for client in cohort}
        yield from (fate for fate in fates.values() if fate.failure is not None)
        able = {client: self._rows[client] for client in cohort if fates[client].failure is None}
        for reply in train_cohort(self._base, self._layers, able, task, self._tokens):
            yield reply if self._trace is None else replace(reply, seconds=fates[reply.client].seconds)

    def _fate(self, client: str, task: TrainTask) -> Reply:
        """Return the reply of a client that will not answer in time, or else one with its simulated seconds only."""
        if self._trace is None:
            return Reply(client, 0.0)
        condition = self._trace(client, task.round)
        if not condition.available:
            return Reply(client, 0.0, failure="it is away", reached=False)
        seconds = rows_to_train(len(self._rows[client]), task) / condition.rows_per_second
        if condition.drops_out:
            return Reply(client, seconds, failure="it dropped out in mid-round")
        if task.deadline is not None and seconds > task.deadline:
            late = f"it would need {seconds:.1f} s, and the deadline is {task.deadline:g} s"
            return Reply(client, seconds, failure=late)
        return Reply(client, seconds)

    def _evaluate(self, cohort: Sequence[str], task: EvaluateTask) -> Iterator[Reply]:
        """Let clients score the rows that they hold out themselves."""
        self._layers.load(0, task.adapter.tensors)
        for client in cohort:
            start = time.perf_counter()
            rows = self._held_out[client]
            scored = score(self._base, self._layers, rows, task.evaluation, self._stop)
            totals, groups = by_category(rows, scored), by_group(rows, scored)
            yield Reply(client, time.perf_counter() - start, totals=totals, groups=groups)


def rows_to_train(rows: int, task: TrainTask) -> int:
    """Return how many rows a client will go through in a round, repetitions counted."""
    training = task.training
    if training.local_steps is None:
        return rows * training.local_epochs
    return min(rows, training.batch_size) * training.accumulation * training.local_steps
