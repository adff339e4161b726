"""A site: one resident process that holds base and tokenised rows, and answers what its coordinator asks.

Nothing is taken on trust: a task must be signed by the coordinator, be meant for this site and run, stand under the
terms that the site agreed to, and be allowed by its policy. What a recipe says is taken from the site's own copy of it,
never from a message. Every message is written to the ledger before it counts. A task is done once: where the same is
asked again, since the answer was lost on its way or the coordinator redoes its round, the same is sent again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bellwether.engine.processes import Work, local_engine
from bellwether.engine.remote import COORDINATOR, Facts, terms_of
from bellwether.errors import (
    BellwetherError,
    CheckpointError,
    ModelError,
    NotFinite,
    RoundFailed,
    UpdateRejected,
    first_line,
)
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.checks import check_array
from bellwether.exchange.codec import Kind, decode_task, encode_reply, kind_of
from bellwether.exchange.messages import (
    PURPOSES,
    SECRETS,
    SPACE,
    Announced,
    AnnounceTask,
    EvaluateTask,
    Masking,
    Payload,
    Reply,
    SecureTask,
    ShareTask,
    SurveyTask,
    Task,
    TrainTask,
)
from bellwether.exchange.seal import Header, Parcel, check_meant, content_of, opened, sealed
from bellwether.exchange.secure_codec import SECURE_KINDS
from bellwether.federate import Engine
from bellwether.method.method import Method, send_trained, serve_sent
from bellwether.method.named import make_method
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers
from bellwether.recipe.recipe import Compression, Recipe
from bellwether.site.answers import keep_answer, kept_answer, question_of
from bellwether.site.facts import differing, facts_of
from bellwether.site.ledger import Ledger
from bellwether.site.peers import Peers, check_signed, signed
from bellwether.site.protection import without_small_names
from bellwether.site.trained import row_hash
from bellwether.store.client_state import METHOD, UNSENT, kept_rounds, state_file
from bellwether.tools.json_text import from_json, typed
from bellwether.tools.pauses import Pauses
from bellwether.tools.words import byte_size, duration

POLL, LATEST = 0.1, 1.0  # seconds between two looks for a task, after one came and when none has for a while
LINGER = 3.0  # seconds in which Flower passes the last answer on
MOST_TOLD = 10  # facts that differ, of which coordinator and person are told
# Different tasks of one kind, round and client that are done. An honest coordinator asks one, or another where it goes
# back to an older checkpoint; whoever could ask without end would learn of the rows without end.
MOST_TASKS = 5

_KEPT = {METHOD: "what its method kept here", UNSENT: "what its update left to be sent"}

# From a task that was found to be the coordinator's to why this site's policy forbids it, as a clause; or None.
Policy = Callable[[Header, Task], str | None]

# From such a task and the bytes of its answer to why this site's policy forbids to send it, as a clause; or None.
Limit = Callable[[Header, int], str | None]


class Message(Protocol):
    """A message that waits for its answer; ``engine.flower.inbox`` has it."""

    parcel: Parcel | None

    def answer(self, parcel: Parcel) -> None:
        """Send the answer."""
        ...


class Messages(Protocol):
    """Where messages come from; ``engine.flower.inbox`` has one."""

    def take(self) -> Message | None:
        """Return the next message, or None."""
        ...


@dataclass(frozen=True)
class Holdings:
    """What a site holds.

    Args:
        name: its name.
        clients: the clients whose rows it holds.
        recipe: what it agreed to run.
        engine: trains and scores its clients.
        facts: what it works with, see ``site.facts``.
        config: the adapter's configuration, with the largest rank.
        shapes: inputs and outputs of each adapted module.
        folders: each client's own, with what the method keeps there.
        going_on: of the kinds of tasks that go on from what is kept of the last round that counted, what that is.
        rows: a hash of the rows.
        secret: what noise is drawn from, see ``site.protection``; None in a rehearsal, where nothing is
            protected from the coordinator.
    """

    name: str
    clients: Collection[str]
    recipe: Recipe
    engine: Engine
    facts: Facts
    config: AdapterConfig
    shapes: Mapping[str, tuple[int, int]]
    folders: Mapping[str, Path] = field(default_factory=dict)
    going_on: Mapping[str, Collection[str]] = field(default_factory=dict)
    rows: str = ""
    secret: bytes | None = None


def holdings_of(name: str, recipe: Recipe, base: Base, layers: LoraLayers, work: Work) -> Holdings:
    """Return what a site holds.

    Args:
        name: its name.
        recipe: what it agreed to run.
        base: the base model that it has loaded.
        layers: LoRA layers over it.
        work: rows, folders and secret of its clients; they are trained one by one.
    """
    shapes = {shape.path: (shape.inputs, shape.outputs) for shape in base.facts.linears}
    method = make_method(work.method, work.privacy)
    engine, facts = local_engine(base, layers, work, method), facts_of(recipe, base, work.public)
    clients, going_on = tuple(work.rows), kinds_going_on(method, recipe.compression)
    rows = hashlib.sha256(json.dumps([[row_hash(one.row) for one in rows] for rows in work.rows.values()]).encode())
    return Holdings(
        name, clients, recipe, engine, facts, work.config, shapes, work.folders, going_on, rows.hexdigest(), work.secret
    )


def kinds_going_on(method: Method, compression: Compression) -> dict[str, tuple[str, ...]]:
    """Return the kinds of tasks that go on from what is kept at a client, each with what that is."""
    left = (UNSENT,) if compression.up != "none" and compression.error_feedback else ()
    train = (*((METHOD,) if method.finish is not send_trained else ()), *left)
    kinds = {"train": train, "evaluate": (METHOD,) if method.serves is not serve_sent else ()}
    return {kind: names for kind, names in kinds.items() if names}


class Resident:
    """Answers messages.

    Args:
        holdings: what the site holds.
        key: signs what it sends.
        coordinator: verifies what comes.
        federation: how the identifiers of all runs begin that it takes part in.
        ledger: everything that came and was sent.
        policy: says what is forbidden.
        tell: is told of what happens, in sentences.
        keep: keeps the result that comes with the end: what is said of it, and its values.
        limit: says which answers are too large to be sent.
        peers: keys of the sites whose clients' keys are believed, by the names of the clients.
    """

    def __init__(
        self,
        holdings: Holdings,
        key: Ed25519PrivateKey,
        coordinator: Ed25519PublicKey,
        federation: str,
        ledger: Ledger,
        policy: Policy,
        tell: Callable[[str], None],
        keep: Callable[[bytes, bytes], None] = lambda about, values: None,
        limit: Limit = lambda header, size: None,
        peers: Peers = MappingProxyType({}),
    ) -> None:
        self._holdings, self._key, self._coordinator, self._federation = holdings, key, coordinator, federation
        self._ledger, self._policy, self._tell, self._keep, self._limit = ledger, policy, tell, keep, limit
        self._terms, self._peers = terms_of(holdings.facts), peers
        self.ended = False

    def serve(self, messages: Messages) -> None:
        """Answer messages until the coordinator says that the run has ended."""
        pauses = Pauses(POLL, LATEST)
        while not self.ended:
            message = messages.take()
            if message is None:
                time.sleep(pauses.next())
                continue
            message.answer(self.answer(message.parcel))
            pauses.begin()
        time.sleep(LINGER)

    def answer(self, parcel: Parcel | None) -> Parcel:
        """Return the answer to a message; one that is not the coordinator's gets an empty one.

        Raises:
            CheckpointError: the ledger, or what a client keeps, cannot be written.
        """
        try:
            header = self._header(parcel)
        except UpdateRejected as reason:
            self._tell(f"A message is refused, since {reason}.")
            return Parcel(b"", b"", b"")
        assert parcel is not None
        self._ledger.note(header, parcel)
        if header.kind == "end" and not self._ends(parcel):
            return Parcel(b"", b"", b"")
        answer, failure = self._answered(header, parcel)
        self._ledger.note(header.answered(), answer, self._protection(header), failure)
        return answer

    def _answered(self, header: Header, parcel: Parcel) -> tuple[Parcel, str]:
        """Return the answer to a message, and why it has no result."""
        if header.kind == "hello":
            return self._sealed(header, self._hello(parcel)), ""
        if header.kind == "end":
            return self._sealed(header, b"{}"), ""
        folder, question = self._holdings.folders.get(header.client), self._question(header, parcel)
        kept = kept_answer(folder, header.kind, question) if folder is not None else None
        if kept is not None:
            self._tell(f"Round {header.round}: {header.client} is asked to {header.kind} as before.")
            return self._within_limit(header, header.kind, self._sealed(header, *kept), None)
        reply, failure = self._reply(header, parcel)
        manifest, body = encode_reply(reply, header.kind)
        if failure:
            return self._sealed(header, manifest, body), failure
        if folder is not None:
            keep_answer(folder, header.kind, question, manifest, body)
        return self._within_limit(header, header.kind, self._sealed(header, manifest, body), reply.seconds)

    def _question(self, header: Header, parcel: Parcel) -> bytes:
        """Return the hash of a task, whatever its run is, and of what it is done with.

        Its number counts where secrets are drawn for it, which are others when a coordinator begins a round anew.
        """
        anew = self._holdings.recipe.secure_aggregation.enabled and header.kind in ("train", *SECURE_KINDS)
        number = header.number if anew else ""
        asked = header.kind, str(header.round), header.client, header.terms, content_of(parcel), number
        return question_of(*asked, self._terms, self._holdings.rows)

    def _within_limit(self, header: Header, kind: Kind, answer: Parcel, seconds: float | None) -> tuple[Parcel, str]:
        """Return an answer, or that the policy forbids to send it, and why; for one that was kept seconds are None."""
        forbidden = self._limit(header, answer.size)
        if forbidden is None:
            done = "the answer was kept" if seconds is None else f"done in {duration(seconds)}"
            self._tell(f"Round {header.round}: {done}; {byte_size(answer.size)} leave this site.")
            return answer, ""
        failure = f"the policy of this site forbids it: {forbidden}"
        self._tell(f"Round {header.round}: nothing leaves this site, since {failure}.")
        refusal = Reply(header.client, seconds or 0.0, failure=failure)
        return self._sealed(header, *encode_reply(refusal, kind)), failure

    def _sealed(self, header: Header, manifest: bytes, body: bytes = b"") -> Parcel:
        return sealed(header.answered(), self._key, manifest, body)

    def _header(self, parcel: Parcel | None) -> Header:
        """Return what a message is for, once it is the coordinator's, for this site, and no answered hello or end."""
        if parcel is None:
            raise UpdateRejected("it is no message of bellwether's")
        header = opened(parcel, self._coordinator)
        if not header.run.startswith(f"{self._federation}/"):
            raise UpdateRejected("its run belongs to another federation")
        check_meant(header, replace(header, way="task", sender=COORDINATOR, receiver=self._holdings.name))
        if header.kind in ("hello", "end") and self._ledger.answered(header.number):
            raise UpdateRejected("it came before")
        return header

    def _ends(self, parcel: Parcel) -> bool:
        """Keep the result that comes with the end, and return whether it is one.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            self._keep(parcel.manifest, parcel.body)
        except CheckpointError:
            raise
        except Exception as reason:  # whatever values of others make of those who read them
            self._tell(f"The end that came is refused, since its result cannot be used ({_detail(reason)}).")
            return False
        self.ended = True
        return True

    def _hello(self, parcel: Parcel) -> bytes:
        """Return what differs here from what the coordinator works with, of much the beginning."""
        try:
            theirs = typed(from_json(parcel.manifest), dict[str, str])
            differs = differing(theirs, self._holdings.facts)
        except ValueError as error:
            differs = [f"the hello cannot be read ({first_line(error)})"]
        differs = differs[:MOST_TOLD]
        for one in differs:
            self._tell(f"This site takes no part yet: {one}.")
        if not differs:
            self._tell("The coordinator has said hello; this site takes part.")
        return json.dumps({"differs": differs}).encode()

    def _reply(self, header: Header, parcel: Parcel) -> tuple[Reply, str]:
        """Return a client's reply to a task, and why it holds no result, in words that stay here."""
        begun = time.perf_counter()
        try:
            task = self._task(header, parcel)
            self._tell(f"Round {header.round}: {header.client} is asked to {header.kind}.")
            reply = next(iter(self._holdings.engine.ask({header.client: task})))
            if isinstance(reply.secured, Announced):
                about = self._federation, header.round, header.client
                reply = replace(reply, secured=signed(reply.secured, self._key, *about))
            if self._holdings.secret is not None:
                reply = without_small_names(reply)
        except Exception as reason:  # a site answers whatever happens to its client, and stays
            failure = _detail(reason)
            self._tell(f"Round {header.round}: {header.client} does not {header.kind}: {failure}.")
            return Reply(header.client, time.perf_counter() - begun, failure=_told(reason)), failure
        return reply, reply.failure or ""

    def _task(self, header: Header, parcel: Parcel) -> Task:
        """Return the task in a message, with the settings of this site's own recipe.

        Raises:
            UpdateRejected: it is not what this site agreed to, or cannot be done here.
        """
        if header.terms != self._terms:
            raise UpdateRejected("its terms are not those of this site")
        if header.client not in self._holdings.clients:
            raise UpdateRejected(f"{header.client[:80]!r} is no client of this site")
        _check_round(header, self._holdings.recipe.federation.rounds)
        if self._ledger.place(header, content_of(parcel)) >= MOST_TASKS:
            raise UpdateRejected(
                f"{header.client} was asked to {header.kind} in round {header.round} in {MOST_TASKS} other ways "
                "already, which is the most that a site does"
            )
        task = decode_task(parcel.manifest, parcel.body)
        if kind_of(task) != header.kind or task.round != header.round:
            raise UpdateRejected("the task is not the one that its header names")
        _check_draws(task)
        _check_masking(task, self._holdings.recipe)
        if isinstance(task, ShareTask):
            check_signed(task, self._peers, self._federation)
        if not isinstance(task, SecureTask) and task.payload is not None:
            down = "none" if header.kind == "evaluate" else self._holdings.recipe.compression.down
            _check_payload(task.payload, self._holdings, down)
        _check_kept(header, task, self._holdings)
        task = _with_own_settings(task, self._holdings.recipe)
        forbidden = self._policy(header, task)
        if forbidden is not None:
            raise UpdateRejected(f"the policy of this site forbids it: {forbidden}")
        return task

    def _protection(self, header: Header) -> str:
        """Return what is done to an answer before it is sent."""
        recipe = self._holdings.recipe
        if header.kind == "survey" and recipe.selection.noise:
            return f"noise {recipe.selection.noise:g}"
        if header.kind == "train" and recipe.secure_aggregation.enabled:
            return "masked"
        if header.kind == "train" and recipe.privacy.hides_clients:
            moves = recipe.privacy.clip_quantile is not None
            return "cut to a norm that the coordinator says" if moves else f"cut to {recipe.privacy.clip_norm:g}"
        if header.kind == "train" and recipe.privacy.hides_rows:
            return f"noise {recipe.privacy.noise:g} on gradients of rows"
        return "none"


