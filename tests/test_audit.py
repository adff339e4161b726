"""Audits of whole recipes: what is planted and left out, what is seen, what is found, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_RECIPE, call, write_rows

from bellwether.arms.audit.audit import AS_IT_IS, BARE, audit, versions
from bellwether.arms.audit.bounds import chance
from bellwether.arms.audit.canaries import candidates, make_canaries
from bellwether.arms.audit.game import Eavesdropper, Settings, coins, dealt, make_world
from bellwether.arms.audit.leaks import named_rows, update_scores
from bellwether.arms.audit.runs import stated_epsilon
from bellwether.arms.audit.verdict import verdicts
from bellwether.client.memory import Memory
from bellwether.errors import CheckpointError, DataError, RecipeError
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.messages import Payload, Reply, TrainTask, Update
from bellwether.method.select.cluster import Clusters
from bellwether.recipe.file import load_recipe, with_overrides
from bellwether.recipe.recipe import Recipe, Training
from bellwether.report.page.audit import audit_page, page_markdown
from bellwether.runner.prepare import prepare
from bellwether.store.audit import Audit, Epsilon, Exposed, Membership, Side, read_audit
from bellwether.store.audit import Named as NamedRows
from bellwether.store.privacy import Epsilon as StatedEpsilon
from bellwether.store.privacy import GivenAway, Promise, keep_given_away
from bellwether.tools.intervals import Interval
from bellwether.tools.json_text import plain
from bellwether.tools.randomness import Draws, Randomness

SMALL = Settings(runs=2, rows=20, canaries=2, repeats=(1,), candidates=16)
# Many steps over few rows, so that the adapter learns them by heart.
BY_HEART = {
    "seed": 1,
    "partition.clients": 3,
    "data.test_rows_per_category": 1,
    "training.local_epochs": 10,
    "training.learning_rate": 0.02,
    "federation.fraction": 1.0,
    "federation.rounds": 3,
    "lora.target_modules": "all-linear",
    "lora.rank": 16,
    "lora.dropout": 0.0,
}
HEART_SETTINGS = Settings(runs=2, rows=40, canaries=4, repeats=(4,), candidates=16, clients=True)


def promised(value: float) -> Promise:
    """What a run with that epsilon states."""
    epsilon = StatedEpsilon("add_or_remove", "PLD", value)
    return Promise("example", 1e-5, 1.0, 0.5, 1.0, 1, (epsilon,), secret=False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Recipe:
    """A tiny recipe over rows that say nothing of each other."""
    folder, draw = tmp_path_factory.mktemp("audited"), np.random.default_rng(0)

    def word() -> str:
        return "".join(map(chr, draw.integers(97, 123, 6)))

    rows = [
        {"instruction": f"What is {word()}?", "context": "", "response": word(), "category": "a"} for _ in range(30)
    ]
    data = write_rows(folder / "rows.jsonl", rows)
    (folder / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=data))
    return load_recipe(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def learnt(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Audit]:
    """An audit of a federation that learns its rows by heart: its folder, and what was found."""
    folder = tmp_path_factory.mktemp("learnt") / "audit"
    return folder, audit(with_overrides(recipe, BY_HEART), folder, HEART_SETTINGS)


# What is planted ----------------------------------------------------------------------------------


def test_canaries_are_dealt_to_all_clients_and_their_candidates_are_different():
    found = make_canaries(["a", "b", "c"], 6, (1, 4), Randomness(3))
    assert sorted(one.client for one in found) == ["a", "a", "b", "b", "c", "c"]
    assert [one.repeats for one in found] == [1, 4, 1, 4, 1, 4]
    assert found == make_canaries(["a", "b", "c"], 6, (1, 4), Randomness(3))
    likely = candidates(found[0], 100, Randomness(3))
    assert likely[0] == found[0].secret
    assert len(set(likely)) == 100
    assert all(len(secret) == 6 and secret.isdecimal() for secret in likely)


def test_a_run_trains_on_the_rows_whose_coin_says_so_and_on_its_canaries(recipe):
    world = make_world(prepare(recipe), dataclasses.replace(SMALL, repeats=(3,)))
    everything = {client: {one.row for one in held.rows} for client, held in world.prepared.clients.items()}
    rows_in = coins(recipe, "rows", 1, len(world.rows))
    given = dealt(world, rows_in, [True, False])
    for (client, _), token, inside in zip(world.rows, world.tokens, rows_in, strict=True):
        assert (token.row in given.clients[client]) == inside
    planted = [row for rows in given.clients.values() for row in rows if row.place.startswith("canary")]
    assert len(planted) == 3
    assert set(planted) <= set(given.clients[world.canaries[0].client])
    assert {row.response for row in planted} == {f"The access code is {' '.join(world.canaries[0].secret)}."}
    others = [row for rows in given.clients.values() for row in rows if row not in planted]
    assert len(others) == sum(map(len, everything.values())) - rows_in.count(False)


def test_each_client_keeps_a_row_and_rows_that_stand_there_twice_are_not_in_the_game(recipe):
    prepared = prepare(recipe)
    clients = dict(prepared.clients)
    first, second = list(clients)[:2]
    twin = clients[first].rows[0]
    clients[second] = dataclasses.replace(clients[second], rows=[*clients[second].rows, twin])
    world = make_world(dataclasses.replace(prepared, clients=clients), dataclasses.replace(SMALL, rows=10_000))
    assert twin.row not in [token.row for token in world.tokens]
    for client, held in clients.items():
        assert 0 < world.owners.count(client) < len(held.rows)


def test_clients_of_one_row_leave_nothing_to_play_with(recipe):
    prepared = prepare(recipe)
    alone = {client: dataclasses.replace(held, rows=held.rows[:1]) for client, held in prepared.clients.items()}
    with pytest.raises(DataError, match="No row can be left out"):
        make_world(dataclasses.replace(prepared, clients=alone), SMALL)


def test_coins_are_fair_and_others_in_each_run(recipe):
    drawn = np.array([coins(recipe, "rows", run, 1000) for run in range(4)])
    # 4000 coins have a deviation of √4000 / 2 = 32.
    assert abs(drawn.sum() - 2000) < 4 * 32
    assert all((first != second).any() for first, second in itertools.pairwise(drawn))


# What is seen -------------------------------------------------------------------------------------

MODULE = "layers.0.proj"
CONFIG = AdapterConfig(1, 1.0, 0.0, (MODULE,))


def adapter(value: float) -> Adapter:
    return Adapter(CONFIG, {key_a(MODULE): np.full((1, 2), value), key_b(MODULE): np.full((2, 1), value)})


def task(round: int, value: float = 0.0) -> TrainTask:
    return TrainTask(round, Payload(adapter(value)), Training(), 2, Draws())


class Scripted:
    """An engine whose clients send back what is told."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values, self.asked = values, list[str]()

    def ask(self, tasks: Any, deadline: Any = None) -> Any:
        for client, one in tasks.items():
            self.asked.append(client)
            tensors = adapter(self.values[client]).tensors
            figures = {"loss": 1.0, "tokens": 1.0, "rows": 1.0}
            yield Reply(client, 0.0, update=Update(client, one.round, tensors, 1, figures))


