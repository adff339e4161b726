import re
from pathlib import Path

import pytest
import yaml

from bellwether.errors import RecipeError
from bellwether.recipe.file import differences, dump_recipe, find_recipe, load_recipe, shipped
from bellwether.recipe.recipe import Recipe, Section


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
        (("partition.categories_per_client=[3, 1]",), "is [3, 1]; give the smaller number first"),
        (("partition.rows_per_client=[60, 20]",), "is [60, 20]; give the smaller number first"),
        (("partition.rows_per_client=[5, 20]", "partition.min_rows=9"), "begins at 5, but partition.min_rows is 9"),
        (
            ("partition.clients_per_group={a: 7, b: 5}",),
            "adds up to 12 clients, but partition.clients is 10; set partit",
        ),
        (("partition.clients_per_group.a=10", "partition.method=files"), "method files makes the clients itself"),
        (("partition.clients_per_group.a=10", "partition.method=own:deal"), "method own:deal makes the clients itself"),
        (
            ("partition.clients_per_group={a: 3, b: 1}", "partition.clients=4", "federation.cohort_size=5"),
            "there are 4 clients",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, message):
    assert message in problems(None, overrides)[0]


def test_clients_per_group_are_set_by_name_or_together_in_the_order_given(tmp_path):
    path = write(tmp_path, "partition:\n  clients: 10\n  clients_per_group: {south: 5, north: 5}\n")
    assert load_recipe(path).partition.clients_per_group == {"south": 5, "north": 5}
    fields = ["partition.clients_per_group.south=7", "partition.clients_per_group.north=3"]
    assert load_recipe(path, fields).partition.clients_per_group == {"south": 7, "north": 3}
    mapping = load_recipe(path, ['partition.clients_per_group={"b": 9, "a": 1}'])
    assert list(mapping.partition.clients_per_group.items()) == [("b", 9), ("a", 1)]
    again = load_recipe(write(tmp_path, dump_recipe(mapping)))
    assert list(again.partition.clients_per_group) == ["b", "a"]


def test_a_group_may_be_called_what_yaml_takes_for_a_truth_value_or_a_number(tmp_path):
    wanted = {"no": 4, "2": 6}
    path = write(tmp_path, "partition: {clients_per_group: {no: 4, 2: 6}}\n")
    recipe = load_recipe(path)
    assert recipe.partition.clients_per_group == wanted
    assert load_recipe(None, ["partition.clients_per_group={no: 4, 2: 6}"]).partition.clients_per_group == wanted
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_ranges_come_back_from_a_dumped_recipe(tmp_path):
    fields = ["partition.categories_per_client=[1, 3]", "partition.rows_per_client=[20, 60]"]
    recipe = load_recipe(None, fields)
    assert (recipe.partition.categories_per_client, recipe.partition.rows_per_client) == ((1, 3), (20, 60))
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("categories_per_client=0", "is 0: give a whole number of at least 1, or two such as [1, 3]"),
        ("categories_per_client=[1, 2, 3]", "is [1, 2, 3]: give a whole number of at least 1, or two such as [1, 3]"),
        ("categories_per_client=[1, true]", "is [1, True]: give a whole number"),
        ("categories_per_client=many", "is 'many': give a whole number"),
        ("rows_per_client=20", "is 20: give two of at least 1, such as [20, 60]"),
        ("rows_per_client=[0, 5]", "is [0, 5]: give two of at least 1, such as [20, 60]"),
        ("clients_per_group={}", "clients_per_group: this is empty; name at least one"),
        ("clients_per_group=[5, 5]", "is [5, 5]: a mapping is wanted"),
        ("clients_per_group={a: 0}", "clients_per_group.a is 0: input should be greater than or equal to 1"),
        ("clients_per_group={a: true}", "clients_per_group.a is True: input should be a valid integer"),
    ],
)
def test_ranges_and_groups_of_a_wrong_kind_are_one_mistake_in_one_sentence(field, said):
    (problem,) = problems(None, (f"partition.{field}",))
    assert problem.startswith("command line: partition.")
    assert said in problem


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
    chosen = ["model.path=starter", "data.sources=[starter]"] if "???" in path.read_text() else []
    recipe = load_recipe(path, chosen)
    first = path.read_text().splitlines()[0]
    runs = "# bellwether run" if name == "default" else f"# bellwether run {name}"
    assert first == runs or (recipe.compare is not None and re.match(f"# bellwether compare( {name} |$)", first))
    assert recipe.name == name


def test_the_default_recipe_adds_what_suits_the_embedded_rows_to_the_defaults_of_the_fields():
    assert differences(Recipe(), load_recipe("default")) == [
        "evaluation.every: 5 → 10",
        "federation.rounds: 20 → 40",
        "partition.categories_per_client: 2 → [1, 3]",
        "partition.rows_per_client: None → [20, 60]",
    ]


def test_a_shipped_recipe_is_loaded_by_its_name():
    assert load_recipe("fedit-10", ["seed=3"]) == load_recipe(find_recipe("fedit-10"), ["seed=3"])
