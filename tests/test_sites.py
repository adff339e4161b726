"""Coordinator and sites by their own commands: papers, keys, terms, refusals, and a whole federation of processes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from conftest import dolly_rows, json_lines, write_rows
from forked import alive, family, start
from test_flower import activation
from test_rehearsal import finished, wait_for, weights

pytest.importorskip("flwr")

FIELDS = ("data.test_rows_per_category=10", "partition.client_test_fraction=0.2", "federation.fraction=1")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def papers(bellwether, tiny_recipe, tiny_llama, tmp_path):
    """A coordinator's folder, and two invited sites with rows and the base of their own: all in the current folder."""
    (tmp_path / tiny_llama.name).symlink_to(tiny_llama)
    address = f"127.0.0.1:{free_port()}"
    done = bellwether("federation", "init", tiny_recipe, *FIELDS, "--address", address)
    assert done.code == 0, done.err
    for number, name in enumerate(("north", "south")):
        key = bellwether("site", "keygen", "--folder", name)
        assert key.code == 0, key.err
        done = bellwether("federation", "invite", name, key.out.strip())
        assert done.code == 0, done.err
        rows = dolly_rows(("open_qa", "closed_qa", "summarization"), 6 + number)
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def test_secrets_are_their_owners_alone(papers):
    def mode(path):
        return stat.S_IMODE((papers / path).stat().st_mode)

    assert mode("federation") == mode("north") == 0o700
    secrets = ["federation/ca.key", "federation/server.key", "federation/inner.key", "federation/signing.key"]
    for path in (*secrets, "north/signing.key", "north/flower.key"):
        assert mode(path) == 0o600, path
        assert (papers / path).read_bytes() not in (papers / "north.invitation").read_bytes()


def test_keys_are_made_as_a_whole_in_a_folder_of_the_sites_own(bellwether, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "rows.jsonl").write_text("")
    refused(bellwether("site", "keygen", "--folder", "shared"), "shared holds other things, and others than you can re")
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755
    shared.chmod(0o700)
    word = bellwether("site", "keygen", "--folder", "shared").out.strip()
    refused(bellwether("site", "keygen", "--folder", "shared"), "shared holds keys already")
    # Killed between the two files, of which the second tells that there are keys.
    (shared / "signing.key").unlink()
    anew = bellwether("site", "keygen", "--folder", "shared")
    assert anew.code == 0, anew.err
    assert anew.out.strip() != word


def test_the_invitation_to_another_federation_is_not_replaced(bellwether, papers, tiny_recipe):
    kept = (papers / "north.invitation").read_text()
    words = ("--address", "127.0.0.1:9", "--folder", "other")
    made = bellwether("federation", "init", tiny_recipe, *FIELDS, *words)
    assert "invite SITE PUBLIC_KEY --folder other, then bellwether federation serve --folder other" in made.out
    word = json.loads(kept)["key"]
    refused(bellwether("federation", "invite", "north", word, "--folder", "other"), "name another file with --out")
    assert (papers / "north.invitation").read_text() == kept
    again = bellwether("federation", "invite", "north", word)
    assert again.code == 0, again.err