def _detail(reason: Exception) -> str:
    """Return what went wrong, for this site's own log and ledger."""
    said = first_line(reason)
    return said if isinstance(reason, BellwetherError) else f"{type(reason).__name__}: {said}"


def _told(reason: Exception) -> str:
    """Return what a coordinator is told of a failure: no words of this machine, its files, functions or rows."""
    match reason:
        case UpdateRejected():  # our own words, of what the coordinator sent or of the policy
            return first_line(reason)
        case NotFinite():
            return "the hidden states or losses of some of its rows are not finite"
        case ModelError():
            return "its base model or adapter cannot be used"
        case CheckpointError():
            return "what it keeps on its disk cannot be read or written"
        case RoundFailed():
            return "its method, or a function that the recipe names, failed"
        case _:
            return "its process failed"


def _check_draws(task: Task) -> None:
    """Refuse a task that lacks seeds of what a client draws."""
    due = {SECRETS} if isinstance(task, AnnounceTask) else {*PURPOSES, SPACE}
    if isinstance(task, TrainTask | SurveyTask | AnnounceTask) and task.draws.seeds.keys() != due:
        raise UpdateRejected("its draws are not those that a client needs")


def _check_masking(task: Task, recipe: Recipe) -> None:
    """Refuse to send an update as it is where masks were agreed to, and masks where they were not."""
    on = recipe.secure_aggregation.enabled
    if isinstance(task, SecureTask) and not on:
        raise UpdateRejected("it belongs to secure aggregation, which this site did not agree to")
    if isinstance(task, TrainTask) and (task.masking is not None) != on:
        raise UpdateRejected(f"its update would {'not ' if on else ''}be masked, which is not what was agreed to")


