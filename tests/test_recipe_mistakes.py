"""Mistakes in recipes and overrides, where they are parsed: each one sentence with its place, the value and the remedy.

That the command shows these sentences, with exit code 2 and nothing left behind, is tested in ``test_bad_input.py``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY_RECIPE

from bellwether.errors import RecipeError
from bellwether.recipe.file import differences, dump_recipe, load_recipe, with_overrides
from bellwether.recipe.recipe import Recipe

TINY = TINY_RECIPE.format(model="a-model", data="rows.jsonl")


@dataclass(frozen=True)
class Mistake:
    """A recipe that cannot be used.

    Args:
        recipe: the content of its file.
        fields: overrides.
        says: for each sentence, what it must contain.
    """

    recipe: str | bytes
    fields: tuple[str, ...]
    says: tuple[tuple[str, ...], ...]


def mistake(recipe: str | bytes, fields: list[str], *says: str | tuple[str, ...]) -> Mistake:
    """Return a mistake; texts stand for one sentence, tuples for one each."""
    several = tuple(line for line in says if isinstance(line, tuple))
    return Mistake(recipe, tuple(fields), several or (tuple(text for text in says if isinstance(text, str)),))


MISTAKES = {
    "misspelt_field": mistake(
        "training:\n  batchsize: 4\n",
        [],
        "recipe.yaml:2: there is no field training.batchsize; did you mean training.batch_size?",
    ),
    "field_in_the_wrong_section": mistake(
        "model:\n  rank: 4\n", [], "recipe.yaml:2: there is no field model.rank; did you mean lora.rank?"
    ),
    "unknown_section": mistake(
        TINY, ["quantum=1"], "command line: there is no field quantum; known here: name, seed, model"
    ),
    "value_out_of_range": mistake(
        "training:\n  # nothing fits in this\n  batch_size: 0\n",
        [],
        "recipe.yaml:3: training.batch_size is 0",
        "greater than or equal to 1",
        "rows per batch",
    ),
    "value_nan": mistake(
        "training:\n  learning_rate: .nan\n", [], "recipe.yaml:2: training.learning_rate is nan", "finite number"
    ),
    "value_infinite": mistake(
        TINY, ["training.learning_rate=.inf"], "command line: training.learning_rate is inf", "finite number"
    ),
    "value_of_a_wrong_type": mistake(
        "lora: {rank: eight}\n", [], "recipe.yaml:1: lora.rank is 'eight'", "valid integer"
    ),
    "value_instead_of_a_section": mistake(
        "training: 4\n", [], "recipe.yaml:1: training is 4: this is a section; set fields below it, or leave it out"
    ),
    "section_without_fields": mistake(
        "training:\nseed: 1\n",
        [],
        "recipe.yaml:1: training is None: this is a section; set fields below it, or leave it out",
    ),
    "truth_instead_of_a_number": mistake(
        TINY,
        ["federation.rounds=yes"],
        "command line: federation.rounds is True: true and false are not wanted here (number of rounds)",
    ),
    "one_name_instead_of_a_list": mistake(
        TINY,
        ["lora.target_modules=q_proj"],
        "command line: lora.target_modules is 'q_proj': a list is wanted, such as [one, two] (names of",
    ),
    "empty_list": mistake(
        TINY, ["lora.target_modules=[]"], "command line: lora.target_modules is []: this is empty; name at least one"
    ),
    "yaml_tag_that_would_make_an_object": mistake(
        "name: a\nseed: !!python/object/apply:os.getpid []\n",
        [],
        "recipe.yaml:2: '!!python/object/apply:os.getpid' is a tag, and values are plain here; remove or quote it.",
    ),
    "yaml_date_that_is_none": mistake(
        "name: 2024-99-99\n", [], "recipe.yaml:1: the value of name cannot be read (month must be in 1..12); quote it"
    ),
    "override_with_a_date_that_is_none": mistake(
        TINY, ["name=2024-99-99"], "command line: the value of name is not YAML: '2024-99-99'; quote it"
    ),
    "yaml_alias_of_itself": mistake(
        "lora: &l {rank: *l}\n",
        [],
        "recipe.yaml:1: '&l' names a value to be repeated; remove it, and write every value out.",
    ),
    "duplicate_yaml_key": mistake(
        "lora:\n  rank: 4\n  alpha: 8\n  rank: 8\n",
        [],
        "recipe.yaml:4: lora.rank stands twice (first in line 2); remove one",
    ),
    "several_mistakes_together": mistake(
        "seed: 1\nlora:\n  rnak: 4\nseed: 2\n",
        ["training.batch_size=0"],
        ("recipe.yaml:4: seed stands twice (first in line 1)",),
        ("recipe.yaml:3: there is no field lora.rnak; did you mean lora.rank?",),
        ("command line: training.batch_size is 0",),
    ),
    "recipe_that_is_a_list": mistake(
        "- training\n- lora\n", [], "recipe.yaml:1: a recipe is a mapping of sections such as 'training:'"
    ),
    "recipe_that_is_not_yaml": mistake(
        "seed: 1\nlora: [1, 2\n", [], "recipe.yaml:3: this is not YAML (expected ',' or ']'"
    ),
    "recipe_with_tabs": mistake("lora:\n\trank: 2\n", [], "recipe.yaml:2: this is not YAML (found character '\\t'"),
    "recipe_in_another_encoding": mistake(
        b"name: \xfcmlaut\n", [], "recipe.yaml: byte 6 is not UTF-8; save the recipe as UTF-8"
    ),
    "override_without_a_field": mistake(
        TINY, ["=4"], "command line: '=4' is not an override; write section.field=value"
    ),
    "override_that_is_not_yaml": mistake(
        TINY,
        ["lora.target_modules=[q_proj"],
        "command line: the value of lora.target_modules is not YAML: '[q_proj'; quote it",
    ),
    "name_with_parts_of_a_path": mistake("name: ../up\n", [], "recipe.yaml:1: name is '../up'", "name of the run"),
    "unknown_tracker": mistake(
        TINY,
        ["output.trackers=[teletext]"],
        "output.trackers.0 is 'teletext'",
        "'tensorboard', 'mlflow', 'wandb' or 'trackio'",
    ),
    "method_that_does_not_exist": mistake(
        TINY,
        ["federation.sampler=unifrom"],
        "federation.sampler is 'unifrom': 'unifrom' is not one of uniform, poisson, available, nor package.module:func",
    ),
    "sampler_without_availability": mistake(
        TINY, ["federation.sampler=available"], "federation.sampler is available, but federation.availability is null"
    ),
    "warm_up_as_long_as_the_run": mistake(
        TINY,
        ["training.warmup_rounds=2"],
        "training.warmup_rounds is 2, which leaves none of the 2 rounds at the full learning rate; give fewer",
    ),
    "cohort_larger_than_the_clients": mistake(
        TINY, ["federation.cohort_size=9"], "federation.cohort_size is 9, but there are 4 clients; give at most 4"
    ),
    "partition_by_a_column_without_name": mistake(
        TINY,
        ["partition.method=column"],
        "tiny.yaml:4: partition.method is column, so name the column in partition.column",
    ),
    "groups_that_do_not_add_up": mistake(
        TINY,
        ["partition.clients_per_group={english: 4, french: 3}"],
        "command line: partition.clients_per_group adds up to 7 clients, but partition.clients "
        "is 4; set partition.clients",
    ),
    "alpha_that_no_float32_holds": mistake(
        TINY, ["lora.alpha=1.0e+300"], "command line: lora.alpha is 1e+300", "less than or equal to 1000000"
    ),
    "output_folder_without_name": mistake(
        TINY, ["output.folder=''"], "output.folder is '': this cannot be the name of a folder (run folder"
    ),
    "output_folder_with_a_null_character": mistake(
        TINY, ['output.folder="a\\0b"'], "output.folder is 'a\\x00b': this cannot be the name of a folder (run folder"
    ),
    "arm_of_an_unknown_kind": mistake(
        TINY + "compare: {arms: {x: {trains: nobod}}}\n",
        [],
        "tiny.yaml:9: compare.arms.x.trains is 'nobod': input should be 'nobody', 'alone', 'together'",
    ),
    "arm_with_a_misspelt_field": mistake(
        TINY + "compare: {arms: {x: {train: alone}}}\n",
        [],
        "there is no field compare.arms.x.train; did you mean compare.arms.x.trains?",
    ),
    "arm_that_is_no_section": mistake(
        TINY + "compare: {arms: {x: alone}}\n", [], "compare.arms.x is 'alone': this is a section; set fields below it"
    ),
    "arm_without_a_name": mistake(
        TINY + "compare: {arms: {'': {}}}\n", [], "the name of an arm has 1 to 64 printable characters"
    ),
    "arm_with_a_line_break_in_its_name": mistake(
        TINY + 'compare: {arms: {"a\\nb": {}}}\n', [], "1 to 64 printable characters"
    ),
    "no_arm": mistake(TINY + "compare: {arms: {}}\n", [], "compare.arms: this is empty; name at least one"),
    "seed_given_twice": mistake(
        TINY + "compare: {seeds: [1, 2, 1]}\n", [], "tiny.yaml:9: compare.seeds names 1 twice; once is enough"
    ),
    "client_given_twice": mistake(
        TINY + "compare: {arms: {x: {trains: alone, clients: [a, a]}}}\n",
        [],
        "compare.arms.x.clients names a twice; once is enough",
    ),
    "passes_and_steps": mistake(
        TINY + "compare: {arms: {x: {trains: alone, passes: 2, steps: 3}}}\n",
        [],
        "tiny.yaml:9: compare.arms.x.steps is given as well as passes; leave one of them out",
    ),
    "steps_of_a_federation": mistake(
        TINY + "compare: {arms: {x: {steps: 3}}}\n", [], "compare.arms.x.steps is given, but a federation counts"
    ),
    "passes_of_nobody": mistake(
        TINY + "compare: {arms: {x: {trains: nobody, passes: 3}}}\n",
        [],
        "compare.arms.x.passes is given, but trains is nobody, which trains nothing; leave it out",
    ),
    "learning_rate_of_a_rule": mistake(
        TINY + "compare: {arms: {x: {trains: nearest row, learning_rate: 3}}}\n",
        [],
        "compare.arms.x.learning_rate is given, but trains is nearest row, which trains nothing",
    ),
    "clients_that_train_together": mistake(
        TINY + "compare: {arms: {x: {trains: together, clients: [client-1]}}}\n",
        [],
        "compare.arms.x.clients is given, but trains is together; only an arm that trains alone names clients",
    ),
    "seed_set_by_an_arm": mistake(
        TINY + "compare: {arms: {x: {set: {seed: 3}}}}\n",
        [],
        "compare.arms.x.set names seed, which is the same for all arms of a comparison; leave it out",
    ),
    "training_of_nobody_set_by_an_arm": mistake(
        TINY + "compare: {arms: {x: {trains: nobody, set: {training.batch_size: 3}}}}\n",
        [],
        "compare.arms.x.set names training.batch_size, which has no effect, since trains is nobody; leave it out",
    ),
    "training_of_a_rule_set_by_an_arm": mistake(
        TINY + "compare: {arms: {x: {trains: nearest row, set: {training.local_epochs: 3}}}}\n",
        [],
        "compare.arms.x.set names training.local_epochs, which has no effect, since trains is nearest row",
    ),
    "warm_up_without_rounds_set_by_an_arm": mistake(
        TINY + "compare: {arms: {x: {trains: alone, set: {training.warmup_rounds: 1}}}}\n",
        [],
        "compare.arms.x.set names training.warmup_rounds, which has no effect, since trains is alone; leave it out",
    ),
    "aggregation_without_a_federation_set_by_an_arm": mistake(
        TINY + "compare: {arms: {x: {trains: together, set: {method.name: uniform}}}}\n",
        [],
        "compare.arms.x.set names method.name, which has no effect, since trains is together; leave it out",
    ),
    "ranks_of_clients_without_a_federation_set_by_an_arm": mistake(
        TINY + "compare: {arms: {x: {trains: alone, set: {lora.ranks: [2, 4]}}}}\n",
        [],
        "compare.arms.x.set names lora.ranks, which has no effect, since trains is alone; leave it out",
    ),
    "fraction_beside_passes_set_by_an_arm": mistake(
        TINY + "compare: {arms: {x: {trains: together, passes: 3, set: {federation.fraction: 1}}}}\n",
        [],
        "compare.arms.x.set names federation.fraction, which has no effect, since trains is together; leave it out",
    ),
    "length_told_twice": mistake(
        TINY + "compare: {arms: {x: {passes: 3, set: {federation.rounds: 3}}}}\n",
        [],
        "compare.arms.x.set names federation.rounds, but passes decides it; leave one of them out",
    ),
    "rates_to_try_without_trials": mistake(
        TINY + "compare: {arms: {x: {learning_rates: [0.1, 0.2]}}}\n",
        [],
        "compare.arms.x.learning_rates is given, but the arm has no trials (compare.tune); give learning_rate",
    ),
    "fewer_rates_to_try_than_other_arms": mistake(
        TINY + "compare: {arms: {x: {learning_rates: [0.1]}}, tune: {learning_rates: [0.1, 0.2, 0.3]}}\n",
        [],
        "compare.arms.x.learning_rates names 1, but trials try 3 learning rates with each arm; name as many",
    ),
    "no_passes_where_trials_choose_none": mistake(
        TINY + "compare: {arms: {x: {}}, tune: {passes: null}}\n",
        [],
        "compare.arms.x.passes is not given, but compare.tune.passes is null, so that each arm says its own; give it",
    ),
    "kept_entries_without_top_k": mistake(
        TINY + "compression: {up: 4bit, keep: 0.2}\n",
        [],
        "compression.keep is given, but compression.up is 4bit, which keeps all entries; leave it out",
    ),
    "error_feedback_of_nothing": mistake(
        TINY + "compression: {error_feedback: false}\n",
        [],
        "compression.error_feedback is false, but compression.up is none, which leaves nothing unsent; leave it out",
    ),
    "masked_updates_in_few_bits": mistake(
        TINY + "secure_aggregation: {enabled: true}\ncompression: {up: 8bit}\n",
        [],
        "compression.up is 8bit, but masked updates cannot be added up in few bits; set it to none, or",
    ),
    "masks_among_two": mistake(
        TINY + "secure_aggregation: {enabled: true}\n",
        ["federation.cohort_size=2"],
        "federation.cohort_size is 2, which masks nothing; give at least 3, or set secure_aggregation.enabled=false",
    ),
    "threshold_of_no_masks": mistake(
        TINY + "secure_aggregation: {threshold: 0.8}\n",
        [],
        "secure_aggregation.threshold is given, but secure_aggregation.enabled is false; leave it out, or set",
    ),
    "threshold_of_half": mistake(
        TINY + "secure_aggregation: {enabled: true, threshold: 0.5}\n",
        [],
        "secure_aggregation.threshold",
    ),
    "trials_of_preferences_by_clients_loss": mistake(
        TINY + "compare: {arms: {x: {}}, tune: {choose_by: clients_loss}}\n",
        ["training.loss=dpo"],
        "compare.tune.choose_by is clients_loss, the cross-entropy of chosen answers, which says little of preferences",
    ),
    "rate_given_and_tuned": mistake(
        TINY + "compare: {arms: {x: {learning_rate: 0.1}}, tune: {}}\n",
        [],
        "compare.arms.x.learning_rate is given, but compare.tune chooses it; leave one of them out",
    ),
    "rate_set_and_tuned": mistake(
        TINY + "compare: {arms: {x: {set: {training.learning_rate: 0.1}}}, tune: {}}\n",
        [],
        "compare.arms.x.set names training.learning_rate, but compare.tune decides it",
    ),
    "rate_tried_twice": mistake(
        TINY + "compare: {tune: {learning_rates: [0.1, 0.1]}}\n",
        [],
        "compare.tune.learning_rates names 0.1 twice; once is enough",
    ),
    "nothing_to_tune": mistake(
        TINY + "compare: {arms: {x: {trains: nobody}}, tune: {}}\n", [], "no arm trains passes that it could choose"
    ),
    "choice_by_answers_that_are_not_there": mistake(
        TINY + "compare: {tune: {choose_by: exact}}\n",
        ["evaluation.generate=false"],
        "compare.tune.choose_by is exact, but evaluation.generate is false, so there are no answers; choose by loss",
    ),
}


def sentences(path: Path, fields: tuple[str, ...] = ()) -> list[str]:
    """What is said of a recipe that cannot be used."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, fields)
    return str(caught.value).split("\n")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = MISTAKES[name]
    # Recipes that are whole but for an override, or what they compare, are called tiny.yaml, the others recipe.yaml.
    path = Path("tiny.yaml" if str(bad.recipe).startswith("name: tiny\n") else "recipe.yaml")
    path.write_bytes(bad.recipe if isinstance(bad.recipe, bytes) else bad.recipe.encode())
    said = sentences(path, bad.fields)
    assert len(said) == len(bad.says), said
    for line, parts in zip(said, bad.says, strict=True):
        assert line.endswith((".", "?")), line
        assert line.isprintable()
        for part in parts:
            assert part in line


