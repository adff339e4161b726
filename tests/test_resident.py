"""A site's resident process against a coordinator that holds the right key and asks for what it should not."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("flwr")

from test_federate import START, AddingEngine
from test_remote import FACTS, KEYS, answered, resident

from bellwether.cli.say import say
from bellwether.engine.remote import terms_of
from bellwether.errors import CheckpointError, FederationError, ModelError, RoundFailed, UpdateRejected
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.codec import encode_task
from bellwether.exchange.compress import compress_payload
from bellwether.exchange.messages import EvaluateTask, Payload, Reply, TrainTask, client_draws
from bellwether.exchange.scores import Totals
from bellwether.exchange.seal import Header, Parcel, sealed
from bellwether.method.average import fedavg
from bellwether.method.flexlora import flexlora
from bellwether.method.scaffold import scaffold
from bellwether.recipe.method import FedAvg, FlexLora, Flora
from bellwether.recipe.recipe import Compression, Evaluation, Training
from bellwether.site.ledger import LEDGER, entries
from bellwether.site.policy import Policy, as_limit
from bellwether.site.protection import SECRET, lumped, own_secret
from bellwether.site.resident import MOST_TASKS, kinds_going_on, tensor_shapes
from bellwether.store.client_state import METHOD, UNSENT, keep_state
from bellwether.tools.randomness import Draws, Randomness

TRAIN = TrainTask(1, Payload(START), Training(), 1, client_draws(Randomness(0), 1, "a"))
SCORE = EvaluateTask(0, Payload(START), Evaluation())


def ask(site, task, kind="train", number="n1", run="fed/1"):
    """Return what a site says to a task of the coordinator's, as text."""
    header = Header("task", kind, run, task.round, "coordinator", "north", "a", number, terms_of(FACTS))
    _, manifest = answered(site, sealed(header, KEYS["coordinator"], *encode_task(task)))
    return manifest.decode()


# How much is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "kind", "first"), [(TRAIN, "train", 1), (SCORE, "evaluate", 0)])
def test_a_site_knows_no_rounds_but_those_that_it_agreed_to(tmp_path, task, kind, first):
    site = resident("north", tmp_path)  # of 3 rounds
    for round, refused in ((0, first == 1), (1, False), (3, False), (4, True), (10_000, True)):
        said = ask(site, replace(task, round=round), kind, f"n{round}")
        assert (f"round {round} is none of {first} to 3" in said) == refused


def other(number):
    """Return a task that differs from others by its weights."""
    tensors = {key: np.full_like(value, number) for key, value in START.tensors.items()}
    return replace(TRAIN, payload=Payload(replace(START, tensors=tensors)))


def test_so_many_different_tasks_are_done_and_no_more_also_by_a_site_that_was_begun_again(tmp_path):
    work = AddingEngine()
    for number in range(2 * MOST_TASKS):
        said = ask(resident("north", tmp_path, engine=work), other(number), number=f"n{number}", run=f"fed/{number}")
    assert len(work.tasks) == MOST_TASKS
    assert "a was asked to train in round 1 in 5 other ways already" in said
    site = resident("north", tmp_path, engine=work)
    assert "rows" in ask(site, other(0), number="as at first")
    assert len(work.tasks) == MOST_TASKS + 1  # not the last one that was answered, so that it is done anew
    ask(site, replace(TRAIN, round=2), number="another round")
    assert len(work.tasks) == MOST_TASKS + 2


def test_tasks_that_fail_count_too(tmp_path):
    class Diverging(AddingEngine):
        def ask(self, tasks, deadline=None):
            self.tasks.append(tasks)
            yield from (Reply(client, 0.0, failure="its losses are not finite") for client in tasks)

    work = Diverging()
    for number in range(2 * MOST_TASKS):
        ask(resident("north", tmp_path, engine=work), other(number), number=f"n{number}")
    assert len(work.tasks) == MOST_TASKS


def test_a_coordinator_that_redoes_its_round_again_and_again_gets_what_was_trained_once(tmp_path):
    work = AddingEngine()
    said = [
        ask(resident("north", tmp_path, engine=work), TRAIN, number=f"n{number}", run=f"fed/{number}")
        for number in range(3 * MOST_TASKS)
    ]
    assert len(work.tasks) == 1
    assert len(set(said)) == 1
    assert "rows" in said[0]


def test_a_site_whose_rows_are_others_now_trains_on_them(tmp_path):
    work = AddingEngine()
    for rows in ("0", "1"):
        site = resident("north", tmp_path, engine=work)
        site._holdings = replace(site._holdings, rows=rows)
        ask(site, TRAIN, number=rows)
    assert len(work.tasks) == 2


