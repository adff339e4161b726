"""Secure aggregation on the server's side: relay keys and shares, add masked updates up, take the masks off the sum.

Bonawitz et al. 2017 (CCS, figure 4); ``bellwether.client.masking`` has the clients' side and what deviates. Before the
training of a round the cohort announces keys and deals shares of its secrets; after it, whoever sent a masked update
opens a share of each secret that is needed. A client may fall away between any two steps: as long as ``needed`` of the
cohort, more than half, are there to the end, the sum of those whose masked updates came is read, exactly as it is in
the ring (``exchange.ring``). Of fewer, nothing is.

Shape legend: P values of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from bellwether.errors import UpdateRejected
from bellwether.exchange.checks import Shapes, check_seconds
from bellwether.exchange.masks import KEY, needed_of, numbers_of, own_mask, pair_mask, pledge_of, public_key
from bellwether.exchange.messages import (
    MASKED,
    SECRETS,
    Announced,
    AnnounceTask,
    Dealt,
    Masking,
    Payload,
    Reply,
    Revealed,
    SecureTask,
    ShareTask,
    TrainTask,
    UnmaskTask,
    Update,
)
from bellwether.exchange.records import RoundRecord, SecureRecord
from bellwether.exchange.ring import Ring, from_vector, out_of_ring, scale_of
from bellwether.exchange.secure_checks import (
    check_announced,
    check_dealt,
    check_revealed,
    named_bytes,
    secured_bytes,
    task_bytes_of,
)
from bellwether.method.method import Mean, mean_of
from bellwether.recipe.recipe import Recipe
from bellwether.recipe.secure import LEAST_COHORT
from bellwether.tools.randomness import Draws, Randomness
from bellwether.tools.shamir import factors_of, secret_of
from bellwether.tools.words import counted

Ask = Callable[[Mapping[str, Any]], Iterator[Reply]]
T = TypeVar("T")


@dataclass(frozen=True)
class Agreed:
    """What a cohort has agreed on before it trains.

    Args:
        cohort: how many clients were asked.
        tasks: what each client is asked that dealt shares, with those that are for it.
        announced: what each client announced that did, by name.
        needed: how many must take part to the end.
        limits: the largest absolute value of an update, and the largest weight.
        left_out: client and reason of those that are not among ``tasks``.
        failure: why there can be no sum; None where there can.
        record: what is written of it.
        duration: how long the slowest clients took, in seconds.
    """

    cohort: int
    tasks: Mapping[str, TrainTask]
    announced: Mapping[str, Announced]
    needed: int
    limits: tuple[float, float]
    left_out: Mapping[str, str]
    failure: str | None
    record: SecureRecord
    duration: float

    def added_to(self, record: RoundRecord) -> RoundRecord:
        """Return a round's record with that of secure aggregation, and with the bytes and seconds of it."""
        return replace(
            record,
            secure=self.record,
            bytes_down=record.bytes_down + self.record.bytes_down,
            bytes_up=record.bytes_up + self.record.bytes_up,
            duration=record.duration + self.duration,
        )


@dataclass(frozen=True)
class _Step(Generic[T]):
    """What came of a step: answers that can be used, who gave none and why, bytes and seconds, and if all travelled."""

    answers: Mapping[str, T]
    left_out: Mapping[str, str]
    bytes_down: int
    bytes_up: int
    duration: float
    travelled: bool


