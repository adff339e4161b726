"""What travels between the server and its clients: tasks downwards, replies upwards.

The engines deliver these; the clients and the round loop read and write them. Every task is made for one client, and
holds nothing of another one's but what it sealed for this one. Nothing here holds a row of text.

Shape legend: C centroids of a client, d dimensions of the space, P parameters of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from bellwether.exchange.adapter import Adapter, Arrays, Tensors
from bellwether.exchange.packing import Packed
from bellwether.exchange.scores import Totals
from bellwether.recipe.recipe import Compression, Evaluation, Privacy, SecureAggregation, Selection, Training
from bellwether.tools.randomness import Draws, Randomness

# What a client draws for in a round, each from a seed of its own; the space is drawn once for all clients and rounds.
NOISE = "centroid noise"
EXAMPLES, EXAMPLE_NOISE = "examples", "example noise"  # of steps that hide single rows
PURPOSES = (
    "batch order",
    "dropout",
    "selection",
    NOISE,
    "t-SNE",
    "method",
    "compression",
    EXAMPLES,
    EXAMPLE_NOISE,
)
SPACE = "selection space"
SECRETS = "secure aggregation"  # in a simulation alone; a site draws its secrets from nothing that others know

MASKED = "masked"  # the name in ``packed`` of a masked update, uint64_P


def client_draws(randomness: Randomness, round: int, client: str) -> Draws:
    """Return what a client may draw in a round.

    Args:
        randomness: of the run.
        round: the round, counted from 1.
        client: the client's name.
    """
    own = {purpose: randomness.seed_for(purpose, round=round, client=client) for purpose in PURPOSES}
    return Draws({**own, SPACE: randomness.seed_for(SPACE)})


@dataclass(frozen=True)
class Payload:
    """What the server sends a client to begin with.

    Args:
        adapter: the adapter that the client begins with; its rank is the client's own.
        arrays: named arrays beside it, such as SCAFFOLD's control variate.
        trained: keys of the tensors that are trained; the others stay as they are sent, and nothing moves them. None
            trains all.
        returned: keys of the tensors that come back; None are those that are trained.
        folded: an update of the frozen weights that all rounds before have folded into them, as factors; the client
            adds it to its base before it begins. None leaves the base as it is.
        packed: tensors of the adapter as they travel, of which the client makes those of ``adapter``; None sends all
            of them whole.
    """

    adapter: Adapter
    arrays: Arrays = field(default_factory=dict)
    trained: tuple[str, ...] | None = None
    returned: tuple[str, ...] | None = None
    folded: Adapter | None = None
    packed: Packed | None = None

    @property
    def whole(self) -> Tensors:
        """The tensors of the adapter that travel as they are."""
        packed = self.packed.keys if self.packed is not None else ()
        return {key: value for key, value in self.adapter.tensors.items() if key not in packed}

    @property
    def expected(self) -> Tensors:
        """The tensors that come back, as they are sent: an update's have their keys, shapes and precision."""
        whole = tuple(self.adapter.tensors)
        keys = next(keys for keys in (self.returned, self.trained, whole) if keys is not None)
        return {key: self.adapter.tensors[key] for key in keys}


@dataclass(frozen=True)
class Masking:
    """How an update is to be masked, and what the server cannot check then.

    Args:
        shares: what each other client sealed for this one, by its name: those whose masks are taken off each other.
        max_rows: rows that the update may claim, and the largest weight.
        max_norm: the largest norm of the change of all tensors, and of each array.
    """

    shares: Mapping[str, bytes]
    max_rows: int
    max_norm: float


