"""Two rounds of each shipped recipe, with only model and data exchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import Command, json_lines

from bellwether.recipe_file import RECIPES, load_recipe, shipped

# Clients, clients in a cohort, training rows of 240 at each client, passes over them.
EXPECTED = {
    "default": (10, 5),
    "fedit-10": (10, 5),
    "fedit-dolly": (100, 5),
    "shepherd": (10, 1),
}


def test_every_shipped_recipe_is_expected_here() -> None:
    assert shipped() == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_opens_with_the_command_that_runs_it(name: str) -> None:
    first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    assert first == ("# bellwether run" if name == "default" else f"# bellwether run {name}")
    assert load_recipe(RECIPES / f"{name}.yaml").name == name


@pytest.mark.parametrize("name", EXPECTED)
def test_two_rounds_of_a_shipped_recipe(
    name: str, bellwether: Command, tiny_llama: Path, dolly_like_large: Path
) -> None:
    clients, cohort = EXPECTED[name]
    outcome = bellwether("run", name, "--model", tiny_llama, "--data", dolly_like_large, "--rounds", 2, "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"2 rounds, {cohort} of {clients} clients in each" in outcome.out

    # Ten rows of each of eight categories are held out of 320; the clients share the others.
    rounds = json_lines(Path("out/rounds.jsonl"))
    assert [len(record["cohort"]) for record in rounds] == [cohort, cohort]
    assert [len(record["clients"]) for record in rounds] == [cohort, cohort]
    if name != "default":
        for record in rounds:
            assert record["rows"] == pytest.approx(240 / clients * cohort, abs=cohort)
    scored = [row for row in json_lines(Path("out/evaluation.jsonl")) if row["round"] == 2]
    assert len([row for row in scored if row["rows"] == 10]) == 8
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    shipped_recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for section in shipped_recipe.keys() - {"name", "model", "data", "federation"}:
        assert shipped_recipe[section].items() <= recipe[section].items()

    loads_in_peft(tiny_llama, Path("out/adapter"), all_linear=name == "default")


def loads_in_peft(base: Path, adapter: Path, all_linear: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    loaded = {key: value for key, value in tuned.state_dict().items() if "lora_" in key}
    assert len(loaded) == 2 * (7 if all_linear else 4)
    assert all(value.abs().max() > 0 for value in loaded.values()), "nothing was trained or loaded"