def agree(ask: Ask, tasks: Mapping[str, TrainTask], round: int, recipe: Recipe) -> Agreed:
    """Let a cohort announce keys and deal shares, and return how its updates are to be masked.

    Args:
        ask: gives clients their tasks and yields their replies.
        tasks: what each client of the cohort will be asked to train.
        round: the round, counted from 1.
        recipe: the recipe.
    """
    settings, cohort = recipe.secure_aggregation, len(tasks)
    needed, limits = needed_of(cohort, settings.threshold), (settings.range, float(recipe.federation.max_rows))
    agreed = Agreed(cohort, {}, {}, needed, limits, {}, None, SecureRecord(needed, 0, 0, 0, 0, 0), 0.0)
    if cohort < LEAST_COHORT:
        return replace(agreed, failure=f"a cohort of {cohort} masks nothing, and {LEAST_COHORT} clients are needed")
    announced = _step(ask, _announcing(tasks, round, recipe), check_announced)
    keys = dict(sorted(announced.answers.items()))
    failure = _too_few("announced keys", keys, agreed, announced.left_out)
    questions = {client: ShareTask(round, keys) for client in tasks if client in keys and failure is None}
    dealt = _step(ask, questions, lambda reply: check_dealt(reply, keys.keys() - {reply.client}))
    left_out = {**announced.left_out, **dealt.left_out}
    failure = failure or _too_few("dealt shares", dealt.answers, agreed, left_out)
    masked = _masked_tasks(tasks, dealt.answers, recipe) if failure is None else {}
    # Where messages travel, the shares are part of the tasks to train.
    on_top = () if dealt.travelled else tuple(task.masking for task in masked.values() if task.masking is not None)
    shares = sum(named_bytes(masking.shares) for masking in on_top)
    down, up = announced.bytes_down + dealt.bytes_down + shares, announced.bytes_up + dealt.bytes_up
    record = SecureRecord(needed, len(keys), len(dealt.answers), 0, down, up)
    return Agreed(cohort, masked, keys, needed, limits, left_out, failure, record, announced.duration + dealt.duration)


def _announcing(tasks: Mapping[str, TrainTask], round: int, recipe: Recipe) -> dict[str, AnnounceTask]:
    """Return what each client of a cohort is asked first."""
    randomness, settings = Randomness(recipe.seed), recipe.secure_aggregation
    draws = {client: Draws({SECRETS: randomness.seed_for(SECRETS, round=round, client=client)}) for client in tasks}
    return {client: AnnounceTask(round, len(tasks), settings, draws[client]) for client in tasks}


def open_sum(agreed: Agreed, ask: Ask, updates: Sequence[Update]) -> tuple[Agreed, Ring | None]:
    """Let those whose masked updates came take the masks off their sum.

    Args:
        agreed: what the cohort agreed on.
        ask: gives clients their tasks and yields their replies.
        updates: the masked updates, one of each client.

    Returns:
        What the cohort has agreed on, with what it told now, or with why nothing can be read; and the sum_P in the
        ring, or None.
    """
    survivors, round = tuple(sorted(update.client for update in updates)), updates[0].round
    gone = sorted(agreed.tasks.keys() - set(survivors))
    failure = _too_few("sent masked updates", survivors, agreed, {})
    if failure is not None:
        return replace(agreed, failure=failure), None
    questions = dict.fromkeys(survivors, UnmaskTask(round, survivors))
    told = _step(ask, questions, lambda reply: check_revealed(reply, survivors, gone))
    record = agreed.record
    record = replace(
        record,
        opened=len(told.answers),
        bytes_down=record.bytes_down + told.bytes_down,
        bytes_up=record.bytes_up + told.bytes_up,
    )
    agreed = replace(agreed, record=record, duration=agreed.duration + told.duration)
    failure = _too_few("opened shares", told.answers, agreed, told.left_out)
    if failure is not None:
        return replace(agreed, failure=failure), None
    try:
        return agreed, _unmasked(agreed, {update.client: update.packed[MASKED] for update in updates}, told.answers)
    except UpdateRejected as reason:
        return replace(agreed, failure=str(reason)), None


def mean_of_sum(
    sum_P: Ring,
    agreed: Agreed,
    updates: Sequence[Update],
    weigh: Callable[[Update], float],
    begun: Mapping[str, Payload],
    returns: Shapes,
) -> Mean:
    """Return the weighted mean of updates of which only the sum of weighted changes is known, in float64.

    Args:
        sum_P: the sum in the ring.
        agreed: what the cohort agreed on.
        updates: who is in the sum, with rows and figures.
        weigh: the method's.
        begun: what each client was sent, to which its change is added.
        returns: the shapes of the arrays that come beside the tensors, by name.
    """
    without = [replace(update, tensors=begun[update.client].expected, arrays={}, packed={}) for update in updates]
    before = mean_of(without, weigh)
    scale = scale_of(agreed.limits[0] * agreed.limits[1], len(agreed.tasks))
    change, arrays = from_vector(out_of_ring(sum_P, scale) / before.weight, before.tensors, returns)
    return replace(before, tensors={key: value + change[key] for key, value in before.tensors.items()}, arrays=arrays)


