"""The engine of a real federation: tasks go to sites, replies come back, and the coordinator's clock decides.

A site is asked nothing before it has said hello: it is told what the coordinator works with (the hashes of base,
tokenizer and adapter, versions, the recipe's settings), and answers what differs at its place. A site that comes late,
or comes back, says hello then, and takes part from the round on in which it did. Where an answer is lost on its way, or
a site goes away while it works, it is sent the same task again. Whoever is silent costs no more than the deadline, or,
where there is none, as long as Flower takes to find that it is gone.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bellwether.errors import FederationError, UpdateRejected, first_line
from bellwether.exchange.codec import LONGEST_MANIFEST, decode_reply, encode_task, kind_of
from bellwether.exchange.messages import EvaluateTask, Reply, SecureTask, SurveyTask, Task
from bellwether.exchange.records import Note, Watcher
from bellwether.exchange.seal import LONGEST_HEADER, AnyKind, Header, Parcel, check_meant, opened, sealed
from bellwether.exchange.sizes import payload_bytes
from bellwether.tools.json_text import from_json, typed
from bellwether.tools.pauses import Pauses

COORDINATOR = "coordinator"

POLL, LATEST = 0.1, 1.0  # seconds between two looks for answers, after one came and when none has for a while
LONGEST_HELLO = 2**20  # bytes
LONGEST_SURVEY = 2**27  # bytes
LONGEST_SHARES = 2**24  # bytes, of a step of secure aggregation among some ten thousand clients
PARTING = 3600.0  # seconds that sites which are there have for the end, after what they are at
ABSENT = 20.0  # seconds that a round waits for a site that is not connected
TIMES = 3  # that a site is sent a task, where no answer of its own comes
LONGEST_WAIT = 7 * 86_400.0  # seconds that a task without a deadline is worth delivering

Facts = Mapping[str, str]


class Arrival(Protocol):
    """What came of one message: an answer, or why there is none."""

    @property
    def message(self) -> str:
        """The message's identifier."""
        ...

    @property
    def parcel(self) -> Parcel | None:
        """The answer."""
        ...

    @property
    def failure(self) -> str:
        """Why there is none, in one clause."""
        ...


class Deliveries(Protocol):
    """What delivers messages to sites; ``engine.flower.dispatch`` has it."""

    def online(self) -> Mapping[str, int]:
        """Return the numbers of the sites that are there, by name."""
        ...

    def revoked(self) -> Collection[str]:
        """Return the names of the sites that take part no more, for whom nobody waits."""
        ...

    def send(self, node: int, parcel: Parcel, seconds: float, most: int) -> str | None:
        """Send a message; return its identifier, or None where it is not taken.

        Args:
            node: the number of the site.
            parcel: the message.
            seconds: how long it is worth delivering.
            most: bytes that its answer may have.
        """
        ...

    def arrived(self, messages: Sequence[str]) -> Sequence[Arrival]:
        """Return what has come of messages."""
        ...


@dataclass(frozen=True)
class Party:
    """A site as the coordinator knows it.

    Args:
        name: its name.
        key: verifies what it sends.
        clients: the clients whose rows it holds; a site of a real federation is one client.
    """

    name: str
    key: Ed25519PublicKey
    clients: tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """A message that waits for its answer, or to be sent.

    Args:
        party: the site.
        header: what the message is for.
        task: what a client of the site is asked; None for a hello.
        since: from when on the site is waited for, by the coordinator's clock.
        sent: how often it was sent.
        lost: why no answer has come to what was sent, as a clause.
        bytes_down: bytes of all that was sent.
    """

    party: Party
    header: Header
    task: Task | None = None
    since: float = 0.0
    sent: int = 0
    lost: str = ""
    bytes_down: int = 0


