"""Masked updates across sites: keys are signed, and a site believes those alone whose words a person entered."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")

from forked import start
from masking import MaskingEngine, secured
from test_federate import begin
from test_rehearsal import finished, weights
from test_remote import FACTS, HOMES, KEYS, Post, resident
from test_resident import TRAIN, ask
from test_sites import FIELDS, dolly_rows, papers, refused, write_rows  # noqa: F401

from bellwether.engine.remote import Party, RemoteEngine
from bellwether.errors import RoundFailed
from bellwether.exchange.messages import SECRETS, Announced, AnnounceTask, Masking, ShareTask, UnmaskTask
from bellwether.federate import federate
from bellwether.recipe.recipe import SecureAggregation
from bellwether.site.peers import check_signed, signed
from bellwether.tools.randomness import Draws

CLIENT_KEYS = {client: KEYS[name].public_key() for name, clients in HOMES.items() for client in clients}
ANNOUNCE = AnnounceTask(1, 4, SecureAggregation(enabled=True), Draws({SECRETS: 7}))


def masked_site(name, folder, engine, peers=CLIENT_KEYS):
    """A site that agreed to masked updates."""
    site = resident(name, folder, engine=engine, peers=peers)
    recipe = secured(engine=engine).recipe
    site._holdings = replace(site._holdings, recipe=recipe)
    return site


def masked_world(folder, between=lambda task: task, **more):
    """A coordinator's engine with two sites; ``between`` changes what it relays."""
    post = Post({name: masked_site(name, folder, MaskingEngine(folder / name, real=True), **more) for name in HOMES})
    parties = [Party(name, KEYS[name].public_key(), clients) for name, clients in HOMES.items()]
    clock = lambda: post.clock[0]  # noqa: E731
    engine = RemoteEngine(
        post, parties, KEYS["coordinator"], "fed/1", FACTS, [].append, None, clock=clock, pause=post.pause
    )
    relayed = engine.ask
    engine.ask = lambda tasks, deadline=None: relayed({c: between(task) for c, task in tasks.items()}, deadline)
    engine.method = MaskingEngine(folder).method
    return engine


def test_sites_come_to_the_mean_of_one_process_and_the_coordinator_sees_no_update(tmp_path):
    remote = federate(secured(engine=masked_world(tmp_path)), begin())
    # By hand: (100 + 400 + 900 + 1600) / 100; what float32 holds of it.
    for value in remote.adapter.tensors.values():
        np.testing.assert_allclose(value, 30, rtol=np.finfo(np.float32).eps)
    record = remote.rounds[0]
    assert (record.secure.announced, record.secure.opened) == (4, 4)


def swapped(task):
    """Keys of the coordinator's own in place of b's."""
    if not isinstance(task, ShareTask):
        return task
    forged = Announced(*(bytes([number]) * 32 for number in (1, 2, 3)), signature=task.keys["b"].signature)
    return replace(task, keys={**task.keys, "b": forged})


def test_keys_that_the_coordinator_puts_in_a_sites_place_are_not_taken(tmp_path):
    with pytest.raises(RoundFailed, match="the keys that came as those of b are not signed by it"):
        federate(secured(engine=masked_world(tmp_path, swapped)), begin())


def test_keys_of_sites_that_nobody_entered_are_not_taken(tmp_path):
    known = {client: key for client, key in CLIENT_KEYS.items() if client != "d"}
    with pytest.raises(RoundFailed, match="no key of d was entered at this site"):
        federate(secured(engine=masked_world(tmp_path, peers=known)), begin())


def test_a_signature_is_for_one_federation_round_and_client():
    key = KEYS["north"]
    announced = Announced(b"1" * 32, b"2" * 32, b"3" * 32)
    good = signed(announced, key, "fed", 1, "a")
    peers = {"a": key.public_key(), "b": key.public_key()}
    check_signed(ShareTask(1, {"a": good}), peers, "fed")
    for task, federation in (
        (ShareTask(2, {"a": good}), "fed"),
        (ShareTask(1, {"b": good}), "fed"),
        (ShareTask(1, {"a": good}), "other"),
        (ShareTask(1, {"a": announced}), "fed"),
        (ShareTask(1, {"a": replace(good, pledge=b"4" * 32)}), "fed"),
        (ShareTask(1, {"a": replace(good, masking=b"4" * 32)}), "fed"),
    ):
        with pytest.raises(Exception, match="are not signed by it"):
            check_signed(task, peers, federation)


