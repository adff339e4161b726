"""What a run gives away of its clients: what leaves them, with which protection, and what was spent.

privacy.json    everything that leaves a client, what protects it, and the promise that rests on it
charges.jsonl   one line for each round, on the disk before its clients are asked; one that fails is charged too. One
                that is run again after an interruption has another line where its noise is another one, and none in a
                simulation, where noise and result are the same
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bellwether.tools.atomic import write_atomic
from bellwether.tools.json_text import (
    KEPT,
    Amount,
    Count,
    Truth,
    from_json,
    from_json_lines,
    json_lines,
    plain,
    reading,
    typed,
)

PRIVACY = "privacy.json"
CHARGES = "charges.jsonl"

UNPROTECTED = "not protected"


@dataclass(frozen=True)
class Leaving:
    """One kind of thing that leaves a client.

    Args:
        what: it is.
        when: how often.
        mechanism: what protects it, or ``not protected``.
        charge: what it spends of the promise; ``none`` where it is not part of it.
    """

    __pydantic_config__ = KEPT

    what: str
    when: str
    mechanism: str
    charge: str

    @property
    def protected(self) -> bool:
        """Whether anything protects it."""
        return self.mechanism != UNPROTECTED


@dataclass(frozen=True)
class Epsilon:
    """One epsilon of a promise.

    Args:
        relation: what of the data cannot be told, ``add_or_remove`` or ``replace``.
        accountant: whose bound, ``PLD`` or ``RDP``.
        value: epsilon at the promise's delta.
    """

    __pydantic_config__ = KEPT

    relation: Literal["add_or_remove", "replace"]
    accountant: Literal["PLD", "RDP"]
    value: Amount


@dataclass(frozen=True)
class Promise:
    """What differential privacy promises of a run.

    Args:
        unit: whose presence is hidden, ``client`` or ``example``.
        delta: probability with which epsilon may not hold.
        noise: noise multiplier.
        clip_norm: largest norm of one update, or gradient, at first.
        rate: probability that one is in a sum; 1 where sampling is not counted on.
        releases: how many noisy sums there were.
        epsilons: by relation and accountant.
        secret: whether the noise was drawn from a secret; a simulation's is not, so that nothing is promised of it.
        client: for ``example``, the client whose rows have the largest epsilon; empty for ``client``.
    """

    __pydantic_config__ = KEPT

    unit: Literal["client", "example"]
    delta: Amount
    noise: Amount
    clip_norm: Amount
    rate: Amount
    releases: Count
    epsilons: tuple[Epsilon, ...]
    secret: Truth
    client: str = ""

    @property
    def epsilon(self) -> float:
        """Epsilon for adding or removing one, by PLD, the tightest."""
        return next(one.value for one in self.epsilons if (one.relation, one.accountant) == ("add_or_remove", "PLD"))


@dataclass(frozen=True)
class GivenAway:
    """What a run gives away.

    Args:
        leaves: everything that leaves a client.
        promise: of differential privacy; None where there is none.
        rounds: how many rounds the run had in the end; None before.
    """

    __pydantic_config__ = KEPT

    leaves: tuple[Leaving, ...]
    promise: Promise | None = None
    rounds: Count | None = None


@dataclass(frozen=True)
class Charge:
    """What a round spends.

    Args:
        round: the round.
        noise: noise multiplier of its sum.
        rate: probability that one is in it.
        sums: how many such sums; of rows, at the client where they show most.
    """

    __pydantic_config__ = KEPT

    round: Count
    noise: Amount
    rate: Amount
    sums: Count = 1


def keep_given_away(folder: Path, given: GivenAway) -> None:
    """Write what a run gives away into its folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_atomic(folder / PRIVACY, (json.dumps(plain(given), indent=2) + "\n").encode())


def given_away(folder: Path) -> GivenAway | None:
    """Return what a run gives away; None where its folder is of an older version that did not say.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / PRIVACY
    if not path.exists():
        return None
    with reading(path, "restore it, or remove it"):
        found: GivenAway = typed(from_json(path.read_bytes()), GivenAway)
    return found


def charges(folder: Path) -> list[Charge]:
    """Return what was spent so far, in the order of rounds.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / CHARGES
    if not path.exists():
        return []
    with reading(path, "restore it: without it nobody knows what was spent"):
        return from_json_lines(path.read_bytes(), lambda line: typed(line, Charge))


def charge(folder: Path, spent: Charge, *, again: bool = False) -> None:
    """Make the charge of a round last, once.

    Args:
        folder: of the run.
        spent: what the round spends.
        again: whether a round that was charged before is charged again.

    Raises:
        CheckpointError: what was spent before cannot be read, or this cannot be written.
    """
    before: Sequence[Charge] = charges(folder)
    if not again and any(one.round == spent.round for one in before):
        return
    write_atomic(folder / CHARGES, json_lines([*before, spent]))