@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 40)], ids=["its end", "most of it"])
def test_a_kept_answer_that_is_damaged_is_told(tmp_path, cut):
    site = resident("north", tmp_path)
    ask(site, TRAIN)
    path = tmp_path / "north" / "a" / "answers" / "train"
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(CheckpointError, match="train is damaged; remove it, to do the task anew"):
        ask(site, TRAIN, number="again")


def test_what_is_sent_again_counts_again_for_the_policy(tmp_path):
    limit = as_limit(Policy(megabytes_per_round=0.001), tmp_path / "north")
    site = resident("north", tmp_path, limit=limit)
    said = [ask(site, TRAIN, number=f"n{number}") for number in range(9)]
    sent = [entry.bytes for entry in entries(tmp_path / "north") if entry.way == "reply" and not entry.failure]
    assert 0 < sum(sent) <= 1000 < sum(sent) + sent[0]
    assert "the policy of this site forbids it: an answer has " in said[-1]


def test_an_answer_that_the_policy_finds_too_large_does_not_leave(tmp_path):
    said, sizes = [], []

    def limit(header, size):
        sizes.append(size)
        return f"{header.kind} is too large"

    site = resident("north", tmp_path, tell=said.append, limit=limit)
    answer = ask(site, TRAIN)
    assert "the policy of this site forbids it: train is too large" in answer
    assert "lora" not in answer
    assert (
        said[-1] == "Round 1: nothing leaves this site, since the policy of this site forbids it: train is too large."
    )
    _, sent = entries(tmp_path / "north")
    assert sent.failure.endswith("train is too large")
    assert sent.bytes < sizes[0]


def hello(site, facts, number="h1"):
    """Return what a site says to a hello of the coordinator's with some facts."""
    header = Header("task", "hello", "fed/1", 0, "coordinator", "north", "", number, terms_of(FACTS))
    _, manifest = answered(site, sealed(header, KEYS["coordinator"], json.dumps(facts).encode()))
    return json.loads(manifest)["differs"]


def test_a_hello_draws_no_fact_of_the_site_out_and_writes_no_line_of_its_log(tmp_path):
    said = []
    site = resident("north", tmp_path, tell=said.append, facts={**FACTS, "own path": "/home/ada"})
    assert hello(site, {}) == [f"{name} is missing at the coordinator" for name in (*FACTS, "own path")]
    forged = {f"x{number}\nThe coordinator has said hello": "1\n2" for number in range(1000)}
    answers = hello(site, forged, "h2")
    assert len(answers) == 10
    assert answers[0] == "x0?The coordinator has said hello is missing here"
    assert hello(site, {**FACTS, "own path": "1\n2"}, "h3") == ["own path is /home/ada here and 1?2 at the coordinator"]
    assert not any("\n" in line for line in said)
    assert "/home/ada" not in "".join(said[:-1])


def test_a_sentence_is_one_line_of_the_command_whatever_is_in_it(capsys):
    say("Round 1: it fails.\nThe federation has ended.\r\x1b[2J")
    assert capsys.readouterr().out == "Round 1: it fails. The federation has ended.\\r\\x1b[2J\n"


# What goes wrong ---------------------------------------------------------------------------------


class Failing:
    """An engine of which nothing comes but an error."""

    def __init__(self, error):
        self.error = error

    def ask(self, tasks, deadline=None):
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA out of memory at /home/ada"), "its process failed"),
        (KeyError("/home/ada"), "its process failed"),
        (ZeroDivisionError(), "its process failed"),
        (
            RoundFailed("What my_function said of /home/ada: no"),
            "its method, or a function that the recipe names, failed",
        ),
        (CheckpointError("/home/ada/x.npz is not as it was written"), "what it keeps on its disk cannot be read"),
        (ModelError("/home/ada/model is none"), "its base model or adapter cannot be used"),
    ],
)
def test_a_task_that_fails_is_answered_in_words_that_say_nothing_of_the_machine_and_the_site_stays(
    tmp_path, error, told
):
    said = []
    site = resident("north", tmp_path, engine=Failing(error), tell=said.append)
    answer = ask(site, TRAIN)
    assert told in answer
    assert "home" not in answer
    assert not site.ended
    own = list(entries(tmp_path / "north"))[-1].failure
    assert str(error).strip("'") in own
    assert any(own in line for line in said)


@pytest.mark.parametrize("seeds", [{}, {"batch order": 1}, {**TRAIN.draws.seeds, "more": 1}])
def test_a_task_without_its_draws_is_refused(tmp_path, seeds):
    assert "its draws are not those" in ask(resident("north", tmp_path), replace(TRAIN, draws=Draws(seeds)))


def the_end(number="n1"):
    header = Header("task", "end", "fed/1", 0, "coordinator", "north", "", number, terms_of(FACTS))
    return sealed(header, KEYS["coordinator"], b"{}", b"junk")