def test_a_site_that_agreed_to_masks_sends_no_update_without_and_the_other_way_round(tmp_path):
    site = masked_site("north", tmp_path, MaskingEngine(tmp_path))
    assert "its update would not be masked, which is not what was agreed to" in ask(site, TRAIN)
    (tmp_path / "plain").mkdir()
    plain = resident("north", tmp_path / "plain")
    said = ask(plain, replace(TRAIN, masking=Masking({}, 10, 1.0)))
    assert "its update would be masked, which is not what was agreed to" in said
    for task, kind in ((ANNOUNCE, "announce"), (ShareTask(1, {}), "share"), (UnmaskTask(1, ()), "unmask")):
        assert "which this site did not agree to" in ask(plain, task, kind, number=kind)


def test_a_task_that_is_asked_again_gets_the_same_answer_and_a_round_begun_anew_other_secrets(tmp_path):
    site = masked_site("north", tmp_path, MaskingEngine(tmp_path / "north", real=True))
    first, again, anew = (ask(site, ANNOUNCE, "announce", number=number) for number in ("1", "1", "2"))
    keys = [said_keys(tmp_path, number) for number in range(3)]
    assert first == again == anew  # manifests; the keys stand in the bodies
    assert keys[0] == keys[1] != keys[2]


def said_keys(folder: Path, number: int):
    lines = [json.loads(line) for line in (folder / "north" / "ledger.jsonl").read_text().splitlines()]
    return [line["content"] for line in lines if line["way"] == "reply"][number]


# By their own commands ----------------------------------------------------------------------------


def test_a_person_enters_words_of_other_sites_and_too_few_are_told(bellwether, papers, tiny_recipe):  # noqa: F811
    words = {name: bellwether("site", "keygen", "--folder", name).out.strip() for name in ("east", "west")}
    trust = partial(bellwether, "site", "trust")
    assert "east is known at north by this word." in trust("east", words["east"], "--folder", "north").out
    assert "in place of another one" in trust("east", words["west"], "--folder", "north").out
    own = json.loads((papers / "north.invitation").read_text())["key"]
    refused(trust("north", own, "--folder", "north"), "This word is that of north itself")
    refused(trust("../x", words["east"], "--folder", "north"), "is no name of a site")
    refused(trust("east", "bw1-x", "--folder", "north"), "is no public key of a site")
    made = bellwether("federation", "init", tiny_recipe, *MASKED, "--address", "127.0.0.1:9", "--folder", "masked")
    assert made.code == 0, made.err
    invited = bellwether("federation", "invite", "north", own, "--folder", "masked", "--out", "masked.invitation")
    assert invited.code == 0, invited.err
    words = ("masked.invitation", "--data", "north.jsonl", "--folder", "north", "--yes")
    refused(bellwether("site", "join", *words), "knows 1 other sites, where 2 are needed")


MASKED = (*FIELDS, "secure_aggregation.enabled=true")


@pytest.mark.slow
def test_a_federation_of_three_sites_masks_its_updates(bellwether, tiny_recipe, tiny_llama, tmp_path):
    from test_sites import free_port

    (tmp_path / tiny_llama.name).symlink_to(tiny_llama)
    address = f"127.0.0.1:{free_port()}"
    done = bellwether("federation", "init", tiny_recipe, *MASKED, "--address", address)
    assert done.code == 0, done.err
    names = ("north", "south", "west")
    words = {name: bellwether("site", "keygen", "--folder", name).out.strip() for name in names}
    for name in names:
        assert bellwether("federation", "invite", name, words[name]).code == 0
        write_rows(tmp_path / f"{name}.jsonl", dolly_rows(("open_qa", "closed_qa"), 6))
        for other in set(names) - {name}:
            assert bellwether("site", "trust", other, words[other], "--folder", name).code == 0
    options = ("--listen", "127.0.0.1", "--quorum", "3", "--deadline", "120")
    coordinator = start("federation", "serve", *options, folder=tmp_path)
    joined = [
        start(
            "site", "join", f"{name}.invitation", "--data", f"{name}.jsonl", "--folder", name, "--yes", folder=tmp_path
        )
        for name in names
    ]
    finished(coordinator)
    said = [finished(one) for one in joined]
    run = tmp_path / "federation" / "run"
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["secure"]["opened"] for line in rounds] == [3, 3]
    assert all(weights(tmp_path / name) == weights(run) for name in names)
    assert "the coordinator sees the sum of the updates of at least 60% of the sites" in " ".join(said[0].split())
    ledger = [json.loads(line) for line in (tmp_path / "north" / "ledger.jsonl").read_text().splitlines()]
    assert {line["protection"] for line in ledger if (line["way"], line["kind"]) == ("reply", "train")} == {"masked"}
    assert not list((tmp_path / "north" / "clients").rglob("secure/*.json"))