def eavesdropped(absent: Any = ()) -> tuple[Scripted, Eavesdropper]:
    engine = Scripted({"a": 1.0, "b": 2.0, "c": 3.0})
    seen = Eavesdropper(engine, {}, absent)
    list(seen.ask({client: task(1) for client in "abc"}))
    list(seen.ask({"a": task(2, 9.0)}))
    return engine, seen


def test_absent_clients_are_not_asked():
    engine, seen = eavesdropped(absent={"b"})
    assert engine.asked == ["a", "c", "a"]
    assert seen.replies.keys() == {"a", "c"}


def test_the_first_updates_and_what_the_round_gave_are_noted():
    _, seen = eavesdropped()
    assert [reply.update.tensors[key_a(MODULE)][0, 0] for reply in seen.replies.values()] == [1, 2, 3]
    assert seen.after.adapter.tensors[key_a(MODULE)][0, 0] == 9


def test_scores_of_updates_are_the_losses_that_they_take_away():
    _, seen = eavesdropped()

    # The loss of row n falls by one for each unit of the adapter's values, but that no one is taught by more than n.
    def losses(one: Adapter, folded: Any) -> Any:
        return 10 - np.minimum(one.tensors[key_a(MODULE)][0, 0], np.array([1.5, 5.0, 5.0, 5.0]))

    found = update_scores(seen, adapter(9.0), Recipe(), ["a", "b", "c", "z"], [True, True, False, True], losses)
    assert found.senders == 3
    assert found.inside == (True, True, False)  # nobody knows z
    assert found.single == (1.0, 2.0, 3.0)
    assert found.summed == (1.5, 5.0, 5.0)
    # The third update tells most of the rows of all three.
    assert found.named == (False, False, True)


def test_updates_that_cannot_be_read_alone_give_no_scores():
    _, seen = eavesdropped()
    masked = {
        client: dataclasses.replace(reply, update=dataclasses.replace(reply.update, tensors={}))
        for client, reply in seen.replies.items()
    }
    seen.replies = masked
    assert update_scores(seen, adapter(9.0), Recipe(), ["a"], [True], lambda one, folded: np.zeros(1)) is None


