"""The engine over sites and the resident process of a site, message by message: what is forged, late or foreign."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_federate import ROWS, START, A, AddingEngine, B, begin, federation

from bellwether.engine.remote import ABSENT, LATEST, TIMES, Party, RemoteEngine
from bellwether.errors import CheckpointError, FederationError
from bellwether.exchange.codec import encode_reply
from bellwether.exchange.messages import Payload, Reply, SurveyTask, TrainTask, Update, client_draws
from bellwether.exchange.seal import Header, Parcel, opened, sealed
from bellwether.exchange.sizes import payload_bytes
from bellwether.federate import federate
from bellwether.recipe.recipe import Selection, Training
from bellwether.site.ledger import Ledger, entries
from bellwether.site.resident import Holdings, Resident
from bellwether.tools.randomness import Randomness

pytest.importorskip("flwr")

HOMES = {"north": ("a", "b"), "south": ("c", "d")}
KEYS = {name: Ed25519PrivateKey.generate() for name in ("coordinator", *HOMES)}
FACTS = {"base model": "1234", "torch": "2.13.0"}


@dataclass(frozen=True)
class Came:
    message: str
    parcel: Parcel | None
    failure: str = ""


@dataclass
class Post:
    """Takes messages to residents in this process; ``faults`` changes what single sites answer to a kind of task."""

    sites: dict
    clock: list = field(default_factory=lambda: [0.0])
    faults: dict = field(default_factory=dict)
    away: set = field(default_factory=set)
    back: dict = field(default_factory=dict)  # seconds after which one that is away comes back
    out: set = field(default_factory=set)
    sent: list = field(default_factory=list)
    most: list = field(default_factory=list)  # bytes that each answer may have
    waiting: dict = field(default_factory=dict)

    def online(self):
        return {name: number for number, name in enumerate(self.sites) if name not in self.away | self.out}

    def revoked(self):
        return self.out

    def send(self, node, parcel, seconds, most):
        name = list(self.sites)[node]
        self.sent.append((name, parcel))
        self.most.append(most)
        header = opened(parcel, KEYS["coordinator"].public_key())
        fault = self.faults.get((name, header.kind), lambda answer: answer)
        message = f"message {len(self.sent)}"
        answer = fault(self.sites[name].answer(parcel))
        if answer is not None:
            self.waiting[message] = answer if isinstance(answer, Came) else Came(message, answer)
        return message

    def pause(self, seconds):
        self.clock[0] += seconds
        self.back = {name: left - seconds for name, left in self.back.items() if name in self.away}
        self.away -= {name for name, left in self.back.items() if left <= 0}

    def arrived(self, messages):
        return [replace(self.waiting.pop(one), message=one) for one in messages if one in self.waiting]


def resident(name, folder, facts=None, policy=lambda header, task: None, engine=None, tell=lambda text: None, **more):
    recipe = federation().recipe
    (folder / name).mkdir(exist_ok=True)
    shapes = {"q": (2, 2)}
    folders = {client: folder / name / client for client in HOMES[name]}
    work = engine or AddingEngine()
    holdings = Holdings(name, HOMES[name], recipe, work, facts or FACTS, START.config, shapes, folders)
    ledger = Ledger(folder / name)
    key, coordinator = KEYS[name], KEYS["coordinator"].public_key()
    return Resident(holdings, key, coordinator, "fed", ledger, policy, tell, **more)


def world(folder, events=None, deadline=None, **more):
    """A coordinator's engine with two sites, and the post between them."""
    post = Post({name: resident(name, folder, **more) for name in HOMES})

    parties = [Party(name, KEYS[name].public_key(), clients) for name, clients in HOMES.items()]
    watch = (events if events is not None else []).append
    clock = lambda: post.clock[0]  # noqa: E731
    return RemoteEngine(
        post, parties, KEYS["coordinator"], "fed/1", FACTS, watch, deadline, clock=clock, pause=post.pause
    ), post


def run(engine, *overrides, events=None):
    fields = ["federation.rounds=1", *overrides]
    return federate(federation(*fields, engine=engine, events=events, evaluating=("a", "c")), begin())


def test_a_federation_over_sites_gives_what_one_process_gives(tmp_path):
    engine, _ = world(tmp_path)
    remote = run(engine, "federation.rounds=3")
    local = federate(federation("federation.rounds=3"), begin())
    assert remote.adapter.fingerprint() == local.adapter.fingerprint()
    assert remote.evaluations[-1].clients.keys() == {"a", "c"}