def terms_of(facts: Facts) -> str:
    """Return the hash of what coordinator and sites work with."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


class RemoteEngine:
    """Delivers tasks to the sites that hold the clients' rows, each message signed and each answer checked.

    Args:
        deliveries: takes messages to sites and picks up their answers.
        parties: the sites.
        key: signs what is sent.
        run: the run's identifier, which never serves another run.
        facts: what the coordinator works with, by name; sites must work with the same.
        watch: is told who is there, and who differs.
        deadline: seconds that a site has for a task, beside the recipe's; None waits until Flower finds it gone.
        expect: is told how many bytes of answers each site may send from now on, by its name.
        clock: seconds, of a clock that never goes back.
        pause: waits so many seconds.
        absent: seconds that a round waits for a site that is not connected.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        parties: Sequence[Party],
        key: Ed25519PrivateKey,
        run: str,
        facts: Facts,
        watch: Watcher,
        deadline: float | None = None,
        expect: Callable[[Mapping[str, int]], None] = lambda most: None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        absent: float = ABSENT,
    ) -> None:
        self._deliveries, self._parties, self._key, self._run = deliveries, parties, key, run
        self._facts, self._terms = facts, terms_of(facts)
        self._watch, self._expect, self._clock, self._pause = watch, expect, clock, pause
        self._deadline, self._absent = deadline, absent
        self._homes = {client: party for party in parties for client in party.clients}
        self._greeted: dict[str, _Asked] = {}  # by message
        self._ready: set[str] = set()
        self._differs: dict[str, str] = {}
        self.bytes_down = self.bytes_up = 0

    @property
    def ready(self) -> frozenset[str]:
        """The sites that have said hello and work with the same."""
        return frozenset(self._ready)

    def wait(self, needed: Callable[[], int], seconds: float) -> None:
        """Wait until so many sites have said hello, of those that are not revoked.

        Args:
            needed: says how many, as things are then.
            seconds: how long at most.

        Raises:
            FederationError: they did not come in time, with what differs at those that came.
        """
        end, pauses = self._clock() + seconds, Pauses(POLL, LATEST)
        while len(here := self._ready - set(self._deliveries.revoked())) < (sites := needed()):
            if self._clock() > end:
                why = "".join(f" {name} {reason}." for name, reason in sorted(self._differs.items()))
                raise FederationError(
                    f"{len(here)} of {len(self._parties)} sites are there after {seconds:g} s, and {sites} are "
                    f"needed.{why} Finished rounds are kept: give the same command again once the sites have joined."
                )
            self._greet(self._deliveries.online())
            self._hear([])
            self._pause(pauses.next())

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Give every client its task, by its site; yield the replies as they come.

        Args:
            tasks: what each client is asked.
            deadline: seconds, by the coordinator's clock, after which nobody is waited for any more, where the
                engine's own is not sooner.

        Yields:
            At most one reply per client; none of those that were silent until the deadline.
        """
        begun = self._clock()
        deadline = min((one for one in (deadline, self._deadline) if one is not None), default=None)
        self._expect(self._largest(tasks))
        waiting = [self._asking(client, task, begun) for client, task in tasks.items()]
        asked, pauses = dict[str, _Asked](), Pauses(POLL, LATEST)
        while waiting or asked:
            passed = self._clock() - begun
            if deadline is not None and passed >= deadline:
                return
            left = LONGEST_WAIT if deadline is None else deadline - passed
            waiting, gone = self._send_waiting(waiting, asked, left)
            lost, replies = self._take_answers(asked, passed)
            waiting += lost
            yield from (self._gone(one, passed) for one in gone)
            yield from replies
            if replies:
                pauses.begin()
            self._pause(min(pauses.next(), max(POLL, left)))  # not beyond the deadline

    def end(
        self,
        about: Callable[[str], bytes] = lambda name: b"{}",
        values: bytes = b"",
        seconds: float = PARTING,
        absent: float = ABSENT,
        known: Collection[str] = (),
        told: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Tell the sites that the run has ended, until each has said that it knows.

        A site that comes meanwhile is told, too; one that is at work still is waited for.

        Args:
            about: gives what a site is told of the result, as JSON, by its name.
            values: the result's.
            seconds: how long to wait at most.
            absent: how long to wait for sites that are not connected.
            known: names of the sites that know already.
            told: is given the name of each site once it has said that it knows.
        """
        begun, left = self._clock(), {party.name: party for party in self._parties if party.name not in known}
        asked, tried, pauses = dict[str, _Asked](), Counter[str](), Pauses(POLL, LATEST)
        while True:
            passed, online = self._clock() - begun, self._deliveries.online()
            gone = {*self._deliveries.revoked(), *(name for name, times in tried.items() if times == TIMES)}
            left = {name: party for name, party in left.items() if name not in gone}
            here = left.keys() & online.keys() - self._differs.keys()
            if not left or passed >= seconds or (passed >= absent and not here):
                return
            self._greet(online)
            for name in sorted((here & self._ready) - {one.party.name for one in asked.values()}):
                one = _Asked(left[name], self._header("end", left[name], "", 0))
                parcel = sealed(one.header, self._key, about(name), values)
                asked[self._deliveries.send(online[name], parcel, seconds - passed, LONGEST_HELLO) or ""] = one
            asked.pop("", None)  # Flower did not take it
            for arrival in self._hear(list(asked)):
                one = asked.pop(arrival.message)
                try:
                    self._opened(one, arrival, LONGEST_HELLO)
                except UpdateRejected as reason:
                    tried[one.party.name] += 1
                    text = f"The site {one.party.name} has not said that it knows of the end: {reason}."
                    self._watch(Note(text, warning=True))
                else:
                    left.pop(one.party.name, None)  # it may have been revoked meanwhile
                    told(one.party.name)
                pauses.begin()
            self._pause(pauses.next())

    def _largest(self, tasks: Mapping[str, Task]) -> dict[str, int]:
        """Return how many bytes of answers each site may send that is given these tasks, by its name."""
        largest = {party.name: LONGEST_HELLO for party in self._parties}
        for client, task in tasks.items():
            largest[self._homes[client].name] += TIMES * _most(task)
        return largest

    def _asking(self, client: str, task: Task, since: float) -> _Asked:
        """Return what is to be sent for a client."""
        party = self._homes[client]
        return _Asked(party, self._header(kind_of(task), party, client, task.round), task, since)

    def _send_waiting(
        self, waiting: Sequence[_Asked], asked: dict[str, _Asked], seconds: float
    ) -> tuple[list[_Asked], list[_Asked]]:
        """Send what waits for its site to those that are there; return what waits still, and what does no longer."""
        online = self._deliveries.online() if waiting else {}
        if waiting:
            self._greet(online)
        still, gone = [], []
        for one in waiting:
            site = one.party.name
            if site in online and site in self._ready:
                assert one.task is not None
                parcel = sealed(one.header, self._key, *encode_task(one.task))
                self.bytes_down += parcel.size
                message = self._deliveries.send(online[site], parcel, seconds, _most(one.task))
                if message is None:
                    gone.append(replace(one, lost="Flower did not take its task"))
                else:
                    asked[message] = replace(one, sent=one.sent + 1, bytes_down=one.bytes_down + parcel.size)
            elif self._is_given_up(site, self._clock() - one.since):
                gone.append(one)
            else:
                still.append(one)
        return still, gone

    def _take_answers(self, asked: dict[str, _Asked], passed: float) -> tuple[list[_Asked], list[Reply]]:
        """Take what has come of what was asked; return what has to be sent again, and the replies."""
        lost, replies = [], []
        revoked = self._deliveries.revoked()
        for message, one in list(asked.items()):
            if one.party.name in revoked:  # whatever it sends from now on is not looked at
                replies.append(self._gone(asked.pop(message), passed))
        for arrival in self._hear(list(asked)):
            one = asked.pop(arrival.message)
            if arrival.parcel is None and one.sent < TIMES:
                text = f"No answer of {one.party.name} has come ({arrival.failure}); it is asked again."
                self._watch(Note(text, warning=True))
                lost.append(replace(one, since=self._clock(), lost=arrival.failure))
            else:
                up = arrival.parcel.size if arrival.parcel is not None else 0
                reply = self._reply(one, arrival, passed)
                replies.append(replace(reply, bytes_down=one.bytes_down, bytes_up=up))
        return lost, replies

    def _gone(self, one: _Asked, passed: float) -> Reply:
        """Return the reply of a client whose site is not waited for any more."""
        site = one.party.name
        why = "was revoked" if site in self._deliveries.revoked() else self._differs.get(site, "is not connected")
        failure = one.lost or f"its site {why}"
        return Reply(one.header.client, passed, failure=failure, reached=one.sent > 0, bytes_down=one.bytes_down)

    def _is_given_up(self, site: str, passed: float) -> bool:
        """Return whether a site that is not there is waited for no longer, after so many seconds."""
        if site in self._deliveries.revoked() or site in self._differs:
            return True
        return passed > self._absent and site not in {one.party.name for one in self._greeted.values()}

    def _greet(self, online: Mapping[str, int]) -> None:
        """Send a hello to those that are there and have not had one since they came."""
        self._ready &= online.keys()
        self._differs = {name: why for name, why in self._differs.items() if name in online}
        busy = {one.party.name for one in self._greeted.values()}
        for party in self._parties:
            if party.name in online and party.name not in self._ready | busy | self._differs.keys():
                header = self._header("hello", party, "", 0)
                parcel = sealed(header, self._key, json.dumps(dict(self._facts)).encode())
                message = self._deliveries.send(online[party.name], parcel, 600.0, LONGEST_HELLO)
                if message is not None:
                    self._greeted[message] = _Asked(party, header)

    def _hear(self, asked: Sequence[str]) -> list[Arrival]:
        """Take the answers to hellos, and return those to the messages that are asked about."""
        arrivals = self._deliveries.arrived([*asked, *self._greeted])
        for arrival in arrivals:
            if arrival.message in self._greeted:
                self._take_hello(self._greeted.pop(arrival.message), arrival)
        return [arrival for arrival in arrivals if arrival.message in asked]

    def _take_hello(self, asked: _Asked, arrival: Arrival) -> None:
        """Take a site in that works with the same; tell of one that does not."""
        name = asked.party.name
        try:
            parcel = self._opened(asked, arrival, LONGEST_HELLO)
            said = typed(from_json(parcel.manifest), dict[str, list[str]])
            differs = said["differs"][:3]
        except UpdateRejected as reason:
            self._watch(Note(f"The site {name} is not taken in: {reason}.", warning=True))
            return  # it may say hello again
        except (ValueError, KeyError) as error:
            differs = [f"sent a hello that cannot be read ({first_line(error)})"]
        if differs:
            self._differs[name] = f"differs: {'; '.join(one[:300] for one in differs)}"
            self._watch(Note(f"The site {name} takes no part, since it {self._differs[name]}.", warning=True))
        else:
            self._ready.add(name)
            self._watch(Note(f"The site {name} is there."))

    def _reply(self, asked: _Asked, arrival: Arrival, seconds: float) -> Reply:
        """Return the reply in a message; where it cannot be believed, one that says why."""
        assert asked.task is not None
        header = asked.header
        try:
            parcel = self._opened(asked, arrival, _most(asked.task))
            kind = kind_of(asked.task)
            return decode_reply(parcel.manifest, parcel.body, kind, header.client, header.round, seconds)
        except UpdateRejected as reason:
            return Reply(header.client, seconds, failure=str(reason))

    def _opened(self, asked: _Asked, arrival: Arrival, most: int) -> Parcel:
        """Return an answer that is its site's, meant for this message, and no larger than it can be.

        Raises:
            UpdateRejected: it is not, as one clause.
        """
        parcel = arrival.parcel
        if parcel is None:
            raise UpdateRejected(arrival.failure or "it sent nothing")
        self.bytes_up += parcel.size
        if parcel.size > most:
            raise UpdateRejected(f"its answer has {parcel.size} bytes, where {most} are taken")
        check_meant(opened(parcel, asked.party.key), asked.header.answered())
        return parcel

    def _header(self, kind: AnyKind, party: Party, client: str, round: int) -> Header:
        number = secrets.token_hex(16)
        return Header("task", kind, self._run, round, COORDINATOR, party.name, client, number, self._terms)


def _most(task: Task) -> int:
    """Return the bytes that an answer to a task takes at most."""
    small = LONGEST_MANIFEST + LONGEST_HEADER
    if isinstance(task, EvaluateTask):
        return small
    if isinstance(task, SurveyTask):
        return small + LONGEST_SURVEY
    if isinstance(task, SecureTask):
        return small + LONGEST_SHARES
    # What comes back of an update is of the kind of what was sent, with arrays beside it, and may come whole, or masked
    # in twice the bytes.
    return small + (6 if task.masking is not None else 3) * payload_bytes(replace(task.payload, packed=None))
