"""Two rounds of each shipped recipe, with only model and data exchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import CATEGORIES, Command, dolly_rows, json_lines, write_rows

from bellwether.recipe.file import RECIPES, load_recipe, shipped

# Clients, clients in a cohort, and the fewest and the most rows that those of a cohort may have together: of Dolly's
# 240 made-up ones, or of the embedded ones.
EXPECTED = {
    "default": (10, 5, 5 * 20, 5 * 60),
    "default-table": (10, 5, 5 * 20, 5 * 60),
    "fedit-10": (10, 5, 120 - 5, 120 + 5),
    "fedit-100": (100, 5, 5 * 6, 5 * 8),
    "fedit-dolly": (100, 5, 12 - 5, 12 + 5),
    "fedit-table": (10, 5, 5 * 20, 5 * 60),
    "fedit-trials": (10, 5, 5 * 20, 5 * 60),
    "languages-table": (10, 5, 5 * 20, 5 * 60),
    "methods-table": (10, 5, 5 * 4, 5 * 48),  # a Dirichlet distribution; a fifth is held out
    "own-table": (10, 10, 160, 160),  # half of the rows are held out, for test and validation
    "quality-against-cost": (10, 5, 5 * 20, 5 * 60),
    "real-table": (10, 5, 5 * 10, 5 * 20),
    "shepherd": (10, 1, 24 - 1, 24 + 1),
    "two-languages": (10, 5, 5 * 20, 5 * 60),
}
BILINGUAL = ("languages-table", "two-languages")
EMBEDDED = (
    *("default", "default-table", "fedit-100", "fedit-table", "fedit-trials", "methods-table", "quality-against-cost"),
    *BILINGUAL,
)


WARNED = (
    "bellwether: warning: training.learning_rate (0.008) is meant for the embedded base, and the model is {}; 0.0003 "
    "is usual with AdamW: set training.learning_rate=0.0003.\n"
)

# Clients, and clients in a cohort, of recipes whose clients choose the rows that they train on.
CHOOSING = {
    "fedhds": (10, 5),
    "fedhds-paper-dolly-05": (200, 10),
    "fedhds-paper-dolly-50": (200, 10),
    "fedhds-paper-ni": (120, 6),
}


def test_every_shipped_recipe_is_expected_here() -> None:
    assert shipped() == sorted([*EXPECTED, *CHOOSING])


@pytest.mark.parametrize("name", [*EXPECTED, *CHOOSING])
def test_a_shipped_recipe_opens_with_the_command_that_runs_it(name: str) -> None:
    first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    command = {
        "default": "bellwether run",
        "default-table": "bellwether compare",
        "fedit-table": "bellwether compare fedit-table --out table --jobs 2",
        "fedit-trials": "bellwether compare fedit-trials --out trials --jobs 2",
        "languages-table": "bellwether compare languages-table --out languages --jobs 2",
        "methods-table": "bellwether compare methods-table --out methods --jobs 2",
        "own-table": "bellwether compare own-table --model my-model --data questions.jsonl --out own --jobs 2",
        "quality-against-cost": "bellwether compare quality-against-cost --out costs --jobs 2",
        "real-table": "bellwether compare real-table --model my-model --data dolly.jsonl --out real",
    }
    assert first == f"# {command.get(name, f'bellwether run {name}')}"
    open_fields = ["model.path=a", "data.sources=[a.jsonl]"] if name in ("own-table", "real-table") else []
    assert load_recipe(RECIPES / f"{name}.yaml", open_fields).name == name


@pytest.mark.parametrize("name", EXPECTED)
def test_two_rounds_of_a_shipped_recipe(
    name: str, bellwether: Command, tiny_llama: Path, dolly_like_large: Path
) -> None:
    clients, cohort, least, most = EXPECTED[name]
    words = ["evaluation.max_rows_per_category=10"] if name in EMBEDDED else ["--data", dolly_like_large]
    outcome = bellwether("run", name, "--model", tiny_llama, *words, "--rounds", 2, "--out", "out")
    assert outcome.code == 0
    # Rates that were found for the embedded base are told where another one takes its place.
    assert outcome.err == (WARNED.format(tiny_llama) if name in EMBEDDED else "")
    assert f"2 rounds, {cohort} of {clients} clients in each" in outcome.out

    rounds = json_lines(Path("out/rounds.jsonl"))
    assert [len(record["cohort"]) for record in rounds] == [cohort, cohort]
    assert [len(record["clients"]) for record in rounds] == [cohort, cohort]
    assert all(least <= record["rows"] <= most for record in rounds)
    scored = [row for row in json_lines(Path("out/evaluation.jsonl")) if row["round"] == 2 and row["part"] != "clients"]
    # Ten rows of each of eight categories, in each language.
    languages = {row["group"]: row["rows"] for row in scored if row.get("group")}
    assert languages == ({"english": 80, "lowland": 80} if name in BILINGUAL else {})
    assert len([row for row in scored if row["rows"] == 10 * max(1, len(languages))]) == 8
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    shipped_recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for section in shipped_recipe.keys() - {"name", "model", "data", "federation", "compare"}:  # changed, or filled up
        assert shipped_recipe[section].items() <= recipe[section].items()

    loads_in_peft(tiny_llama, Path("out/adapter"), all_linear=name in (*EMBEDDED, "own-table", "real-table"))


@pytest.mark.parametrize("name", CHOOSING)
def test_two_rounds_of_a_shipped_recipe_whose_clients_choose_rows(
    name: str, bellwether: Command, tiny_llama: Path
) -> None:
    clients, cohort = CHOOSING[name]
    outcome = bellwether("run", name, "--model", tiny_llama, *made_up(name), "--rounds", 2, "--out", "out")
    assert (outcome.code, outcome.err) == (0, WARNED.format(tiny_llama) if name == "fedhds" else "")
    assert f"2 rounds, {cohort} of {clients} clients in each" in outcome.out

    rounds = json_lines(Path("out/rounds.jsonl"))
    assert [len(record["cohort"]) for record in rounds] == [cohort, cohort]
    for record in rounds:
        held = {path.parts[-2].partition("-")[2]: path for path in Path("out").glob("clients/*/rows.json")}
        all_rows = sum(len(json.loads(held[client].read_text())) for client in record["cohort"])
        assert record["rows"] == sum(one["selected"] for one in record["clients"]) < all_rows / 4
    # Of few centroids, HDBSCAN as the paper's release has it sees no groups now and then.
    assert any(record["clients"] for record in rounds)
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    shipped_recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for section in shipped_recipe.keys() - {"name", "model", "data", "federation", "evaluation"}:
        assert shipped_recipe[section].items() <= recipe[section].items()
    scored = {row["category"] for row in json_lines(Path("out/evaluation.jsonl"))}
    assert {"fedhds-paper-ni": "unseen", "fedhds": "summarization"}.get(name, "summarization") in scored

    loads_in_peft(tiny_llama, Path("out/adapter"), all_linear=True)


def made_up(name: str) -> list[object]:
    """Return what exchanges a recipe's data for little of it that is made up, and shortens its scoring."""
    short = ["evaluation.max_rows_per_category=5", "evaluation.max_new_tokens=4"]
    if name == "fedhds":
        return short
    fitting = ["data.max_tokens=256", *short]
    if name == "fedhds-paper-ni":
        for number in range(120):
            # Enough rows and subjects that six clients have many clusters, of which some surely make groups.
            subjects = [f"task {number}", *(f"subject {number % several}" for several in (2, 3, 5, 7))]
            write_rows(folder("tasks") / f"task-{number:03}.jsonl", dolly_rows(subjects, 15))
        write_rows(folder("unseen") / "task-999.jsonl", dolly_rows(["unseen"], 5))
        return ["--data", "tasks", "data.test_sources=[unseen]", *fitting]
    write_rows(Path("dolly.jsonl"), dolly_rows(CATEGORIES, 900))
    return ["--data", "dolly.jsonl", "data.test_rows_per_category=5", *fitting]