def travelled(folder, way, round):
    """The bytes of a round's training by the sites' own ledgers."""
    lines = [entry for name in HOMES for entry in entries(folder / name)]
    return sum(line.bytes for line in lines if (line.way, line.kind, line.round) == (way, "train", round))


def test_bytes_of_a_record_are_those_that_travelled_refused_and_repeated_ones_too(tmp_path):
    engine, post = world(tmp_path)
    post.faults["north", "train"], _ = once(lambda answer: replace(answer, body=answer.body[:-1] + b"\1"))
    post.faults["south", "train"], given = once(lambda answer: LOST)
    first, second = run(engine, "federation.rounds=2").rounds
    assert len(first.left_out) == 1
    lost = given[0].size
    assert first.bytes_down == travelled(tmp_path, "task", 1)
    assert first.bytes_up + lost == travelled(tmp_path, "reply", 1)  # a lost answer has left its site, and did not come
    assert second.bytes_down == travelled(tmp_path, "task", 2)
    assert second.bytes_up == travelled(tmp_path, "reply", 2)
    local = federate(federation("federation.rounds=2"), begin()).rounds[1]
    for sites, simulated in ((second.bytes_up, local.bytes_up), (second.bytes_down, local.bytes_down)):
        assert simulated < sites < simulated + 4 * 4000  # what it is for, its signature, its settings


def reply_of(client, answer, key, **changes):
    """What a site would send that holds its own key and lies about something."""
    header = opened(answer, key.public_key())
    tensors = {key: value + np.float32(1) for key, value in START.tensors.items()}
    update = Update(client, header.round, tensors, 10, {"loss": 1.0, "tokens": 1})
    manifest, body = encode_reply(Reply(client, 1.0, update=replace(update, **changes)), "train")
    return sealed(header, key, manifest, body)


def other_header(answer, **changes):
    header = opened(answer, KEYS["south"].public_key())
    return sealed(replace(header, **changes), KEYS["south"], answer.manifest, answer.body)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda answer: replace(answer, body=answer.body[:-1] + b"\1"), "its content is not what was signed"),
        (lambda answer: replace(answer, signature=bytes(64)), "its signature is not that"),
        (lambda answer: Parcel(b"", b"", b""), "its signature is not that"),
        (lambda answer: sealed(opened(answer, KEYS["south"].public_key()), KEYS["north"], b"{}"), "its signature"),
        (lambda answer: other_header(answer, round=0), "its round is '0', where '1' is due"),
        (lambda answer: other_header(answer, run="fed/0"), "its run is 'fed/0'"),
        (lambda answer: other_header(answer, number="0" * 32), "its number is"),
        (lambda answer: other_header(answer, client="a"), "its client is 'a'"),
        (lambda answer: other_header(answer, way="task"), "its way is 'task'"),
        (lambda answer: replace(answer, body=bytes(2**24)), "its answer has 167"),
        (lambda answer: Came("", None, "its site is not connected any more"), "is not connected any more"),
        (lambda answer: reply_of("c", answer, KEYS["south"], rows=10**12), "it claims 1000000000000 rows"),
        (
            lambda answer: reply_of("c", answer, KEYS["south"], tensors={A: START.tensors[A], B: np.zeros((1, 1))}),
            "lora_B.weight is float64",
        ),
        (
            lambda answer: reply_of(
                "c", answer, KEYS["south"], tensors={A: START.tensors[A], B: np.full((2, 1), np.nan, np.float32)}
            ),
            "not finite",
        ),
        (lambda answer: reply_of("c", answer, KEYS["south"], tensors={A: np.zeros(1, np.float32)}), "not those due"),
    ],
)
def test_what_a_site_forges_is_left_out_and_the_others_count(tmp_path, fault, reason):
    engine, post = world(tmp_path)
    post.faults["south", "train"] = fault
    (record,) = run(engine).rounds
    assert {one.client for one in record.clients} == {"a", "b"}
    assert reason in record.left_out["d"] + record.left_out["c"]


def test_each_site_may_send_what_its_own_tasks_need_and_no_answer_more_than_its_task(tmp_path):
    engine, post = world(tmp_path)
    engine.wait(lambda: 2, 5)
    expected = []
    engine._expect = expected.append
    list(engine.ask({"a": asked_to_train(), "b": asked_to_train(), "c": asked_to_train(1000)}))
    # A manifest may have 4 MiB and a header 4 KiB.
    small, large = (2**22 + 2**12 + 3 * payload_bytes(asked_to_train(more).payload) for more in (0, 1000))
    assert large - small > 3 * 4000
    assert expected == [{"north": 2**20 + 3 * 2 * small, "south": 2**20 + 3 * large}]
    assert post.most == [2**20, 2**20, small, small, large]