def _check_round(header: Header, rounds: int) -> None:
    """Refuse a round that the federation does not have."""
    first = 0 if header.kind == "evaluate" else 1
    if not first <= header.round <= rounds:
        raise UpdateRejected(f"round {header.round} is none of {first} to {rounds}, which this site agreed to")


def _check_kept(header: Header, task: Task, holdings: Holdings) -> None:
    """Refuse to go on from what a client kept of the last round that counted, where that is lost."""
    if not isinstance(task, TrainTask | EvaluateTask) or not task.settled:
        return
    for name in holdings.going_on.get(header.kind, ()):
        folder = holdings.folders[header.client]
        if task.settled not in kept_rounds(folder, name):
            path = state_file(folder, name, task.settled).relative_to(folder.parent)
            raise UpdateRejected(
                f"{_KEPT[name]} of round {task.settled} is gone, and without it another result would come: "
                f"{path.as_posix()} has to be restored"
            )


def _with_own_settings(task: Task, recipe: Recipe) -> Task:
    """Return a task whose settings are the site's own, which the terms say are the same but for paths."""
    if isinstance(task, TrainTask):
        task = replace(task, training=recipe.training, selection=recipe.selection, compression=recipe.compression)
        if task.masking is not None:
            limits = recipe.federation.max_rows, recipe.federation.max_norm
            task = replace(task, masking=Masking(task.masking.shares, *limits))
        return replace(task, rounds=recipe.federation.rounds, privacy=recipe.privacy)
    if isinstance(task, SurveyTask):
        return replace(task, selection=recipe.selection)
    if isinstance(task, AnnounceTask):
        return replace(task, settings=recipe.secure_aggregation)
    return replace(task, evaluation=recipe.evaluation) if isinstance(task, EvaluateTask) else task