def test_a_folder_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    (said,) = sentences(Path("folder"))
    assert said == "folder: the recipe cannot be read (Is a directory); give another one."


# What recipes do not take -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["!!bool", "!!timestamp", "!!float", "!!int", "!!binary", "!!python/name:os.system", "!", "!own"]
)
@pytest.mark.parametrize("place", ["{tag} x", "[1, {tag} x]", "{{a: {tag} x}}", "{{{tag} a: x}}"])
def test_an_explicit_tag_is_refused_with_its_line(tmp_path: Path, tag: str, place: str) -> None:
    value = place.format(tag=tag)
    (tmp_path / "r.yaml").write_text(f"name: a\nseed: {value}\n")
    end = f"{tag!r} is a tag, and values are plain here; remove or quote it."
    assert sentences(tmp_path / "r.yaml") == [f"{tmp_path / 'r.yaml'}:2: {end}"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [f"model.trust_remote_code={value}"])
    assert caught.value.problems == [f"command line: model.trust_remote_code: {end}"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("&a [x]", "'&a' names a value to be repeated; remove it, and write every value out."),
        ("*a", "'*a' repeats a value from elsewhere; write it out."),
        ("[*a]", "'*a' repeats a value from elsewhere; write it out."),
        ("{<<: {rank: 2}}", "'<<' would take in another mapping; write its fields out."),
        ("[{<<: {rank: 2}}]", "'<<' would take in another mapping; write its fields out."),
        ("[" * 21 + "]" * 21, "this is nested more than 20 deep; write it flatter."),
        ("- " * 5000 + "x", "this is nested more than 20 deep; write it flatter."),
        ("[" * 100_000, "this is nested more than 20 deep; write it flatter."),
        (
            "[" + "1," * 25_000 + "]",
            "there are more than 20000 values; give fewer, such as a folder instead of its files.",
        ),
    ],
)
def test_what_stands_for_more_than_it_says_is_refused(tmp_path: Path, value: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(f"name: a\nlora:\n  {value}\n")
    assert sentences(tmp_path / "r.yaml") == [f"{tmp_path / 'r.yaml'}:3: {said}"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [f"lora={value}"])
    assert caught.value.problems == [f"command line: lora: {said}"]


def test_values_that_double_from_line_to_line_cost_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 41))]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    start = time.process_time()
    (said,) = sentences(tmp_path / "r.yaml")
    assert "r.yaml:1: '&a0' names a value" in said
    assert time.process_time() - start < 5  # seconds; where they were followed, it never ended


