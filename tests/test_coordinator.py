"""What a coordinator does with its folder, its list of sites and its run, in this process and without a network."""

import contextlib
import dataclasses
import datetime
import ipaddress
import json
import signal
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from test_federate import AddingEngine, begin, federation
from test_rehearsal import finished, wait_for, weights
from test_remote import LOST, once, world
from test_sites import joining, papers, serving  # noqa: F401

pytest.importorskip("flwr")

from bellwether.engine.remote import LATEST
from bellwether.errors import CheckpointError, FederationError, RoundFailed
from bellwether.exchange.messages import Reply
from bellwether.federate import federate
from bellwether.method.cohort import make_sampler
from bellwether.recipe.file import load_recipe
from bellwether.site import coordinator, federation_folder
from bellwether.site.federation_folder import (
    invite,
    invited,
    make_federation_folder,
    note_told,
    participants,
    revoke,
    status,
    untold,
)
from bellwether.site.keys import days_left, make_site_keys
from bellwether.tools.atomic import write_atomic


class Killed(BaseException):
    """Ends a process at a moment where nothing is tidied up any more."""


def kill_while_waiting(folder, monkeypatch):
    """Begin a federation's run, and leave its folder as a process that is killed before the first commit does."""
    from bellwether.store.run_folder import RunFolder

    def killed(*anything):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(coordinator, "_over_link", killed)
        patched.setattr(RunFolder, "discard", RunFolder.close)
        with pytest.raises(Killed):
            coordinator.serve(folder)
    assert (folder / "run" / "recipe.yaml").is_file()
    assert not any((folder / "run" / "checkpoints").iterdir())


def test_a_coordinator_killed_while_it_waited_for_sites_goes_on_by_the_same_command(papers, monkeypatch):  # noqa: F811
    kill_while_waiting(papers / "federation", monkeypatch)
    waited = []

    @contextlib.contextmanager
    def nobody(setting, *anything):
        waited.append(setting.folder)
        raise FederationError("0 of 2 sites are there.")
        yield

    monkeypatch.setattr(coordinator, "_over_link", nobody)
    for _ in range(2):
        with pytest.raises(FederationError, match="0 of 2 sites"):
            coordinator.serve(papers / "federation")
    assert waited == [papers / "federation" / "run"] * 2


def keys_of(folder, name):
    (folder / name).mkdir()
    return make_site_keys(folder / name)


@pytest.fixture
def sites(tmp_path):
    """A coordinator's folder whose sites are a, b, c and d, as ``federation`` has them."""
    folder = tmp_path / "federation"
    make_federation_folder(folder, load_recipe(None), {"base model": "1234"}, "127.0.0.1:9")
    for name in "abcd":
        invite(folder, name, keys_of(tmp_path, name))
    return folder


def test_a_revoked_key_is_never_taken_again_under_whatever_name_and_however_it_is_written(sites, tmp_path):
    revoked = invited(sites)[1].key
    revoke(sites, "b")
    invite(sites, "b", keys_of(tmp_path, "new"))
    body = revoked.removeprefix("bw1-")
    for name in ("b", "e"):
        for key in (revoked, "bw1-" + body.replace("-", "+").replace("_", "/")):
            with pytest.raises(FederationError, match="revoked|already|another key"):
                invite(sites, name, key)
    with pytest.raises(FederationError, match="The key of e was revoked"):
        invite(sites, "e", revoked)
    assert [(site.name, site.revoked) for site in invited(sites)] == [(name, False) for name in "abcd"]
    revoke(sites, "b")
    assert [site.name for site in invited(sites) if site.revoked] == ["b"]


def test_half_a_revoked_key_is_not_taken_either(sites, tmp_path):
    from bellwether.site.keys import public_word

    revoke(sites, "b")
    keys_of(tmp_path, "mixed")
    (tmp_path / "b" / "flower.key").replace(tmp_path / "mixed" / "flower.key")
    with pytest.raises(FederationError, match="The key of e was revoked"):
        invite(sites, "e", public_word(tmp_path / "mixed"))


def while_written(monkeypatch, name, happens):
    """Let something begin when a file of the coordinator's folder is about to be written, and return what ends it."""
    begun = []

    def written(path, data):
        if path.name == name and not begun:
            begun.append(threading.Thread(target=happens))
            begun[0].start()
            begun[0].join(1)  # where nothing holds it up, it is done before the file is written
        write_atomic(path, data)

    monkeypatch.setattr(federation_folder, "write_atomic", written)
    return lambda: begun[0].join(60)


def test_a_site_that_is_revoked_while_another_is_invited_stays_revoked(sites, tmp_path, monkeypatch):
    done = while_written(monkeypatch, "sites.json", lambda: revoke(sites, "b"))
    invite(sites, "e", keys_of(tmp_path, "e"))
    done()
    assert [(site.name, site.revoked) for site in invited(sites)] == [(name, name == "b") for name in "abcde"]


