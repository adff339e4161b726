"""The local engine: a whole federation in one process, over one resident base model."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from bellwether.client.choose import Chooser
from bellwether.client.score import by_category, by_group, score
from bellwether.client.train import train_chosen
from bellwether.data.rows import TokenRow
from bellwether.exchange.messages import EvaluateTask, Reply, SurveyTask, Task, TrainTask
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
        folders: each client's own folder, for what it remembers where rows are selected.
        public: rows of public text that the space of a selection is fitted on.
    """

    def __init__(
        self,
        base: Base,
        layers: LoraLayers,
        rows: Mapping[str, Sequence[TokenRow]],
        held_out: Mapping[str, Sequence[TokenRow]],
        stop: Collection[int] = (),
        tokens: int | None = None,
        folders: Mapping[str, Path] = MappingProxyType({}),
        public: Sequence[TokenRow] = (),
    ) -> None:
        self._base, self._layers = base, layers
        self._rows, self._held_out = rows, held_out
        self._chooser = Chooser(base, layers, folders, public)
        self._stop, self._tokens = stop, tokens

    def ask(self, cohort: Sequence[str], task: Task) -> Iterator[Reply]:
        """Give a task to every client of a cohort; yield their replies as they come.

        Args:
            cohort: names of clients.
            task: what they shall do.

        Yields:
            One reply per client, in the order of the cohort; those that cannot choose rows to train on come first.
        """
        match task:
            case TrainTask():
                rows = {client: self._rows[client] for client in cohort}
                yield from train_chosen(self._chooser.choose, self._base, self._layers, rows, task, self._tokens)
            case SurveyTask():
                yield from (self._chooser.survey(client, self._rows[client], task) for client in cohort)
            case EvaluateTask():
                yield from self._evaluate(cohort, task)

    def _evaluate(self, cohort: Sequence[str], task: EvaluateTask) -> Iterator[Reply]:
        """Let clients score the rows that they hold out themselves."""
        self._layers.load(0, task.adapter.tensors)
        for client in cohort:
            start = time.perf_counter()
            rows = self._held_out[client]
            scored = score(self._base, self._layers, rows, task.evaluation, self._stop)
            totals, groups = by_category(rows, scored), by_group(rows, scored)
            yield Reply(client, time.perf_counter() - start, totals=totals, groups=groups)
