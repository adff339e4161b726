"""What clients will do in a pass, drawn before it begins: steps, the rows of each, and the pieces that these run in."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bellwether.client.batches import local_steps, poisson_steps
from bellwether.client.objective import Objective, Reference
from bellwether.client.score import answer_losses
from bellwether.data.rows import TokenRow
from bellwether.exchange.adapter import Arrays
from bellwether.exchange.codec import encode_task
from bellwether.exchange.messages import EXAMPLES, TrainTask
from bellwether.method.schedule import learning_rate
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers
from bellwether.tools.progress import REFERENCE
from bellwether.tools.randomness import secret_draw


@dataclass(frozen=True)
class Client:
    """One client of those that are trained together.

    Args:
        name: its name.
        rows: those that it trains on.
        task: what it is asked.
        own: the arrays that it keeps.
        secret: what is drawn from where single rows are hidden; None draws from the seeds of the task.
    """

    name: str
    rows: Sequence[TokenRow]
    task: TrainTask
    own: Arrays
    secret: bytes | None = field(default=None, repr=False)

    def key(self, purpose: str) -> bytes:
        """Return what the client draws from, for a purpose, where single rows are hidden.

        Of a secret, and of all that the client is asked and answers by. So the same question is answered alike,
        however often it is asked, and asking again tells nothing new; and any other question gets noise that has
        nothing to do with it, whatever the gradients, since a difference of two answers with one noise would be one of
        gradients. Without a secret it is the seed that came with the task: a simulation repeats its noise, which hides
        nothing from those who know the run's seed.

        Args:
            purpose: one of those that have a seed in the task.
        """
        if self.secret is None:
            return self.task.draws.seeds[purpose].to_bytes(8, "big")
        # Which state is needed no more has no part in the answer.
        asked, task = hashlib.sha256(self.name.encode()), encode_task(replace(self.task, certain=0))
        for part in (*task, *_bytes_of(self.rows, self.own)):
            asked.update(len(part).to_bytes(8, "big") + part)
        return hmac.digest(self.secret, purpose.encode() + asked.digest(), hashlib.sha256)


def _bytes_of(rows: Sequence[TokenRow], own: Arrays) -> Iterator[bytes]:
    """Yield all that a client answers by beside the question."""
    for row in rows:
        for answer in row.answers:
            yield from (answer.ids_T.tobytes(), answer.trained_T.tobytes())
    for name, array in sorted(own.items()):
        yield from (name.encode(), array.tobytes())


@dataclass(frozen=True)
class Plan:
    """All that a client will do in a pass, drawn before it begins.

    Args:
        client: whose it is.
        steps: per optimizer step its batches, per batch row numbers.
        seeds: a number for each of these rows, from which its dropout derives; both answers of a row are dropped alike.
        rates: the learning rate of each step.
        references: by row number what the loss compares with, where it does.
    """

    client: Client
    steps: Sequence[Sequence[Sequence[int]]]
    seeds: Sequence[Sequence[Sequence[int]]]
    rates: Sequence[float]
    references: Mapping[int, Reference] = field(default_factory=dict)

    @property
    def rows(self) -> Sequence[TokenRow]:
        """The client's rows."""
        return self.client.rows


@dataclass(frozen=True)
class Used:
    """One row of one client's step, as it stands in a piece."""

    slot: int
    row: TokenRow
    seed: int
    reference: Reference


def plan_passes(base: Base, layers: LoraLayers, client: Client, passes: int, objective: Objective) -> list[Plan]:
    """Return all that a client will do, pass by pass.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it, which are set aside where a loss compares with the base.
        client: who will do it.
        passes: how many passes it goes through.
        objective: what is minimised.
    """
    plans = [planned(client, part) for part in range(passes)]
    return with_references(base, layers, plans) if objective.referenced else plans


def planned(client: Client, part: int) -> Plan:
    """Draw a client's steps and the numbers that its dropout derives from.

    Args:
        client: whose they are.
        part: the pass, from 0 on.
    """
    task = client.task
    if task.privacy.hides_rows:
        # What is dropped is drawn from there as well: a row may not change what is dropped of others.
        draws = secret_draw(client.key(EXAMPLES), str(part).encode())
        steps = poisson_steps(len(client.rows), task.training, draws)
    else:
        lengths = [row.longest for row in client.rows]
        steps = local_steps(lengths, task.training, task.draws.numpy("batch order", part))
        draws = task.draws.numpy("dropout", part)
    seeds = [[draws.integers(-(2**63), 2**63, len(batch)).tolist() for batch in step] for step in steps]
    rates = [learning_rate(task.training, task.round, task.rounds, n, len(steps)) for n in range(len(steps))]
    return Plan(client, steps, seeds, rates)


def with_references(base: Base, layers: LoraLayers, plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans of a client's passes, with what the untuned base makes of all rows that they use.

    It is computed once for all passes and epochs of a task, without dropout and without gradients, in batches of as
    many rows as are trained at once, for each client by itself, so that it does not depend on who trains beside it.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it, which are set aside.
        plans: of all passes of one client.
    """
    client = plans[0].client
    used = sorted({number for plan in plans for step in plan.steps for batch in step for number in batch})
    rows = [client.rows[number] for number in used]
    with layers.disabled():
        losses = answer_losses(base, layers, rows, client.task.training.batch_size, REFERENCE)
    references = {number: [-loss for loss in losses_of_row] for number, losses_of_row in zip(used, losses, strict=True)}
    return [replace(plan, references=references) for plan in plans]


def tokens_of(plan: Plan) -> int:
    """Return the tokens of all rows that a client goes through, repetitions counted."""
    return sum(plan.rows[index].tokens for step in plan.steps for batch in step for index in batch)


def counted(plan: Plan, number: int, objective: Objective) -> int:
    """Return over how many losses the mean of one of a client's steps is.

    Args:
        plan: the client's.
        number: of the step, from 0 on.
        objective: says how many losses a row has.
    """
    return sum(objective.count(plan.rows[index]) for batch in plan.steps[number] for index in batch)


def pieces(plans: Sequence[Plan], number: int, tokens: int | None) -> Iterator[list[Used]]:
    """Yield the rows of all clients' next steps in pieces that run through the base at once.

    Rows of like length share a piece of at most ``tokens`` tokens with its padding, or of one row; without a limit, a
    piece is one batch of one client. Both answers of a row are in the same piece.

    Args:
        plans: of the clients, in the order of their slots.
        number: of the step, from 0 on.
        tokens: most tokens of a piece; None takes the clients' own batches.
    """
    batches = [
        [
            Used(slot, plan.rows[index], seed, plan.references.get(index, ()))
            for index, seed in zip(batch, seeds, strict=True)
        ]
        for slot, plan in enumerate(plans)
        for batch, seeds in zip(plan.steps[number], plan.seeds[number], strict=True)
    ]
    if tokens is None:
        yield from batches
        return
    piece: list[Used] = []
    for used in sorted((used for batch in batches for used in batch), key=lambda used: -used.row.longest):
        answers = sum(len(one.row.answers) for one in (*piece, used))
        if piece and piece[0].row.longest * answers > tokens:
            yield sorted(piece, key=lambda used: used.slot)  # so that few slots stand beside each other
            piece = []
        piece.append(used)
    yield sorted(piece, key=lambda used: used.slot)