def test_a_centroid_names_the_row_that_lies_nearest():
    # Client a: rows at 0 and 1 are a cluster, with the centroid 0.5; a row of b lies at 0.6, nearer than both.
    # Client b: rows at 5 and 5, of one text, are a cluster with the centroid 5.
    def memory(points: list[float], labels: list[int], centroids: list[float]) -> Memory:
        clusters = Clusters(np.array(labels), np.ones(len(labels)), np.array(centroids)[:, None])
        return Memory("key", 1, np.array(points)[:, None], 1, clusters, tuple(range(len(centroids))))

    memories = {"a": memory([0.0, 1.0], [0, 0], [0.5]), "b": memory([0.6, 5.0, 5.0], [-1, 0, 0], [5.0])}
    released = {"a": np.float32([[0.5]]), "b": np.float32([[5.0]])}
    found = named_rows(released, memories, {"a": ["x", "y"], "b": ["z", "t", "t"]})
    # Two of five rows are a hit of each.
    assert found == NamedRows(released=2, hits=1, chance=pytest.approx(2 / 5), copies=1, exact=1)


def test_what_an_accountant_states_is_read_from_the_run(tmp_path):
    assert stated_epsilon(tmp_path) is None
    keep_given_away(tmp_path, GivenAway((), promised(2.5)))
    assert stated_epsilon(tmp_path) == 2.5
    (tmp_path / "privacy.json").write_text('{"epsilon": "much"}')
    with pytest.raises(CheckpointError, match=r"privacy\.json cannot be read"):
        stated_epsilon(tmp_path)


# What is found ------------------------------------------------------------------------------------


def test_protection_is_taken_away_for_the_other_side():
    bare = Recipe()
    assert list(versions(bare)) == [AS_IT_IS]
    protected = with_overrides(bare, {"privacy.epsilon": 3.0})
    both = versions(protected)
    assert list(both) == [BARE, AS_IT_IS]
    assert both[AS_IT_IS] == protected
    assert both[BARE] == bare


@pytest.mark.integration
def test_a_federation_that_learns_by_heart_is_seen_through(learnt):
    _, found = learnt
    [side] = found.sides
    [planted] = side.exposed
    assert planted.planted.mean == 4  # log2 of 16 candidates: always the first
    # The untuned base knows no secret: of two canaries the mean of ranks 1 to 16 is far from the first.
    assert planted.base.mean < 4
    best = side.best_on_result
    # About 13 rows on each side in two runs: chance has a deviation of √(27 / (12 · 13²) / 2) = 0.08.
    assert best.auc.mean > 0.5 + 4 * 0.08
    assert side.owner.mean > side.owner_chance
    bounds = {one.game: one for one in side.epsilons}
    assert bounds["rows"].lower > 0.5
    assert bounds["clients"].bits == 2 * 3
    assert found.chance == chance(16)


@pytest.mark.integration
def test_an_untrained_adapter_tells_nothing(recipe, tmp_path):
    settings = dataclasses.replace(SMALL, rows=40, canaries=0)
    found = audit(with_overrides(recipe, {"training.learning_rate": 1e-7}), tmp_path / "audit", settings)
    [side] = found.sides
    area = next(one for one in side.memberships if one.of_result).auc.mean
    # Of n rows in and as many out, the area of chance has the variance (2 n + 1) / (12 n²); two runs, about 10 each.
    assert abs(area - 0.5) < 4 * math.sqrt(21 / (12 * 10**2) / 2)
    assert all(one.lower == 0 for one in side.epsilons)


@pytest.mark.integration
def test_what_is_finished_is_not_run_again(learnt, recipe, monkeypatch):
    folder, found = learnt
    monkeypatch.setattr("bellwether.runner.run.run", lambda *given, **more: pytest.fail("it was run again"))
    again = audit(with_overrides(recipe, BY_HEART), folder, HEART_SETTINGS)
    assert plain(again) == plain(found) == plain(read_audit(folder))


@pytest.mark.integration
def test_another_audit_is_not_mixed_in(learnt, recipe, tmp_path):
    folder, _ = learnt
    with pytest.raises(CheckpointError, match="holds an audit of something else"):
        audit(recipe, folder, SMALL)
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(CheckpointError, match="is not empty"):
        audit(recipe, tmp_path, SMALL)


def test_amounts_that_say_nothing_are_refused(recipe, tmp_path):
    for wrong in ({"runs": 0}, {"candidates": 1}, {"repeats": ()}):
        with pytest.raises(RecipeError, match="give"):
            audit(recipe, tmp_path / "audit", dataclasses.replace(SMALL, **wrong))


