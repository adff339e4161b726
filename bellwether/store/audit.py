"""What an audit found, as its folder keeps it.

audit.json                    what each attack found, without protection and as the recipe is
recipe.yaml, settings.json    what was audited, and how much was done
SIDE/rows-3/                  a run of the game of rows: run/, and what was seen of it, seen.json
SIDE/clients-3/               a run of the game of clients, likewise
audit.md, report.html         all this to be read
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bellwether.tools.atomic import write_atomic
from bellwether.tools.intervals import Interval
from bellwether.tools.json_text import KEPT, Amount, Count, Number, Truth, plain, read_json

FILE = "audit.json"
LOSS, LIRA = "loss against the base", "LiRA with shadow runs"
SINGLE, SUMMED = "one update alone", "the round's sum"


@dataclass(frozen=True)
class Exposed:
    """How exposed planted secrets are, in bits.

    Args:
        repeats: how often each stands among its client's rows.
        planted: exposure of those that were planted, over canaries and runs; None where none was.
        absent: of those that were not, likewise.
        base: of all of them to the untuned base, over canaries.
    """

    __pydantic_config__ = KEPT

    repeats: Count
    planted: Interval | None
    absent: Interval | None
    base: Interval


@dataclass(frozen=True)
class Membership:
    """How well an attack tells rows that were trained on from rows that were left out.

    Args:
        attack: its name.
        of_result: whether it looks at what everybody receives at the end, and not at what the server sees on the way.
        auc: probability that a trained row scores above one that was left out.
        tpr: share of the trained rows that a threshold catches with 1 % false alarms.
    """

    __pydantic_config__ = KEPT

    attack: str
    of_result: Truth
    auc: Interval
    tpr: Interval


@dataclass(frozen=True)
class Epsilon:
    """A lower bound of epsilon, of a game's guesses.

    Args:
        game: whose presence is guessed, ``rows`` or ``clients``.
        bits: coins in all runs.
        made: guesses.
        right: right guesses.
        lower: the epsilon that they refute, at the audit's confidence.
    """

    __pydantic_config__ = KEPT

    game: str
    bits: Count
    made: Count
    right: Count
    lower: Amount


@dataclass(frozen=True)
class Named:
    """How often a released centroid names a row: the one of all surveyed rows that lies nearest to it.

    Args:
        released: centroids that left the clients.
        hits: of these, those whose nearest row is one of the client's cluster behind it.
        chance: share of hits that rows drawn at random would have.
        copies: centroids of clusters that hold one text alone.
        exact: of these, those whose nearest row is that text.
    """

    __pydantic_config__ = KEPT

    released: Count
    hits: Count
    chance: Amount
    copies: Count
    exact: Count


@dataclass(frozen=True)
class Side:
    """What the attacks found against one version of the recipe.

    Args:
        name: ``as it is`` or ``without protection``.
        protections: what protects it, in words; none for none.
        unit: whose presence its epsilon hides, ``client`` or ``example``.
        stated: the epsilon that its accountant states; None where it states none.
        delta: that belongs to it.
        exposed: planted secrets, by how often they stand there.
        memberships: attacks on rows.
        owner: share of the trained rows of which the update of their own client tells most; None where single updates
            cannot be read.
        owner_chance: that share where nothing tells, one over the number of clients that sent an update.
        epsilons: lower bounds.
        named: what centroids name; None where none is released, or not into one space.
        gains_in: how far training lowered the loss of rows that were trained on, in nats, over all runs; some of them.
        gains_out: of rows that were left out.
    """

    __pydantic_config__ = KEPT

    name: str
    protections: tuple[str, ...]
    unit: str
    stated: Amount | None
    delta: Amount
    exposed: tuple[Exposed, ...]
    memberships: tuple[Membership, ...]
    owner: Interval | None
    owner_chance: Amount
    epsilons: tuple[Epsilon, ...]
    named: Named | None
    gains_in: tuple[Number, ...] = ()
    gains_out: tuple[Number, ...] = ()

    @property
    def best_on_result(self) -> Membership | None:
        """The attack that tells most from the result alone; None where none could be made."""
        return max((one for one in self.memberships if one.of_result), key=lambda one: one.auc.mean, default=None)

    @property
    def lower(self) -> float | None:
        """The lower bound for whose presence its epsilon hides; None where that game was not played."""
        game = "clients" if self.unit == "client" else "rows"
        return next((one.lower for one in self.epsilons if one.game == game), None)

    @property
    def broken(self) -> bool:
        """Whether the run cannot be as private as it states."""
        return self.stated is not None and self.lower is not None and self.lower > self.stated


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Args:
        recipe: name of the recipe.
        model: path of the base.
        seed: the recipe's.
        runs: of each game, on each side.
        rows: training rows in the game.
        clients: of the federation.
        canaries: planted secrets.
        candidates: among which each is ranked.
        chance: exposure that a secret has on average that was never seen.
        confidence: of intervals and bounds.
        sides: the recipe without protection, where it has some, and as it is.
        verdicts: what that means, in sentences.
    """

    __pydantic_config__ = KEPT

    recipe: str
    model: str
    seed: Count
    runs: Count
    rows: Count
    clients: Count
    canaries: Count
    candidates: Count
    chance: Amount
    confidence: Amount
    sides: tuple[Side, ...]
    verdicts: tuple[str, ...]

    @property
    def broken(self) -> bool:
        """Whether any side cannot be as private as it states."""
        return any(side.broken for side in self.sides)


def write_audit(folder: Path, audit: Audit) -> None:
    """Write what an audit found."""
    write_atomic(folder / FILE, (json.dumps(plain(audit), indent=1) + "\n").encode())


def is_audit(folder: Path) -> bool:
    """Return whether a folder holds a finished audit."""
    return (folder / FILE).is_file()


def read_audit(folder: Path) -> Audit:
    """Return the finished audit that a folder holds.

    Args:
        folder: that ``bellwether audit`` wrote.

    Raises:
        CheckpointError: it holds none, or one that cannot be read.
    """
    found: Audit = read_json(folder / FILE, Audit, f"go on with bellwether audit --out {folder}, which writes it anew")
    return found


def some(values: Sequence[float], most: int) -> tuple[float, ...]:
    """Return at most so many of the values, evenly taken."""
    step = max(1, -(-len(values) // most))
    return tuple(values[::step])