def test_a_secret_file_is_whole_or_not_there(tmp_path, monkeypatch):
    from bellwether.errors import CheckpointError
    from bellwether.site import keys

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(keys.os, "fsync", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            keys.write_private(tmp_path / "noise.key", bytes(32))
    assert list(tmp_path.iterdir()) == []
    keys.write_private(tmp_path / "noise.key", bytes(32))
    with pytest.raises(CheckpointError, match="File exists"):
        keys.write_private(tmp_path / "noise.key", bytes(16))
    assert (tmp_path / "noise.key").read_bytes() == bytes(32)
    assert stat.S_IMODE((tmp_path / "noise.key").stat().st_mode) == 0o600


def test_the_certificate_is_what_openssl_takes_for_that_address(papers):
    import subprocess

    for name, good in (("127.0.0.1", True), ("127.0.0.2", False)):
        words = ["openssl", "verify", "-CAfile", "federation/ca.crt", "-verify_ip", name, "federation/server.crt"]
        assert (subprocess.run(words, cwd=papers, capture_output=True, check=False).returncode == 0) is good


def test_status_says_who_is_invited(bellwether, papers):
    assert bellwether("federation", "revoke", "south").code == 0
    out = bellwether("federation", "status").out
    assert "north: invited, has not taken part yet." in out
    assert "south: revoked" in out
    assert "0 of 2 rounds are done." in out
    assert "Its certificate ends in 364 days" in out


def refused(outcome, sentence):
    assert outcome.code == 2, outcome.out
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err


def test_papers_that_cannot_be_used_are_refused_in_one_sentence(bellwether, papers, tiny_recipe):
    refused(bellwether("federation", "init", tiny_recipe, "--address", "h:1"), "federation exists already")
    for address in ("nowhere", "a b:1", "host:99999", "host:"):
        words = ("federation", "init", tiny_recipe, "--folder", "new", "--address", address)
        refused(bellwether(*words), "is no address; give HOST:PORT")
    refused(bellwether("federation", "init", tiny_recipe, "--folder", "new"), "say where sites reach this coordinator")
    assert not (papers / "new").exists()
    refused(bellwether("federation", "invite", "east", "bw1-abc"), "is no public key of a site")
    refused(bellwether("federation", "invite", "../east", "bw1-abc"), "is no name for a site")
    other = bellwether("site", "keygen", "--folder", "east").out.strip()
    refused(bellwether("federation", "invite", "north", other), "north is invited with another key")
    refused(bellwether("federation", "revoke", "west"), "'west' is not invited")
    refused(bellwether("federation", "status", "--folder", "north"), "north is no folder of a federation")
    refused(bellwether("site", "keygen", "--folder", "east"), "east holds keys already")
    assert bellwether("federation", "revoke", "south").code == 0
    key = json.loads((papers / "south.invitation").read_text())["key"]
    refused(bellwether("federation", "invite", "south", key), "The key of south was revoked")
    refused(bellwether("federation", "invite", "west", key), "The key of west was revoked")


def changed(papers, **fields):
    """An invitation with other fields."""
    path = papers / "changed.invitation"
    path.write_text(json.dumps({**json.loads((papers / "north.invitation").read_text()), **fields}))
    return path


def join(bellwether, invitation="north.invitation", *words):
    return bellwether("site", "join", invitation, "--data", "north.jsonl", "--folder", "north", "--yes", *words)


def test_a_site_that_cannot_take_part_is_told_why_before_it_connects(bellwether, papers):
    facts = json.loads((papers / "north.invitation").read_text())["facts"]
    other = changed(papers, facts={**facts, "base model": "0" * 64})
    refused(join(bellwether, other), "This site cannot take part: base model is ")
    other = changed(papers, facts={**facts, "flwr": "1.41.0"})
    refused(join(bellwether, other), "flwr is 1.42.0 here and 1.41.0 at the coordinator; bring it to the same.")
    refused(join(bellwether, "south.invitation"), "The invitation of south is for another key than the one in north")
    refused(join(bellwether, "none.invitation"), "none.invitation is no file; give the invitation")
    refused(join(bellwether, changed(papers, recipe="rounds: many")), "rounds")
    words = ("site", "join", "north.invitation", "--data", "north.jsonl", "--folder", "north")
    outcome = bellwether(*words)
    refused(outcome, "Nobody is there to agree to these terms")
    assert "What leaves this machine each time:" in outcome.out
    assert "What never leaves it: rows" in outcome.out
    # By hand: rank 2; q and v are 16 x 16 in one layer, so 2 x 2 x (16 + 16) numbers.
    assert "Trained: a LoRA adapter of 128 numbers, by fedavg, on 14 rows of yours." in outcome.out
    assert not [*(papers / "north").rglob("consent.json")]


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("rounds: 1", "federation.rounds is 2, where at most 1 are allowed"),
        ("methods: [scaffold]", "method.name is fedavg, where scaffold are allowed"),
        ("minutes: 3", "policy.yaml: minutes: Extra inputs are not permitted; mend it."),
        ("rounds: [", "policy.yaml cannot be read"),
    ],
)
def test_a_policy_keeps_a_site_from_joining(bellwether, papers, policy, sentence):
    (papers / "north" / "policy.yaml").write_text(policy)
    refused(join(bellwether), sentence)


def foreign_server(folder: Path) -> str:
    """Serve one connection at an address with a certificate of another authority."""
    from bellwether.site.keys import make_authority, make_certificate

    (folder / "foreign").mkdir()
    make_authority(folder / "foreign", "foreign", 1)
    made = make_certificate(folder / "foreign", "server", ["127.0.0.1"], 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.chain, made.key)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listening, contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                context.wrap_socket(connection, server_side=True).close()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_site_says_what_is_wrong_with_the_address(bellwether, papers):
    refused(join(bellwether, changed(papers, address="no-such-host.invalid:8443")), "is not known here")
    refused(
        join(bellwether, changed(papers, address=foreign_server(papers))), "has a certificate that is not the federa"
    )
    port = json.loads((papers / "north.invitation").read_text())["address"].rpartition(":")[2]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(port)))
        taken.listen()
        outcome = bellwether("federation", "serve", "--listen", "127.0.0.1")
        refused(outcome, f"The coordinator cannot listen on 127.0.0.1:{port}")


