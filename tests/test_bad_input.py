"""Whatever a person gives that cannot be used: one sentence per mistake, exit code 2, nothing left behind.

Each case arranges its mistake in an empty folder and returns the command line; beside it stands what the
sentences must say: per mistake the place, the value and the remedy. Most mistakes of recipes are tested where they
are parsed, in ``test_recipe_mistakes.py``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import CATEGORIES, TINY_RECIPE, Command, call, dolly_rows, write_rows

Line = tuple[str, ...]


@dataclass
class Place:
    """An empty folder, the current one, where a case arranges its mistake.

    Args:
        path: the folder.
        base: a model folder that is good.
        data: a file of rows that is good.
        finished: returns a folder with a finished run and its rows, made once for all cases.
        after: closes what the case opened.
    """

    path: Path
    base: Path
    data: Path
    finished: Callable[[], Path]
    after: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def run(self, *words: object) -> list[str]:
        """Return the command that runs the tiny recipe with some fields changed."""
        (self.path / "tiny.yaml").write_text(TINY_RECIPE.format(model=self.base, data=self.data))
        return ["run", "tiny.yaml", *map(str, words)]

    def recipe(self, text: str | bytes) -> list[str]:
        """Return the command that runs a recipe of this text."""
        (self.path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["run", "recipe.yaml"]

    def source(self, name: str, content: str | bytes, *words: str) -> list[str]:
        """Return the command that runs the tiny recipe with a file of this content as its data."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.run("--data", name, *words)

    def rows(self, rows: Sequence[Any], *words: str) -> list[str]:
        """Return the command that runs the tiny recipe with these rows as its data."""
        write_rows(self.path / "rows.jsonl", rows)
        return self.run("--data", "rows.jsonl", *words)

    def model(self) -> Path:
        """Return a copy of the good model's folder, to be spoilt."""
        return Path(shutil.copytree(self.base, self.path / "model"))

    def json(self, path: Path, **changes: Any) -> None:
        """Change keys of a JSON file; None removes one."""
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    def finished_run(self) -> Path:
        """Return the folder of a finished run on a copy of the good rows."""
        made = self.finished()
        shutil.copytree(made, self.path, dirs_exist_ok=True)
        recipe = self.path / "out" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(made), str(self.path)))
        return self.path / "out"

    def small_disk(self, *options: str) -> Path:
        """Return a folder on a file system of its own, or skip where this user may not mount one."""
        folder = self.path / "disk"
        folder.mkdir()
        mount = shutil.which("mount")
        command = [mount or "mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a small file system")
        self.after.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
        return folder


@dataclass(frozen=True)
class Case:
    """A mistake.

    Args:
        arrange: makes it, and returns the command line.
        says: for each line on stderr, what it must contain.
        loads_weights: whether it can be found only once weights are loaded.
    """

    arrange: Callable[[Place], list[str]]
    says: tuple[Line, ...]
    loads_weights: bool


CASES: dict[str, Case] = {}


def case(*says: str | Line, loads_weights: bool = False) -> Callable[[Callable[[Place], list[str]]], None]:
    """Register a case; texts stand for one line, tuples for one line each."""
    lines = tuple(line for line in says if isinstance(line, tuple))
    texts = tuple(text for text in says if isinstance(text, str))

    def register(arrange: Callable[[Place], list[str]]) -> None:
        CASES[arrange.__name__.removeprefix("_")] = Case(arrange, lines or (texts,), loads_weights)

    return register


