"""Code that a recipe's file or a folder names is run only with the word of the person at the keyboard."""

from __future__ import annotations

import io
import shutil
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_RECIPE, Command, Outcome, write_rows

from bellwether.cli.given import agree
from bellwether.errors import RecipeError
from bellwether.recipe.consent import Code, code_in, model_code, not_typed
from bellwether.recipe.file import load_recipe, shipped
from bellwether.recipe.recipe import Recipe, Section
from bellwether.tools.functions import file_of

FOREIGN = """\
import pathlib

pathlib.Path("imported").touch()


def deal(rows, settings, randomness):
    return {name: rows[number::4] for number, name in enumerate("abcd")}
"""


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold itself; those of a mapping have names of their own."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    inner = () if typing.get_origin(annotation) is Mapping else typing.get_args(annotation)
    return [section for part in inner for section in sections_in(part)]


def fields_for_functions(section: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """The dotted fields that take a person's own function, by what the recipe says of them."""
    found = []
    for name, info in section.model_fields.items():
        for inner in sections_in(info.annotation):
            found += fields_for_functions(inner, f"{prefix}{name}.")
        if "package.module:function" in (info.description or ""):
            found.append(f"{prefix}{name}")
    return found


def named(recipe: Recipe, **options: Any) -> list[tuple[str, str]]:
    return [(code.field, code.name) for code in code_in(recipe, **options)]


# What a recipe names ------------------------------------------------------------------------------


def test_there_are_fields_for_functions() -> None:
    assert {"partition.method", "training.loss", "method.name"} < set(fields_for_functions())


@pytest.mark.parametrize("field", fields_for_functions())
def test_a_function_in_any_field_that_takes_one_is_known_as_code(field: str) -> None:
    section, name = field.split(".")
    assert named(Recipe.model_validate({section: {name: "mine.rules:best"}})) == [(field, "mine.rules:best")]


def test_a_method_of_ones_own_is_known_as_code_and_its_parameters_are_not() -> None:
    recipe = load_recipe(None, ["method.name=mine.rules:best", "method.parameters.note=a:b"])
    assert named(recipe) == [("method.name", "mine.rules:best")]


def test_a_model_that_may_bring_code_is_known_as_code() -> None:
    recipe = load_recipe(None, ["model.path=some/model", "model.trust_remote_code=true"])
    assert named(recipe) == [("model.trust_remote_code", "some/model")]
    assert [code.name for code in model_code(recipe)] == ["some/model"]


@pytest.mark.parametrize("name", shipped())
def test_no_shipped_recipe_names_code(name: str) -> None:
    assert code_in(load_recipe(name, ["model.path=a", "data.sources=[a]"]), arms=True) == []


def test_what_the_arms_of_a_comparison_set_counts_where_they_are_run() -> None:
    arms = "{x: {set: {federation.sampler: mine:draw}}, y: {set: {model.trust_remote_code: yes, model.path: org/y}}}"
    recipe = load_recipe(None, [f"compare={{arms: {arms}}}", "training.loss=mine:loss"])
    assert named(recipe) == [("training.loss", "mine:loss")]
    assert set(named(recipe, arms=True)) == {
        ("training.loss", "mine:loss"),
        ("federation.sampler", "mine:draw"),
        ("model.trust_remote_code", "org/y"),
    }


# Whose word it is ---------------------------------------------------------------------------------

FILE = """\
method: {name: "mine:average"}
federation: {sampler: "mine:draw"}
model: {trust_remote_code: true, path: org/a}
compare: {arms: {x: {set: {training.loss: "mine:loss", model.path: org/b}}}}
"""


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        ([], {"mine:average", "mine:draw", "mine:loss", "org/a", "org/b"}),
        (["method.name=mine:average"], {"mine:draw", "mine:loss", "org/a", "org/b"}),
        (["method={name: mine:average}", "federation={sampler: mine:other}"], {"mine:loss", "org/a", "org/b"}),
        (["federation.rounds=3", "model.path=org/c"], {"mine:average", "mine:draw", "mine:loss", "org/c", "org/b"}),
        # Whoever trusts the recipe's model has not spoken of another one that an arm of the file takes instead.
        (["model.trust_remote_code=true"], {"mine:average", "mine:draw", "mine:loss", "org/b"}),
        (["compare={arms: {x: {set: {training.loss: mine:loss}}}}"], {"mine:average", "mine:draw", "org/a"}),
        # The same function under the same name needs one word, not one for each arm.
        (["training.loss=mine:loss"], {"mine:average", "mine:draw", "org/a", "org/b"}),
        (["method.name=fedavg", "model.trust_remote_code=false"], {"mine:draw", "mine:loss"}),
    ],
)
def test_what_a_person_typed_needs_no_second_word(tmp_path: Path, typed: list[str], left: set[str]) -> None:
    (tmp_path / "r.yaml").write_text(FILE)
    codes = code_in(load_recipe(tmp_path / "r.yaml", typed), arms=True)
    foreign = not_typed(codes, typed)
    assert {code.name for code in foreign} == left
    assert len(foreign) == len(left)


