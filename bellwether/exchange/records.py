"""What a run tells about itself: one record per round and per evaluation, and events while it goes on.

The round loop makes these, the run folder keeps them, the live view and the report show them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from bellwether.exchange.scores import Scores, Totals
from bellwether.tools.json_text import Amount, Count, Finite, Number
from bellwether.tools.progress import Advanced

Group = Annotated[int, Field(strict=True, ge=-1, le=2**53)]


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round.

    Args:
        client: the client's name.
        rows: the weight of its update: rows it has to train on, or those it chose.
        rows_seen: rows it trained on, repetitions counted.
        tokens: trained tokens, repetitions counted.
        loss: mean loss over those tokens, or over pairs of answers, while training, in nats where it is the
            cross-entropy.
        seconds: how long it took.
        selected: how many of its rows it trained on; None where clients train on all.
        preferred: of pairs of answers the share whose chosen one had the higher implicit reward while training.
        margin: by how much, in the mean.
    """

    client: str
    rows: Count
    rows_seen: Count
    tokens: Count
    loss: Number
    seconds: Number
    selected: Count | None = None
    preferred: Amount | None = None
    margin: Number | None = None


@dataclass(frozen=True)
class SurveyRecord:
    """What the server learned of the cohort's rows before a round's training, and what it kept.

    Args:
        centroids: for each client that answered its centroids, in the dimensions of the space.
        groups: for each client the group of each centroid; -1 is none.
        kept: for each client the numbers of its centroids that were kept.
        bytes_down: bytes of tasks and answers from the server to the cohort.
        sent: bytes of the centroids that left each client that answered, also of those that were refused; over sites,
            of the messages that they were in.
    """

    centroids: Mapping[str, tuple[tuple[Finite, ...], ...]]
    groups: Mapping[str, tuple[Group, ...]]
    kept: Mapping[str, tuple[Count, ...]]
    bytes_down: Count
    sent: Mapping[str, Count]

    @property
    def bytes_up(self) -> int:
        """Bytes of all centroids."""
        return sum(self.sent.values())


@dataclass(frozen=True)
class SecureRecord:
    """How a round's updates were added up so that the server saw their weighted sum alone.

    Args:
        needed: clients that had to take part to the end.
        announced: those that announced keys.
        dealt: those that dealt shares of their secrets.
        opened: those that helped to take the masks off the sum; 0 where it came to none.
        bytes_down: bytes from the server to the cohort for it, beside the tasks to train.
        bytes_up: likewise bytes from the cohort, beside the masked updates.
    """

    needed: Count
    announced: Count
    dealt: Count
    opened: Count
    bytes_down: Count
    bytes_up: Count


@dataclass(frozen=True)
class RoundRecord:
    """One line per round.

    Args:
        round: the round, counted from 1.
        cohort: the clients that were asked.
        clients: those whose updates were aggregated.
        left_out: client and reason for the others.
        learning_rate: the clients' learning rate at the beginning of the round; while it warms up, at its end.
        loss: the clients' training loss per token, weighted by tokens, in nats where it is the cross-entropy; of
            pairs of answers the mean over pairs.
        rows: rows that the clients have to train on.
        rows_seen: rows trained on, repetitions counted.
        tokens: tokens trained, repetitions counted.
        bytes_down: bytes from the server to the cohort, those of a survey included: over sites, all of bellwether's
            messages as they travelled; in a simulation, the values of what would, and their names and shapes.
        bytes_up: likewise bytes from the cohort to the server.
        seconds: wall seconds by phase: survey where there is one, train, aggregate, evaluate.
        duration: how long the round took its clients, in seconds; simulated where speed is simulated.
        adapter: fingerprint of the adapter after the round.
        failure: why the round kept the adapter as it was; None where it did not fail.
        survey: what the cohort told of its rows before; None where nobody asked.
        preferred: of pairs of answers the share whose chosen one had the higher implicit reward while training, over
            all clients, weighted by rows; None where rows have one answer.
        margin: by how much, likewise.
        secure: how updates were added up by secure aggregation; None where the server saw each.
    """

    round: Count
    cohort: tuple[str, ...]
    clients: tuple[ClientRecord, ...]
    left_out: Mapping[str, str]
    learning_rate: Amount
    loss: Number
    rows: Count
    rows_seen: Count
    tokens: Count
    bytes_down: Count
    bytes_up: Count
    seconds: Mapping[str, Amount]
    duration: Number
    adapter: str
    failure: str | None = None
    survey: SurveyRecord | None = None
    preferred: Amount | None = None
    margin: Number | None = None
    secure: SecureRecord | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """The scores of one adapter.

    Args:
        round: the round whose result was scored; 0 is the untuned base.
        part: ``test``, ``validation``, or ``clients`` for the rows that clients hold out themselves.
        categories: totals by category.
        seconds: how long scoring took.
        clients: for the part ``clients``, each client's totals by category.
        groups: totals by group (language or domain); empty where rows name fewer than two.
        shared: for the part ``clients``, after the last round, each client's totals by category of the adapter that all
            share; empty where clients serve no other.
        elsewhere: for the part ``clients``, after the last round of a simulation, the totals by category of what each
            client serves, on the coordinator's rows, which are of everybody's kind; empty where clients serve no other.
    """

    round: Count
    part: str
    categories: Mapping[str, Totals]
    seconds: Amount
    clients: Mapping[str, Mapping[str, Totals]] = field(default_factory=dict)
    groups: Mapping[str, Totals] = field(default_factory=dict)
    shared: Mapping[str, Mapping[str, Totals]] = field(default_factory=dict)
    elsewhere: Mapping[str, Mapping[str, Totals]] = field(default_factory=dict)


