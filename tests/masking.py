"""A federation with secure aggregation for tests: clients that mask in earnest, and fall away when a test says so."""

from __future__ import annotations

from test_federate import AddingEngine, federation

from bellwether.client.masking import as_masked, take_part
from bellwether.errors import UpdateRejected
from bellwether.exchange.messages import AnnounceTask, Reply, ShareTask, TrainTask, UnmaskTask
from bellwether.method.average import fedavg

ANNOUNCE, SHARE, TRAIN, UNMASK = "announce", "share", "train", "unmask"
STEPS = {AnnounceTask: ANNOUNCE, ShareTask: SHARE, TrainTask: TRAIN, UnmaskTask: UNMASK}
CLIENTS = tuple("abcde")


class MaskingEngine(AddingEngine):
    """Clients that add a number of their own to every value, and mask it.

    ``faults`` takes (step, client) to what makes replies of a reply; ``seen`` holds all replies of each step.
    """

    def __init__(self, folder, faults=None, method=None, real=False, inner=None):
        super().__init__()
        self.folder, self.wrong, self.method = folder, faults or {}, method or fedavg()
        self.real, self.inner = real, inner or AddingEngine()
        self.seen = {step: {} for step in STEPS.values()}

    def ask(self, tasks, deadline=None):
        self.tasks.append(dict(tasks))
        for client, task in tasks.items():
            if type(task) not in STEPS:
                yield from self.inner.ask({client: task})
                continue
            step = STEPS[type(task)]
            reply = self.reply(client, task)
            self.seen[step][client] = reply
            yield from self.wrong.get((step, client), lambda reply: [reply])(reply)

    def reply(self, client, task):
        folder = self.folder / client
        if isinstance(task, TrainTask):
            (reply,) = self.inner.ask({client: task})
            return as_masked(reply, task, self.method, folder)
        try:
            return Reply(client, 0.5, secured=take_part(client, task, folder, real=self.real))
        except UpdateRejected as reason:
            return Reply(client, 0.5, failure=str(reason))


def gone(reply):
    """A client that has fallen away before it answered."""
    return []


def secured(*words, engine, **more):
    """A federation whose updates are masked."""
    words = ("secure_aggregation.enabled=true", "federation.rounds=1", *words)
    return federation(*words, engine=engine, method=engine.method, **more)
