"""Runs whose clients are hidden by noise: what they spend, how they go on, and what the page says of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import json_lines

from bellwether.errors import CheckpointError, RecipeError
from bellwether.exchange.records import ClientFinished
from bellwether.method.accounting import Release, epsilon
from bellwether.recipe.file import load_recipe
from bellwether.runner.guarantee import never_again
from bellwether.runner.run import run
from bellwether.runner.wiring import SIMULATION
from bellwether.store.finished import read_run
from bellwether.store.privacy import CHARGES, PRIVACY, Charge, charge, charges, given_away

pytestmark = pytest.mark.integration

HIDDEN = ["federation.rounds=3", "privacy.noise=2", "privacy.clip_norm=0.3", "evaluation.every=0"]


def result(path: Path) -> bytes:
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_bytes_and_spends_no_round_twice(tiny_recipe, tmp_path):
    truth, path = tmp_path / "truth", tmp_path / "run"
    fields = [*HIDDEN, "privacy.clip_quantile=0.5"]
    run(load_recipe(tiny_recipe, [*fields, f"output.folder={truth}"]))

    def stop(event):
        if isinstance(event, ClientFinished) and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(tiny_recipe, [*fields, f"output.folder={path}"]), watch=stop)
    assert [one.round for one in charges(path)] == [1, 2]
    run(resume=path)
    assert [one.round for one in charges(path)] == [1, 2, 3]
    assert result(path) == result(truth)
    assert (path / PRIVACY).read_bytes() == (truth / PRIVACY).read_bytes()


def test_a_round_gives_noise_whoever_answered_so_that_a_quorum_tells_of_nobody(tiny_recipe, tmp_path):
    path = tmp_path / "run"
    lost = ["federation.availability.drop_out=0.99", "federation.quorum=1"]
    run(load_recipe(tiny_recipe, [*HIDDEN, *lost, f"output.folder={path}"]))
    lines = json_lines(path / "rounds.jsonl")
    assert any(not line["clients"] for line in lines)
    assert all(line["failure"] is None for line in lines)
    assert len({line["adapter"] for line in lines}) == 3
    assert given_away(path).promise.releases == 3


def test_noise_of_a_secret_is_charged_each_time_a_round_is_asked_and_ends_the_run_earlier(tiny_recipe, tmp_path):
    path = tmp_path / "run"
    fields = ["federation.rounds=4", "privacy.epsilon=5", "evaluation.every=0", f"output.folder={path}"]
    secret = replace(SIMULATION, secret=never_again)

    def stop(event):
        if isinstance(event, ClientFinished) and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(tiny_recipe, fields), watch=stop, deployment=secret)
    run(resume=path, deployment=secret)
    # Noise for four rounds was found: the second was asked twice, so the fourth is not run.
    assert [one.round for one in charges(path)] == [1, 2, 2, 3]
    assert [record.round for record in read_run(path).rounds] == [1, 2, 3]
    assert given_away(path).promise.epsilon == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize(
    ("unit", "budget", "more"),
    [
        ("client", 6.0, []),
        ("example", 6.0, []),
        # Enough for all rounds but the last, in which nothing comes back.
        ("client", 12.0, ["method.fine_tune=true"]),
    ],
)
def test_a_run_with_noise_and_a_budget_can_be_read_wherever_it_ends(tiny_recipe, tmp_path, unit, budget, more):
    path = tmp_path / "run"
    fields = [f"privacy.unit={unit}", "privacy.noise=1.2", f"privacy.epsilon={budget}", "federation.rounds=4", *more]
    run(load_recipe(tiny_recipe, [*fields, "evaluation.every=0", f"output.folder={path}"]))
    finished = read_run(path)
    assert len(finished.rounds) == given_away(path).rounds
    assert (len(finished.rounds) == 4) == bool(more)
    assert given_away(path).promise.epsilon <= budget


def test_a_run_ends_where_its_budget_is_spent_and_has_its_scores_and_page(bellwether, tiny_recipe, tmp_path):
    path = tmp_path / "run"
    # A noise multiplier of 2 spends 2.9 in two rounds and 3.7 in three.
    outcome = bellwether("run", tiny_recipe, *HIDDEN, "privacy.epsilon=3.2", "--out", path)
    assert outcome.code == 0, outcome.err
    assert "The budget of privacy.epsilon is spent after round 2" in outcome.out + outcome.err
    finished = read_run(path)
    assert [record.round for record in finished.rounds] == [1, 2]
    assert [record.round for record in finished.scored("test")] == [0, 2]
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "Everything that leaves a client" in page
    assert "2 noisy sums of clipped values" in page
    again = bellwether("report", path)
    assert again.code == 0, again.err


def test_a_process_of_its_own_clips_as_well_and_every_way_gives_the_same_bytes(tiny_recipe, tmp_path):
    for name, more in (("one", []), ("two", ["engine.processes=2"])):
        fields = [*HIDDEN, *more, f"output.folder={tmp_path / name}"]
        run(load_recipe(tiny_recipe, ["federation.rounds=1", *fields]))
    assert result(tmp_path / "one") == result(tmp_path / "two")


def test_poisson_cohorts_may_be_empty_and_their_rounds_end_well(tiny_recipe, tmp_path):
    path = tmp_path / "run"
    rare = ["federation.sampler=poisson", "federation.fraction=0.05", "privacy.amplification=true"]
    run(load_recipe(tiny_recipe, [*HIDDEN, "federation.rounds=6", *rare, f"output.folder={path}"]))
    lines = json_lines(path / "rounds.jsonl")
    assert any(not line["cohort"] for line in lines)
    assert all(line["failure"] is None for line in lines)
    # Noise moves the adapter in a round without a client, too.
    assert len({line["adapter"] for line in lines}) == 6


def test_rows_are_hidden_within_a_budget_and_the_page_says_whose_show_most(bellwether, tiny_recipe, tmp_path):
    path = tmp_path / "run"
    fields = ["privacy.unit=example", "privacy.epsilon=20", "federation.rounds=2"]
    fields += ["partition.method=quantity", "partition.min_rows=6"]
    outcome = bellwether("run", tiny_recipe, *fields, "evaluation.every=0", "--out", path)
    assert outcome.code == 0, outcome.err
    promised = given_away(path).promise
    held = {client.client: client.rows for client in read_run(path).description.clients}
    # Batches of four rows, one pass over them a round; the steps are rounded up, so the fewest rows need not show most.
    spent = {
        client: epsilon(Release(promised.noise, 2 * -(-rows // 4), 4 / rows), 1e-5) for client, rows in held.items()
    }
    assert spent[promised.client] == pytest.approx(max(spent.values()), rel=1e-6) == promised.epsilon
    assert promised.rate == pytest.approx(4 / held[promised.client])
    assert promised.releases == 2 * -(-held[promised.client] // 4)
    assert 18 < promised.epsilon <= 20
    assert [one.sums for one in charges(path)] == [promised.releases // 2] * 2
    page = (path / "report.html").read_text(encoding="utf-8")
    assert f"of the client {promised.client}, whose rows have the largest epsilon" in page
    ordinary = tmp_path / "ordinary"
    run(load_recipe(tiny_recipe, [*fields[2:], "evaluation.every=0", f"output.folder={ordinary}"]))
    assert result(path) != result(ordinary)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (["privacy.noise=1", "method.name=flexlora"], "closes rounds with the updates themselves"),
        (
            [
                *("privacy.noise=1", "method.name=scaffold", "training.optimizer=sgd"),
                *("training.schedule=constant", "training.clip_norm=null"),
            ],
            "lets clients send arrays beside the adapter",
        ),
        (["privacy.noise=1", "compression.up=8bit"], "changes updates after they were clipped"),
        (["privacy.noise=1", "selection.method=hierarchical"], "by which one client decides on what others train"),
        (["privacy.noise=1", "federation.sampler=mine:sample"], "may ask clients by what others told"),
        (
            ["privacy.noise=1", "federation.sampler=poisson", "secure_aggregation.enabled=true"],
            "too small for secure aggregation",
        ),
        (["privacy.noise=1", "privacy.unit=example", "partition.copies=2"], "stands at several clients"),
        (["privacy.noise=1", "privacy.amplification=true"], "federation.sampler is uniform"),
        (["privacy.clip_norm=2"], "neither privacy.epsilon nor privacy.noise"),
        (["privacy.noise=1", "privacy.unit=example", "privacy.clip_quantile=0.5"], "is for clients"),
        (["privacy.noise=0.5", "privacy.epsilon=0.1"], "not enough for one round"),
    ],
)
def test_what_does_not_go_together_with_hidden_clients_is_refused_in_a_sentence(
    tiny_recipe, tmp_path, fields, sentence
):
    with pytest.raises(RecipeError, match=sentence):
        run(load_recipe(tiny_recipe, [*fields, f"output.folder={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_charge_is_kept_once_and_a_damaged_file_of_charges_is_never_written_over(tmp_path):
    for round in (1, 2, 2, 1):
        charge(tmp_path, Charge(round, 1.0, 1.0))
    assert [one.round for one in charges(tmp_path)] == [1, 2]
    (tmp_path / CHARGES).write_text('{"round": 1, "noise": 1.0}\n')
    with pytest.raises(CheckpointError, match="nobody knows what was spent"):
        charge(tmp_path, Charge(3, 1.0, 1.0))
