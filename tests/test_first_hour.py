"""What a person meets in their first hour with their own model and rows: warnings before anything is trained."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CATEGORIES, Command, dolly_rows, write_rows

from bellwether.data.rows import Tokenised
from bellwether.errors import DataError
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Data, Recipe
from bellwether.runner.checks import length_warnings
from bellwether.runner.prepare import prepare
from bellwether.tools.words import counted

# Rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fedit-100", "--model", "org/name"], "training.learning_rate (0.008) is meant"),
        (["fedit-100", "--model", "org/name", "training.learning_rate=1e-3"], None),
        (["fedit-100"], None),
        (["fedit-10", "--model", "org/name"], None),
        (["unset.yaml"], "training.learning_rate (0.008) is meant"),
        (["unset.yaml", "--model", "starter"], None),
        (["set.yaml"], None),
    ],
)
def test_rates_that_are_meant_for_the_embedded_base_are_told_where_another_one_is_taken(
    bellwether: Command, words: list[str], said: str | None
) -> None:
    Path("unset.yaml").write_text("model: {path: org/name}\n")
    Path("set.yaml").write_text("model: {path: org/name}\ntraining: {learning_rate: 8.0e-3}\n")
    outcome = bellwether("recipe", *words)
    assert outcome.code == 0
    if said is None:
        assert outcome.err == ""
    else:
        assert outcome.err.startswith(f"bellwether: warning: {said} for the embedded base, and the model is org/name;")


def test_a_comparison_tells_of_its_arms_rates_before_it_starts(
    bellwether: Command, tiny_llama: Path, dolly_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bellwether.arms.compare.compare", lambda *_, **__: pytest.fail("it was told too late"))
    words = ["--model", tiny_llama, "--data", dolly_like]
    with pytest.raises(pytest.fail.Exception):
        bellwether("compare", "default-table", *words)
    outcome = bellwether("compare", "default-table", *words, "--out", "x", "--resume", "x")
    assert "goes on in its own folder" in outcome.err
    monkeypatch.setattr("bellwether.arms.compare.compare", interrupted)
    outcome = bellwether("compare", "default-table", *words)
    said = "compare.arms.local.learning_rate and 2 more fields (0.004, 0.008) are meant for the embedded base"
    assert said in outcome.err
    assert "or take the recipe own-table" in outcome.err
    assert "training.learning_rate" not in outcome.err  # all arms have their own


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# Rows that are too long ----------------------------------------------------------------------------


def lengths(kept: int, left_out: int, cut: int = 0, length: int = 300) -> Tokenised:
    return Tokenised([None] * kept, 0, left_out, cut, [length] * (left_out + cut))  # type: ignore[list-item]


def told(part: Tokenised, positions: int | None = None, most: int = 128) -> list[str]:
    return length_warnings("training rows", [part], Recipe(data=Data(max_tokens=most)), positions, trained=True)


def test_few_rows_that_are_too_long_are_no_warning() -> None:
    assert told(lengths(100, 0)) == []
    assert told(lengths(96, 4)) == []
    assert told(lengths(100, 0, cut=24)) == []


def test_many_rows_that_are_too_long_are_told_with_what_would_hold_them() -> None:
    (said,) = told(lengths(90, 10))
    assert said.startswith("10 of 100 training rows (10%) are left out, since no token of their response fits into ")
    assert "data.max_tokens=320 would hold most of them" in said  # 300 tokens, in steps of 64
    (said,) = told(lengths(90, 10), positions=256)
    assert "set data.max_tokens=256: the base takes at most 256 tokens" in said
    (said,) = told(lengths(90, 10), positions=128)
    assert "the base takes at most 128 tokens; take another base" in said
    (said,) = told(lengths(100, 0, cut=40))
    assert said.startswith("40 of 100 training rows (40%) have their response cut at data.max_tokens=128;")


def test_a_run_on_the_tenth_of_the_rows_that_fits_is_refused() -> None:
    assert told(lengths(11, 89))
    with pytest.raises(DataError, match=r"^90 of 100 training rows \(90%\) are left out, .* trained on so few\.$"):
        told(lengths(10, 90))


def test_test_rows_that_are_too_long_are_told_and_end_nothing() -> None:
    (said,) = length_warnings("test rows", [lengths(0, 1)], Recipe(data=Data(max_tokens=128)), None)
    assert said.startswith("1 of 1 test rows (100%) are left out, since")
    assert said.endswith("would hold most of them, or leave long rows out.")


def test_the_lengths_of_real_rows_say_what_would_hold_them(tmp_path: Path, tiny_llama: Path) -> None:
    asked = [f"Case {number}. {'Why is it so? ' * (1 if number % 3 else 20)}" for number in range(60)]
    rows = [{"instruction": text, "response": "So."} for text in asked]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    fields = [f"model.path={tiny_llama}", f"data.sources=[{source}]", "data.template=alpaca", "partition.clients=2"]

    def prepared(most: int) -> Any:
        return prepare(load_recipe(None, [*fields, f"data.max_tokens={most}"]))

    whole = prepared(512)
    assert not whole.warnings
    needed = max(len(row) for part in whole.clients.values() for row in part.rows)
    short = prepared(needed // 2)
    assert sum(part.left_out for part in short.clients.values()) > 0
    assert any(f"data.max_tokens={-(-needed // 64) * 64} would hold most" in text for text in short.warnings)
    with pytest.raises(DataError, match="Nothing is trained on so few"):
        prepared(16)


def test_what_is_left_out_is_told_on_the_terminal_by_every_command_that_looks_at_rows(
    bellwether: Command, tiny_recipe: Path
) -> None:
    rows = [{**row, "instruction": f"{row['instruction']} {'Why? ' * 40}"} for row in dolly_rows(CATEGORIES[:4], 5)]
    write_rows(Path("long.jsonl"), [*rows, *dolly_rows(CATEGORIES[:4], 5)])
    words = [tiny_recipe, "--data", "long.jsonl", "data.max_tokens=128"]
    run = bellwether("run", *words, "--out", "out")
    assert "warning: 1" in run.out
    assert "are left out, since no token of their response fits into data.max_tokens=128" in run.out
    assert "│ warning" in bellwether("plan", *words).out
    assert "bellwether: warning: 1" in bellwether("data", *words, "--out", ".").err
    assert "warning: 1" in bellwether("compare", *words, "compare.arms={base: {trains: nobody}}", "--seed", 1).out


# The same flags ------------------------------------------------------------------------------------


def test_run_and_compare_take_the_same_flags() -> None:
    from bellwether.cli.compare import compare_arms
    from bellwether.cli.tune import tune_model

    run, compare = (inspect.signature(command).parameters for command in (tune_model, compare_arms))
    assert list(run) == list(compare)
    assert {name: (one.annotation, one.default) for name, one in run.items()} == {
        name: (one.annotation, one.default) for name, one in compare.items()
    }


def test_a_comparison_takes_rounds_seed_and_device_and_goes_on_in_its_folder(
    bellwether: Command, tiny_recipe: Path
) -> None:
    arms = "compare.arms={base: {trains: nobody}, federated: {trains: federation}}"
    words = [tiny_recipe, arms, "--rounds", 1, "--seed", 7, "--device", "cpu", "--out", "out"]
    first = bellwether("compare", *words)
    assert (first.code, first.err) == (0, "")
    assert {path.parent.name for path in Path("out").glob("*/*/outcomes.json")} == {"seed-7"}
    assert len(Path("out/federated/seed-7/run/rounds.jsonl").read_text().splitlines()) == 1
    again = bellwether("compare", "--resume", "out")
    assert (again.code, again.err) == (0, "")
    assert "2 of 2 are finished already." in again.out
    assert "another recipe" in bellwether("compare", "--resume", "out", "lora.rank=4").err


def test_a_run_is_split_among_jobs(bellwether: Command) -> None:
    assert "processes: 2\n" in bellwether("recipe", "engine.processes=2").out
    outcome = bellwether("run", "--jobs", 9, "federation.cohort_size=1")
    assert "engine.processes is 9, but a round asks 1" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["default-table", "--rounds", "3"], "--rounds has no effect, since no arm of default-table counts rounds"),
        (["--resume", "run"], "run holds a run; go on with bellwether run --resume run, or give"),
        (["--resume", "nowhere"], "nowhere holds no comparison; give the folder of a comparison."),
        (["--data", "rows.jsonl"], "model.path is to be chosen; put it in place of ???, or give --model"),
    ],
)
def test_flags_of_a_comparison_that_cannot_be_meant_are_refused(
    bellwether: Command, words: list[str], said: str
) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("name: one\n")
    outcome = bellwether("compare", *words)
    assert outcome.code == 2
    assert said in outcome.err


# One of a kind --------------------------------------------------------------------------------------

NOUNS = "row client round file question token category categorie group passe seed arm centroid step pair verdict answer"
PLURALS = re.compile(rf"(?<![\d.,-])1 (?:\w+ )?(?:{'|'.join(f'{noun}s' for noun in NOUNS.split())})\b")


def test_one_of_a_kind_is_told_in_the_singular(bellwether: Command, tiny_recipe: Path) -> None:
    write_rows(Path("one.jsonl"), dolly_rows(["letters"], 2))
    words = [tiny_recipe, "--data", "one.jsonl", "federation.rounds=1", "partition.clients=1"]
    words.append("data.test_rows_per_category=1")
    said = [
        bellwether(name, *words, *more) for name, *more in (["plan"], ["data", "--show", 1], ["run", "--out", "out"])
    ]
    arms = "compare.arms={base: {trains: nobody}, federated: {trains: federation}, local: {trains: alone, passes: 1}}"
    said.append(bellwether("compare", *words, arms, "--seed", 1, "--out", "table"))
    said.append(bellwether("init", "one.jsonl", "--out", "first.yaml"))
    assert [outcome.code for outcome in said] == [0] * 5
    texts = {f"command {number}": outcome.out + outcome.err for number, outcome in enumerate(said)}
    pages = [*Path("out").rglob("*.html"), *Path("table").rglob("*.html"), *Path(".").rglob("*.md"), Path("first.yaml")]
    texts |= {str(page): re.sub(r"<[^>]*>", "", page.read_text()) for page in pages}
    assert len(pages) >= 4
    found = {name: PLURALS.findall(text) for name, text in texts.items()}
    assert not {name: plurals for name, plurals in found.items() if plurals}
    assert "1 round, 1 of 1 client in each" in texts["command 2"]
    assert "1 client, 1 training row; held out for all: 0 validation, 1 test row." in " ".join(said[1].out.split())


def test_a_number_is_told_with_its_noun() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert counted(1, "reply", "replies") == "1 reply"
    assert counted(3, "reply", "replies") == "3 replies"


def test_test_rows_that_are_trained_on_too_are_told_and_named_in_the_report(
    bellwether: Command, tiny_recipe: Path
) -> None:
    rows = dolly_rows(CATEGORIES[:2], 8)
    write_rows(Path("twice.jsonl"), [*rows, *rows])
    outcome = bellwether("run", tiny_recipe, "--data", "twice.jsonl", "--rounds", 1, "--out", "out")
    assert outcome.code == 0, outcome.err
    (said,) = re.findall(r"(\d) of 4 test rows \(\d+%\) stand among the training rows as well, so scores", outcome.out)
    page = Path("out/report.html").read_text()
    assert page.count(f"({said} of all 4 stand among the training rows as well)") == 2  # headline and answers
    assert "no client holds" not in page


# Plans and comparisons on one's own rows --------------------------------------------------------------


def test_a_plan_is_of_the_run_or_comparison_that_the_same_words_begin(
    bellwether: Command, tiny_recipe: Path, tiny_llama: Path, dolly_like: Path
) -> None:
    own = ["--model", tiny_llama, "--data", dolly_like, "partition.clients=3"]
    assert "What this run will need" in bellwether("plan", *own).out
    own += ["data.test_rows_per_category=1", "data.validation_rows_per_category=1"]
    outcome = bellwether("plan", "own-table", *own, "--seed", 5)
    assert outcome.code == 0, outcome.err
    assert "× 1 seed = " in outcome.out
    write_rows(Path("twice.jsonl"), 2 * dolly_rows(CATEGORIES[:2], 8))
    outcome = bellwether("plan", "own-table", *own, "--data", "twice.jsonl", "--seed", 5)
    assert outcome.code == 0, outcome.err
    assert re.search(r"warning +│.* stand among", " ".join(outcome.out.split()))
    outcome = bellwether("plan", "own-table", *own, "--rounds", 2)
    assert outcome.code == 2
    assert "--rounds has no effect" in outcome.err


def test_a_run_of_a_recipe_with_arms_takes_jobs_since_its_arms_are_not_run(
    bellwether: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Recipe] = []

    def run(recipe: Recipe, **_: Any) -> None:
        taken.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("bellwether.runner.run.run", run)
    assert bellwether("run", "fedit-table", "--jobs", 2).code == 130
    assert (taken[0].engine.processes, taken[0].compare) == (2, None)


def test_a_run_is_not_taken_for_a_comparison_though_its_recipe_has_arms(
    bellwether: Command, tiny_recipe: Path, tiny_run: Any
) -> None:
    folder = Path(shutil.copytree(tiny_run[0], "run"))
    text = (folder / "recipe.yaml").read_text()
    assert "compare: null\n" in text
    (folder / "recipe.yaml").write_text(text.replace("compare: null\n", "compare: {}\n"))
    before = (folder / "report.html").read_bytes()
    outcome = bellwether("compare", "--resume", "run")
    assert outcome.code == 2
    assert "run holds a run; go on with bellwether run --resume run" in outcome.err
    assert (folder / "report.html").read_bytes() == before


def test_an_error_of_ours_is_not_told_as_an_interrupt() -> None:
    from bellwether.cli.going_on import going_on, told

    with pytest.raises(ValueError, match="^a bug$") as caught, going_on(lambda: "go on"):
        raise ValueError("a bug")
    assert not getattr(caught.value, "__notes__", ())
    assert told(caught.value) == "go on"  # where an interrupt was made of it


def test_files_whose_unknown_columns_differ_are_each_asked_for_theirs(bellwether: Command) -> None:
    Path("q.csv").write_text("q1,ans\nWhy?,So.\nHow?,Thus.\n")
    Path("f.csv").write_text("frage,antwort\nWarum?,Darum.\nWie?,So.\n")
    assert bellwether("init", "q.csv", "f.csv").code == 0
    text = Path("recipe.yaml").read_text()
    assert "source_columns:" in text
    assert text.count("instruction: ???") == 2


def test_of_files_of_one_name_in_two_folders_each_has_the_columns_that_are_chosen(bellwether: Command) -> None:
    for folder, columns in (("a", "q1,ans"), ("b", "frage,antwort")):
        Path(folder).mkdir()
        Path(folder, "x.csv").write_text(f"{columns}\nWhy?,So.\nHow?,Thus.\n")
    words = ["--instruction", "q1", "--response", "ans", "--instruction", "frage", "--response", "antwort"]
    outcome = bellwether("init", "a/x.csv", "b/x.csv", *words)
    assert "has no column" not in outcome.err


def test_a_mark_to_choose_within_brackets_is_told_as_one(bellwether: Command) -> None:
    Path("open.yaml").write_text("data: {columns: {instruction: ???}}\n")
    outcome = bellwether("run", "open.yaml")
    assert outcome.code == 2
    assert outcome.err.rstrip().endswith("put a value in place of ???.")


# Rows that cannot be rendered ----------------------------------------------------------------------


def test_rows_that_the_models_format_cannot_render_are_listed_and_skipped_on_request(
    bellwether: Command, tiny_recipe: Path
) -> None:
    call = {"function": {"name": "price", "arguments": {}}}
    calling = [
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "It is 12."},
    ]
    plain = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    write_rows(Path("chats.jsonl"), [{"messages": plain if line % 4 else calling} for line in range(40)])
    outcome = bellwether("data", tiny_recipe, "--data", "chats.jsonl")
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert [line.split(" ")[1] for line in lines[:3]] == [f"chats.jsonl:{line}:" for line in (1, 5, 9)]
    assert "which Alpaca's format cannot render; remove the row" in lines[0]
    remedy = "Set data.skip_bad_rows=true to leave bad rows out (init: --skip-bad-rows)."
    assert lines[3:] == [f"bellwether: ... and 7 more; 10 rows are bad in all. {remedy}"]
    outcome = bellwether("data", tiny_recipe, "--data", "chats.jsonl", "data.skip_bad_rows=true")
    assert outcome.code == 0, outcome.err
    said = "Rows that cannot be rendered are skipped, as data.skip_bad_rows says: 10 in all (chats.jsonl:1: message 2"
    assert said in outcome.out
