"""The command line, end to end, on a tiny model and tiny rows."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CATEGORIES, TINY_RECIPE, Command, Outcome, dolly_rows, json_lines, write_rows

from bellwether.recipe.file import RECIPES, first_sentence, shipped
from bellwether.store.checkpoint import read_checkpoint

COMMANDS = ("run", "compare", "plan", "data", "recipe", "init", "report", "export", "judge", "chat", "ui")
WEIGHTS = Path("adapter") / "adapter_model.safetensors"
HEAVY = {"torch", "transformers", "numpy", "datasets", "peft", "matplotlib", "pandas"}
SCRIPT = Path(sys.executable).with_name("bellwether")


def ok(outcome: Outcome) -> str:
    """Return what a command wrote, once it is known to have succeeded without a complaint."""
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    return outcome.out


def printed(outcome: Outcome) -> dict[str, Any]:
    """Return the recipe that a command printed."""
    recipe = yaml.safe_load(outcome.out)
    assert isinstance(recipe, dict)
    return recipe


# Starting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["recipe", "--list"], ["recipe", "shepherd"]])
def test_what_needs_no_model_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom bellwether.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\nprint(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split()) & HEAVY
    assert loaded <= ({"numpy"} if words[0] == "recipe" else set())


@pytest.mark.parametrize("command", [[sys.executable, "-m", "bellwether"], [str(SCRIPT)]], ids=["module", "script"])
def test_both_ways_to_start_give_help_and_exit_codes(command: list[str], tmp_path: Path) -> None:
    if not Path(command[0]).exists():
        pytest.skip("the package is not installed with its script")
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    for verb in ("run", "plan", "data", "recipe", "init", "export"):
        assert f"\n  {verb} " in helped.stdout
    refused = subprocess.run([*command, "run", "no.yaml"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("bellwether: no.yaml: there is no such recipe")


def test_a_misspelt_option_is_refused_with_the_nearest(bellwether: Command) -> None:
    outcome = bellwether("run", "--modle", "x")
    assert outcome.code == 2
    assert "--modle" in outcome.err
    assert "Did you mean" in outcome.err
    assert "--model" in outcome.err


def test_an_interrupt_says_how_to_go_on(bellwether: Command, tiny_recipe: Path, monkeypatch: Any) -> None:
    rounds: list[None] = []
    train = importlib.import_module("bellwether.federate").run_round

    def interrupted(*given: Any) -> Any:
        rounds.append(None)
        if len(rounds) == stop:
            raise KeyboardInterrupt
        return train(*given)

    monkeypatch.setattr("bellwether.federate.run_round", interrupted)
    stop = 2
    outcome = bellwether("run", tiny_recipe, "--out", "my runs/one")
    assert outcome.code == 130
    said = outcome.err.splitlines()[-1].partition("what is finished is kept; go on with: bellwether ")[2]
    assert shlex.split(said) == ["run", "--resume", "my runs/one"]
    assert "goes on after round 1" in ok(bellwether(*shlex.split(said)))
    stop = 4
    words = ["compare.arms={base: {trains: nobody}, federated: {trains: federation}}", "--seed", 1, "--out", "table"]
    outcome = bellwether("compare", tiny_recipe, *words)
    said = outcome.err.splitlines()[-1].partition("what is finished is kept; go on with: bellwether ")[2]
    assert (outcome.code, said) == (130, "compare --resume table")
    assert "1 of 2 are finished already" in ok(bellwether(*shlex.split(said)))
    monkeypatch.setattr("bellwether.runner.run.load_base", lambda *_: interrupted())
    stop = len(rounds) + 1
    outcome = bellwether("run", tiny_recipe, "--out", "two")
    assert outcome.err == "bellwether: interrupted; nothing is left half done, and the same command begins anew.\n"
    assert not Path("two").exists()


def test_output_that_the_terminal_cannot_show_ends_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bellwether", "recipe", "shepherd", "--data", "ü.jsonl"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sources: [\\xfc.jsonl]" in done.stdout


# Recipes ------------------------------------------------------------------------------------------


def test_recipe_prints_every_field_with_its_meaning_and_can_be_read_back(bellwether: Command, tmp_path: Path) -> None:
    text = ok(bellwether("recipe", "shepherd", "lora.rank=4"))
    assert "# rows of A and columns of B\n  rank: 4\n" in text
    (tmp_path / "again.yaml").write_text(text)
    assert ok(bellwether("recipe", "again.yaml")) == text


def test_recipe_lists_the_shipped_ones_with_a_sentence_on_each(bellwether: Command) -> None:
    lines = ok(bellwether("recipe", "--list")).splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == shipped()
    assert max(map(len, lines)) <= 96
    told = " ".join(" ".join(lines).split())
    for name in shipped():
        header = (RECIPES / f"{name}.yaml").read_text().partition("#\n# ")[2].partition("\nname:")[0]
        sentence = first_sentence(name)
        assert " ".join(header.replace("\n#", "").split()).startswith(sentence)
        assert sentence.endswith((".", "?"))
        assert f"{name} {sentence}" in told


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_plain_text(bellwether: Command, name: str | None) -> None:
    text = ok(bellwether(*filter(None, [name]), "--help"))
    assert "Usage:" in text
    assert "\\" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "near", "far"),
    [
        (["rnu"], "there is no command 'rnu'; did you mean run?", "compare"),
        (["comparee"], "did you mean compare?", "chat"),
        (["zzz"], "there is no command 'zzz'; there are run, compare,", "did you mean"),
        (["run", "--dta", "x"], "--data", "--device"),
        (["run", "--foo", "x"], "No such option '--foo'.", "--out"),
        (["run", "fedit-tabel"], "did you mean fedit-table? Give", "mean default"),
        (["run", "nothing"], "there is no such recipe; give the path", "did you mean"),
        (["run", "training.epochs=1"], "did you mean training.local_epochs?", "known"),
        (["run", "LearningRate=1"], "did you mean training.learning_rate?", "known"),
        (["run", "data.maxtoken=1"], "did you mean data.max_tokens?", "known"),
        (["run", "training.xyz=1"], "known here: loss,", "did you mean"),
        (["run", "lora.bank=1"], "did you mean lora.rank?", "known"),
        (["run", "federation.bounce=1"], "known here: rounds,", "did you mean"),
    ],
)
def test_what_is_suggested_is_near(bellwether: Command, words: list[str], near: str, far: str) -> None:
    outcome = bellwether(*words)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert near in last
    assert far not in last


def test_flags_win_over_fields_and_fields_over_the_file(bellwether: Command, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\nfederation: {rounds: 3, fraction: 0.2}\n")
    recipe = printed(bellwether("recipe", "r.yaml", "seed=2", "federation.rounds=4", "--seed", 5))
    assert (recipe["seed"], recipe["federation"]["rounds"], recipe["federation"]["fraction"]) == (5, 4, 0.2)


def test_each_flag_sets_its_field(bellwether: Command) -> None:
    words = ["--model", "org/name", "--data", "a b.jsonl", "--data", "c: d.jsonl", "--rounds", 7, "--device", "cuda:1"]
    recipe = printed(bellwether("recipe", "shepherd", *words))
    assert recipe["model"]["path"] == "org/name"
    assert recipe["model"]["device"] == "cuda:1"
    assert recipe["data"]["sources"] == ["a b.jsonl", "c: d.jsonl"]
    assert recipe["federation"]["rounds"] == 7


def test_other_rows_do_not_keep_the_test_rows_of_the_recipe(bellwether: Command, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "data: {sources: [a.jsonl], test_sources: [t.jsonl], validation_sources: [v.jsonl]}"
    )
    data = printed(bellwether("recipe", "r.yaml", "--data", "b.jsonl"))["data"]
    assert (data["sources"], data["test_sources"], data["validation_sources"]) == (["b.jsonl"], [], [])
    words = ["r.yaml", "--data", "b.jsonl", "data.test_sources=[own.jsonl]"]
    assert printed(bellwether("recipe", *words))["data"]["test_sources"] == ["own.jsonl"]


@pytest.mark.parametrize("words", [["--data", "mine.jsonl"], ["data.sources=[mine.jsonl]"]])
def test_other_rows_are_all_dealt_though_the_default_keeps_some_of_the_embedded_ones(
    bellwether: Command, words: list[str]
) -> None:
    embedded, own = (printed(bellwether("recipe", *given))["partition"] for given in ([], words))
    assert (embedded["categories_per_client"], embedded["rows_per_client"]) == ([1, 3], [20, 60])
    assert (own["categories_per_client"], own["rows_per_client"]) == (2, None)
    asked = printed(bellwether("recipe", *words, "partition.rows_per_client=[5, 9]"))["partition"]
    assert asked["rows_per_client"] == [5, 9]


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["--data", "starter"], False),
        (["data.sources=[starter:lowland]"], False),
        (["--data", "starter", "--data", "starter:lowland"], False),
        (["--data", "starter", "--data", "mine.jsonl"], True),
    ],
)
def test_embedded_rows_by_name_are_those_of_the_default_recipe_and_others_are_told_of(
    bellwether: Command, words: list[str], own: bool
) -> None:
    outcome = bellwether("recipe", *words)
    recipe = printed(outcome)
    assert (recipe["partition"]["rows_per_client"] is None) is own
    assert (recipe["federation"]["rounds"] == printed(bellwether("recipe"))["federation"]["rounds"]) is not own
    assert ("fields that you do not set have their own defaults" in outcome.err) is own


def test_a_data_file_in_the_place_of_a_recipe_is_told_from_one(bellwether: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"instruction": "a", "response": "b"}')
    outcome = bellwether("run", "mine.jsonl")
    assert outcome.code == 2
    assert "this is a data file, not a recipe; give it with --data" in outcome.err


@pytest.mark.parametrize(
    ("words", "rate", "said"),
    [
        ([], 8e-3, False),
        (["--model", "starter"], 8e-3, False),
        (["--model", "org/name"], 3e-4, True),
        (["model.path=org/name"], 3e-4, True),
        (["--model", "org/name", "training.learning_rate=0.1"], 0.1, False),
        (["shepherd", "--model", "org/name"], 3e-4, False),
    ],
)
def test_the_default_rate_of_the_embedded_base_is_not_used_for_others(
    bellwether: Command, words: list[str], rate: float, said: bool
) -> None:
    outcome = bellwether("recipe", *words)
    assert printed(outcome)["training"]["learning_rate"] == rate
    assert ("training.learning_rate is 0.0003" in outcome.err) is said


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_tells_its_rounds_scores_and_where_the_results_are(tiny_run: tuple[Path, Outcome]) -> None:
    folder, outcome = tiny_run
    text = ok(outcome)
    assert f"run tiny begins in {folder}: 2 rounds, 2 of 4 clients in each\n" in text
    assert "test of the untuned base: loss " in text
    assert "round 1 of 2: loss " in text
    assert "test after round 2: loss " in text
    assert "untuned base against round 2" in text
    for category in CATEGORIES[:4]:
        assert f"  {category} " in text
    end = f"\nAdapter, scores and records are in {folder}.\nReport: {folder / 'report.html'}\n"
    assert text.endswith(end)


def test_scores_are_told_by_group_of_the_servers_rows_and_of_those_at_clients_of_one_group(
    bellwether: Command, tiny_recipe: Path
) -> None:
    rows = [row | {"domain": name} for name in ("law", "clinic") for row in dolly_rows(CATEGORIES[:2], 12)]
    write_rows(tiny_recipe.parent / "rows.jsonl", rows)
    fields = ["partition.clients_per_group={law: 1, clinic: 3}", "partition.client_test_fraction=0.25"]
    text = ok(bellwether("run", tiny_recipe, "--data", "rows.jsonl", *fields, "--out", "out"))
    assert "test by group: untuned base against round 2" in text
    assert "clients by group: untuned base against round 2" in text
    scored = {
        (row["part"], row["group"]): row["rows"]
        for row in json_lines(Path("out/evaluation.jsonl"))
        if row["round"] == 2 and row["category"] == "(all rows)"
    }
    test = {group: scored["test", group] for group in ("law", "clinic")}
    assert sum(test.values()) == 4
    # 24 rows of law less those of the test are one client's, a quarter of which it holds out.
    assert scored["clients", "law"] == round(0.25 * (24 - test["law"]))
    assert set(scored) == {(part, group) for part in ("test", "clients") for group in test}


def test_a_run_leaves_its_records(tiny_run: tuple[Path, Outcome]) -> None:
    folder, _ = tiny_run
    rounds = json_lines(folder / "rounds.jsonl")
    assert [(record["round"], record["rows"]) for record in rounds] == [(1, 16), (2, 16)]
    assert all(len(set(record["cohort"])) == 2 for record in rounds)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert Path(recipe["data"]["sources"][0]).is_absolute()
    scored = {(row["round"], row["part"]) for row in json_lines(folder / "evaluation.jsonl")}
    assert scored == {(0, "test"), (2, "test")}
    samples = json_lines(folder / "samples.jsonl")
    assert [sample["category"] for sample in samples] == ["brainstorming", "classification"]
    assert json.loads((folder / "environment.json").read_text())["device"] == "cpu"


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(
    bellwether: Command, tiny_run: tuple[Path, Outcome], tiny_recipe: Path
) -> None:
    ok(bellwether("run", tiny_recipe, "--out", "same"))
    ok(bellwether("run", tiny_recipe, "--out", "other", "--seed", 1))
    first = (tiny_run[0] / WEIGHTS).read_bytes()
    assert Path("same", WEIGHTS).read_bytes() == first
    assert Path("other", WEIGHTS).read_bytes() != first


def test_runs_get_folders_of_their_own(bellwether: Command, tiny_recipe: Path) -> None:
    for number in (1, 2):
        assert f"are in runs/tiny-{number}." in ok(bellwether("run", tiny_recipe, "--rounds", 1))
        assert len(json_lines(Path(f"runs/tiny-{number}/rounds.jsonl"))) == 1


def test_a_finished_run_that_is_resumed_keeps_its_result(
    bellwether: Command, tiny_run: tuple[Path, Outcome], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run[0], tmp_path / "run"))
    text = ok(bellwether("run", "--resume", folder))
    assert f"run tiny goes on after round 2 in {folder}" in text
    assert (folder / WEIGHTS).read_bytes() == (tiny_run[0] / WEIGHTS).read_bytes()
    ok(bellwether("run", "--resume", folder, "lora.rank=2"))


def test_the_default_recipe_runs(bellwether: Command) -> None:
    words = ["--rounds", 1, "federation.cohort_size=1", "evaluation.max_rows_per_category=1", "training.local_steps=2"]
    text = ok(bellwether("run", *words))
    assert "run default begins in runs/default-1: 1 round, 1 of 10 clients in each" in text


def test_rows_that_clients_hold_out_are_scored_at_the_clients(bellwether: Command, tiny_recipe: Path) -> None:
    text = ok(bellwether("run", tiny_recipe, "partition.client_test_fraction=0.25", "--out", "out"))
    assert "clients: untuned base against round 2" in text
    rows = [row for row in json_lines(Path("out/evaluation.jsonl")) if row["part"] == "clients"]
    assert {row["round"] for row in rows} == {0, 2}
    # Of 32 training rows a quarter is held out, two at each of four clients.
    by_category = [row["rows"] for row in rows if row["round"] == 2 and row["category"] in CATEGORIES]
    assert sum(by_category) == 8
    assert [record["rows"] for record in json_lines(Path("out/rounds.jsonl"))] == [12, 12]


OWN_RULES = '''
from bellwether.method.method import Method, State


def first_two(sampling):
    """The same two clients in every round."""
    return sampling.clients[:2]


def keep_first():
    """Take the update of the first client by name, and count the rounds."""

    def close(closing):
        rounds = closing.state.arrays.get("rounds", 0) + 1
        return State(closing.state.adapter.updated(closing.updates[0].tensors), {"rounds": rounds})

    return Method(close)


def nobody(sampling):
    return ["nobody"]


def nothing():
    return Method(lambda closing: None)


def halves(rows, settings, randomness):
    return {"left": rows[::2], "right": rows[1::2]}
'''


def own(name: str) -> str:
    Path("own_rules.py").write_text(OWN_RULES)
    sys.modules.pop("own_rules", None)
    return f"own_rules:{name}"


def test_own_sampler_and_aggregate_are_used(bellwether: Command, tiny_recipe: Path) -> None:
    from safetensors.numpy import load_file

    words = [f"federation.sampler={own('first_two')}", f"method.name={own('keep_first')}", "lora.dropout=0"]
    ok(bellwether("run", tiny_recipe, *words, "--out", "out"))
    assert [record["cohort"] for record in json_lines(Path("out/rounds.jsonl"))] == [["client-01", "client-02"]] * 2
    assert read_checkpoint(Path("out/checkpoints/0002")).state["arrays"] == {"rounds": 2}
    # Alone in a federation, the first client ends at the same adapter.
    alone = [*words, "federation.quorum=0.1", "federation.availability.trace=trace.jsonl"]
    line = {"client": "client-02", "round": 1, "available": False, "rows_per_second": 1}
    write_rows(Path("trace.jsonl"), [line])
    ok(bellwether("run", tiny_recipe, *alone, "--out", "alone"))
    assert [record["left_out"] for record in json_lines(Path("alone/rounds.jsonl"))] == [
        {"client-02": "it is away"},
        {"client-02": "it is away"},
    ]
    both, one = load_file(Path("out") / WEIGHTS), load_file(Path("alone") / WEIGHTS)
    assert all((both[key] == one[key]).all() for key in both)


def test_an_own_partition_is_used(bellwether: Command, tiny_recipe: Path) -> None:
    words = [f"partition.method={own('halves')}", "federation.fraction=1", "--rounds", 1]
    ok(bellwether("run", tiny_recipe, *words, "--out", "out"))
    (record,) = json_lines(Path("out/rounds.jsonl"))
    assert sorted(record["cohort"]) == ["left", "right"]
    assert record["rows"] == 32


@pytest.mark.parametrize(
    ("field", "name", "said"),
    [
        ("federation.sampler", "nobody", "the sampler own_rules:nobody returned 'nobody', which is no client."),
        ("method.name", "nothing", "the method own_rules:nothing returned a NoneType; return a State with an adapter."),
    ],
)
def test_an_own_function_that_returns_nonsense_fails_the_run(
    bellwether: Command, tiny_recipe: Path, field: str, name: str, said: str
) -> None:
    outcome = bellwether("run", tiny_recipe, f"{field}={own(name)}", "--out", "out")
    assert outcome.code == 1
    assert outcome.err == f"bellwether: Round 1: {said}\n"


# Uneven resources ---------------------------------------------------------------------------------

UNEVEN = "federation.availability={away: 0.3, drop_out: 0.2, rows_per_second: 50, speed_spread: 0.8}"


def test_clients_that_are_away_slow_or_drop_out_are_left_out_with_the_reason(
    bellwether: Command, tiny_recipe: Path
) -> None:
    words = [UNEVEN, "federation.deadline=0.2", "federation.fraction=1", "federation.quorum=0.01", "--rounds", 8]
    ok(bellwether("run", tiny_recipe, *words, "federation.failed_rounds=8", "--out", "out"))
    rounds = json_lines(Path("out/rounds.jsonl"))
    reasons = [reason for record in rounds for reason in record["left_out"].values()]
    for part in ("it is away", "it dropped out in mid-round", "s, and the deadline is 0.2 s"):
        assert any(part in reason for reason in reasons), part
    for record in rounds:
        answered = {client["client"] for client in record["clients"]}
        assert answered | record["left_out"].keys() == set(record["cohort"])
        assert not answered & record["left_out"].keys()
        assert record["duration"] <= 0.2
        assert all(client["seconds"] <= 0.2 for client in record["clients"])
    assert "  left out: client-" in Path("out/log.txt").read_text()


def test_the_available_sampler_asks_only_those_that_are_there(bellwether: Command, tiny_recipe: Path) -> None:
    words = ["federation.sampler=available", "federation.availability.away=0.5", "federation.fraction=1"]
    ok(bellwether("run", tiny_recipe, *words, "federation.failed_rounds=6", "--rounds", 6, "--out", "out"))
    rounds = json_lines(Path("out/rounds.jsonl"))
    assert min(len(record["cohort"]) for record in rounds) < 4
    assert not any(record["left_out"] for record in rounds)


def test_a_round_below_its_quorum_fails_the_run_with_all_reasons(bellwether: Command, tiny_recipe: Path) -> None:
    words = ["federation.availability.drop_out=0.999", "federation.fraction=1", "federation.quorum=0.75"]
    outcome = bellwether("run", tiny_recipe, *words, "--out", "out")
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert "bellwether: Round 1 failed: 0 of 4 updates can be used, and 3 are needed (" in outcome.err
    for number in range(1, 5):
        assert f"client-{number:02}: it dropped out in mid-round" in outcome.err
    assert "Lower federation.quorum" in outcome.err
    assert not Path("out/adapter").exists()


def test_tolerated_failed_rounds_keep_the_adapter_and_are_recorded(bellwether: Command, tiny_recipe: Path) -> None:
    words = ["federation.availability.drop_out=0.999", "federation.failed_rounds=2", "--out", "out"]
    text = ok(bellwether("run", tiny_recipe, *words))
    rounds = json_lines(Path("out/rounds.jsonl"))
    assert all("0 of 2 updates can be used" in record["failure"] for record in rounds)
    assert len({record["adapter"] for record in rounds}) == 1
    assert "round 1 of 2 failed, the adapter stays as it was" in text


# The other commands -------------------------------------------------------------------------------


def test_plan_counts_what_can_be_counted(bellwether: Command, tiny_recipe: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("bellwether.model.base.load_weights", lambda *_: pytest.fail("weights were loaded"))
    text = " ".join(ok(bellwether("plan", tiny_recipe, "--rounds", 3)).replace("│", " ").split())
    # By hand: embedding and output 2·512·16, attention 4·16², MLP 3·16·24, three norms of 16.
    assert f"{2 * 512 * 16 + 4 * 256 + 3 * 384 + 48:,} parameters, frozen" in text
    # q_proj and v_proj, rank 2: A is 2 × 16 and B is 16 × 2.
    assert "adapter 128 parameters" in text
    assert "3, each with 2 of 4 clients" in text
    assert "16 rows," in text
    assert not Path("runs").exists()


def test_data_shows_each_client_and_draws_the_picture(bellwether: Command, tiny_recipe: Path) -> None:
    text = ok(bellwether("data", tiny_recipe, "--out", "pictures"))
    assert "Wrote pictures/clients.png.\nWrote pictures/clients.svg.\n" in text
    assert Path("pictures/clients.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = Path("pictures/clients.svg").read_text()
    assert all(category in svg for category in CATEGORIES[:4])
    assert "4 clients, 32 training rows; held out for all: 0 validation, 8 test rows" in text


def test_init_writes_a_recipe_that_runs(bellwether: Command, dolly_like: Path, tiny_llama: Path) -> None:
    text = ok(bellwether("init", dolly_like, "--model", tiny_llama, "--out", "mine.yaml"))
    assert "bellwether run mine.yaml" in text
    ok(bellwether("run", "mine.yaml", "--rounds", 1, "evaluation.max_new_tokens=2", "--out", "out"))
    assert Path("out", WEIGHTS).is_file()


def test_what_init_cannot_know_is_chosen_in_the_recipe_or_by_flags(bellwether: Command, tiny_llama: Path) -> None:
    rows = [{"alpha": f"Why {n}?", "beta": "So."} for n in range(40)]
    write_rows(Path("odd.jsonl"), rows)
    text = ok(bellwether("init", "odd.jsonl", "--model", tiny_llama))
    assert "No column looks like the instruction and the response" in text
    refused = bellwether("data", "recipe.yaml")
    assert refused.code == 2
    line = Path("recipe.yaml").read_text().splitlines().index("    response: ???") + 1
    assert f"bellwether: recipe.yaml:{line}: data.columns.response is to be chosen" in refused.err
    words = ["--instruction", "alpha", "--response", "odd.jsonl=beta", "--out", "chosen.yaml", "--model", tiny_llama]
    ok(bellwether("init", "odd.jsonl", *words))
    assert "2 clients, 34 training rows" in ok(bellwether("data", "chosen.yaml"))


def test_export_writes_a_model_that_transformers_loads_to_the_same_logits(
    bellwether: Command, tiny_run: tuple[Path, Outcome], tiny_llama: Path
) -> None:
    import torch
    from peft import PeftModel
    from rounding import FLOAT64, coarse
    from safetensors.numpy import load_file, save_file
    from tiny_models import in_float64
    from transformers import AutoModelForCausalLM

    # The base has weights of few bits, and so the adapter shall have: float32 holds W + 2 B A as it is.
    run = Path(shutil.copytree(tiny_run[0], "run"))
    trained = load_file(run / WEIGHTS)
    save_file({key: coarse(value, 2.0**-9) for key, value in trained.items()}, run / WEIGHTS, metadata={"format": "pt"})
    ok(bellwether("export", run, "merged"))
    ids_NT = torch.arange(3, 35).reshape(2, 16)
    merged = in_float64(AutoModelForCausalLM.from_pretrained("merged"))
    base = in_float64(AutoModelForCausalLM.from_pretrained(tiny_llama))
    with torch.no_grad():
        plain = base(ids_NT).logits
        tuned = PeftModel.from_pretrained(base, run / "adapter", autocast_adapter_dtype=False)(ids_NT).logits
        torch.testing.assert_close(merged(ids_NT).logits, tuned, atol=FLOAT64, rtol=0)
        assert (plain - tuned).abs().max() > 1e-3


# What the terminal is spared ----------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e[/b]"


def test_control_characters_in_data_never_reach_the_terminal(
    bellwether: Command, tiny_llama: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    rows = [
        {key: value + EVIL if key == "category" else value for key, value in row.items()} | {f"col{EVIL}": EVIL}
        for row in dolly_rows(CATEGORIES[:3], 12)
    ]
    path = write_rows(tmp_path / "evil\x1b[2J.jsonl", rows)
    words = ["partition.method=categories", "partition.clients=2", "partition.categories_per_client=1"]
    (tmp_path / "r.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data="none"))
    for command in (["data", "--out", "."], ["plan"], ["run", "--out", "out"]):
        outcome = bellwether(command[0], "r.yaml", *words, "--data", path, *command[1:])
        assert outcome.code == 0, outcome.err
        assert_harmless(outcome.out + outcome.err)
        assert "fell to no client" in outcome.out
        assert "[/b]" in outcome.out
        assert "brainstorming" in outcome.out or command == ["plan"]
    outcome = bellwether("init", path, "--out", "init.yaml")
    assert outcome.code == 0
    assert_harmless(outcome.out + outcome.err + Path("init.yaml").read_text())
    assert_harmless(Path("out/log.txt").read_text())


def assert_harmless(text: str) -> None:
    bad = {character for character in text if not character.isprintable() and character != "\n"}
    assert not bad, bad


def test_the_version_is_that_of_the_package(bellwether: Command) -> None:
    assert ok(bellwether("--version")) == f"bellwether {importlib.metadata.version('bellwether')}\n"


def test_without_rows_to_score_a_run_says_so(bellwether: Command, tiny_recipe: Path) -> None:
    out = ok(bellwether("run", str(tiny_recipe), "data.test_rows_per_category=0", "--out", "none"))
    assert "nothing will be scored" in out
