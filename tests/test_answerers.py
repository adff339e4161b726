"""Who can be asked of a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_RECIPE

from bellwether.arms.compare import compare
from bellwether.ask.answerers import find_answerer, find_answerers
from bellwether.errors import CheckpointError, RecipeError
from bellwether.exchange.adapter import Adapter, read_adapter
from bellwether.recipe.file import load_recipe, with_overrides


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dolly_like: Path) -> Path:
    """A finished comparison under two seeds, one of its arms over an adapter of another rank."""
    place = tmp_path_factory.mktemp("answerers")
    (place / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like))
    arms = {
        "base": {"trains": "nobody"},
        "local": {"trains": "alone", "clients": ["client-01", "client-03"], "passes": 1},
        "federated": {"trains": "federation"},
        "rank 3": {"trains": "federation", "set": {"lora.rank": 3}},
    }
    fields = {"compare": {"seeds": [3, 4], "arms": arms}, "model.threads": 1, "evaluation.generate": False}
    compare(with_overrides(load_recipe(place / "tiny.yaml"), fields), place / "out")
    return place / "out"


def same(first: Adapter | None, second: Adapter | None) -> bool:
    assert first is not None
    assert second is not None
    return all(np.array_equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def test_of_a_run_the_base_and_the_federated_adapter_can_be_asked(tiny_run: tuple[Path, Any]) -> None:
    folder, _ = tiny_run
    base, federated = find_answerers(folder)
    assert (base.name, base.adapter, federated.name) == ("base", None, "federated")
    assert same(federated.adapter, read_adapter(folder / "adapter"))
    assert find_answerer(str(folder)).name == "federated"
    assert find_answerer(f"{folder}:base").adapter is None


def test_of_a_comparison_all_adapters_of_a_seed_can_be_asked(compared: Path) -> None:
    names = ["base", "local, client-01", "local, client-03", "federated", "rank 3"]
    found = find_answerers(compared)
    assert [one.name for one in found] == names
    assert (found[2].arm, found[2].client, found[4].arm, found[4].client) == ("local", "client-03", "rank 3", "")
    assert same(found[2].adapter, read_adapter(compared / "local" / "seed-3" / "adapters" / "2-client-03"))
    assert same(found[3].adapter, read_adapter(compared / "federated" / "seed-3" / "run" / "adapter"))
    assert (found[3].recipe.lora.rank, found[4].recipe.lora.rank) == (2, 3)
    others = find_answerers(compared, seed=4)
    assert same(others[1].adapter, read_adapter(compared / "local" / "seed-4" / "adapters" / "1-client-01"))
    assert not same(others[1].adapter, found[1].adapter)
    assert find_answerer(f"{compared}:local, client-03", seed=4).name == "local, client-03"
    assert find_answerer(str(compared)).name == "federated"


def test_of_an_adapters_folder_the_base_that_it_names_or_another_can_be_asked(
    tiny_run: tuple[Path, Any], tiny_llama: Path
) -> None:
    base, tuned = find_answerers(tiny_run[0] / "adapter")
    assert (base.recipe.model.path, tuned.name) == (str(tiny_llama), "adapter")
    assert find_answerer(str(tiny_run[0] / "adapter")).adapter is not None
    assert find_answerers(tiny_run[0] / "adapter", model="elsewhere")[1].recipe.model.path == "elsewhere"


def test_of_a_models_folder_the_model_can_be_asked(tiny_llama: Path) -> None:
    (base,) = find_answerers(tiny_llama)
    assert (base.recipe.model.path, find_answerer(str(tiny_llama)).name) == (str(tiny_llama), "base")


def test_what_cannot_be_asked_is_refused_with_what_there_is(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"out holds no 'locl'; it has 'base', 'local, client-01'"):
        find_answerer(f"{compared}:locl")
    with pytest.raises(RecipeError, match=r"has no seed 5; it has 3, 4"):
        find_answerers(compared, seed=5)
    with pytest.raises(CheckpointError, match="holds no run, comparison, adapter or model"):
        find_answerers(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: begun\n")
    with pytest.raises(CheckpointError, match="is not finished; go on with it first"):
        find_answerers(tmp_path)


def test_what_would_have_no_effect_is_refused(tiny_run: tuple[Path, Any], tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="holds no comparison, so there is no seed 5 of it to choose"):
        find_answerers(tiny_run[0], seed=5)
    with pytest.raises(RecipeError, match="is a model itself, so the model elsewhere has no effect"):
        find_answerers(tiny_llama, model="elsewhere")


def test_another_base_stands_under_all_adapters(compared: Path, tiny_run: tuple[Path, Any]) -> None:
    for folder in (compared, tiny_run[0]):
        assert {one.recipe.model.path for one in find_answerers(folder, model="elsewhere")} == {"elsewhere"}


def test_an_adapter_named_base_is_not_taken_for_the_untuned_one(tiny_run: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(tiny_run[0] / "adapter", tmp_path / "base")
    assert [one.name for one in find_answerers(tmp_path / "base")] == ["base", "base (tuned)"]
    assert find_answerer(str(tmp_path / "base")).adapter is not None
    assert find_answerer(f"{tmp_path / 'base'}:base").adapter is None


def test_folders_and_names_may_hold_colons(tiny_run: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(tiny_run[0], tmp_path / "a:b")
    assert find_answerer(f"{tmp_path}/a:b").name == "federated"
    assert find_answerer(f"{tmp_path}/a:b:base").name == "base"
    with pytest.raises(RecipeError, match="a:b holds no 'x:y'"):
        find_answerer(f"{tmp_path}/a:b:x:y")