def asked_to_train(more=0):
    """A task with so many numbers beside the adapter."""
    payload = Payload(START, arrays={"more": np.zeros(more, np.float32)} if more else {})
    return TrainTask(1, payload, Training(), 1, client_draws(Randomness(0), 1, "a"))


def test_an_answer_counts_once(tmp_path):
    engine, post = world(tmp_path)
    kept = []

    def replayed(answer):
        kept.append(answer)
        return kept[0]

    post.faults["south", "train"] = replayed
    first, second = run(engine, "federation.rounds=2", "federation.failed_rounds=1").rounds
    # The first answer stands for its own task, and for none of those after it.
    assert {one.client for one in first.clients} == {"a", "b", "c"}
    assert {one.client for one in second.clients} == {"a", "b"}
    assert "its round is '1', where '2' is due" in second.left_out["c"]


def once(fault):
    """A fault of the first answer alone; the list holds all answers, as the site gave them."""
    given = []

    def do(answer):
        given.append(answer)
        return fault(answer) if len(given) == 1 else answer

    return do, given


LOST = Came("", None, "its answer did not come whole")


def test_an_answer_that_is_lost_on_its_way_is_sent_again_and_not_worked_out_again(tmp_path):
    events, work = [], AddingEngine()
    engine, post = world(tmp_path, events, engine=work)
    post.faults["south", "train"], given = once(lambda answer: LOST)
    (record,) = run(engine).rounds
    assert {one.client for one in record.clients} == set(ROWS)
    assert record.left_out == {}
    assert given.count(given[0]) == 2  # the very bytes, signature and all
    assert sum("c" in tasks and isinstance(tasks["c"], TrainTask) for tasks in work.tasks) == 1
    said = "No answer of south has come (its answer did not come whole); it is asked again."
    assert [event.text for event in events if getattr(event, "warning", False)] == [said]


