"""The local engine: a whole federation in one process, over one resident base model."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from bellwether.client.choose import Chooser
from bellwether.client.masking import as_masked, take_part
from bellwether.client.score import by_category, by_group, score
from bellwether.client.train import recalled, train_chosen
from bellwether.data.rows import TokenRow
from bellwether.errors import UpdateRejected
from bellwether.exchange.messages import EvaluateTask, Reply, SecureTask, SurveyTask, Task, TrainTask
from bellwether.method.method import Method
from bellwether.method.returned import served
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers


class LocalEngine:
    """Delivers tasks to simulated clients that share one frozen base.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it.
        rows: training rows by client.
        held_out: rows that clients hold out of their own, by client; may be empty.
        method: what clients do, and which adapter they serve.
        stop: token ids and texts that end an answer beside the model's own.
        tokens: tokens that run through the base at once where the layers have several slots.
        folders: each client's own folder, for what it remembers of its rows and keeps for the method.
        public: rows of public text that the space of a selection is fitted on.
        secret: what noise on centroids and gradients is drawn from; None draws it, and the secrets of secure
            aggregation, from the seeds that a task brings, which hides nothing from those who know the run's seed.
    """

    def __init__(
        self,
        base: Base,
        layers: LoraLayers,
        rows: Mapping[str, Sequence[TokenRow]],
        held_out: Mapping[str, Sequence[TokenRow]],
        method: Method,
        stop: Collection[int | str] = (),
        tokens: int | None = None,
        folders: Mapping[str, Path] = MappingProxyType({}),
        public: Sequence[TokenRow] = (),
        secret: bytes | None = None,
    ) -> None:
        self._base, self._layers = base, layers
        self._rows, self._held_out, self._method, self._folders = rows, held_out, method, folders
        self._chooser = Chooser(base, layers, folders, public, secret)
        self._stop, self._tokens, self._secret = stop, tokens, secret

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Give every client its task; yield the replies as they come.

        Args:
            tasks: what each client is asked, all of one kind.
            deadline: has no effect, since one process has no clock for each of its clients: ``UnevenClients`` has.

        Yields:
            One reply per client, clients of one rank after the other; those that cannot choose rows to train on come
            first.
        """
        train = {client: task for client, task in tasks.items() if isinstance(task, TrainTask)}
        rows = {client: self._rows[client] for client in train}
        method = next((self._method.of_round(task.round, task.rounds) for task in train.values()), self._method)
        trainers = (self._base, self._layers, rows, train, method, self._tokens, self._folders, self._secret)
        for reply in train_chosen(self._chooser.choose, *trainers):
            masked = train[reply.client].masking is not None
            yield as_masked(reply, train[reply.client], method, self._folders[reply.client]) if masked else reply
        for client, task in tasks.items():
            if isinstance(task, SurveyTask):
                yield self._chooser.survey(client, self._rows[client], task)
            elif isinstance(task, EvaluateTask):
                yield self._evaluate(client, task)
            elif isinstance(task, SecureTask):
                yield self._take_part(client, task)

    def _take_part(self, client: str, task: SecureTask) -> Reply:
        """Let a client take a step of secure aggregation."""
        start = time.perf_counter()
        try:
            secured = take_part(client, task, self._folders[client], real=self._secret is not None)
        except UpdateRejected as reason:
            return Reply(client, time.perf_counter() - start, failure=str(reason))
        return Reply(client, time.perf_counter() - start, secured=secured)

    def _evaluate(self, client: str, task: EvaluateTask) -> Reply:
        """Let a client score the adapter that it serves, or that all share, on the rows that it holds out itself."""
        start = time.perf_counter()
        payload, rows = task.payload, self._held_out[client]
        kept = {} if task.shared else recalled(self._folders, client, task.settled)
        adapter = payload.adapter if task.shared else served(self._method, payload, kept)
        self._layers.fit(adapter.config)
        self._layers.load(0, adapter.tensors)
        with self._layers.folded(payload.folded):
            scored = score(self._base, self._layers, rows, task.evaluation, self._stop)
        totals, groups = by_category(rows, scored), by_group(rows, scored)
        return Reply(client, time.perf_counter() - start, totals=totals, groups=groups)
