"""Waiting for a day or longer, with clocks that are set forward: nobody gives up too soon, or waits for ever."""

import pytest
from test_federate import begin, federation
from test_remote import FACTS, HOMES, KEYS, Post, resident, run

pytest.importorskip("flwr")

from bellwether.engine.remote import Party, RemoteEngine, terms_of
from bellwether.errors import FederationError
from bellwether.exchange.seal import Header, opened, sealed
from bellwether.federate import federate
from bellwether.site import joining
from bellwether.site import resident as residents
from bellwether.site.coordinator import PATIENCE
from bellwether.site.invitation import Invitation
from bellwether.site.ledger import entries

HOUR = 3600.0
END = Header("task", "end", "fed/1", 0, "coordinator", "north", "", "n1", terms_of(FACTS))


def waiting_world(folder, happens, kind=Post):
    """A coordinator's engine whose every pause takes a minute; what happens is asked at each, with the hours passed."""
    post = kind({name: resident(name, folder) for name in HOMES})

    def pause(seconds):
        post.clock[0] += 60
        happens(post, post.clock[0] / HOUR)

    parties = [Party(name, KEYS[name].public_key(), clients) for name, clients in HOMES.items()]
    return RemoteEngine(
        post, parties, KEYS["coordinator"], "fed/1", FACTS, lambda event: None, clock=lambda: post.clock[0], pause=pause
    ), post


def test_a_coordinator_waits_nearly_a_day_for_its_quorum_and_then_runs(tmp_path):
    def happens(post, hours):
        if hours > 23:
            post.away.clear()

    engine, post = waiting_world(tmp_path, happens)
    post.away |= HOMES.keys()
    engine.wait(lambda: 2, PATIENCE)
    assert 23 < post.clock[0] / HOUR < 23.2
    assert len(post.sent) == 2  # one hello for each, and none while nobody was there
    assert (
        run(engine).adapter.fingerprint() == federate(federation("federation.rounds=1"), begin()).adapter.fingerprint()
    )


def test_a_coordinator_for_whom_nobody_comes_in_a_day_says_how_to_go_on(tmp_path):
    engine, post = waiting_world(tmp_path, lambda post, hours: None)
    post.away |= HOMES.keys()
    with pytest.raises(FederationError, match=r"^0 of 2 sites are there after 86400 s, and 1 are needed"):
        engine.wait(lambda: 1, PATIENCE)
    assert 24 <= post.clock[0] / HOUR < 24.1


class TwoDays(Post):
    """What one site has trained is two days on its way."""

    def arrived(self, messages):
        return super().arrived([one for one in messages if self.clock[0] > 48 * HOUR or not self.is_slow(one)])

    def is_slow(self, message):
        name, parcel = self.sent[int(message.split()[1]) - 1]
        return name == "south" and opened(parcel, KEYS["coordinator"].public_key()).kind == "train"


def test_without_a_deadline_an_answer_that_takes_two_days_counts(tmp_path):
    engine, post = waiting_world(tmp_path, lambda post, hours: None, TwoDays)
    done = run(engine)
    assert {client.client for client in done.rounds[0].clients} == {"a", "b", "c", "d"}
    assert 48 < post.clock[0] / HOUR < 48.2


def test_a_site_waits_a_day_for_its_coordinator_and_says_so_once(monkeypatch):
    tries, said = [], []

    def away(address, authority, shown):
        tries.append(address)
        if len(tries) * joining.RETRY < 24 * HOUR:
            raise joining.NotThere(f"Nothing answers at {address} (connection refused)")
        return 0.5

    monkeypatch.setattr(joining, "clock_skew", away)
    monkeypatch.setattr(joining.time, "sleep", lambda seconds: None)
    invitation = Invitation("fed", "north", "", "fed.example.org:8443", "", "", "", {})
    joining._wait_for_coordinator(invitation, said.append)
    assert len(tries) == 8640
    assert said == [
        "Nothing answers at fed.example.org:8443 (connection refused); this site waits until the coordinator is there."
    ]


def test_a_site_that_is_asked_nothing_for_a_day_writes_nothing_and_answers_then(tmp_path, monkeypatch):
    site, looked = resident("north", tmp_path), []
    monkeypatch.setattr(residents.time, "sleep", looked.append)

    class Quiet:
        """Nothing comes for a day, then the end of the run."""

        parcel = sealed(END, KEYS["coordinator"], b"{}")

        def take(self):
            return self if looked and len(looked) * max(looked[-1:]) >= 24 * HOUR else None

        def answer(self, parcel):
            assert opened(parcel, KEYS["north"].public_key()).kind == "end"

    site.serve(Quiet())
    assert len(looked) == 86_400 + 1  # and a moment for Flower to pass the answer on
    assert max(looked[:-1]) == residents.LATEST
    assert [entry.kind for entry in entries(tmp_path / "north")] == ["end", "end"]