def test_a_federation_of_three_processes_survives_kills_and_takes_in_a_late_site(papers):
    def coordinator(quorum):
        words = ("federation", "serve", "--listen", "127.0.0.1", "--quorum", quorum, "--deadline", "120")
        return start(*words, folder=papers)

    write_rows(papers / "own-test.jsonl", [{"instruction": "Secret question?", "response": "Secret answer"}] * 3)

    def site(name, *more):
        words = (f"{name}.invitation", "--data", f"{name}.jsonl", "--folder", name, "--yes", *more)
        return start("site", "join", *words, folder=papers)

    # The site is there before its coordinator, and waits.
    north = site("north", "--test", "own-test.jsonl")
    wait_for(lambda: "waits until the coordinator is there" in north.said()[0] or north.poll() is not None, "waiting")
    first = coordinator(1)
    committed = papers / "federation" / "run" / "checkpoints"
    wait_for(lambda: (committed / "0000").exists() or first.poll() is not None, "the beginning")
    (supernode,) = family(north.pid)
    os.kill(supernode, signal.SIGTERM)  # by SIGKILL, Flower would let it come back after 50 s only
    wait_for(lambda: not alive(supernode), "the end of the SuperNode")
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert north.poll() is None, north.said()
    south = site("south")
    again = coordinator(2)
    finished(again)
    for one, name in ((north, "north"), (south, "south")):
        out = finished(one)
        assert "The federation has ended" in out
        assert re.search(r"Round 2: done in \d+ s; \d\.\d kB leave this site\.", out), out
        assert weights(papers / name) == weights(papers / "federation" / "run")
        assert "by 2 sites in a federation" in (papers / name / "adapter" / "README.md").read_text()
        assert "3 held-out rows" in out if name == "north" else "held-out rows" in out  # its own fifth
        assert (papers / name / "report.html").read_bytes().startswith(b"<!DOCTYPE html>")
        assert not list((papers / name).rglob("answers"))  # nobody asks for them any more
    assert "Flower's SuperNode has ended and is begun again" in north.said()[0]
    rounds = [json.loads(line) for line in (papers / "federation" / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [1, 2]
    assert {client["client"] for client in rounds[-1]["clients"]} == {"north", "south"}
    everything = b"".join(path.read_bytes() for path in (papers / "federation").rglob("*") if path.is_file())
    for text in (b"Task 3?", b"Secret question?", b"Secret answer"):
        assert text not in everything, "of a site's rows, none is at the coordinator"


def test_who_is_revoked_while_a_federation_is_served_is_let_in_no_more_at_once(bellwether, papers):
    from bellwether.engine.certificate import Certificate
    from bellwether.engine.flower.link import Link
    from bellwether.site.coordinator import _Roster
    from bellwether.site.federation_folder import read_federation

    folder = papers / "federation"
    inner = Certificate(folder / "inner.crt", folder / "inner.key", folder / "ca.crt")
    with Link(folder, inner, read_federation(folder).outer, "127.0.0.1", 0) as link:
        roster = _Roster(folder, link)
        with link.dispatch():
            assert activation(link, papers, "south") == 200
            assert roster.revoked() == set()
            assert bellwether("federation", "revoke", "south").code == 0
            assert roster.revoked() == {"south"}
            assert [activation(link, papers, name) for name in ("south", "north")] == [401, 200]


class Ends:
    """An inbox whose SuperNode ends whenever it is begun, until a message comes."""

    starts = 1

    def take(self):
        self.starts += 1
        return object() if self.starts == 4 else None


def test_a_site_is_told_once_why_flowers_own_process_may_have_ended():
    from bellwether.site.joining import _Telling

    told = []
    telling = _Telling(Ends(), told.append)
    for _ in range(4):
        telling.take()
    # Once for what came before the message, and once for what came after it.
    assert len(told) == 2
    assert "where this site was revoked, ask the coordinator" in told[0]


def serving(papers, *words):
    options = ("--listen", "127.0.0.1", "--quorum", "2", "--deadline", "300", *words)
    return start("federation", "serve", *options, folder=papers)


def joining(papers, name, folder=None):
    words = (f"{name}.invitation", "--data", f"{name}.jsonl", "--folder", folder or name, "--yes")
    return start("site", "join", *words, folder=papers)


@pytest.mark.slow
def test_a_second_process_with_a_sites_keys_is_told_so_and_the_first_goes_on(papers):
    coordinator, north = serving(papers), joining(papers, "north")
    wait_for(lambda: "takes part" in north.said()[0] or north.poll() is not None, "north's hello")
    shutil.copytree(papers / "north", papers / "copy", ignore=shutil.ignore_patterns(".*", "*.json*", "supernode*"))
    copy = joining(papers, "north", "copy")
    wait_for(lambda: "where another process uses this site's keys" in copy.said()[0] or copy.poll() is not None, "it")
    assert copy.poll() is None
    south = joining(papers, "south")
    for process in (coordinator, north, south):
        finished(process)
    copy.send_signal(signal.SIGTERM)
    copy.wait()
    assert all(len(line["clients"]) == 2 for line in json_lines(papers / "federation" / "run" / "rounds.jsonl"))


@pytest.mark.slow
def test_a_site_comes_back_after_flowers_own_process_was_killed(papers):
    coordinator, north = serving(papers), joining(papers, "north")
    wait_for(lambda: "takes part" in north.said()[0] or north.poll() is not None, "north's hello")
    (supernode,) = family(north.pid)
    os.kill(supernode, signal.SIGKILL)
    south = joining(papers, "south")
    for process in (coordinator, north, south):
        finished(process)
    assert "Flower's SuperNode has ended and is begun again" in north.said()[0]
    assert all(len(line["clients"]) == 2 for line in json_lines(papers / "federation" / "run" / "rounds.jsonl"))