def test_a_file_beyond_any_recipe_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\n" + "#" * 1_000_000)
    said = f"{tmp_path / 'r.yaml'}: this has more than 1000000 bytes, which no recipe needs; give another file."
    assert sentences(tmp_path / "r.yaml") == [said]
    with Path("/dev/zero").open():  # a file without an end
        assert sentences(Path("/dev/zero")) == ["/dev/zero" + said[len(str(tmp_path / "r.yaml")) :]]


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 5000, "1:" * 100_000 + "1", "0b" + "1" * 400])
def test_a_number_of_too_many_digits_is_refused(tmp_path: Path, number: str) -> None:
    (tmp_path / "r.yaml").write_text(f"seed: {number}\n")
    reason = "the value of seed cannot be read (a number has too many digits); quote it."
    assert sentences(tmp_path / "r.yaml") == [f"{tmp_path / 'r.yaml'}:1: {reason}"]


def test_a_character_that_yaml_does_not_have_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: \x01\n")
    assert sentences(tmp_path / "r.yaml") == [f"{tmp_path / 'r.yaml'}: character 6 cannot stand in YAML; remove it."]


def test_a_key_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\n? [a, b]\n: 3\n")
    said = f"{tmp_path / 'r.yaml'}:2: a key is a single word, but this is a list or mapping; quote it."
    assert sentences(tmp_path / "r.yaml") == [said]