def contents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and content of everything in a folder, but for what Python compiles."""
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            plain = path.is_file() and not path.is_symlink()
            yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""


# The recipe and the command -----------------------------------------------------------------------


@case("recipe.yaml:3: training.batch_size is 0", "greater than or equal to 1", "rows per batch")
def value_out_of_range(place: Place) -> list[str]:
    return place.recipe("training:\n  # nothing fits in this\n  batch_size: 0\n")


@case("command line: federation.rounds is 0", "greater than or equal to 1", "number of rounds")
def flag_out_of_range(place: Place) -> list[str]:
    return place.run("--rounds", 0)


@case("command line: seed is -1", "greater than or equal to 0")
def seed_out_of_range(place: Place) -> list[str]:
    return place.run("--seed", -1)


@case(
    ("recipe.yaml:4: seed stands twice (first in line 1)",),
    ("recipe.yaml:3: there is no field lora.rnak; did you mean lora.rank?",),
    ("command line: training.batch_size is 0",),
)
def several_mistakes_together(place: Place) -> list[str]:
    return [*place.recipe("seed: 1\nlora:\n  rnak: 4\nseed: 2\n"), "training.batch_size=0"]


@case("nowhere.yaml: there is no such recipe; give the path of a YAML file or one of default, default-table")
def missing_recipe(place: Place) -> list[str]:
    return ["run", "nowhere.yaml"]


@case("recipe.yaml:2: '!!bool' is a tag, and values are plain here; remove or quote it")
def yaml_tag(place: Place) -> list[str]:
    return place.recipe("model:\n  trust_remote_code: !!bool x\n")


@case("recipe.yaml:3: this is not YAML (expected ',' or ']'")
def recipe_that_is_not_yaml(place: Place) -> list[str]:
    return place.recipe("seed: 1\nlora: [1, 2\n")


@case("give one recipe, not 2 (tiny.yaml, shepherd)")
def two_recipes(place: Place) -> list[str]:
    return place.run("shepherd")


@case("command line: 'training.batch_size' sets no value; write training.batch_size=VALUE")
def override_without_a_value(place: Place) -> list[str]:
    return place.run("training.batch_size")


@case("command line: the value of lora.target_modules is not YAML: '[q_proj'; quote it")
def override_that_is_not_yaml(place: Place) -> list[str]:
    return place.run("lora.target_modules=[q_proj")


@case("model.device is 'gpu'", "auto, cpu, cuda, cuda:N or mps")
def device_of_no_known_kind(place: Place) -> list[str]:
    return place.run("--device", "gpu")


@case("model.device is cuda:99, but torch sees", "CUDA devices here; give auto or cpu")
def cuda_device_that_is_absent(place: Place) -> list[str]:
    return place.run("--device", "cuda:99")


@case("output.trackers names wandb, which is not installed", "pip install -e '.[wandb]', or leave it out")
def tracker_that_is_not_installed(place: Place) -> list[str]:
    patch = pytest.MonkeyPatch()
    place.after.callback(patch.undo)
    find_spec = __import__("importlib.util").util.find_spec
    patch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "wandb" else find_spec(name, *more))
    return place.run("output.trackers=[wandb]")


@case("nothere.rules:mean: the module nothere.rules cannot be imported (ModuleNotFoundError", "it is searched in")
def own_function_whose_module_is_absent(place: Place) -> list[str]:
    return place.run("method.name=nothere.rules:mean")


@case("own_broken:sample: the module own_broken cannot be imported (ZeroDivisionError")
def own_function_whose_module_breaks(place: Place) -> list[str]:
    (place.path / "own_broken.py").write_text("1 / 0\n")
    return place.run("federation.sampler=own_broken:sample")


@case("own_short:sample: the module own_short has no function sample")
def own_function_that_is_absent(place: Place) -> list[str]:
    (place.path / "own_short.py").write_text("SIZE = 2\n")
    return place.run("federation.sampler=own_short:sample")


@case("partition.method own_failing:deal failed at", "own_failing.py:2 (KeyError: 'x')")
def own_partition_that_raises(place: Place) -> list[str]:
    (place.path / "own_failing.py").write_text("def deal(rows, settings, randomness):\n    return {}['x']\n")
    return place.run("partition.method=own_failing:deal")


@case("own_counts:deal: 'a' got int, but a list of rows is wanted")
def own_partition_that_returns_no_rows(place: Place) -> list[str]:
    (place.path / "own_counts.py").write_text("def deal(rows, settings, randomness):\n    return {'a': 5}\n")
    return place.run("partition.method=own_counts:deal")


@case("own_short:deal: the module own_short has no function deal")
def own_partition_that_is_absent(place: Place) -> list[str]:
    (place.path / "own_short.py").write_text("SIZE = 2\n")
    return place.run("partition.method=own_short:deal")


@case("nowhere.jsonl: the trace cannot be read", "federation.availability.trace")
def missing_trace(place: Place) -> list[str]:
    return place.run("federation.availability.trace=nowhere.jsonl")


@case("trace.jsonl:2: there is no client 'nobody'; there are client-01")
def trace_of_an_unknown_client(place: Place) -> list[str]:
    lines = [
        {"client": client, "round": 1, "available": True, "rows_per_second": 5} for client in ("client-01", "nobody")
    ]
    write_rows(place.path / "trace.jsonl", lines)
    return place.run("federation.availability.trace=trace.jsonl")


@case("federation.cohort_size is 9, but the data makes 2 clients; give at most that")
def cohort_larger_than_the_clients_found(place: Place) -> list[str]:
    rows = [{**row, "site": f"site-{number % 2}"} for number, row in enumerate(dolly_rows(CATEGORIES[:2], 8))]
    return place.rows(rows, "partition.method=column", "partition.column=site", "federation.cohort_size=9")


# Data ---------------------------------------------------------------------------------------------

ROW = {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"}


def good(count: int) -> str:
    """Return lines of good rows."""
    return "".join(json.dumps(ROW | {"instruction": f"Why {number}?"}) + "\n" for number in range(count))


@case("nowhere.jsonl: there is no such file; give a file, a folder, starter, or a name on the hub")
def missing_file(place: Place) -> list[str]:
    return place.run("--data", "nowhere.jsonl")


@case("rows.docx: files of this kind cannot be read; give one of .json, .jsonl, .csv, .tsv, .parquet")
def file_of_another_kind(place: Place) -> list[str]:
    return place.source("rows.docx", b"PK")


@case("rows.jsonl: the file is empty; give a file with at least one row")
def empty_file(place: Place) -> list[str]:
    return place.source("rows.jsonl", "\n\n")


@case("folder: the folder holds no file to read; put .json, .jsonl, .csv, .tsv, .parquet, .xlsx files there")
def folder_without_data(place: Place) -> list[str]:
    place.source("folder/README.md", "nothing")
    return place.run("--data", "folder")


@case("rows.jsonl:3: this line is not JSON", "column 15); mend or remove it")
def broken_jsonl_line(place: Place) -> list[str]:
    return place.source("rows.jsonl", good(2) + '{"instruction"; "Why?"}\n' + good(9))


@case("rows.jsonl:2: a line holds one object, but this is a list")
def jsonl_line_that_is_no_object(place: Place) -> list[str]:
    return place.source("rows.jsonl", good(1) + "[1]\n" + good(9))


@case(
    ("rows.jsonl:1: this line is not JSON",),
    ("rows.jsonl:2: this line is not JSON",),
    ("rows.jsonl:3: this line is not JSON",),
    ("... and 4 more; 7 rows are bad in all",),
)
def many_broken_lines(place: Place) -> list[str]:
    return place.source("rows.jsonl", "nonsense\n" * 7 + good(9))


@case("rows.json:1: a .json file holds a list of objects; write [{...}, ...] or name it .jsonl")
def json_that_is_no_list(place: Place) -> list[str]:
    return place.source("rows.json", json.dumps({"rows": [ROW]}))


@case("rows.json:2: this is not JSON", "mend the file")
def broken_json(place: Place) -> list[str]:
    return place.source("rows.json", f"[{json.dumps(ROW)},\n{{'instruction': 1}}]")


@case("rows.jsonl:2: this row has 10,000,038 characters, but at most 10,000,000 are read; shorten or remove it.")
def row_without_end(place: Place) -> list[str]:
    return place.rows([{"instruction": text, "response": "b"} for text in ("a", "x" * 10_000_001)])


@case("rows.json:2: this object cannot be read (a number has too many digits); mend it")
def json_with_a_number_of_many_digits(place: Place) -> list[str]:
    return place.source("rows.json", f'[{json.dumps(ROW)},\n{{"instruction": {"1" * 5000}}}]')


@case("rows.json:1: this object cannot be read (nested too deep); mend it")
def json_that_is_nested_deep(place: Place) -> list[str]:
    return place.source("rows.json", '[{"instruction": ' + "[" * 100_000 + "]" * 100_000 + "}]")


@case(
    ("rows.jsonl:1: this line is not JSON (nested too deep); mend or remove it",),
    ("rows.jsonl:2: this line is not JSON (a number has too many digits); mend or remove it",),
)
def jsonl_lines_beyond_what_python_reads(place: Place) -> list[str]:
    deep = '{"instruction": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    return place.source("rows.jsonl", deep + f'{{"instruction": {"1" * 5000}}}\n' + good(9))


@case("rows.jsonl:3: its text has '</s>', which the tokenizer takes for a special token; write it otherwise, or remove")
def row_that_writes_out_a_special_token(place: Place) -> list[str]:
    return place.rows(
        [ROW, ROW, ROW | {"response": "Blue.</s>"}], "data.test_rows_per_category=0", "partition.clients=1"
    )


@case("data.split is 'test', but no source is a data set on the Hugging Face hub; leave it out")
def split_of_files(place: Place) -> list[str]:
    return place.run("data.split=test")


@case("rows.csv:3: this row has 3 fields, but the header names 2; quote fields with commas")
def csv_row_with_a_stray_comma(place: Place) -> list[str]:
    return place.source("rows.csv", "instruction,response\nWhy?,Because.\nWhy, then?,Because.\n")


@case("rows.csv:1: the header names a column twice or not at all: instruction, response, response; rename them")
def csv_header_with_a_column_twice(place: Place) -> list[str]:
    return place.source("rows.csv", "instruction,response,response\nWhy?,Because.,So.\n")


@case("rows.parquet: this is not a Parquet file that can be read", "write it anew")
def broken_parquet(place: Place) -> list[str]:
    return place.source("rows.parquet", b"PAR1 and nothing behind")


@case("rows.jsonl:3: byte 300 is not UTF-8; save the file as UTF-8")
def wrong_encoding(place: Place) -> list[str]:
    line = json.dumps(ROW).encode()
    bad = line.replace(b"Because", b"F\xfcr")
    start = line + b"\n" + line.ljust(299 - bad.index(b"\xfc") - len(line) - 1) + b"\n"
    return place.source("rows.jsonl", start + bad)


@case("rows.jsonl:2: the field 'response' is missing; every row needs one")
def missing_field(place: Place) -> list[str]:
    return place.rows([ROW, {"instruction": "Why?"}, ROW])


@case("rows.jsonl:3: the field 'instruction' is empty; fill it or remove the row")
def empty_field(place: Place) -> list[str]:
    return place.rows([ROW, ROW, ROW | {"instruction": " \n"}])


@case("rows.jsonl:1: the field 'response' is a number, but text is wanted")
def field_that_is_no_text(place: Place) -> list[str]:
    return place.rows([ROW | {"response": 4}, ROW])


@case("rows.jsonl:1: the field 'response' holds half a character", "mend it")
def field_with_half_a_character(place: Place) -> list[str]:
    return place.source("rows.jsonl", json.dumps(ROW).replace("Because", "\\ud800") + "\n" + good(3))


@case("rows.jsonl: no column holds the response (there are instruction, reply); name it in data.columns.response")
def no_column_for_the_response(place: Place) -> list[str]:
    return place.rows([{"instruction": "Why?", "reply": "So."}] * 9)


@case("rows.jsonl: there is no column 'ask' (data.columns.instruction); there are instruction, context, response")
def mapped_column_that_does_not_exist(place: Place) -> list[str]:
    return place.rows([ROW] * 9, "data.columns.instruction=ask")


@case("rows.jsonl:1: the chat does not end with a message of the assistant; remove what follows the last one")
def chat_that_ends_with_the_user(place: Place) -> list[str]:
    turns = [("user", "Why?"), ("assistant", "So."), ("user", "How?")]
    return place.rows([{"messages": [{"role": role, "content": text} for role, text in turns]}])


@case("rows.jsonl:1: message 2 has the role 'oracle'; known are system, user, human, assistant, gpt")
def chat_with_an_unknown_role(place: Place) -> list[str]:
    turns = [("user", "Why?"), ("oracle", "So.")]
    return place.rows([{"messages": [{"role": role, "content": text} for role, text in turns]}])


@case("rows.jsonl: there is no column 'site' (partition.column); there are instruction")
def client_column_that_does_not_exist(place: Place) -> list[str]:
    return place.rows([ROW] * 9, "partition.method=column", "partition.column=site")


def with_client(name: str) -> list[dict[str, str]]:
    """Return rows of three clients, one of which is called so."""
    return [ROW | {"site": site, "instruction": f"Why {n}?"} for n in range(6) for site in ("a", "b", name)]


@case(*[(f"rows.jsonl:{line}: the client's name '../../etc' has parts of a path; use letters",) for line in (3, 6, 9)]
      + [("... and 3 more; 6 rows are bad in all",)])  # fmt: skip
def client_name_with_parts_of_a_path(place: Place) -> list[str]:
    return place.rows(with_client("../../etc"), "partition.method=column", "partition.column=site")


@case(*[(f"rows.jsonl:{line}: the client's name 'a\\x1b[2Jb' has control characters",) for line in (3, 6, 9)]
      + [("... and 3 more; 6 rows are bad in all",)])  # fmt: skip
def client_name_with_control_characters(place: Place) -> list[str]:
    return place.rows(with_client("a\x1b[2Jb"), "partition.method=column", "partition.column=site")


@case("rows.jsonl:2: the client's name is empty; every row needs one")
def client_name_that_is_empty(place: Place) -> list[str]:
    rows = [ROW | {"site": "a"}, ROW | {"site": ""}]
    return place.rows(rows, "partition.method=column", "partition.column=site")


@case("the client's name 'a\\x07b' has control characters", "Rename the file")
def file_name_with_control_characters(place: Place) -> list[str]:
    place.source("folder/one.jsonl", good(4))
    return [*place.source("folder/a\x07b.jsonl", good(4)), "--data", "folder/one.jsonl"]


@case("names no client, but partition.method is files; give one file per client")
def files_as_clients_with_one_file(place: Place) -> list[str]:
    return place.rows([ROW] * 9, "partition.method=files")


@case("the client 'b' is left with no row, since all of its rows are held out; hold fewer rows out")
def client_whose_rows_are_all_held_out(place: Place) -> list[str]:
    rows = [ROW | {"site": "ab"[number], "instruction": f"Why {number}?"} for number in range(2)]
    # One of the two is held out; with this seed it is b's.
    return place.rows(rows, "partition.method=column", "partition.column=site", "--seed", "0")


@case("1 of 2 clients keep no row that can be trained on", "data.max_tokens=96 (b with 4 rows)",
      "raise data.max_tokens, or leave these clients out")  # fmt: skip
def client_left_empty_by_long_rows(place: Place) -> list[str]:
    place.source("folder/a.jsonl", good(12))
    long = [ROW | {"instruction": f"Why {number}? " * 60, "category": "long"} for number in range(4)]
    write_rows(place.path / "folder" / "b.jsonl", long)
    return place.run("--data", "folder", "partition.method=files", "data.test_rows_per_category=0")


@case("32 rows cannot give 40 clients 1 row each (partition.clients, partition.min_rows); give 32 clients or fewer")
def fewer_rows_than_clients(place: Place) -> list[str]:
    return place.run("partition.clients=40")


@case("32 rows cannot give 4 clients 9 rows each", "give 3 clients or fewer")
def fewer_rows_than_wanted_at_least(place: Place) -> list[str]:
    return place.run("partition.min_rows=9")


@case("32 rows cannot be cut in 40 shards (partition.clients × partition.shards_per_client); take 3 clients or fewer")
def more_shards_than_rows(place: Place) -> list[str]:
    return place.run("partition.method=shards", "partition.shards_per_client=10")


@case("partition.categories_per_client is 5, but the rows have 4 categories; give at most 4")
def more_categories_per_client_than_there_are(place: Place) -> list[str]:
    return place.run("partition.method=categories", "partition.categories_per_client=5")


@case("partition.clients_per_group names 'french', but no row to deal is of that group; there are english with 20 rows")
def group_without_rows(place: Place) -> list[str]:
    rows = [row | {"language": "english"} for row in dolly_rows(CATEGORIES[:2], 10)]
    groups = "partition.clients_per_group={english: 2, french: 2}"
    return place.rows(rows, groups, "data.test_rows_per_category=0")


@case(
    "but 20 rows are of the group 'french'; give it clients, or leave these rows out (there are english with 20 rows,"
)
def group_without_clients(place: Place) -> list[str]:
    rows = [row | {"domain": name} for name in ("english", "french") for row in dolly_rows(CATEGORIES[:2], 10)]
    return place.rows(rows, "partition.clients_per_group.english=4", "data.test_rows_per_category=0")


@case(
    "partition.rows_per_client begins at 20 rows, but 4 of 4 clients are dealt fewer: client-01 gets 8; begin at 8 or"
)
def more_rows_to_keep_than_are_dealt(place: Place) -> list[str]:
    return place.run("partition.rows_per_client=[20, 60]")


@case("the category 'scarce' has only 2 rows to share; take 2 clients or fewer")
def category_too_small_to_be_shared(place: Place) -> list[str]:
    rows = [*dolly_rows(CATEGORIES[:1], 20), *dolly_rows(["scarce"], 2)]
    return place.rows(rows, "partition.method=categories", "data.test_rows_per_category=0")


@case("partition.method is dirichlet, but no row names a category; name the column in data.columns.category")
def partition_by_category_without_categories(place: Place) -> list[str]:
    rows = [{"instruction": f"Why {number}?", "response": "So."} for number in range(20)]
    return place.rows(rows, "partition.method=dirichlet")


@case("data.unseen_categories: no row is of the category 'poetry'; there are brainstorming, classification")
def unknown_category(place: Place) -> list[str]:
    return place.run("data.unseen_categories=[poetry]")


@case("there is no row to deal to clients")
def every_category_unseen(place: Place) -> list[str]:
    return place.run(f"data.unseen_categories=[{', '.join(CATEGORIES[:4])}]")


@case("no row can be held out for the test, since no category has two rows; give data.test_sources")
def nothing_to_test_on(place: Place) -> list[str]:
    return place.rows([ROW | {"category": str(number)} for number in range(9)])


@case("evaluation.part is validation, but no rows are held out for it; set data.validation_rows_per_category or")
def nothing_to_validate_on(place: Place) -> list[str]:
    return place.run("evaluation.part=validation")


@case("rows.jsonl:1: the field 'messages' is empty, but a list of messages is wanted; fill it or remove the row")
def chat_without_messages(place: Place) -> list[str]:
    return place.rows([{"messages": []}])


@case("command line: data.sources.0 is ''", "at least 1 character")
def source_without_name(place: Place) -> list[str]:
    return place.run("--data", "")


@case("nobody/nothing: there is no such file or folder here", "check the name, data.split and the network")
def hub_data_without_network(place: Place) -> list[str]:
    return place.run("--data", "nobody/nothing")


@case("x", "File name too long")
def file_name_too_long(place: Place) -> list[str]:
    return place.run("--data", "x" * 300 + ".jsonl")


# Models -------------------------------------------------------------------------------------------


@case("command line: model.path is ''", "at least 1 character")
def model_without_name(place: Place) -> list[str]:
    return place.run("--model", "")


@case("model.path is './nowhere', but there is no such folder; give a model's folder")
def missing_model(place: Place) -> list[str]:
    return place.run("--model", "./nowhere")


@case("There is no folder 'nobody/nothing', and no model of that name could be had from the Hugging Face hub",
      "give the path of a model's folder, or check name and network")  # fmt: skip
def hub_model_without_network(place: Place) -> list[str]:
    return place.run("--model", "nobody/nothing")


@case("tiny.yaml', which is a file; give the folder that holds config.json")
def model_that_is_a_file(place: Place) -> list[str]:
    return place.run("--model", "tiny.yaml")


@case("empty holds no config.json; give a folder with a model in Hugging Face format")
def model_folder_without_config(place: Place) -> list[str]:
    (place.path / "empty").mkdir()
    return place.run("--model", "empty")


@case("config.json:2: this is not JSON", "repair the model's folder")
def broken_model_config(place: Place) -> list[str]:
    (place.model() / "config.json").write_text('{"model_type": "llama",\n "hidden_size": }')
    return place.run("--model", "model")


@case("config.json: the file cannot be read (maximum recursion depth exceeded", "repair the model's folder")
def model_config_nested_deep(place: Place) -> list[str]:
    (place.model() / "config.json").write_text('{"model_type": ' + "[" * 100_000)
    return place.run("--model", "model")


@case(
    "config.json: num_hidden_layers is 1000000000, but a whole number from 0 to 1,000 is wanted", "repair the model's"
)
def model_of_a_billion_layers(place: Place) -> list[str]:
    place.json(place.model() / "config.json", num_hidden_layers=10**9)
    return place.run("--model", "model")


@case(
    "The weight lm_head.weight has another shape in",
    "model.safetensors (512 by 16) than config.json asks for (512 by 8), and so have 11 more",
    "give the config.json and the weights of one model",
)
def model_whose_weights_are_of_another(place: Place) -> list[str]:
    place.json(place.model() / "config.json", hidden_size=8)
    return place.run("--model", "model")


@case("model holds an adapter (adapter_config.json)", "merge it first with bellwether export, or remove it")
def model_with_an_adapter_beside_it(place: Place) -> list[str]:
    (place.model() / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return place.run("--model", "model")


@case("config.json: model_type is 'nonesuch', an architecture that transformers does not know")
def unknown_architecture(place: Place) -> list[str]:
    place.json(place.model() / "config.json", model_type="nonesuch")
    return place.run("--model", "model")


@case("brings its own Python code (nonesuch); if you trust it, set model.trust_remote_code to true")
def model_with_its_own_code(place: Place) -> list[str]:
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    place.json(place.model() / "config.json", model_type="nonesuch", auto_map=code)
    (place.path / "model" / "code.py").write_text("raise SystemExit('this code was run')\n")
    return place.run("--model", "model")


@case("is quantised; give one with float weights")
def quantised_model(place: Place) -> list[str]:
    place.json(place.model() / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return place.run("--model", "model")


@case("has its weights in pytorch_model.bin, a format that can run code", "save the model as model.safetensors")
def pickle_weights(place: Place) -> list[str]:
    (place.model() / "model.safetensors").rename(place.path / "model" / "pytorch_model.bin")
    return place.run("--model", "model")


@case("holds no weights; there has to be model.safetensors")
def model_without_weights(place: Place) -> list[str]:
    (place.model() / "model.safetensors").unlink()
    return place.run("--model", "model")


@case("model.safetensors has", "bytes, but its header promises", "copy the model again")
def truncated_weights(place: Place) -> list[str]:
    path = place.model() / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    return place.run("--model", "model")


@case("model.safetensors is no whole safetensors file (its header is cut off); copy the model again")
def weights_cut_off_in_their_header(place: Place) -> list[str]:
    os.truncate(place.model() / "model.safetensors", 20)
    return place.run("--model", "model")


@case("model-00002.safetensors is missing, though model.safetensors.index.json lists it; copy the model again")
def missing_shard(place: Place) -> list[str]:
    folder = place.model()
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    shards = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    return place.run("--model", "model")


def change_weights(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors file."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@case("The weight model.layers.0.mlp.up_proj.weight in", "holds NaN or infinity; copy the model again",
      loads_weights=True)  # fmt: skip
def nan_weights(place: Place) -> list[str]:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    change_weights(place.model() / "model.safetensors", spoil)
    return place.run("--model", "model")


@case("lacks model.norm.weight; it does not belong to its config.json", loads_weights=True)
def missing_weight(place: Place) -> list[str]:
    change_weights(place.model() / "model.safetensors", lambda tensors: tensors.__delitem__("model.norm.weight"))
    return place.run("--model", "model")


@case("holds no tokenizer; save it there (tokenizer.json) beside the model")
def model_without_tokenizer(place: Place) -> list[str]:
    (place.model() / "tokenizer.json").unlink()
    return place.run("--model", "model")


@case("The tokenizer in", "cannot be read")
def broken_tokenizer(place: Place) -> list[str]:
    (place.model() / "tokenizer.json").write_text("{}")
    return place.run("--model", "model")


@case("knows tokens up to number", "but the model's embedding ends at",
      "give the tokenizer that the model was trained with")  # fmt: skip
def tokenizer_larger_than_the_embedding(place: Place) -> list[str]:
    path = place.model() / "tokenizer.json"
    stored = json.loads(path.read_text())
    far = {"content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    numbers = range(len(stored["model"]["vocab"]), 2000)
    stored["added_tokens"] += [{**far, "id": n, "content": f"<far-{n}>", "special": True} for n in numbers]
    path.write_text(json.dumps(stored))
    return place.run("--model", "model")


@case("has no end-of-sequence token, so the model could not learn to stop", "tokenizer_config.json (eos_token)")
def tokenizer_without_end_of_sequence(place: Place) -> list[str]:
    place.json(place.model() / "tokenizer_config.json", eos_token=None)
    return place.run("--model", "model")


@case("data.template is chat, but the tokenizer has no chat template; set it to alpaca or auto")
def chat_without_a_chat_template(place: Place) -> list[str]:
    return place.run("data.template=chat")


@case("model.revision is 'main', but model.path", "is a folder, which has none; leave model.revision out")
def revision_of_a_folder(place: Place) -> list[str]:
    return place.run("model.revision=main")


@case("lora.target_modules", "'query'", "q_proj", "down_proj")
def target_module_that_does_not_exist(place: Place) -> list[str]:
    return place.run("lora.target_modules=[q_proj, query]")


@case("embed_tokens", "q_proj")
def target_module_that_is_not_linear(place: Place) -> list[str]:
    return place.run("lora.target_modules=[embed_tokens]")


@case("lora.rank is 17, but model.layers.0.self_attn.q_proj is only 16 × 16; give at most 16")
def rank_above_the_layers_size(place: Place) -> list[str]:
    return place.run("lora.rank=17")


@case("data.max_tokens is 513, but the base model", "has 512 positions; set data.max_tokens=512 or less")
def more_tokens_than_positions(place: Place) -> list[str]:
    return place.run("data.max_tokens=513")


@case("x", "File name too long")
def model_name_too_long(place: Place) -> list[str]:
    return place.run("--model", "x" * 300)


# The output folder --------------------------------------------------------------------------------


@case("out is a file, not a folder; give another run folder with --out")
def output_that_is_a_file(place: Place) -> list[str]:
    (place.path / "out").write_text("mine")
    return place.run("--out", "out")


@case("out is not empty (it holds notes.txt): give a new or empty folder")
def output_folder_with_files(place: Place) -> list[str]:
    (place.path / "out").mkdir()
    (place.path / "out" / "notes.txt").write_text("mine")
    return place.run("--out", "out")


@case("out already holds a run: go on with it by bellwether run --resume out, or give another folder")
def output_folder_with_a_run(place: Place) -> list[str]:
    place.finished_run()
    return place.run("--out", "out")


@case("cannot be written (Read-only file system): give a folder in which this user may write")
def output_folder_on_a_read_only_disk(place: Place) -> list[str]:
    return place.run("--out", place.small_disk("ro") / "out")


@case("out cannot be written (Permission denied): give a folder in which this user may write")
def output_folder_not_writable(place: Place) -> list[str]:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    folder = place.path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    place.after.callback(folder.chmod, stat.S_IRWXU)
    return place.run("--out", folder / "out")


@case("tiny.yaml/out cannot be written (Not a directory)")
def output_folder_below_a_file(place: Place) -> list[str]:
    return place.run("--out", "tiny.yaml/out")


@case("x", "File name too long")
def output_name_too_long(place: Place) -> list[str]:
    return place.run("--out", "x" * 300)


def hold(place: Place, folder: Path) -> int:
    """Let another process hold a folder's lock; return its number."""
    code = (
        "import sys, pathlib, bellwether.tools.lock as lock\n"
        "held = lock.acquire(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    process = place.after.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process.pid


@case("out is in use by process {process}: wait until it ends, or give another folder")
def output_folder_in_use(place: Place) -> list[str]:
    (place.path / "out").mkdir()
    return [*place.run("--out", "out"), str(hold(place, place.path / "out"))]


@case("out is in use by process {process}: wait until it ends, or give another folder")
def resumed_folder_in_use(place: Place) -> list[str]:
    place.finished_run()
    return ["run", "--resume", "out", str(hold(place, place.path / "out"))]


@case("cannot be written, because the disk is full: free some space", loads_weights=True)
def disk_full(place: Place) -> list[str]:
    return place.run("--out", place.small_disk("size=64k") / "out", "lora.rank=16", "lora.target_modules=all-linear")


@case("cannot be written, because the disk is full: free some space", loads_weights=True)
def disk_full_from_the_first_byte(place: Place) -> list[str]:
    disk = place.small_disk("size=4k,nr_inodes=16")
    (disk / "ballast").write_bytes(bytes(4096))
    return place.run("--out", disk / "out")


@case("empty holds no run to go on with; leave out --resume to begin one")
def resume_of_an_empty_folder(place: Place) -> list[str]:
    (place.path / "empty").mkdir()
    return ["run", "--resume", "empty"]


@case("mine holds no run to go on with; leave out --resume to begin one")
def resume_of_a_folder_with_a_recipe_only(place: Place) -> list[str]:
    (place.path / "mine").mkdir()
    (place.path / "mine" / "recipe.yaml").write_text("seed: 1\n")
    return ["run", "--resume", "mine"]


@case("nowhere holds no run to go on with; leave out --resume to begin one")
def resume_of_a_missing_folder(place: Place) -> list[str]:
    return ["run", "--resume", "nowhere"]


@case("out began with another recipe", "Changed: lora.rank: 2 → 4; seed: 0 → 1.")
def resume_with_a_changed_recipe(place: Place) -> list[str]:
    place.finished_run()
    return ["run", "--resume", "out", "lora.rank=4", "--seed", "1"]


@case("out cannot go on, because its data is another one now", "restore it, or begin a new run")
def resume_with_changed_data(place: Place) -> list[str]:
    # Not a copy, whose checkpoints name the rows of the first one.
    assert call(*place.source("rows.jsonl", good(40), "--rounds", "1", "--out", "out")).code == 0
    with (place.path / "rows.jsonl").open("a") as rows:
        rows.write(good(1))
    return ["run", "--resume", "out"]


@case("No checkpoint in", "can be used, so the run cannot go on; begin it anew in another folder", loads_weights=True)
def resume_without_a_whole_checkpoint(place: Place) -> list[str]:
    for path in (place.finished_run() / "checkpoints").glob("*/adapter_model.safetensors"):
        os.truncate(path, 50)
    return ["run", "--resume", "out"]


# Comparisons --------------------------------------------------------------------------------------

# By name: the section ``compare``, fields of the command line, and what the sentence says.
COMPARISONS: dict[str, tuple[str, str, str]] = {
    "nothing_to_compare": ("null", "", "compare is null, so there is nothing to compare; name arms and seeds there"),
    "arm_of_an_unknown_kind": (
        "{arms: {x: {trains: nobod}}}",
        "",
        "tiny.yaml:9: compare.arms.x.trains is 'nobod': input should be 'nobody', 'alone', 'together'",
    ),
    "arms_with_one_folder": (
        "{arms: {a/b: {}, A b: {}}}",
        "",
        "compare.arms: 'A b' and 'a/b' would share a folder; rename this arm",
    ),
    "arm_named_like_the_trials": ("{arms: {trials: {}}}", "", "'trials' and the trials would share a folder"),
    "passes_and_steps": (
        "{arms: {x: {trains: alone, passes: 2, steps: 3}}}",
        "",
        "tiny.yaml:9: compare.arms.x.steps is given as well as passes; leave one of them out",
    ),
    "clients_that_are_not_there": (
        "{arms: {x: {trains: alone, clients: [client-01, nobody]}}}",
        "",
        "compare.arms.x.clients: there is no client 'nobody'; there are client-01, client-02, client-03 to client-04",
    ),
    "unknown_field_set_by_an_arm": (
        "{arms: {x: {set: {lora.ranc: 3}}}}",
        "",
        "compare.arms.x: there is no field lora.ranc; did you mean lora.rank?",
    ),
    "wrong_value_set_by_an_arm": ("{arms: {x: {set: {lora.rank: 0}}}}", "", "compare.arms.x: lora.rank is 0: input"),
    "section_set_by_an_arm": (
        "{arms: {x: {set: {lora: {rank: 3}}}}}",
        "",
        "compare.arms.x.set: lora is a whole section; name its fields, such as lora.rank",
    ),
    "impossible_partition_set_by_an_arm": (
        "{arms: {y: {}, x: {set: {partition.clients: 99}}}}",
        "",
        "compare.arms.x: 32 rows cannot give 99 clients 1 row each",
    ),
    "other_rows_scored_by_an_arm": (
        "{arms: {y: {}, x: {set: {data.seed: 3}}}}",
        "",
        "compare.arms.x.set makes other rows to score than those of y; compare arms on the same",
    ),
    "passes_where_steps_are_counted": (
        "{arms: {x: {passes: 3}}}",
        "training.local_steps=4",
        "compare.arms.x: passes cannot be told where training.local_steps counts steps; set federation.rounds",
    ),
    "no_length_where_steps_are_counted": (
        "{arms: {x: {trains: alone}}}",
        "training.local_steps=4",
        "compare.arms.x: training.local_steps counts steps of a round; give this arm passes or steps",
    ),
    "nothing_to_score": ("{}", "data.test_rows_per_category=0", "no rows are held out, so arms cannot be compared"),
    "trials_without_validation_rows": (
        "{tune: {}}",
        "",
        "evaluation.part is validation, but no rows are held out for it; set data.validation_rows_per_category",
    ),
}


def _compared(section: str, field: str) -> Callable[[Place], list[str]]:
    def arrange(place: Place) -> list[str]:
        place.run()
        with (place.path / "tiny.yaml").open("a") as recipe:
            recipe.write(f"compare: {section}\n")
        return ["compare", "tiny.yaml", *filter(None, [field])]

    return arrange


for _name, (_section, _field, _says) in COMPARISONS.items():
    CASES[_name] = Case(_compared(_section, _field), ((_says,),), loads_weights=False)


@case("comparison is not empty; give a new or empty folder with --out")
def comparison_into_a_folder_with_files(place: Place) -> list[str]:
    (place.path / "comparison").mkdir()
    (place.path / "comparison" / "thesis.txt").touch()
    return ["compare", *place.run("compare={}")[1:]]


@case("comparison is in use by process {process}: wait until it ends, or give another folder")
def comparison_in_use(place: Place) -> list[str]:
    (place.path / "comparison").mkdir()
    return ["compare", *place.run("compare={}")[1:], str(hold(place, place.path / "comparison"))]


@case("comparison/recipe.yaml cannot be read; give another folder with --out.")
def comparison_in_a_folder_whose_recipe_is_broken(place: Place) -> list[str]:
    (place.path / "comparison").mkdir()
    (place.path / "comparison" / "recipe.yaml").write_text("seeds: 3\n")
    return ["compare", *place.run("compare={}")[1:]]


# The other commands -------------------------------------------------------------------------------


@case("recipe.yaml exists already; remove it, or name another file with --out")
def init_over_a_file(place: Place) -> list[str]:
    place.recipe("seed: 1\n")
    return ["init", str(place.data)]


@case("nowhere.jsonl: there is no such file")
def init_of_a_missing_file(place: Place) -> list[str]:
    return ["init", "nowhere.jsonl"]


@case("recipe.yaml:2: data.sources is to be chosen; put it in place of ???, or give --data (files, folders, hub names")
def recipe_in_which_something_is_to_be_chosen(place: Place) -> list[str]:
    place.recipe("data:\n  sources:\n  - ???\n")
    return ["run", "recipe.yaml"]


@case("--response: rows.jsonl has no column 'c'; there are a, b.")
def init_with_a_column_that_is_not_there(place: Place) -> list[str]:
    write_rows(place.path / "rows.jsonl", [{"a": "x", "b": "y"}])
    return ["init", "rows.jsonl", "--instruction", "a", "--response", "c"]


@case("tiny.yaml", "cannot be written (", "give a folder in which this user may write")
def pictures_into_a_file(place: Place) -> list[str]:
    return ["data", *place.run("--out", "tiny.yaml")[1:]]


@case("adapter cannot be read: lora_alpha in adapter_config.json is nan, but a finite number is wanted")
def export_of_an_adapter_whose_alpha_is_no_number(place: Place) -> list[str]:
    place.json(place.finished_run() / "adapter" / "adapter_config.json", lora_alpha=float("nan"))
    return ["export", "out", "merged"]


@case("adapter cannot be read: use_rslora in adapter_config.json is 'false', but true or false is wanted.")
def export_of_an_adapter_whose_switch_is_text(place: Place) -> list[str]:
    place.json(place.finished_run() / "adapter" / "adapter_config.json", use_rslora="false")
    return ["export", "out", "merged"]


@case("it is not a plain LoRA adapter, since task_type in adapter_config.json is 'SEQ_CLS'; only those can be used.")
def export_of_an_adapter_for_classifying(place: Place) -> list[str]:
    place.json(place.finished_run() / "adapter" / "adapter_config.json", task_type="SEQ_CLS")
    return ["export", "out", "merged"]


@case("nowhere holds neither a run nor an adapter; give a folder with one of them")
def export_of_a_missing_folder(place: Place) -> list[str]:
    return ["export", "nowhere", "merged"]


@case("merged exists and is not empty; give a new or an empty folder to write to")
def export_over_a_folder_with_files(place: Place) -> list[str]:
    place.finished_run()
    (place.path / "merged").mkdir()
    (place.path / "merged" / "config.json").write_text("mine")
    return ["export", "out", "merged"]


@case("data.max_tokens is 513, but the base model")
def plan_of_what_does_not_fit(place: Place) -> list[str]:
    return ["plan", *place.run("data.max_tokens=513")[1:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dolly_like: Path) -> Callable[[], Path]:
    """What returns a folder with a finished run in ``out``, and its rows; it is made when it is first wanted."""

    @functools.cache
    def make() -> Path:
        place = tmp_path_factory.mktemp("finished")
        shutil.copy(dolly_like, place / "rows.jsonl")
        (place / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=place / "rows.jsonl"))
        outcome = call("run", place / "tiny.yaml", "--rounds", 1, "--out", place / "out")
        assert outcome.code == 0, outcome.err
        return place

    return make


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_sentence_and_leaves_nothing(
    name: str,
    bellwether: Command,
    tmp_path: Path,
    tiny_llama: Path,
    dolly_like: Path,
    finished: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = CASES[name]
    place = Place(tmp_path, tiny_llama, dolly_like, finished)
    with place.after:
        words = bad.arrange(place)
        process = words.pop() if words[-1].isdecimal() and "in_use" in name else ""
        if not bad.loads_weights:
            monkeypatch.setattr("bellwether.model.base.load_weights", lambda *_: pytest.fail("weights were loaded"))
        before = dict(contents(tmp_path))
        outcome = bellwether(*words)
        after = dict(contents(tmp_path))

    lines = outcome.err.splitlines()
    assert outcome.code == 2, outcome.err
    assert len(lines) == len(bad.says), outcome.err
    for line, parts in zip(lines, bad.says, strict=True):
        assert line.startswith("bellwether: ")
        assert line.endswith((".", "?")), line
        assert line.isprintable()
        for part in parts:
            assert part.replace("{process}", process) in line
    assert "Traceback" not in outcome.err + outcome.out
    assert after == before, "something was left behind, or changed"