def test_a_site_that_is_invited_while_others_are_settled_on_is_refused_and_not_forgotten(sites, tmp_path, monkeypatch):
    refused = []

    def late():
        try:
            invite(sites, "e", keys_of(tmp_path, "e"))
        except FederationError as error:
            refused.append(str(error))

    done = while_written(monkeypatch, "participants.json", late)
    assert [site.name for site in participants(sites)] == list("abcd")
    done()
    assert [text.partition(",")[0] for text in refused] == ["e cannot be invited any more"]
    assert [site.name for site in invited(sites)] == list("abcd")


def test_a_command_that_waits_for_another_too_long_says_so_and_changes_nothing(sites, monkeypatch):
    monkeypatch.setattr(federation_folder, "TURN", 0.1)
    with federation_folder._changing(sites), pytest.raises(CheckpointError, match="is in use by process"):
        revoke(sites, "b")
    assert not any(site.revoked for site in invited(sites))
    revoke(sites, "b")


class Recording(AddingEngine):
    """Of those that are asked, who is revoked does not answer; before the second round, one is."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def ask(self, tasks, deadline=None):
        gone = {site.name for site in invited(self.folder) if site.revoked}
        for reply in super().ask(tasks, deadline):
            yield Reply(reply.client, 0.0, failure="its site was revoked") if reply.client in gone else reply


def test_a_revoked_site_is_in_no_cohort_and_counts_for_no_quorum(sites):
    participants(sites)
    told = federation("federation.quorum=1", "federation.fraction=0.5", engine=Recording(sites))
    own = make_sampler(told.recipe.federation, None)
    told = dataclasses.replace(told, sample=coordinator._among_staying(own, sites))
    first = federate(dataclasses.replace(told, recipe=told.recipe), begin()).rounds
    assert [len(record.cohort) for record in first] == [2, 2, 2]
    for name in "abc":
        revoke(sites, name)
    assert [record.cohort for record in federate(told, begin()).rounds] == [("d",)] * 3
    assert all(record.failure is None for record in federate(told, begin()).rounds)
    revoke(sites, "d")
    with pytest.raises(FederationError, match="All sites of .* are revoked"):
        federate(told, begin())


def test_a_sampler_without_revoked_sites_draws_as_in_a_rehearsal(sites):
    told = federation("federation.fraction=0.5")
    own = make_sampler(told.recipe.federation, None)
    cohorts = [
        [record.cohort for record in federate(dataclasses.replace(told, sample=one), begin()).rounds]
        for one in (own, coordinator._among_staying(own, sites))
    ]
    assert cohorts[0] == cohorts[1]


def test_the_quorum_before_the_first_round_is_of_those_who_are_not_revoked(papers, monkeypatch):  # noqa: F811
    needed = []

    def over_link(setting, folder, made, listen, sites, deadline):
        needed.append(sites())
        raise Killed

    monkeypatch.setattr(coordinator, "_over_link", over_link)
    text = (papers / "federation" / "recipe.yaml").read_text()
    assert "quorum: 0.5" in text
    (papers / "federation" / "recipe.yaml").write_text(text.replace("quorum: 0.5", "quorum: 1.0"))
    for revoked in (None, "south"):
        participants(papers / "federation")
        if revoked:
            revoke(papers / "federation", revoked)
        with pytest.raises(Killed):
            coordinator.serve(papers / "federation")
    assert needed == [2, 1]


def test_a_quorum_of_more_sites_than_there_are_is_refused_before_anything_is_loaded(bellwether, papers, monkeypatch):  # noqa: F811
    monkeypatch.setattr(coordinator, "prepare_coordinator", None)
    outcome = bellwether("federation", "serve", "--quorum", "3")
    assert outcome.code == 2
    assert "--quorum is 3, and 2 of the sites of federation are not revoked" in " ".join(outcome.err.split())
    assert not (papers / "federation" / "run").exists()


@pytest.mark.parametrize(("fraction", "needed"), [(0.55, 55), (0.07, 7), (0.001, 1), (1.0, 100)])
def test_a_quorum_is_its_share_of_those_who_stay_and_not_one_more(tmp_path, monkeypatch, fraction, needed):
    monkeypatch.setattr(coordinator, "_staying", lambda folder: ["a site"] * 100)
    recipe = load_recipe(None, [f"federation.quorum={fraction}"])
    assert coordinator._needed(tmp_path, recipe, None) == needed


def test_a_site_that_is_revoked_while_the_quorum_is_waited_for_is_not_waited_for_and_does_not_count(tmp_path):
    engine, post = world(tmp_path)
    post.away.add("south")
    asked = []

    def needed():
        asked.append(engine.ready)
        if len(asked) == 20:
            post.out.add("south")
        return 2 - len(post.out)

    engine.wait(needed, 86_400.0)  # of two sites, one of which never comes
    assert post.clock[0] < 60
    post.out = {"north"}  # which is there, and is not counted
    post.away.add("south")
    with pytest.raises(FederationError, match="0 of 2 sites are there after 5 s, and 1 are needed"):
        engine.wait(lambda: 1, 5)


def test_a_site_that_is_revoked_while_so_many_are_waited_for_that_there_are_no_more_is_told_at_once(sites):
    recipe = load_recipe(None)
    assert coordinator._needed(sites, recipe, 4) == 4
    revoke(sites, "b")
    with pytest.raises(FederationError, match="--quorum is 4, and 3 of the sites of"):
        coordinator._needed(sites, recipe, 4)


def test_the_end_is_told_to_sites_that_come_later_and_to_none_twice(tmp_path):
    engine, post = world(tmp_path)
    post.away.add("south")
    post.back["south"] = 3000.0
    told = []
    engine.end(seconds=3600.0, absent=3600.0, told=told.append)
    assert told == ["north", "south"]
    assert 3000 < post.clock[0] < 3000 + 3 * LATEST  # it says hello, is told, and has heard
    ends = [name for name, parcel in post.sent if b'"end"' in parcel.header]
    assert ends == ["north", "south"]


def test_the_end_is_told_again_where_the_answer_is_lost_and_not_to_those_who_know(tmp_path):
    engine, post = world(tmp_path)
    post.faults["south", "end"], given = once(lambda answer: LOST)
    told = []
    engine.end(seconds=60.0, known=["north"], told=told.append)
    assert (told, len(given)) == (["south"], 2)
    assert not post.sites["north"].ended


def test_a_site_at_work_has_the_time_of_a_task_for_the_end_and_one_that_is_away_a_moment(tmp_path):
    for away, least in ((False, 1800.0), (True, 20.0)):
        engine, post = world(tmp_path)
        post.faults["south", "end"] = lambda answer: None  # it is at work still
        engine.wait(lambda: 2, 5)
        if away:
            post.away.add("south")
        begun, told = post.clock[0], []
        engine.end(seconds=1800.0, told=told.append)
        assert told == ["north"]
        assert least <= post.clock[0] - begun < least + 1


def test_a_revoked_site_and_one_that_cannot_be_believed_are_not_waited_for_at_the_end(tmp_path):
    engine, post = world(tmp_path)
    post.out.add("north")
    post.faults["south", "end"] = lambda answer: dataclasses.replace(answer, signature=bytes(64))
    told = []
    engine.end(seconds=86_400.0, absent=86_400.0, told=told.append)
    assert told == []
    assert post.clock[0] < 5
    assert sum(b'"end"' in parcel.header for _, parcel in post.sent) == 3


class Ended:
    """A federation whose rounds are all done, and what is asked of its engine when it is served again."""

    def __init__(self, folder, monkeypatch):
        self.asked = []
        (folder / "run" / "adapter").mkdir(parents=True)
        (folder / "run" / "checkpoints" / "0002").mkdir(parents=True)
        monkeypatch.setattr(coordinator, "run", lambda *anything, **more: self.asked.append(more))


def test_after_a_round_that_failed_a_coordinator_says_what_can_be_done_where_sites_were_missing(papers, monkeypatch):  # noqa: F811
    def fails(*words, **more):
        raise RoundFailed("Round 2 failed.")

    monkeypatch.setattr(coordinator, "run", fails)
    with pytest.raises(RoundFailed, match=r"^Round 2 failed\. .* goes on once they are back\.$"):
        coordinator.serve(papers / "federation")


def test_a_federation_that_all_sites_have_the_result_of_is_served_by_one_sentence(bellwether, papers, monkeypatch):  # noqa: F811
    folder = papers / "federation"
    ended = Ended(folder, monkeypatch)
    assert untold(folder) == ["north", "south"]
    note_told(folder, "north")
    coordinator.serve(folder)
    assert len(ended.asked) == 1  # since south has not got it
    note_told(folder, "south")
    outcome = bellwether("federation", "serve")
    assert outcome.code == 0, outcome.err
    assert "all sites have it; nothing is left to do." in " ".join((outcome.out + outcome.err).split())
    assert len(ended.asked) == 1
    (folder / "told.json").write_text('["north"]')
    revoke(folder, "south")
    assert coordinator.serve(folder) is None
    assert len(ended.asked) == 1


@pytest.mark.slow
def test_a_site_that_missed_the_end_gets_the_result_when_the_federation_is_served_again(bellwether, papers):  # noqa: F811
    north, first = joining(papers, "north"), serving(papers, "--quorum", "1")
    finished(north)
    assert "Without the result are still: south." in finished(first)

    def served_again():
        process = serving(papers)  # whose quorum is 2 sites
        wait_for(lambda: "have not got it: south." in process.said()[0] or process.poll() is not None, "the waiting")
        return process

    interrupted = served_again()
    time.sleep(1)
    interrupted.send_signal(signal.SIGINT)
    assert "Without the result are still: south." in finished(interrupted)
    again = served_again()
    south = joining(papers, "south")
    finished(south)
    finished(again)
    assert weights(papers / "south") == weights(papers / "north") == weights(papers / "federation" / "run")
    assert bellwether("federation", "serve").code == 0


def test_a_coordinators_folder_that_was_moved_is_served_from_where_it_is(bellwether, papers, monkeypatch):  # noqa: F811
    kill_while_waiting(papers / "federation", monkeypatch)
    (papers / "federation").rename(papers / "restored")
    outcome = bellwether("federation", "status", "--folder", "restored")
    assert outcome.code == 0, outcome.err
    assert str(papers / "federation") not in (papers / "restored" / "federation.json").read_text()

    def killed(setting, folder, made, *anything):
        assert made.outer.chain == papers / "restored" / "server.crt"
        raise Killed

    monkeypatch.setattr(coordinator, "_over_link", killed)
    with pytest.raises(Killed):
        coordinator.serve(papers / "restored")


def test_an_invitation_does_not_tell_where_anything_is_at_the_coordinator(bellwether, papers, tiny_llama, dolly_like):  # noqa: F811
    text = (papers / "north.invitation").read_text()
    for place in (tiny_llama, dolly_like, papers):
        assert str(place.parent) not in text
    path = papers / "federation" / "recipe.yaml"
    assert str(tiny_llama) in path.read_text()  # the coordinator's own
    recipe = json.loads(text)["recipe"]
    assert f"path: ./{tiny_llama.name}" in recipe
    for model in ("starter", "org/model"):
        path.write_text(path.read_text().replace(str(tiny_llama), model).replace("starter", model))
        assert load_recipe(path).model.path == model
        key = json.loads(text)["key"]
        assert f"path: {model}\n" in invite(papers / "federation", "north", key).recipe


def test_an_invitation_names_files_of_a_selection_without_their_folders(tmp_path):
    folder, here = tmp_path / "federation", "/srv/private"
    fields = [
        "selection.method=hierarchical",
        "selection.space=shared",
        f"selection.projection_sources=[{here}/a.jsonl]",
    ]
    make_federation_folder(folder, load_recipe(None, fields), {}, "127.0.0.1:9")
    recipe = invite(folder, "north", keys_of(tmp_path, "north")).recipe
    assert here not in recipe
    assert "./a.jsonl" in recipe


def put_old_certificate(folder, stem, days):
    """Put a certificate for 127.0.0.1 in the place of a federation's own, begun a year before it ends in some days."""
    key = serialization.load_pem_private_key((folder / f"{stem}.key").read_bytes(), None)
    signing = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old")]))
        .issuer_name(x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()).subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(end - datetime.timedelta(days=365))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(signing, hashes.SHA384())
    )
    (folder / f"{stem}.crt").write_bytes(built.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(("days", "anew"), [(-3, 2), (12, 2), (60, 0)])
def test_certificates_that_end_soon_or_have_ended_are_made_anew_by_the_same_authority(tmp_path, days, anew):
    folder = tmp_path / "federation"
    made = make_federation_folder(folder, load_recipe(None), {}, "127.0.0.1:9")
    kept = {name: (folder / name).read_bytes() for name in ("ca.crt", "ca.key", "server.key", "inner.key")}
    assert days_left(folder / "ca.crt") > 9 * 365
    for stem in ("server", "inner"):
        put_old_certificate(folder, stem, days)
    foretold = [one for one in status(folder) if "federation serve makes it anew" in one]
    assert len(foretold) == bool(anew)
    said = list(coordinator.check_certificates(folder, made))  # which agrees on TLS with it, as sites do
    assert sum("was made anew" in one for one in said) == len(said) == anew
    assert days_left(folder / "server.crt") >= 60 - 1
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_a_certificate_of_another_authority_is_never_made_anew(tmp_path):
    folder, other = tmp_path / "federation", tmp_path / "other"
    made = make_federation_folder(folder, load_recipe(None), {}, "127.0.0.1:9")
    make_federation_folder(other, load_recipe(None), {}, "127.0.0.1:9")
    put_old_certificate(other, "server", 12)
    (folder / "server.crt").write_bytes((other / "server.crt").read_bytes())
    (folder / "server.key").write_bytes((other / "server.key").read_bytes())
    with pytest.raises(FederationError, match="Sites would refuse the certificate"):
        list(coordinator.check_certificates(folder, made))
    assert (folder / "server.crt").read_bytes() == (other / "server.crt").read_bytes()