def _check_payload(payload: Payload, holdings: Holdings, down: str) -> None:
    """Refuse an adapter that does not fit this site's base, or comes or is trained otherwise than was agreed."""
    own = holdings.config
    if (payload.packed.kind if payload.packed is not None else "none") != down:
        raise UpdateRejected(f"its adapter does not come as was agreed to, with compression.down={down}")
    _check_folded(payload.folded, holdings)
    for adapter in (payload.adapter, payload.folded):
        if adapter is None:
            continue
        most = math.inf if adapter is payload.folded else own.rank  # what is folded stacks what many rounds gave
        if adapter.config.modules != own.modules or not 1 <= adapter.config.rank <= most:
            raise UpdateRejected("its adapter is for other modules, or of another rank, than this site agreed to")
        if adapter is payload.adapter and _trained_as(adapter.config) != _trained_as(own):
            raise UpdateRejected("its adapter has another alpha, dropout or scaling than this site agreed to")
        due = tensor_shapes(adapter.config, holdings.shapes)
        if adapter.tensors.keys() != due.keys():
            raise UpdateRejected("its adapter has other tensors than its configuration says")
        for key, shape in due.items():
            check_array(key, adapter.tensors[key], shape, np.dtype(np.float32))
    for name, value in payload.arrays.items():
        check_array(name, value, value.shape, np.dtype(np.float32))