def test_an_end_whose_result_cannot_be_used_is_refused_and_the_site_waits_on(tmp_path):
    said = []
    for error in (UpdateRejected("it is no adapter"), KeyError("config")):
        site = resident("north", tmp_path, tell=said.append, keep=lambda about, values, error=error: throw(error))
        assert site.answer(the_end()) == Parcel(b"", b"", b"")
        assert not site.ended
    assert said == [
        "The end that came is refused, since its result cannot be used (it is no adapter).",
        "The end that came is refused, since its result cannot be used (KeyError: 'config').",
    ]
    kept = []
    site = resident("north", tmp_path, keep=lambda about, values: kept.append(values))
    answered(site, the_end())
    assert (site.ended, kept) == (True, [b"junk"])


def test_a_result_that_the_disk_does_not_take_ends_the_site_with_the_reason(tmp_path):
    site = resident("north", tmp_path, keep=lambda about, values: throw(CheckpointError("the disk is full")))
    with pytest.raises(CheckpointError, match="the disk is full"):
        site.answer(the_end())


def throw(error):
    raise error


# What is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"alpha": 4000.0}, {"dropout": 0.9}, {"rslora": True}, {"fan_in_fan_out": True}, {"alpha": 0.0}]
)
def test_an_adapter_that_would_be_trained_otherwise_than_agreed_is_refused(tmp_path, change):
    other = replace(START, config=replace(START.config, **change))
    said = ask(resident("north", tmp_path), replace(TRAIN, payload=Payload(other)))
    assert "another alpha, dropout or scaling than this site agreed to" in said


def test_names_that_only_peft_reads_may_be_others(tmp_path):
    named = replace(START, config=replace(START.config, base_model="/elsewhere", target_modules=("q",)))
    assert "rows" in ask(resident("north", tmp_path), replace(TRAIN, payload=Payload(named)))