# Where it would come from -------------------------------------------------------------------------


def test_the_file_of_a_function_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_file.py").write_text("1 / 0\n")
    (tmp_path / "own_package" / "deep").mkdir(parents=True)
    for path in ("own_package/__init__.py", "own_package/deep/__init__.py", "own_package/deep/rules.py"):
        (tmp_path / path).write_text("1 / 0\n")
    before, paths = set(sys.modules), list(sys.path)
    assert file_of("own_file:f") == str(tmp_path / "own_file.py")
    assert file_of("own_package.deep.rules:f") == str(tmp_path / "own_package/deep/rules.py")
    assert file_of("own_package.absent:f") is None
    assert file_of("own_file.inner:f") is None
    assert file_of("own_absent:f") is None
    assert file_of("json.decoder:JSONDecoder") == sys.modules["json.decoder"].__file__
    assert set(sys.modules) == before
    assert sys.path == paths


# Commands -----------------------------------------------------------------------------------------


@pytest.fixture
def foreign(
    tmp_path: Path, tiny_llama: Path, dolly_like: Path, bellwether: Command, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder, the current one, with somebody's recipe and the module that it names, which leaves a trace."""
    monkeypatch.delitem(sys.modules, "foreign_rules", raising=False)
    (tmp_path / "foreign_rules.py").write_text(FOREIGN)
    text = TINY_RECIPE.format(model=tiny_llama, data=dolly_like).replace("method: iid", "method: 'foreign_rules:deal'")
    (tmp_path / "theirs.yaml").write_text(text)
    return tmp_path


@pytest.fixture
def foreign_run(foreign: Path, tiny_run: tuple[Path, Outcome]) -> Path:
    """The folder of somebody's finished run, whose recipe names code."""
    folder = Path(shutil.copytree(tiny_run[0], foreign / "theirs"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["partition"]["method"] = "foreign_rules:deal"
    recipe["model"]["trust_remote_code"] = True
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_rows(foreign / "questions.jsonl", [{"instruction": "Why?"}])
    return folder


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """One sentence, and nothing was imported."""
    assert outcome.code == 2, outcome.err
    (line,) = outcome.err.splitlines()
    assert line.startswith("bellwether: theirs")
    assert line.endswith("; if you trust it, give --trust-code.")
    for part in parts:
        assert part in line
    assert not Path("imported").exists()
    assert "foreign_rules" not in sys.modules


@pytest.mark.parametrize("command", ["run", "compare", "plan", "data"])
def test_a_command_does_not_import_what_a_recipe_names(bellwether: Command, foreign: Path, command: str) -> None:
    outcome = bellwether(command, "theirs.yaml", "compare={}")
    assert_refused(outcome, f"foreign_rules:deal from {foreign / 'foreign_rules.py'} (partition.method)")


def test_arms_that_name_code_are_refused_by_a_comparison_and_its_plan_and_of_no_matter_elsewhere(
    bellwether: Command, foreign: Path
) -> None:
    text = (foreign / "theirs.yaml").read_text().replace("'foreign_rules:deal'", "iid")
    arms = "compare: {arms: {x: {set: {partition.method: 'foreign_rules:deal'}}}}\n"
    (foreign / "theirs.yaml").write_text(text + arms)
    assert_refused(bellwether("compare", "theirs.yaml"), "foreign_rules:deal from ")
    assert_refused(bellwether("plan", "theirs.yaml"), "foreign_rules:deal from ")
    assert bellwether("data", "theirs.yaml").code == 0
    assert bellwether("plan", "theirs.yaml", "compare=null").code == 0
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run", "--resume", "theirs"], ["foreign_rules:deal from ", "the code that the model "]),
        (["chat", "theirs"], ["foreign_rules:deal from ", "the code that the model "]),
        (["chat", "theirs", "--model", "org/name"], ["foreign_rules:deal from ", "the code that the model org/name b"]),
        (["ui", "theirs"], ["foreign_rules:deal from ", "the code that the model "]),
        (["export", "theirs", "merged"], ["the code that the model "]),
        (["judge", "theirs", "theirs", "--questions", "questions.jsonl", "--judge", "j"], ["the code that the model "]),
    ],
)
def test_a_command_does_not_import_what_a_folder_names(
    bellwether: Command, foreign_run: Path, words: list[str], named: list[str]
) -> None:
    outcome = bellwether(*words)
    assert_refused(outcome, *named)
    assert outcome.err.count("foreign_rules") == (2 if len(named) == 2 else 0)  # the function and its file


def test_a_comparison_that_goes_on_does_not_import_what_another_recipe_names(
    bellwether: Command, foreign: Path, tiny_comparison: Path
) -> None:
    shutil.copytree(tiny_comparison, foreign / "kept")
    outcome = bellwether("compare", "--resume", "kept", "theirs.yaml", "compare={}")
    assert outcome.code == 2
    assert outcome.err.startswith("bellwether: kept or theirs.yaml would run Python code: foreign_rules:deal from ")
    assert not Path("imported").exists()


def test_a_report_and_a_printed_recipe_import_nothing_that_is_named(bellwether: Command, foreign_run: Path) -> None:
    for words in (["report", "theirs"], ["recipe", "theirs.yaml"]):
        outcome = bellwether(*words)
        assert outcome.code == 0, outcome.err
    assert not Path("imported").exists()


def test_with_the_word_of_the_person_the_code_is_run(bellwether: Command, foreign: Path) -> None:
    outcome = bellwether("data", "theirs.yaml", "--trust-code")
    assert outcome.code == 0, outcome.err
    assert Path("imported").exists()
    assert "4 clients" in outcome.out


def test_a_run_of_ones_own_goes_on_with_the_same_words_or_the_flag(bellwether: Command, foreign: Path) -> None:
    typed = ["partition.method=foreign_rules:deal"]
    text = (foreign / "theirs.yaml").read_text().replace("'foreign_rules:deal'", "iid")
    (foreign / "theirs.yaml").write_text(text)
    assert bellwether("run", "theirs.yaml", *typed, "--rounds", 1, "--out", "theirs").code == 0
    Path("imported").unlink()
    sys.modules.pop("foreign_rules")
    assert_refused(bellwether("run", "--resume", "theirs"), "foreign_rules:deal from ")
    assert bellwether("run", "--resume", "theirs", *typed).code == 0
    assert bellwether("run", "--resume", "theirs", "--trust-code").code == 0


# The question -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "agrees"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_at_a_terminal_the_person_is_asked(monkeypatch: pytest.MonkeyPatch, typed: str, agrees: bool) -> None:
    said = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", said)
    codes = [Code("training.loss", "absent_rules:loss", (("training", "loss"),))]
    if agrees:
        agree("theirs.yaml", codes, False)
    else:
        with pytest.raises(RecipeError, match="nothing was run"):
            agree("theirs.yaml", codes, False)
    assert "theirs.yaml would run Python code" in said.getvalue()
    assert "\n  absent_rules:loss from a module that is not found here (training.loss)\n" in said.getvalue()


def test_a_person_who_declines_ends_the_command_before_anything_is_imported(foreign: Path) -> None:
    pexpect = pytest.importorskip("pexpect", reason="pexpect, which plays a terminal, is not installed")
    words = ["-m", "bellwether", "data", "theirs.yaml"]
    child = pexpect.spawn(sys.executable, words, encoding="utf-8", timeout=60, dimensions=(40, 200))
    child.expect_exact(f"foreign_rules:deal from {foreign / 'foreign_rules.py'} (partition.method)")
    child.expect_exact("Run it? [y/N] ")
    child.sendline("n")
    child.expect_exact("bellwether: The code is not trusted, so nothing was run.")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2
    assert not (foreign / "imported").exists()