def test_a_site_that_was_killed_at_work_does_it_when_it_is_back(tmp_path):
    engine, post = world(tmp_path)
    north = resident("north", tmp_path)

    def killed(answer):
        # What it had written down by then, and no more: that the tasks came.
        lines = (tmp_path / "south" / "ledger.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "south" / "ledger.jsonl").write_text("".join(lines[:-1]))
        post.sites = {"north": north, "south": resident("south", tmp_path)}
        post.away.add("south")
        post.back["south"] = 5.0
        return Came("", None, "its site is not connected any more")

    post.faults["south", "train"], given = once(killed)
    (record,) = run(engine).rounds
    assert record.left_out == {}
    number = opened(given[0], KEYS["south"].public_key()).number
    assert [entry.way for entry in entries(tmp_path / "south") if entry.number == number] == ["task", "task", "reply"]


def test_a_site_whose_answers_never_come_is_asked_so_often_and_left_out(tmp_path):
    engine, post = world(tmp_path)
    post.faults["south", "train"] = lambda answer: LOST
    (record,) = run(engine).rounds
    assert record.left_out == dict.fromkeys("cd", "its answer did not come whole")
    assert sum(name == "south" and b'"train"' in parcel.header for name, parcel in post.sent) == 2 * TIMES


def test_a_site_that_goes_away_at_work_is_waited_for_a_moment(tmp_path):
    engine, post = world(tmp_path)

    def leaves(answer):
        post.away.add("south")
        return Came("", None, "its site is not connected any more")

    post.faults["south", "train"] = leaves
    (record,) = run(engine).rounds
    assert record.left_out == dict.fromkeys("cd", "its site is not connected any more")
    assert 2 * ABSENT < post.clock[0] < 2 * (ABSENT + LATEST) + 2  # to train, and to score


def test_a_site_that_is_revoked_at_work_takes_part_no_more_and_the_round_goes_on(tmp_path):
    engine, post = world(tmp_path)

    def revoked(answer):
        post.out.add("south")
        return answer

    post.faults["south", "train"] = revoked
    first, second = run(engine, "federation.rounds=2").rounds
    for record in (first, second):
        assert {one.client for one in record.clients} == {"a", "b"}
        assert record.left_out == dict.fromkeys("cd", "its site was revoked")
    assert post.clock[0] < 5


def test_a_silent_site_costs_no_more_than_the_deadline(tmp_path):
    engine, post = world(tmp_path, deadline=60)
    post.faults["south", "train"] = lambda answer: None
    (record,) = run(engine).rounds
    assert record.left_out == {"c": "it did not answer", "d": "it did not answer"}
    assert 60 <= post.clock[0] < 61


def test_a_site_that_is_not_there_is_waited_for_a_moment(tmp_path):
    engine, post = world(tmp_path)
    post.away.add("south")
    (record,) = run(engine).rounds
    assert record.left_out["c"] == "its site is not connected"
    assert 3 * ABSENT < post.clock[0] < 3 * (ABSENT + 2 * LATEST)  # to score before, to train, and to score at the end


def test_nobody_waits_for_a_site_that_was_revoked(tmp_path):
    engine, post = world(tmp_path)
    post.out.add("south")
    (record,) = run(engine).rounds
    assert record.left_out == {"c": "its site was revoked", "d": "its site was revoked"}
    assert post.clock[0] < 2


def test_a_late_site_takes_part_from_the_round_in_which_it_comes(tmp_path):
    engine, post = world(tmp_path)
    post.away.add("south")
    committed = []
    fields = ["federation.rounds=2"]

    def commit(progress):
        committed.append(progress)
        if progress.round == 1:
            post.away.clear()

    told = dataclasses.replace(federation(*fields, engine=engine), commit=commit)
    progress = federate(told, begin())
    assert [{one.client for one in record.clients} for record in progress.rounds] == [{"a", "b"}, set(ROWS)]


def test_a_site_that_differs_is_told_what_and_takes_no_part(tmp_path):
    events = []
    engine, post = world(tmp_path, events)
    post.sites["south"] = resident("south", tmp_path, {**FACTS, "base model": "5678", "own": "x"})
    with pytest.raises(FederationError) as refused:
        engine.wait(lambda: 2, 30)
    assert str(refused.value).startswith(
        "1 of 2 sites are there after 30 s, and 2 are needed. south differs: base model"
    )
    assert "base model is 5678 here and 1234 at the coordinator" in str(refused.value)
    assert any("The site south takes no part" in event.text for event in events)
    (record,) = run(engine).rounds
    assert "differs: base model" in record.left_out["c"]


def test_a_site_that_was_mended_says_hello_again(tmp_path):
    engine, post = world(tmp_path)
    post.sites["south"] = resident("south", tmp_path, {"base model": "5678"})
    with pytest.raises(FederationError):
        engine.wait(lambda: 2, 5)
    post.away.add("south")
    with pytest.raises(FederationError):
        engine.wait(lambda: 2, 1)
    post.sites["south"] = resident("south", tmp_path)
    post.away.clear()
    engine.wait(lambda: 2, 5)
    assert engine.ready == {"north", "south"}


def test_the_end_is_told_to_all(tmp_path):
    engine, post = world(tmp_path)
    engine.wait(lambda: 2, 5)
    engine.end()
    assert all(site.ended for site in post.sites.values())


# A site ------------------------------------------------------------------------------------------


def task_for(site, **changes):
    """A task as the coordinator would send it, but for some fields of its header."""
    from bellwether.engine.remote import terms_of
    from bellwether.exchange.codec import encode_task

    task = TrainTask(1, Payload(START), Training(), 1, client_draws(Randomness(0), 1, "a"))
    header = Header("task", "train", "fed/1", 1, "coordinator", site, "a", "n1", terms_of(FACTS))
    return sealed(replace(header, **changes), KEYS["coordinator"], *encode_task(task))


def answered(site, parcel):
    answer = site.answer(parcel)
    return opened(answer, KEYS["north"].public_key()), answer.manifest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"terms": "0" * 64}, "its terms are not those of this site"),
        ({"client": "c"}, "'c' is no client of this site"),
        ({"round": 2}, "the task is not the one that its header names"),
        ({"kind": "evaluate"}, "the task is not the one that its header names"),
    ],
)
def test_a_site_does_not_do_what_it_did_not_agree_to(tmp_path, changes, reason):
    _, manifest = answered(resident("north", tmp_path), task_for("north", **changes))
    assert reason in manifest.decode()


@pytest.mark.parametrize(
    "parcel",
    [
        None,
        task_for("south"),
        task_for("north", run="another/1"),
        task_for("north", way="reply"),
        task_for("north", sender="south"),
        replace(task_for("north"), body=b""),
        sealed(opened(task_for("north"), KEYS["coordinator"].public_key()), KEYS["south"], b"{}"),
    ],
)
def test_a_site_answers_nothing_to_what_is_not_its_coordinators(tmp_path, parcel):
    site = resident("north", tmp_path)
    assert site.answer(parcel) == Parcel(b"", b"", b"")
    assert list(entries(tmp_path / "north")) == []