Record = RoundRecord | EvaluationRecord


@dataclass(frozen=True)
class Expected:
    """How long something is expected to take, in seconds.

    Args:
        training: of a round, or of all of an arm.
        evaluation: once of the coordinator's rows, or all of an arm's.
    """

    training: float
    evaluation: float

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.training + self.evaluation


@dataclass(frozen=True)
class RunStarted:
    """The run begins, or goes on after ``done`` rounds.

    Args:
        name: name of the run.
        folder: its run folder.
        rounds: how many rounds there will be.
        done: how many are already committed.
        clients: number of clients.
        cohort: clients per round.
        scored: the rounds to come after which the adapter is scored.
        expected: what the plan says, where anybody asked it; what is measured takes its place.
    """

    name: str
    folder: str
    rounds: int
    done: int
    clients: int
    cohort: int
    scored: tuple[int, ...] = ()
    expected: Expected | None = None


@dataclass(frozen=True)
class RoundStarted:
    """A round begins with this cohort."""

    round: int
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class SurveyFinished:
    """The cohort of a round has told of its rows, and the server what it kept."""

    round: int
    record: SurveyRecord


@dataclass(frozen=True)
class ClientFinished:
    """A client of the cohort has answered."""

    round: int
    record: ClientRecord


@dataclass(frozen=True)
class ClientFailed:
    """A client of the cohort gave nothing that can be used."""

    round: int
    client: str
    reason: str


@dataclass(frozen=True)
class RoundFinished:
    """A round is committed."""

    record: RoundRecord


@dataclass(frozen=True)
class Evaluated:
    """An adapter was scored."""

    record: EvaluationRecord


@dataclass(frozen=True)
class Note:
    """A sentence for the log; ``warning`` marks what a person should look at."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class RunFinished:
    """The run is over; ``seconds`` is the wall time since the base was loaded."""

    seconds: float


@dataclass(frozen=True)
class ArmRun:
    """One arm of a comparison under one seed.

    Args:
        arm: the arm's name.
        seed: the run's seed.
        trial: what a trial tries, such as ``rate 0.008, 10 passes``; empty where it is none.
    """

    arm: str
    seed: int
    trial: str = ""


@dataclass(frozen=True)
class ComparisonStarted:
    """What a comparison will do; told once more when its trials have chosen how long arms train.

    Args:
        name: name of the recipe.
        folder: where everything goes.
        processes: how many work side by side.
        expected: how long each arm takes under each seed, by the plan; trials stand first.
    """

    name: str
    folder: str
    processes: int
    expected: Mapping[ArmRun, Expected]


@dataclass(frozen=True)
class ArmStarted:
    """An arm begins, or goes on, under a seed."""

    run: ArmRun


@dataclass(frozen=True)
class ArmTold:
    """What an arm tells of itself while it goes on."""

    run: ArmRun
    event: Event


@dataclass(frozen=True)
class ArmFinished:
    """An arm is trained and scored under a seed.

    Args:
        run: which.
        scores: means over categories and then over its adapters.
        before: whether it was finished before this process began.
        failure: why a trial has no scores; empty where it has some.
    """

    run: ArmRun
    scores: Scores
    before: bool = False
    failure: str = ""


Event = (
    RunStarted
    | Advanced
    | ComparisonStarted
    | ArmStarted
    | ArmTold
    | ArmFinished
    | RoundStarted
    | SurveyFinished
    | ClientFinished
    | ClientFailed
    | RoundFinished
    | Evaluated
    | Note
    | RunFinished
)
Watcher = Callable[[Event], None]
