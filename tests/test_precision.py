"""The precision that a machine computes in where a recipe leaves that to it."""

from pathlib import Path

import pytest

from bellwether.errors import CheckpointError, ModelError
from bellwether.model.base import load_base
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Model
from bellwether.runner import precision
from bellwether.runner.precision import speed_up, with_precision

AUTO = "model.dtype=auto"


@pytest.fixture
def machine(monkeypatch):
    """Be a machine that multiplies so many times as fast in bfloat16; return what was timed."""
    timed = []

    def with_times(times):
        def rate(dtype, settings, tokens, inputs, outputs, seconds):
            timed.append(dtype)
            return times if dtype == "bfloat16" else 1.0

        monkeypatch.setattr(precision, "product_rate", rate)
        return timed

    return with_times


@pytest.mark.parametrize(("times", "dtype"), [(0.1, "float32"), (1.49, "float32"), (1.5, "bfloat16"), (8, "bfloat16")])
def test_bfloat16_is_taken_where_it_is_half_as_fast_again(machine, times, dtype):
    machine(times)
    said = []
    assert with_precision(load_recipe(None, [AUTO]), None, said.append).model.dtype == dtype
    assert f"takes {dtype}" in said[0]


def test_a_method_that_folds_into_the_base_takes_float32_on_any_machine(machine):
    timed, said = machine(8), []
    assert with_precision(load_recipe(None, [AUTO, "method.name=flora"]), None, said.append).model.dtype == "float32"
    assert "since the method flora folds updates into the base" in said[0]
    arm = "compare={arms: {usual: {}, folding: {set: {method.name: fedex_lora}}}}"
    assert with_precision(load_recipe(None, [AUTO, arm]), None, said.append).model.dtype == "float32"
    assert "since the method fedex_lora folds updates into the base" in said[1]
    assert timed == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_precision_that_is_named_is_taken_and_nothing_is_timed(machine, dtype):
    timed = machine(8)
    recipe = load_recipe(None, [f"model.dtype={dtype}"])
    assert with_precision(recipe, None, timed.append) == recipe
    assert timed == []


def test_this_machine_can_be_timed_and_keeps_its_threads():
    import torch

    threads = torch.get_num_threads()
    assert 0 < speed_up(Model(threads=1)) < 1e6
    assert torch.get_num_threads() == threads


def test_a_base_is_not_loaded_in_a_precision_that_nobody_has_found():
    with pytest.raises(ModelError, match="model.dtype auto names no precision yet"):
        load_base(Model(dtype="auto"))


def test_a_run_keeps_what_it_found_and_goes_on_in_it(bellwether, tiny_recipe, machine):
    machine(8)
    done = bellwether("run", tiny_recipe, AUTO, "federation.rounds=1", "--out", "run")
    assert done.code == 0, done.err
    assert "model.dtype auto takes bfloat16: products are 8.0 times as fast" in done.out
    assert load_recipe(Path("run/recipe.yaml")).model.dtype == "bfloat16"
    machine(0.1)
    again = bellwether("run", "--resume", "run", AUTO)
    assert again.code == 0, again.err
    assert load_recipe(Path("run/recipe.yaml")).model.dtype == "bfloat16"


def test_a_comparison_keeps_what_it_found_for_all_arms(bellwether, tiny_recipe, machine):
    arms = "compare={seeds: [0], arms: {base: {trains: nobody}, federated: {trains: federation}}}"
    words = ("compare", tiny_recipe, AUTO, arms, "federation.rounds=1", "--out", "compared")
    for times in (0.1, 8):
        machine(times)
        done = bellwether(*words)
        assert done.code == 0, done.err
        assert load_recipe(Path("compared/recipe.yaml")).model.dtype == "float32"


def test_a_plan_says_what_would_be_taken(bellwether, tiny_recipe, machine):
    machine(8)
    assert "model.dtype auto takes bfloat16" in " ".join(bellwether("plan", tiny_recipe, AUTO).out.split())


def test_a_folder_whose_recipe_cannot_be_read_is_told(tmp_path, machine):
    (tmp_path / "recipe.yaml").write_text("rounds: many")
    with pytest.raises(CheckpointError, match="recipe.yaml cannot be read"):
        with_precision(load_recipe(None, [AUTO]), tmp_path, print)