def folder(name: str) -> Path:
    """Return a folder of the current one, made where it is not there."""
    Path(name).mkdir(exist_ok=True)
    return Path(name)


def loads_in_peft(base: Path, adapter: Path, all_linear: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    loaded = {key: value for key, value in tuned.state_dict().items() if "lora_" in key}
    assert len(loaded) == 2 * (7 if all_linear else 4)
    assert all(value.abs().max() > 0 for value in loaded.values()), "nothing was trained or loaded"


def test_own_table_compares_methods_on_a_model_and_rows_of_ones_own_without_being_named(
    bellwether: Command, tiny_llama: Path, dolly_like_large: Path
) -> None:
    fields = ["evaluation.max_new_tokens=2", "compare.tune.learning_rates=[0.01, 0.1]", "compare.tune.passes=[1]"]
    words = ["--model", tiny_llama, "--data", dolly_like_large, "data.max_rows=240", "--seed", 3, *fields]
    outcome = bellwether("compare", *words, "--out", "own")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("on validation rows loss is best") == 3
    arms = {arm["name"] for arm in json.loads(Path("own/table.json").read_text())["lines"]}
    assert {"base", "local", "centralized", "federated"} <= arms
    assert {path.parent.name for path in Path("own").glob("*/*/outcomes.json")} == {"seed-3"}
    assert {path.parent.name for path in Path("own/trials").glob("*/*/*/outcomes.json")} == {"seed-3"}