def test_what_looks_like_a_tag_or_an_alias_can_be_quoted_and_is_written_so(tmp_path: Path) -> None:
    names = ["!!bool x", "*a", "&b", "<<", "=", "2024-99-99", "0x1f"]
    recipe = load_recipe(None, [f"data.unseen_categories=[{', '.join(map(repr, names))}]"])
    assert recipe.data.unseen_categories == tuple(names)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_a_recipe_made_in_python_is_written_without_aliases(tmp_path: Path) -> None:
    twice = ["q_proj", "v_proj"]
    values = {"compare": {"arms": {name: {"set": {"lora.target_modules": twice}} for name in ("a", "b")}}}
    recipe = Recipe.model_validate(values)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert dict(load_recipe(tmp_path / "r.yaml").compare.arms) == dict(recipe.compare.arms)


# How much is said ---------------------------------------------------------------------------------


def test_of_many_mistakes_ten_are_told_and_all_are_kept(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("training:\n" + "".join(f"  key{number}: 1\n" for number in range(60)))
    said = sentences(tmp_path / "r.yaml")
    assert len(said) == 11
    assert f"{tmp_path / 'r.yaml'}:11: there is no field training.key9; known here: loss" in said[9]
    assert said[10] == "... and 50 more; there are 60 mistakes in all."
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert len(caught.value.problems) == 60
    (tmp_path / "r.yaml").write_text("training:\n" + "".join(f"  key{number}: 1\n" for number in range(10)))
    assert len(sentences(tmp_path / "r.yaml")) == 10


LONG = "x" * 3000


@pytest.mark.parametrize(
    "field",
    [
        f"seed={LONG}",
        f"seed=[{LONG}, {LONG}]",
        f"{LONG}=1",
        f"lora.{LONG}=1",
        f"{LONG}",
        f"seed=[{LONG}",
        f"seed=!{LONG} 1",
        f"seed=&{LONG} 1",
        f"federation.sampler={LONG}",
        f"partition.clients_per_group={{{LONG}: 0}}",
        f"partition.column={LONG}",
        f"partition={{method: 'a:{LONG}', clients_per_group: {{a: 1}}}}",
        f"compare={{arms: {{x: {{trains: alone, clients: [{LONG}, {LONG}]}}}}}}",
        f"compare={{arms: {{x: {{trains: nobody, set: {{training.{LONG}: 1}}}}}}}}",
        f"compare={{arms: {{{LONG}: {{}}}}}}",
        f"selection={{method: random, rows: 3, proxy: {LONG}}}",
        f"%TAG !x{LONG}! y",
        "a." * 3000 + "b=1",
    ],
)
def test_long_values_are_cut_in_what_is_said(field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [field])
    for line in caught.value.problems:
        assert len(line) < 700, line
        assert "\n" not in line


def test_differences_are_cut() -> None:
    changed = with_overrides(Recipe(), {"data.unseen_categories": [LONG]})
    (line,) = differences(Recipe(), changed)
    assert line.startswith("data.unseen_categories: [] → ['xxx")
    assert len(line) < 200
    assert line.endswith("…")