@pytest.mark.integration
def test_a_run_that_states_less_than_is_found_is_called_broken(recipe, tmp_path, monkeypatch):
    from bellwether.runner import run as runner

    real = runner.run

    def stating(*given: Any, **more: Any) -> Any:
        result = real(*given, **more)
        keep_given_away(result.folder, GivenAway((), promised(0.01)))
        return result

    monkeypatch.setattr(runner, "run", stating)
    of_rows = with_overrides(recipe, {**BY_HEART, "privacy.unit": "example"})
    found = audit(of_rows, tmp_path / "audit", dataclasses.replace(SMALL, runs=1, rows=40, canaries=0))
    assert found.broken
    assert found.verdicts[0].startswith("BROKEN. An epsilon of 0.01 for each row is stated")


# What is said -------------------------------------------------------------------------------------


def side_with(**changed: Any) -> Side:
    interval = Interval(0.7, 0.6, 0.8, math.nan)
    values: dict[str, Any] = {
        "name": AS_IT_IS,
        "protections": (),
        "unit": "example",
        "stated": None,
        "delta": 1e-5,
        "exposed": (Exposed(4, Interval(5, 4, 6, math.nan), None, Interval(1.2, 0.5, 2, math.nan)),),
        "memberships": (Membership("loss", True, interval, interval),),
        "owner": None,
        "owner_chance": 0.0,
        "epsilons": (Epsilon("rows", 100, 50, 40, 1.5),),
        "named": None,
    }
    return Side(**values | changed)


def audit_of(*sides: Side) -> Audit:
    found = Audit("mine", "starter", 0, 8, 100, 4, 12, 128, chance(128), 0.95, sides, ())
    return dataclasses.replace(found, verdicts=tuple(verdicts(found)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "no epsilon is stated"),
        ({"stated": 1.0}, "BROKEN. An epsilon of 1.00 for each row is stated"),
        ({"stated": 2.0}, "not broken. An epsilon of 2.00 for each row is stated"),
        ({"stated": 2.0, "unit": "client"}, "was not tested; add --clients"),
    ],
)
def test_the_first_sentence_says_whether_what_is_stated_is_refuted(changed, said):
    found = audit_of(side_with(**changed))
    assert said in found.verdicts[0]
    assert found.broken == said.startswith("BROKEN")


def test_sentences_say_what_chance_would_give():
    texts = audit_of(side_with()).verdicts
    assert any("0.70 (0.60 to 0.80), where a coin has 0.50" in text for text in texts)
    assert any("is found in the result: its exposure is 5.00 (4.00 to 6.00) bits" in text for text in texts)
    weak = Membership("loss", True, Interval(0.55, 0.45, 0.65, math.nan), Interval(0, 0, 0, math.nan))
    unseen = Exposed(4, Interval(1.5, 0.5, 2.5, math.nan), None, Interval(1.2, 0.5, 2, math.nan))
    texts = audit_of(side_with(memberships=(weak,), exposed=(unseen,))).verdicts
    assert any("no better than a coin" in text for text in texts)
    assert any("is not found in the result" in text for text in texts)


def test_the_page_and_its_markdown_have_both_sides_and_the_verdict():
    named = NamedRows(10, 7, 0.1, 2, 1)
    found = audit_of(side_with(name=BARE, named=named, owner=Interval(0.9, 0.8, 1, math.nan)), side_with(stated=1.0))
    page = audit_page(found)
    assert "BROKEN" in page.result
    text = page_markdown(page)
    for part in ("0.70 (0.60 to 0.80)", "without protection", "as it is", "40 of 50", "70% of 10 released centroids"):
        assert part in text
    assert "| as it is | whether single rows were there | 40 of 50 | 100 | 1.50 | 1.00 | BROKEN |" in text


@pytest.mark.integration
def test_the_command_writes_figures_tables_and_a_page(bellwether, tiny_recipe, tmp_path):
    words = ("audit", tiny_recipe, "--out", tmp_path / "out", "--runs", 1, "--rows", 8, "--canaries", 2)
    outcome = bellwether(*words)
    assert outcome.code == 0, outcome.err
    assert "No epsilon is stated" in outcome.out
    assert "game of rows: run 1 of 1" in outcome.out
    assert "Planted secrets" in (tmp_path / "out" / "audit.md").read_text()
    assert "report on a privacy audit" in (tmp_path / "out" / "report.html").read_text()
    assert call("report", tmp_path / "out", "--figures").code == 0