def _check_folded(folded: Adapter | None, holdings: Holdings) -> None:
    """Refuse an update to fold into the base where the method folds none, or in another scaling than methods have it.

    A method folds in the adapter's own scaling or, once several rounds are stacked, in that of 1.
    """
    if folded is None:
        return
    section = holdings.recipe.method
    if not make_method(section).folds:
        raise UpdateRejected(f"it brings an update to fold into the base, which the method {section.name} does not do")
    own, its = holdings.config, folded.config
    if (its.alpha, its.rslora) not in ((own.alpha, own.rslora), (float(its.rank), False)) or _trained_as(
        replace(its, alpha=own.alpha, rslora=own.rslora)
    ) != _trained_as(own):
        raise UpdateRejected("what it folds into the base has another alpha, dropout or scaling than was agreed to")


def _trained_as(config: AdapterConfig) -> AdapterConfig:
    """Return what of a configuration decides how it is trained: all but the rank and names for PEFT alone."""
    return replace(config, rank=1, base_model="", target_modules=())


def tensor_shapes(config: AdapterConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the shape of each of an adapter's tensors, by its key.

    Args:
        config: its configuration.
        shapes: inputs and outputs of each adapted module.
    """
    due: dict[str, tuple[int, int]] = {}
    for module in config.modules:
        inputs, outputs = shapes[module]
        due |= {key_a(module): (config.rank, inputs), key_b(module): (outputs, config.rank)}
    return due
