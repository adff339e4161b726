"""Tasks for tests: what a client is asked, drawn from a seed as the round loop does it."""

from __future__ import annotations

from bellwether.client.train import train_cohort
from bellwether.exchange.messages import EvaluateTask, Payload, SurveyTask, TrainTask, client_draws
from bellwether.method.average import fedavg
from bellwether.recipe.recipe import Selection
from bellwether.tools.randomness import Randomness


def train_task(adapter, training, client="a", *, round=1, rounds=1, seed=0, **more):
    """What one client is asked; ``more`` goes to the task."""
    draws = client_draws(Randomness(seed), round, client)
    payload = adapter if isinstance(adapter, Payload) else Payload(adapter)
    return TrainTask(round, payload, training, rounds, draws, **more)


def train_tasks(clients, adapter, training, **more):
    """What each of several clients is asked, alike but for what it draws."""
    return {client: train_task(adapter, training, client, **more) for client in clients}


def survey_tasks(clients, adapter, selection=None, *, round=1, seed=0):
    """What each of several clients is asked in a survey."""
    chosen = selection or Selection()
    payload = adapter if isinstance(adapter, Payload | None) else Payload(adapter)
    return {
        client: SurveyTask(round, payload, chosen, client_draws(Randomness(seed), round, client)) for client in clients
    }


def evaluate_tasks(clients, adapter, evaluation, *, round=1):
    """What each of several clients is asked to score."""
    return dict.fromkeys(clients, EvaluateTask(round, Payload(adapter), evaluation))


def train(base, layers, cohort, adapter, training, tokens=None, method=None, **more):
    """The replies of clients that train from an adapter; ``more`` goes to their tasks."""
    tasks = train_tasks(cohort, adapter, training, **more)
    return list(train_cohort(base, layers, cohort, tasks, method or fedavg(), tokens))