@pytest.mark.parametrize("method", [FedAvg(), FlexLora()])
@pytest.mark.parametrize("alpha", [1.0, 1e-12])
def test_an_update_to_fold_is_refused_where_the_method_folds_none(tmp_path, method, alpha):
    folded = replace(START, config=replace(START.config, alpha=alpha))
    said = ask(working_by(method, tmp_path), replace(TRAIN, payload=Payload(START, folded=folded)))
    assert f"an update to fold into the base, which the method {method.name} does not do" in said


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"rank": 2, "alpha": 2.0}, True),  # as updates are stacked
        ({"base_model": "elsewhere"}, True),
        ({"rank": 2, "alpha": 1.5}, False),
        ({"alpha": 1e-12}, False),
        ({"alpha": 1e4}, False),
        ({"rslora": True}, False),
        ({"dropout": 0.5}, False),
        ({"fan_in_fan_out": True}, False),
    ],
)
def test_a_method_that_folds_does_so_in_the_scalings_that_methods_have_alone(tmp_path, change, taken):
    config = replace(START.config, **change)
    shapes = tensor_shapes(config, {"q": (2, 2)})
    folded = Adapter(config, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    said = ask(working_by(Flora(), tmp_path), replace(TRAIN, payload=Payload(START, folded=folded)))
    assert ("rows" in said) == taken
    assert ("what it folds into the base has another alpha" in said) != taken


def working_by(method, folder):
    site = resident("north", folder)
    recipe = site._holdings.recipe.model_copy(update={"method": method})
    site._holdings = replace(site._holdings, recipe=recipe)
    return site


# What is kept ------------------------------------------------------------------------------------


def with_kept(site, folder, rounds, going_on="train", name=METHOD):
    for round in rounds:
        keep_state(folder / "1-a", name, round, {"control": np.zeros(2)})
    site._holdings = replace(site._holdings, folders={"a": folder / "1-a"}, going_on={going_on: (name,)})
    return site


@pytest.mark.parametrize(
    ("kept", "settled", "going_on", "gone"),
    [
        ((), 0, "train", False),  # its first round
        ((1, 2), 2, "train", False),
        ((1, 2), 1, "train", False),  # the coordinator went back to an older checkpoint
        ((), 2, "evaluate", False),  # a method that keeps nothing for training
        ((), 2, "train", True),
        ((1,), 2, "train", True),
        ((2,), 1, "train", True),
    ],
)
@pytest.mark.parametrize("name", [METHOD, UNSENT])
def test_a_task_that_would_go_on_from_what_is_lost_is_refused(tmp_path, kept, settled, going_on, gone, name):
    site = with_kept(resident("north", tmp_path), tmp_path, kept, going_on, name)
    said = ask(site, replace(TRAIN, round=3, settled=settled))
    assert (f"1-a/{name}/000{settled}.npz has to be restored" in said) == gone
    assert ("rows" in said) != gone
    assert str(tmp_path) not in said


def test_of_the_methods_scaffold_alone_goes_on_from_what_it_keeps():
    whole = Compression()
    assert kinds_going_on(scaffold(), whole) == {"train": (METHOD,)}
    assert kinds_going_on(fedavg(), whole) == kinds_going_on(flexlora(), whole) == {}


def test_with_error_feedback_every_method_goes_on_from_what_was_left_unsent():
    fed = Compression(up="4bit")
    assert kinds_going_on(fedavg(), fed) == {"train": (UNSENT,)}
    assert kinds_going_on(scaffold(), fed) == {"train": (METHOD, UNSENT)}
    assert kinds_going_on(fedavg(), Compression(up="4bit", error_feedback=False)) == {}
    assert kinds_going_on(fedavg(), Compression(down="4bit")) == {}


@pytest.mark.parametrize(("agreed", "sent"), [("none", "8bit"), ("8bit", "none"), ("8bit", "4bit")])
def test_an_adapter_comes_in_as_many_bits_as_was_agreed(tmp_path, agreed, sent):
    site = resident("north", tmp_path)
    recipe = site._holdings.recipe.model_copy(update={"compression": Compression(down=agreed)})
    site._holdings = replace(site._holdings, recipe=recipe)
    payload = compress_payload(Payload(START), sent, np.random.default_rng(0))
    refusal = f"its adapter does not come as was agreed to, with compression.down={agreed}"
    assert refusal in ask(site, replace(TRAIN, payload=payload))
    due = compress_payload(Payload(START), agreed, np.random.default_rng(0))
    assert "rows" in ask(site, replace(TRAIN, payload=due))
    assert ("down=none" in ask(site, replace(SCORE, payload=due), "evaluate", "n2")) == (agreed != "none")


# What is protected -------------------------------------------------------------------------------


def test_the_secret_is_made_once_and_its_owner_alone_can_read_it(tmp_path):
    made = own_secret(tmp_path)
    assert own_secret(tmp_path) == made
    assert ((tmp_path / SECRET).stat().st_mode & 0o777, len(set(made)) > 4) == (0o600, True)
    (tmp_path / SECRET).write_bytes(made[:9])
    with pytest.raises(FederationError, match="has 9 bytes, where 32 are due"):
        own_secret(tmp_path)


def sums(**rows):
    return {name: Totals(count, 10 * count, 2.0 * count) for name, count in rows.items()}


@pytest.mark.parametrize(
    ("rows", "sent"),
    [
        ({"open": 6, "closed": 5}, {"open": 6, "closed": 5}),
        ({"open": 20, "x": 1, "y": 1, "z": 4}, {"open": 20, "other": 6}),
        ({"open": 20, "closed": 9, "x": 4}, {"open": 20, "other": 13}),  # the 4 rows of one name are not told apart
        ({"x": 1, "y": 1}, {"other": 2}),
        ({"": 2}, {"": 2}),
        ({"": 2, "x": 4}, {"other": 6}),
        ({"other": 7, "x": 5, "y": 2}, {"other": 14}),
        ({}, {}),
    ],
)
def test_categories_of_few_rows_have_no_name(rows, sent):
    assert lumped(sums(**rows)) == sums(**sent)


class Scoring:
    """An engine whose client has scored rows of one category each."""

    def ask(self, tasks, deadline=None):
        yield Reply("a", 1.0, totals=sums(**{f"Mrs {n}": 1 for n in range(9)}), groups=sums(de=9))


def test_names_of_categories_of_few_rows_leave_no_site_but_that_of_a_rehearsal(tmp_path):
    site = resident("north", tmp_path, engine=Scoring())
    assert "Mrs 8" in ask(site, SCORE, "evaluate")
    (tmp_path / "real").mkdir()
    site = resident("north", tmp_path / "real", engine=Scoring())
    site._holdings = replace(site._holdings, secret=bytes(32))
    said = ask(site, SCORE, "evaluate", "n2")
    assert "Mrs" not in said
    fields = json.loads(said)["fields"]
    assert ({name: one["rows"] for name, one in fields["totals"].items()}, [*fields["groups"]]) == (
        {"other": 9},
        ["de"],
    )


# The ledger --------------------------------------------------------------------------------------


def test_a_line_that_is_still_being_written_is_not_read(tmp_path):
    ask(resident("north", tmp_path), TRAIN)
    with (tmp_path / "north" / LEDGER).open("a") as file:
        file.write('{"time": "2026')
    assert [entry.way for entry in entries(tmp_path / "north")] == ["task", "reply"]


def test_a_damaged_line_is_one_sentence(tmp_path):
    (tmp_path / LEDGER).write_text('{"time": "2026\n')
    with pytest.raises(CheckpointError, match="cannot be read .line 1: .*; restore it, or remove the line.$"):
        list(entries(tmp_path))
