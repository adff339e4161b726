"""What travels between the server and its clients: tasks downwards, replies upwards.

The engines deliver these; the clients and the round loop read and write them. Nothing here holds
a row of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from bellwether.exchange.adapter import Adapter, Tensors
from bellwether.exchange.scores import Totals
from bellwether.recipe.recipe import Evaluation, Selection, Training


@dataclass(frozen=True)
class TrainTask:
    """Ask clients to train the adapter on their own rows.

    Args:
        round: the round, counted from 1.
        adapter: the adapter to start from.
        training: the recipe's training section.
        rounds: rounds of the whole run, over which the learning rate follows its schedule.
        seed: the seed of the run, from which the client derives its own draws.
        deadline: seconds after which a reply is of no use; None waits for all.
        selection: the recipe's selection section, which of their rows they shall train on.
        kept: for each client the clusters of its survey that the server kept; empty where there was no survey.
    """

    round: int
    adapter: Adapter
    training: Training
    rounds: int
    seed: int
    deadline: float | None = None
    selection: Selection = field(default_factory=Selection)
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class SurveyTask:
    """Ask clients for the centroids of their rows' clusters, and to remember these for the training of the round.

    Args:
        round: the round, counted from 1.
        adapter: the adapter whose hidden states stand for the rows; None where a proxy's do.
        selection: the recipe's selection section.
        seed: the seed of the run, from which the shared projection and the client's own draws derive.
    """

    round: int
    adapter: Adapter | None
    selection: Selection
    seed: int


@dataclass(frozen=True)
class EvaluateTask:
    """Ask clients to score the adapter on the rows that they hold out.

    Args:
        round: the round whose result is scored; 0 before the first.
        adapter: the adapter to score.
        evaluation: the recipe's evaluation section.
    """

    round: int
    adapter: Adapter
    evaluation: Evaluation


Task = TrainTask | SurveyTask | EvaluateTask


@dataclass(frozen=True)
class Update:
    """What one client sends back after training.

    Args:
        client: the client's name.
        round: the round it trained for.
        tensors: its trained tensors, under the keys of the adapter.
        rows: how many rows it has to train on, the weight of its update in FedAvg; where rows are selected, those
            selected or all of them, as the recipe says.
        metrics: named figures: ``loss`` (per trained token, in nats where it is the cross-entropy), ``tokens`` and
            ``rows`` (as trained, repetitions counted), ``selected`` (how many of its rows it trained on).
        extras: named arrays beside the adapter, for methods that need them.
    """

    client: str
    round: int
    tensors: Tensors
    rows: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Survey:
    """What one client tells of its rows: where their clusters lie, and nothing else.

    Args:
        client: the client's name.
        round: the round it answers for.
        centroids_Cd: a float32 point for each of its C clusters that may leave it, in d dimensions; C may be 0.
    """

    client: str
    round: int
    centroids_Cd: NDArray[Any]


@dataclass(frozen=True)
class Reply:
    """A client's answer to a task: an update, a survey, scores, or the reason why there is none of these.

    Args:
        client: the client that was asked.
        seconds: how long the client took; simulated seconds where speed is simulated.
        update: its update, after a ``TrainTask``.
        survey: its centroids, after a ``SurveyTask``.
        totals: its totals by category, after an ``EvaluateTask``.
        failure: why there is no result, in one clause.
        reached: whether the task came to the client at all.
        groups: its totals by group (language or domain), after an ``EvaluateTask``.
        losses: mean loss of each of its optimizer steps, per trained token, after a ``TrainTask``;
            for those who hold the rows, it is not sent.
    """

    client: str
    seconds: float
    update: Update | None = None
    totals: Mapping[str, Totals] | None = None
    failure: str | None = None
    reached: bool = True
    groups: Mapping[str, Totals] = field(default_factory=dict)
    losses: Sequence[float] = ()
    survey: Survey | None = None