@dataclass(frozen=True)
class TrainTask:
    """Ask one client to train on its own rows.

    Args:
        round: the round, counted from 1.
        payload: what it begins with.
        training: the recipe's training section.
        rounds: rounds of the whole run, over which the learning rate follows its schedule.
        draws: what the client may draw.
        selection: the recipe's selection section, which of its rows it shall train on.
        kept: the clusters of its survey that the server kept; None where there was no survey.
        settled: the last round in which an update of this client counted, 0 where none did; what the client keeps of
            later rounds is not to be gone on from.
        certain: the last such round at the oldest checkpoint that the run can still go back to; what the client keeps
            of earlier rounds is needed no more.
        compression: the recipe's compression section, which says how the update comes back.
        privacy: the recipe's privacy section, which says whether single rows are hidden, with the noise that is due.
        masking: how the update is to be masked; None sends it as it is.
    """

    round: int
    payload: Payload
    training: Training
    rounds: int
    draws: Draws
    selection: Selection = field(default_factory=Selection)
    kept: Sequence[int] | None = None
    settled: int = 0
    certain: int = 0
    compression: Compression = field(default_factory=Compression)
    privacy: Privacy = field(default_factory=Privacy)
    masking: Masking | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter that the client begins with."""
        return self.payload.adapter


@dataclass(frozen=True)
class SurveyTask:
    """Ask one client for the centroids of its rows' clusters, and to remember these for the training of the round.

    Args:
        round: the round, counted from 1.
        payload: what it begins with, whose adapter's hidden states stand for the rows; None where a proxy's do.
        selection: the recipe's selection section.
        draws: what the client may draw.
    """

    round: int
    payload: Payload | None
    selection: Selection
    draws: Draws


@dataclass(frozen=True)
class EvaluateTask:
    """Ask one client to score the adapter that it serves on the rows that it holds out.

    Args:
        round: the round whose result is scored; 0 before the first.
        payload: what the server sends it; the method says which adapter the client makes of it.
        evaluation: the recipe's evaluation section.
        settled: as in ``TrainTask``.
        shared: whether it scores the adapter that it is sent, instead of the one that it serves.
    """

    round: int
    payload: Payload
    evaluation: Evaluation
    settled: int = 0
    shared: bool = False


@dataclass(frozen=True)
class AnnounceTask:
    """Ask one client to draw its secrets of a round, and to announce its public keys.

    Args:
        round: the round, counted from 1.
        cohort: how many clients are asked.
        settings: the recipe's section of secure aggregation.
        draws: what a simulated client draws its secrets from, for the purpose ``SECRETS``.
    """

    round: int
    cohort: int
    settings: SecureAggregation
    draws: Draws


@dataclass(frozen=True)
class ShareTask:
    """Ask one client to deal its secrets out in shares, one sealed for each other client.

    Args:
        round: the round, counted from 1.
        keys: what each client of the cohort announced that did, the asked one's included, by name.
    """

    round: int
    keys: Mapping[str, Announced]


@dataclass(frozen=True)
class UnmaskTask:
    """Ask one client to help take the masks off the sum.

    Args:
        round: the round, counted from 1.
        survivors: the clients whose masked updates are in the sum; of the others the masks are taken off with them.
    """

    round: int
    survivors: tuple[str, ...]


SecureTask = AnnounceTask | ShareTask | UnmaskTask
Task = TrainTask | SurveyTask | EvaluateTask | SecureTask


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
        arrays: named arrays beside the adapter, as the method says.
        packed: the change of its tensors in few bytes, in place of them, where the recipe's compression says so; or
            ``MASKED`` alone, in place of tensors and arrays.
    """

    client: str
    round: int
    tensors: Tensors
    rows: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    packed: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Announced:
    """What one client announces before a round with secure aggregation; all but the last are 32 bytes.

    Args:
        sealing: its public key for what others seal for it.
        masking: its public key for the masks that it has in common with each other one.
        pledge: the hash of the seed of its own mask, by which the server knows it once shares have given it.
        signature: its site's over all of it, 64 bytes; none where clients are simulated.
    """

    sealing: bytes
    masking: bytes
    pledge: bytes
    signature: bytes = b""


@dataclass(frozen=True)
class Dealt:
    """What one client deals out: its shares of both secrets, sealed, by the name of who can open them."""

    shares: Mapping[str, bytes]


@dataclass(frozen=True)
class Revealed:
    """What one client tells so that the sum can be read; of no client both.

    Args:
        seeds: its shares of the seeds of the survivors' own masks, by their names.
        keys: its shares of the masking keys of those who fell away after they had dealt, by their names.
    """

    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]


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
    """What an engine delivers of one client: an update, a survey, scores, or the reason why there is none of these.

    Who answered, how long it took, whether the task came there at all and what travelled the engine knows itself;
    everything else is what somebody claims, to be checked before it is used.

    Args:
        client: the client that was asked.
        seconds: how long the client took, by the engine's clock; simulated seconds where speed is simulated.
        update: its update, after a ``TrainTask``.
        survey: its centroids, after a ``SurveyTask``.
        totals: its totals by category, after an ``EvaluateTask``.
        failure: why there is no result, in one clause.
        reached: whether the task came to the client at all.
        groups: its totals by group (language or domain), after an ``EvaluateTask``.
        losses: mean loss of each of its optimizer steps, per trained token, after a ``TrainTask``;
            for those who hold the rows, it is not sent.
        bytes_down: bytes of all messages that brought it the task, as they travelled; None where nothing travels, since
            client and server are one process, and what would is counted instead.
        bytes_up: likewise bytes of its answer, also of one that is refused.
        secured: its part in secure aggregation, after one of the tasks of it.
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
    bytes_down: int | None = None
    bytes_up: int | None = None
    secured: Announced | Dealt | Revealed | None = None
