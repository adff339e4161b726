from pathlib import Path

import pytest
import yaml

from bellwether.errors import RecipeError
from bellwether.recipe import Recipe, Section
from bellwether.recipe_file import differences, dump_recipe, find_recipe, load_recipe, shipped


def problems(path: Path | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_field_has_a_default_and_says_what_it_means():
    def walk(section: type[Section], where: str) -> None:
        for name, info in section.model_fields.items():
            inner = info.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                walk(inner, f"{where}{name}.")
                continue
            assert info.description, f"{where}{name} has no description"
            assert not info.is_required(), f"{where}{name} has no default"

    walk(Recipe, "")


def test_a_dumped_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe(None, ["seed=7", "lora.target_modules=[q_proj]", "federation.availability.away=0.1"])
    for comments in (False, True):
        assert load_recipe(write(tmp_path, dump_recipe(recipe, comments=comments))) == recipe
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json")


def test_all_mistakes_are_reported_together_with_file_and_line(tmp_path):
    path = write(
        tmp_path,
        "seed: -1\ntraning:\n  x: 1\ntraining:\n  batchsize: 3\n  learning_rate: .nan\n"
        "lora:\n  rank: 0\n  rank: 4\npartition:\n  method: dirichle\n",
    )
    found = problems(path, ("federation.deadline=soon", "nonsense"))
    expected = [
        (f"{path}:1", "seed is -1"),
        (f"{path}:2", "did you mean training?"),
        (f"{path}:5", "did you mean training.batch_size?"),
        (f"{path}:6", "training.learning_rate is nan"),
        (f"{path}:8", "lora.rank is 0"),
        (f"{path}:9", "lora.rank stands twice (first in line 8)"),
        (f"{path}:11", "'dirichle' is not one of"),
        ("command line", "federation.deadline is 'soon'"),
        ("command line", "'nonsense' is not an override"),
    ]
    for place, text in expected:
        assert any(line.startswith(place + ":") and text in line for line in found), (place, text, found)
    assert len(found) == len(expected)


def test_a_field_of_another_section_is_named_as_the_remedy():
    assert "did you mean lora.rank?" in problems(None, ("rank=4",))[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", ":1: a recipe is a mapping"),
        ("a: [1\n", "this is not YAML"),
        ("\xff", "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    (problem,) = problems(path)
    assert message in problem


def test_a_missing_recipe_names_the_shipped_ones(tmp_path):
    (problem,) = problems(tmp_path / "none.yaml")
    assert all(name in problem for name in ("default", "fedit-dolly", "shepherd"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("partition.method=column",), "name the column"),
        (("partition.column=site",), "set it to column"),
        (("partition.method=iid", "partition.clients=4", "federation.cohort_size=5"), "give at most 4"),
        (("federation.sampler=available",), "say there who is away"),
        (("federation.deadline=5",), "nobody's speed is simulated"),
        (("federation.rounds=3", "training.warmup_rounds=3"), "none of the 3 rounds"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, message):
    assert message in problems(None, overrides)[0]


def test_numbers_in_exponent_form_are_numbers():
    # YAML 1.1 reads 3e-4 as text; people write it all the same.
    assert load_recipe(None, ["training.learning_rate=3e-4"]).training.learning_rate == 3e-4


def test_differences_name_field_and_both_values():
    old = Recipe()
    new = load_recipe(None, ["training.batch_size=4"])
    assert differences(old, new) == ["training.batch_size: 8 → 4"]
    assert differences(old, old) == []


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads_and_opens_with_the_command_that_runs_it(name):
    path = find_recipe(name)
    recipe = load_recipe(path)
    first = path.read_text().splitlines()[0]
    assert first == ("# bellwether run" if name == "default" else f"# bellwether run {name}")
    assert recipe.name == name


def test_the_default_recipe_is_the_default_in_python():
    assert load_recipe(find_recipe("default")) == Recipe()