def _unmasked(agreed: Agreed, masked: Mapping[str, Ring], told: Mapping[str, Revealed]) -> Ring:
    """Return the sum_P of updates, without their masks.

    Raises:
        UpdateRejected: shares do not give a secret that was announced.
    """
    numbers = numbers_of(agreed.announced)
    holders = sorted(told)[: agreed.needed]
    factors, size = factors_of([numbers[holder] for holder in holders]), len(next(iter(masked.values())))
    sum_P: Ring = np.sum(list(masked.values()), axis=0, dtype=np.uint64)
    for client in masked:
        seed = _secret({numbers[holder]: told[holder].seeds[client] for holder in holders}, factors)
        if pledge_of(seed) != agreed.announced[client].pledge:
            raise UpdateRejected(f"the shares that were opened do not give the mask of {client}")
        sum_P -= own_mask(seed, size)
    round = next(iter(agreed.tasks.values())).round
    for client in sorted(agreed.tasks.keys() - masked.keys()):
        key = _secret({numbers[holder]: told[holder].keys[client] for holder in holders}, factors)
        if public_key(key) != agreed.announced[client].masking:
            raise UpdateRejected(f"the shares that were opened do not give the masking key of {client}")
        for other in masked:  # what it would have added cancels what the others added for it
            sum_P += pair_mask(key, agreed.announced[other].masking, round, client, other, size)
    return sum_P


def _secret(shares: Mapping[int, bytes], factors: Mapping[int, int]) -> bytes:
    """Return the secret behind shares; of shares that belong to none, some bytes."""
    whole = secret_of({number: int.from_bytes(share, "big") for number, share in shares.items()}, factors)
    return (whole & ((1 << 8 * KEY) - 1)).to_bytes(KEY, "big")


def _masked_tasks(tasks: Mapping[str, TrainTask], dealt: Mapping[str, Dealt], recipe: Recipe) -> dict[str, TrainTask]:
    """Return the tasks of those that dealt shares, each with what the others sealed for it."""
    limits = recipe.federation.max_rows, recipe.federation.max_norm
    return {
        client: replace(
            task,
            masking=Masking(
                {one: dealt[one].shares[client] for one in tasks if one in dealt and one != client}, *limits
            ),
        )
        for client, task in tasks.items()
        if client in dealt
    }


def _step(ask: Ask, tasks: Mapping[str, SecureTask], check: Callable[[Reply], T]) -> _Step[T]:
    """Ask clients for a step, and check what comes; of a client what came first counts."""
    answers: dict[str, T] = {}
    left_out = dict.fromkeys(tasks, "it did not answer")
    heard: set[str] = set()
    down = up = 0
    duration, travelled = 0.0, False
    for reply in ask(tasks):
        if reply.client not in tasks or reply.client in heard:
            continue
        heard.add(reply.client)
        travelled |= reply.bytes_down is not None
        down += (
            (task_bytes_of(tasks[reply.client]) if reply.reached else 0)
            if reply.bytes_down is None
            else reply.bytes_down
        )
        up += secured_bytes(reply.secured) if reply.bytes_up is None else reply.bytes_up
        try:
            check_seconds(reply, None)
            duration = max(duration, reply.seconds)
            answers[reply.client] = check(reply)
        except UpdateRejected as reason:
            left_out[reply.client] = str(reason)
            continue
        left_out.pop(reply.client)
    down += sum(task_bytes_of(task) for client, task in tasks.items() if client not in heard)
    return _Step(answers, left_out, down, up, duration, travelled)


def _too_few(what: str, answers: Collection[str], agreed: Agreed, left_out: Mapping[str, str]) -> str | None:
    """Return why so few answers of a cohort open no sum, or None."""
    if len(answers) >= agreed.needed:
        return None
    reasons = "".join(f"; {client}: {reason}" for client, reason in left_out.items())
    return (
        f"{len(answers)} of {counted(agreed.cohort, 'client')} {what}, and {agreed.needed} are needed "
        f"(secure_aggregation.threshold{reasons})"
    )
