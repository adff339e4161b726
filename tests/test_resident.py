"""A site's resident process against a coordinator that holds the right key and asks for what it should not."""

from dataclasses import replace

import pytest

pytest.importorskip("flwr")

from test_federate import START, AddingEngine
from test_remote import FACTS, KEYS, answered, resident, task_for

from bellwether.engine.remote import terms_of
from bellwether.errors import CheckpointError
from bellwether.exchange.codec import encode_task
from bellwether.exchange.messages import EvaluateTask, Payload, TrainTask, client_draws
from bellwether.exchange.seal import Header, sealed
from bellwether.recipe.recipe import Evaluation, Training
from bellwether.site.ledger import LEDGER, entries
from bellwether.site.resident import MOST_TIMES
from bellwether.tools.randomness import Randomness

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


def test_a_task_is_done_so_often_and_no_more_also_by_a_site_that_was_begun_again(tmp_path):
    work = AddingEngine()
    for number in range(2 * MOST_TIMES):
        said = ask(resident("north", tmp_path, engine=work), TRAIN, number=f"n{number}", run=f"fed/{number}")
    assert len(work.tasks) == MOST_TIMES
    assert "it did train for a in round 1 5 times already" in said
    site = resident("north", tmp_path, engine=work)
    ask(site, replace(TRAIN, round=2), number="another round")
    assert len(work.tasks) == MOST_TIMES + 1


def test_an_answer_that_is_sent_again_counts_once(tmp_path):
    site = resident("north", tmp_path)
    for _ in range(2 * MOST_TIMES):
        answered(site, task_for("north"))
    assert "rows" in ask(site, TRAIN, number="n2")


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