def test_a_task_is_done_once_also_by_a_site_that_was_begun_again(tmp_path):
    parcel = task_for("north")
    first = resident("north", tmp_path).answer(parcel)
    engine = AddingEngine()
    assert resident("north", tmp_path, engine=engine).answer(parcel) == first
    assert not engine.tasks


def fill_disk(path):
    """Let a file be on a disk that is full; return what makes space again."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    path.symlink_to("/dev/full")
    return lambda: aside.replace(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_site_whose_disk_is_full_sends_nothing_and_says_so_and_does_the_task_once_there_is_space(tmp_path):
    site, engine = resident("north", tmp_path), AddingEngine()
    answered(site, task_for("north", number="n0", client="b"))
    make_space = fill_disk(tmp_path / "north" / "ledger.jsonl")
    parcel = task_for("north")
    with pytest.raises(CheckpointError, match="ledger.jsonl cannot be written, because the disk is full: free some"):
        site.answer(parcel)
    make_space()
    header, manifest = answered(resident("north", tmp_path, engine=engine), parcel)
    assert (header.number, len(engine.tasks)) == ("n1", 1)
    assert "rows" in manifest.decode()


def test_a_site_whose_disk_is_full_costs_the_others_nothing(tmp_path):
    engine, post = world(tmp_path)

    def ends(answer):  # as ``site join`` does, once it has said so
        post.away.add("south")
        return Came("", None, "its site is not connected any more")

    post.faults["south", "train"] = ends
    first, second = run(engine, "federation.rounds=2").rounds
    assert [{one.client for one in record.clients} for record in (first, second)] == [{"a", "b"}] * 2


def test_an_end_that_came_before_is_not_listened_to(tmp_path):
    from bellwether.engine.remote import terms_of

    header = Header("task", "end", "fed/1", 0, "coordinator", "north", "", "n1", terms_of(FACTS))
    parcel = sealed(header, KEYS["coordinator"], b"{}")
    answered(resident("north", tmp_path), parcel)
    site = resident("north", tmp_path)
    assert site.answer(parcel) == Parcel(b"", b"", b"")
    assert not site.ended


def test_a_site_trains_with_its_own_settings_whatever_a_task_says(tmp_path):
    engine = AddingEngine()
    site = resident("north", tmp_path, engine=engine)
    answered(site, task_for("north"))
    (asked,) = engine.tasks
    assert asked["a"].training == federation().recipe.training
    assert asked["a"].rounds == federation().recipe.federation.rounds == 3


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (replace(START, config=replace(START.config, modules=("k",))), "for other modules"),
        (replace(START, config=replace(START.config, rank=9)), "of another rank"),
        (START.with_tensors({A: START.tensors[A]}), "other tensors than its configuration says"),
        (START.with_tensors({A: START.tensors[A], B: np.zeros((4, 1), np.float32)}), "has shape (4, 1), not (2, 1)"),
        (START.with_tensors({A: START.tensors[A], B: np.full((2, 1), np.inf, np.float32)}), "not finite"),
    ],
)
def test_a_site_refuses_an_adapter_that_does_not_fit(tmp_path, payload, reason):
    from bellwether.engine.remote import terms_of
    from bellwether.exchange.codec import encode_task

    draws = client_draws(Randomness(0), 1, "a")
    header = Header("task", "survey", "fed/1", 1, "coordinator", "north", "a", "n1", terms_of(FACTS))
    task = SurveyTask(1, Payload(payload), Selection(), draws)
    _, manifest = answered(resident("north", tmp_path), sealed(header, KEYS["coordinator"], *encode_task(task)))
    assert reason in manifest.decode()


def test_a_policy_forbids(tmp_path):
    site = resident("north", tmp_path, policy=lambda header, task: f"no round after {task.round - 1}")
    _, manifest = answered(site, task_for("north"))
    assert "the policy of this site forbids it: no round after 0" in manifest.decode()
    came, sent = entries(tmp_path / "north")
    assert (came.failure, sent.failure) == ("", "the policy of this site forbids it: no round after 0")


def test_the_ledger_holds_what_came_and_what_was_sent(tmp_path):
    import hashlib

    site = resident("north", tmp_path)
    parcel = task_for("north")
    answer = site.answer(parcel)
    came, sent = entries(tmp_path / "north")
    assert (came.way, came.kind, came.client, came.round, came.bytes) == ("task", "train", "a", 1, parcel.size)
    assert (sent.way, sent.number, sent.bytes, sent.protection) == ("reply", "n1", answer.size, "none")
    by_hand = hashlib.sha256(len(answer.manifest).to_bytes(8, "big") + answer.manifest + answer.body)
    assert sent.content == by_hand.hexdigest()
