"""The documentation is run: its commands, its Python, its links, its tables.

Each page is played in a folder of its own, from top to bottom, with the files that it speaks of made
on the spot. Runs are shortened (one round of one small step, one scored row per category), and models
on the hub are played by a tiny local one, since tests use no network.

    PYTHONPATH=. python tests/test_docs.py        writes the table of recipe fields anew
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import yaml
from conftest import CATEGORIES, call, dolly_rows, write_rows
from gguf_files import gguf_llama, write_gguf
from judge_server import serving
from tiny_models import tiny_tokenizer

from bellwether.ask.answerers import find_answerers
from bellwether.ask.judge import Judgement, JudgeSettings
from bellwether.data.prompts import prompt
from bellwether.recipe.file import load_recipe, shipped
from bellwether.recipe.method import METHODS, OwnMethod
from bellwether.recipe.recipe import Recipe, Section
from bellwether.tools.version import VERSION
from starter.instructions import write_rows as write_starter_rows
from starter.pretrain import Pretraining, settings_of
from starter.world import make_world

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FEDERATION = ROOT / "docs" / "federation.md"
# What makes a run short that has a process of its own.
SHORT = ("federation.rounds=1", "federation.fraction=1", "training.local_steps=1", "training.batch_size=2")
SHORT += ("evaluation.max_rows_per_category=1", "evaluation.max_new_tokens=2", "evaluation.every=0")
HUB_MODEL = "Qwen/Qwen3-0.6B"

MINE = """\
name: mine
model: {path: my-model}
data: {sources: [clinic-a.jsonl, clinic-b.jsonl]}
"""
LM_EVAL = "lm-eval==0.4.13"
TRACE = [{"client": f"client-{n:02}", "round": 1, "available": n % 3 > 0, "rows_per_second": 9.5} for n in range(1, 9)]


# Reading pages ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block's first line names, such as ``# my_methods.py``."""
        named = re.match(r"# ([\w-]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fields_table(section: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """Return the lines of the table of recipe fields, in the order of the recipe."""
    lines = [] if prefix else ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, info in section.model_fields.items():
        if not prefix and name == "method":
            lines += method_lines()
            continue
        inner = [kind for kind in (info.annotation, *getattr(info.annotation, "__args__", ())) if _is_section(kind)]
        if inner and _is_section(type(info.default)):
            lines += fields_table(inner[0], f"{prefix}{name}.")
            continue
        several = typing.get_origin(info.annotation) is Mapping and inner
        default = (
            list(info.default) if isinstance(info.default, tuple) else None if info.is_required() else info.default
        )
        if several:
            default = {key: value.model_dump(exclude_unset=True) for key, value in info.default.items()}
        shown = yaml.safe_dump(default, default_flow_style=True, width=10_000, sort_keys=False)
        shown = shown.removesuffix("...\n").strip()
        lines.append(f"| `{prefix}{name}` | `{shown}` | {info.description} |")
        if inner:
            lines += fields_table(inner[0], f"{prefix}{name}.{'NAME.' if several else ''}")
    return lines


def method_lines() -> list[str]:
    """Return the lines of the recipe's section of the method: the name, and the fields of each method."""
    lines = [f"| `method.name` | `fedavg` | the method: {', '.join(METHODS)}, or package.module:function |"]
    named: dict[tuple[str, Any, str], list[str]] = {}
    for name, section in [*METHODS.items(), ("one's own", OwnMethod)]:
        for field, info in section.model_fields.items():
            if field != "name":
                named.setdefault((field, str(info.default), str(info.description)), []).append(name)
    for (field, default, description), names in named.items():
        lines.append(f"| `method.{field}` | `{default}` | {', '.join(names)}: {description} |")
    return lines


def compatible_table() -> list[str]:
    """Return the lines of the table of what goes together with each method."""
    from bellwether.method.named import make_method
    from bellwether.runner.compatible import RULES

    lines = [f"| method | {' | '.join(rule.heading for rule in RULES)} |", f"| --- |{' --- |' * len(RULES)}"]
    for name in METHODS:
        recipes = [load_recipe(None, [f"method.name={name}", *rule.example]) for rule in RULES]
        refused = [rule.refused(one, make_method(one.method)) for rule, one in zip(RULES, recipes, strict=True)]
        lines.append(f"| `{name}` | {' | '.join('no' if sentences else 'yes' for sentences in refused)} |")
    return lines


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def between(page: Path, mark: str) -> str:
    """Return what stands between two marks of a page."""
    found = re.search(rf"<!-- {mark}:begin -->\n(.*)<!-- {mark}:end -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{page.name} has no place marked {mark}"
    return found[1]


# Playing pages ------------------------------------------------------------------------------------


@pytest.fixture
def workshop(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the documentation speaks of, in which runs are short."""
    shutil.copytree(tiny_llama, tmp_path / "my-model")
    write_gguf(tmp_path / "my-model.gguf", gguf_llama(), tiny_tokenizer(300))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    kinds = ("letters", "triage", "coding", "billing")
    write_rows(tmp_path / "questions.jsonl", dolly_rows(kinds, 30))
    write_rows(tmp_path / "clinic-a.jsonl", dolly_rows(kinds[:2], 12))
    write_rows(tmp_path / "clinic-b.jsonl", dolly_rows(kinds[2:], 12))
    write_rows(tmp_path / "held-out.jsonl", dolly_rows(kinds[:2], 15)[24:])
    letters = [row | {"language": name} for name in ("french", "german") for row in dolly_rows(kinds[:1], 30)]
    write_rows(tmp_path / "letters.jsonl", letters)
    write_rows(tmp_path / "dolly.jsonl", dolly_rows(CATEGORIES, 40))
    write_rows(tmp_path / "trace.jsonl", TRACE)
    write_rows(tmp_path / "vicuna.jsonl", [{"question_id": 1, "category": "generic", "turns": ["Why is it so?"]}])
    (tmp_path / "mine.yaml").write_text(MINE)
    tickets = [f"Why {n}?,Since {n}.,Because {n % 4}.,topic {n % 2},site-{n % 3}" for n in range(60)]
    (tmp_path / "tickets.csv").write_text("\n".join(["query,body,reply,topic,site", *tickets]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    runner = importlib.import_module("bellwether.runner.run")
    monkeypatch.setattr(runner, "run", functools.partial(short_run, runner.run))
    auditing = importlib.import_module("bellwether.arms.audit.audit")
    monkeypatch.setattr(auditing, "audit", functools.partial(short_audit, auditing.audit))
    comparison = importlib.import_module("bellwether.arms.compare")
    monkeypatch.setattr(comparison, "compare", functools.partial(short_compare, comparison.compare))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set max-new-tokens 2\n/examples 1\n/quit\n"))
    monkeypatch.setattr("bellwether.ask.ui.serve", lambda folder, **_: find_answerers(folder))
    judging = importlib.import_module("bellwether.ask.judge")
    with serving(lambda asked, number: "8 7\nThe first says more.") as server:
        monkeypatch.setattr(judging, "judge", functools.partial(short_judge, judging.judge, server.address))
        yield tmp_path
    sys.modules.pop("my_methods", None)


def short_run(run: Any, recipe: Recipe | None = None, *, resume: Any = None, **given: Any) -> Any:
    """Run a recipe with little work; what it says about data, methods and model stays."""
    if "deployment" in given:  # a federation's, which was made short when its recipe was given
        return run(recipe, resume=resume, **given)
    short = None if resume and recipe is None else shortened(recipe or load_recipe("default"))
    return run(short, resume=resume, **given)


def short_compare(compare: Any, recipe: Recipe, folder: Path, *, jobs: int, watch: Any) -> Any:
    """Compare with little work: one arm of a kind, one seed, one pass, one trial of each arm, two clients alone."""
    values = shortened(recipe).model_dump()
    values["training"] |= {"local_steps": None, "batch_size": 16}
    values["federation"] |= {"fraction": 0.2}
    section = values["compare"]
    section["seeds"] = section["seeds"][:1]
    kinds = {(arm["trains"], bool(arm["set"])): name for name, arm in reversed(section["arms"].items())}
    section["arms"] = {name: arm for name, arm in section["arms"].items() if name in kinds.values()}
    for arm in section["arms"].values():
        arm |= {"passes": arm["passes"] and 1, "steps": arm["steps"] and 1}
        if arm["trains"] == "alone" and recipe.partition.method not in ("column", "file"):
            digits = max(2, len(str(recipe.partition.clients)))
            arm["clients"] = arm["clients"] or [f"client-{number:0{digits}}" for number in (1, 2)]
    if section["tune"] is not None:
        passes = {"passes": section["tune"]["passes"] and [1]}  # null leaves them to the arms
        section["tune"] |= {name: section["tune"][name][:1] for name in ("seeds", "learning_rates")} | passes
    return compare(Recipe.model_validate(values), folder, jobs=1, watch=watch)


def short_audit(audit: Any, recipe: Recipe, folder: Path, settings: Any, **given: Any) -> Any:
    """Audit with little work: one run of each game over few rows and secrets."""
    short = replace(settings, runs=1, rows=8, canaries=2, candidates=4)
    return audit(shortened(recipe), folder, short, **given)


def short_judge(judge: Any, address: str, *arguments: Any, watch: Any) -> Judgement:
    """Ask a scripted judge about one short answer."""
    *models, settings, folder = arguments
    assert isinstance(settings, JudgeSettings)
    short = replace(settings, judge=replace(settings.judge, address=address), limit=1, max_new_tokens=2)
    result: Judgement = judge(*models, short, folder, watch=watch)
    return result


def shortened(recipe: Recipe) -> Recipe:
    values = recipe.model_dump()
    values["federation"]["rounds"] = 1
    values["training"] |= {"local_steps": 1, "batch_size": 2, "accumulation": 1, "warmup_rounds": 0}
    values["data"]["test_rows_per_category"] = min(10, values["data"]["test_rows_per_category"])
    values["evaluation"] |= {"max_rows_per_category": 1, "max_new_tokens": 2, "every": 0}
    if recipe.partition.rows_per_client is not None:
        values["partition"] |= {"rows_per_client": (4, 12), "min_rows": 1}
    elif recipe.data.sources == ("starter",) and recipe.data.max_rows is None and recipe.partition.clients <= 10:
        values["data"]["max_rows"] = 120
    return Recipe.model_validate(values)


def play(page: Path) -> None:
    """Do what a page says, from top to bottom."""
    names: dict[str, Any] = {"__name__": page.stem}
    federation = Federated()
    for block in blocks(page):
        if block.file:
            with Path(block.file).open("w" if block.language == "yaml" else "a") as file:
                file.write(block.text)
            sys.modules.pop(Path(block.file).stem, None)
            importlib.invalidate_caches()
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "sh":
            for line in block.text.splitlines():
                words = shlex.split(line, comments=True)
                if page != FEDERATION and words[1:2] in (["federation"], ["site"]):
                    # Played on that page, where keys come before, with more words.
                    assert any(is_part(words, one) for one in commands(FEDERATION)), line
                elif not federation.follow(words):
                    follow(words)
    federation.wait()


def is_part(words: list[str], command: list[str]) -> bool:
    """Return whether words stand in a command, in their order."""
    rest = iter(command)
    return all(word in rest for word in words)


class Federated:
    """Commands of a federation: those that stay are begun beside each other, and waited for at the end of the page."""

    def __init__(self) -> None:
        self.staying: list[tuple[str, Any]] = []
        self.word = ""
        self.port = 0

    def follow(self, words: list[str]) -> bool:
        """Do what a command of coordinator or site says; return whether it is one."""
        match words:
            case ["bellwether", "federation", "rehearse", *_]:
                self.wait_for(shlex.join(words), forked.start(*words[1:], *SHORT))
            case ["bellwether", "federation", "serve", *_] | ["bellwether", "site", "join", *_]:
                listen = ["--listen", "127.0.0.1"] if words[2] == "serve" else []
                self.staying.append((shlex.join(words), forked.start(*words[1:], *listen)))
            case ["bellwether", "federation", "init", recipe, "--address", address]:
                assert address.endswith(":8443")
                with socket.create_server(("127.0.0.1", 0)) as one:
                    self.port = one.getsockname()[1]
                self.call("federation", "init", recipe, *SHORT, "--address", f"127.0.0.1:{self.port}")
            case ["bellwether", "federation", "invite", site, _]:
                self.call("federation", "invite", site, self.word)
            case ["bellwether", "federation", "revoke", site]:
                self.wait()  # the page revokes one that has taken part
                self.call("federation", "revoke", site)
            case ["echo", _, "|", "bellwether", "chat", *_]:
                self.wait()  # asked is what has come of it
                return False
            case ["bellwether", "federation" | "site", *_]:
                self.word = self.call(*words[1:]).out.strip()
            case _:
                return False
        return True

    def call(self, *words: str) -> Any:
        outcome = call(*words)
        assert outcome.code == 0, f"{shlex.join(words)}: {outcome.err}"
        return outcome

    def wait(self) -> None:
        """Wait for those that stay, the coordinator first; where it fails, nobody waits for it."""
        try:
            while self.staying:
                self.wait_for(*self.staying.pop(0))
        finally:
            for _, process in self.staying:
                process.kill()

    @staticmethod
    def wait_for(what: str, process: Any) -> None:
        out, err = process.communicate()
        assert process.returncode == 0, f"{what}: {err}{out}"


def follow(words: list[str]) -> None:
    """Run one command of a page; of those that are not ours, check that there is such a thing."""
    match words:
        case ["bellwether", *arguments]:
            outcome = call(*("my-model" if word == HUB_MODEL else word for word in arguments))
            assert outcome.code == 0, f"{shlex.join(words)}: {outcome.err}"
        case ["python", "-m", "starter.instructions", "--out", folder]:
            write_starter_rows(make_world(), Path(folder))
        case ["python", "-m", "starter.pretrain", *arguments]:
            assert settings_of(arguments)[0] == Pretraining(), "the page says how the shipped base is made"
        case ["make", *targets]:
            known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {target for target in targets if "=" not in target} <= known, words
        case ["echo", text, "|", "bellwether", *arguments]:
            sys.stdin = io.StringIO(f"{text}\n")
            outcome = call(*arguments)
            assert outcome.code == 0, f"{shlex.join(words)}: {outcome.err}"
        case [".venv/bin/pip", "install", "-e", extra]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert extra.strip(".[]") in project["optional-dependencies"], words
        case [".venv/bin/pip", "install", package]:
            assert package == LM_EVAL, words
        case ["lm_eval", *arguments]:  # the slow test below runs it
            options = dict(itertools.pairwise(arguments))
            assert Path(options["--tasks"]).is_file()
            given = dict(pair.split("=") for pair in options["--model_args"].split(","))
            assert all(Path(given[name]).is_dir() for name in ("pretrained", "peft", "tokenizer"))
        case ["tensorboard", "--logdir", folder]:
            assert importlib.util.find_spec("tensorboard")
            assert list(Path(folder).rglob("*tfevents*"))
        case [".venv/bin/pytest", *given]:
            for file, _, name in (word.partition("::") for word in given if word.startswith("tests/")):
                assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), words
        case [".venv/bin/python", "-m", "build"]:
            assert importlib.util.find_spec("build")
        case ["../fresh/bin/pip", "install", "--constraint", file, what]:
            assert (ROOT / file).is_file()
            assert what in ("torch", f"dist/bellwether-{VERSION}-py3-none-any.whl")
        case ["fresh/bin/bellwether", *arguments]:
            follow(["bellwether", *arguments])
        case ["git", "tag", "--annotate", tag, "--message", _]:
            assert tag == f"v{VERSION}"
        case ["python3", "-m", "venv", _] | ["cd", ".."] | [".", ".venv/bin/activate"] | []:
            pass
        case _:
            pytest.fail(f"the documentation shows a command that nothing checks: {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_says_can_be_done(page: Path, workshop: Path) -> None:
    play(page)


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert project["version"] == VERSION
    assert newest in (VERSION, "Unreleased")


@pytest.mark.slow
def test_the_harness_scores_an_exported_adapter_as_peft_does_with_its_chat_template(workshop: Path) -> None:
    """What docs/results.md prints, run to its scores."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip(f"lm_eval is not installed: pip install {LM_EVAL}")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    page = ROOT / "docs" / "results.md"
    (task,) = (block for block in blocks(page) if block.file == "questions-task.yaml")
    Path(str(task.file)).write_text(task.text)
    at = next(number for number, words in enumerate(commands(page)) if words[0] == "lm_eval")
    for words in commands(page)[at - 2 : at]:
        follow(words)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(workshop / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", *commands(page)[at]], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    samples = [json.loads(line) for path in Path("scores").rglob("samples_*.jsonl") for line in path.open()]
    assert len(samples) == 120
    tokenizer = AutoTokenizer.from_pretrained("asked")
    base = AutoModelForCausalLM.from_pretrained("my-model")
    base.resize_token_embeddings(len(tokenizer))  # as the harness does: no answer has tokens that have no text
    model = PeftModel.from_pretrained(base, "asked").eval()
    for sample in samples[:6]:
        row = sample["doc"]
        asked = "\n\n".join(filter(None, (row["instruction"], row["context"])))
        text = prompt(asked, "", None, tokenizer)  # Alpaca's: the tiny base has no template of its own
        assert sample["arguments"]["gen_args_0"]["arg_0"] == text
        ids = tokenizer(text, return_tensors="pt").input_ids
        answer = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        wanted = tokenizer.decode(answer, skip_special_tokens=True).partition("\n\n")[0]
        assert sample["resps"][0][0] == wanted
    (results,) = Path("scores").rglob("results_*.json")
    exact = sum(sample["resps"][0][0] == sample["doc"]["response"] for sample in samples) / len(samples)
    assert json.loads(results.read_text())["results"]["questions"]["exact_match,none"] == pytest.approx(exact)


def test_every_command_is_documented_and_no_other() -> None:
    from bellwether.cli.app import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {str(group.name) for group in app.registered_groups}
    shown = {words[1] for page in PAGES for words in commands(page) if words[0] == "bellwether"}
    listed = set(re.findall(r"^\| `bellwether (\w+)", prose(ROOT / "README.md"), re.MULTILINE))
    assert shown == listed == known


def test_every_shipped_recipe_is_listed() -> None:
    table = prose(ROOT / "docs" / "recipes.md").split("| recipe |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == shipped()


def test_the_table_of_fields_is_that_of_the_recipe() -> None:
    assert between(ROOT / "docs" / "recipes.md", "fields").splitlines() == fields_table(), (
        "write it anew: PYTHONPATH=. python tests/test_docs.py"
    )


def test_the_table_of_what_goes_together_is_the_one_that_recipes_are_checked_by() -> None:
    assert between(ROOT / "docs" / "your-own-method.md", "compatible").splitlines() == compatible_table(), (
        "write it anew: PYTHONPATH=. python tests/test_docs.py"
    )


def test_the_errors_that_the_docs_show_are_the_ones_that_are_printed(workshop: Path) -> None:
    shown = next(block.text for block in blocks(ROOT / "docs" / "recipes.md") if block.language == "text")
    (workshop / "mine.yaml").write_text(MINE + "training: {learningrate: 0.1}\n")
    outcome = call("run", "mine.yaml", "federation.fraction=1.5")
    assert (outcome.code, outcome.err) == (2, shown)


def test_the_error_of_a_broken_row_is_the_one_that_the_docs_show(workshop: Path) -> None:
    (workshop / "tickets.csv").write_text("query,reply\nWhy?,So.\nWhere?,\n")
    outcome = call("data", "--data", "tickets.csv", "data.columns.instruction=query", "data.columns.response=reply")
    sentence = outcome.err.splitlines()[-1].removeprefix("bellwether: ")
    assert outcome.code == 2
    assert f"`{sentence}`" in " ".join((ROOT / "docs" / "your-own-data.md").read_text().split())


def test_the_stateful_method_of_the_docs_moves_as_it_says(workshop: Path) -> None:
    from test_aggregate import closed

    from bellwether import Adapter, AdapterConfig, State, Update

    page = ROOT / "docs" / "your-own-method.md"
    names: dict[str, Any] = {}
    exec(
        next(block.text for block in blocks(page) if "remembering" in block.text and block.language == "python"), names
    )
    adapter = Adapter(AdapterConfig(1, 1.0, 0.0, ()), {"w": np.array([1.0, 2.0], np.float32)})

    def updates(*values: float) -> list[Update]:
        tensors = [{"w": np.array([value, value], np.float32)} for value in values]
        return [Update(f"c{n}", 1, tensor, rows=n + 1) for n, tensor in enumerate(tensors)]

    method = names["remembering"](share=0.9)
    first = closed(method, updates(3.0, 0.0), State(adapter))
    second = closed(method, updates(1.0, 1.0), first)
    # By hand: the mean with weights 1 and 2 is 1, so the moves are 0 and -1; then 0 and 0.9 · -1 from 1.
    np.testing.assert_allclose(first.adapter.tensors["w"], [1.0, 1.0])
    np.testing.assert_allclose(second.adapter.tensors["w"], [1.0, 1.0 - 0.9 * 1.0], atol=1e-6)
    assert closed(method, [], second, failure="nobody answered") is second


def test_methods_of_the_docs_take_at_most_twenty_lines() -> None:
    methods = [block.text for block in blocks(ROOT / "docs" / "your-own-method.md") if block.file]
    assert len(methods) == 8
    assert all(len(text.splitlines()) <= 20 for text in methods)


def test_the_sampler_of_the_docs_asks_everybody_once_before_anybody_twice() -> None:
    from bellwether import Randomness
    from bellwether.method.cohort import Sampling

    names: dict[str, Any] = {}
    page = ROOT / "docs" / "your-own-method.md"
    exec(next(block.text for block in blocks(page) if "in_turn" in block.text and block.language == "python"), names)
    clients = [f"c{number}" for number in range(9)]
    drawn = (names["in_turn"](Sampling(round, clients, {}, None, Randomness(0))) for round in (1, 2, 3))
    asked = [client for cohort in drawn for client in cohort]
    assert sorted(asked) == clients


def test_the_model_card_of_a_default_run_says_how_to_load_it(workshop: Path) -> None:
    assert call("run", "--out", "runs/card").code == 0
    card = workshop / "runs" / "card" / "adapter" / "README.md"
    code = next(block.text for block in blocks(card) if block.language == "python")
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(card.parent)), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


# Links, pictures, words ---------------------------------------------------------------------------


@pytest.mark.parametrize("document", PAGES, ids=NAMES)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(document)):
        if target.startswith("https://"):
            assert re.match(r"https://arxiv\.org/abs/\d{4}\.\d{5}$", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.is_relative_to(ROOT)
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reached_from_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", prose(ROOT / "docs" / "README.md")))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_pictures_are_small_and_shown() -> None:
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.suffix in (".png", ".svg")]
    assert pictures
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture
        assert f"images/{picture.name})" in text, picture


def test_pictures_load_nothing_from_elsewhere() -> None:
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        hosts = set(re.findall(r"https?://([^/\"' ]+)", picture.read_text(encoding="utf-8")))
        assert hosts <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org", "www.textualize.io"}, hosts


@pytest.mark.parametrize("document", PAGES, ids=NAMES)
def test_pages_speak_of_the_project_alone(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    forbidden = (
        r"pip install (-U )?bellwether",
        r"http://(?!127\.0\.0\.1)",
        r"pypi|index-url|pythonhosted",
        r"/work/|/tmp/|/home/|/root\b|~/",
        r"(?i)\b(this|the) (issue|session|task|brief|instructions? (i|we) (was|were))\b",
        r"(?i)state.of.the.art|blazing|seamless|powerful|cutting.edge|effortless",
        r"FIGURES",
    )
    found = [match[0] for pattern in forbidden for match in re.finditer(pattern, text)]
    assert not found


def script(name: str) -> Any:
    """Return one of the documentation's own programs as a module."""
    specification = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look for the names in their annotations
    specification.loader.exec_module(module)
    return module


def test_figures_of_the_readme_are_of_the_default_run_as_it_is() -> None:
    assert f"default run {script('figures').default_run_hash()}" in between(ROOT / "README.md", "figures"), (
        "measure them anew: python docs/figures.py"
    )


def test_the_comparison_that_is_shown_is_of_the_recipe_as_it_is() -> None:
    page = ROOT / "docs" / "measured.md"
    assert f"comparison {script('comparison').comparison_hash()}" in between(page, "comparison"), (
        "compare anew, then: python docs/comparison.py FOLDER"
    )


@pytest.mark.parametrize("name", ["federating.svg", "own-categories.svg", "few-rows.svg"])
def test_the_plots_of_the_readme_show_the_tables_as_they_are(name: str) -> None:
    plots = script("plots")
    lines = plots.tables((ROOT / "docs" / "measured.md").read_text(encoding="utf-8"))
    drawn = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
    assert drawn == plots.draw(plots.PLOTS[name], lines), "draw them anew: python docs/plots.py"


def test_a_plot_puts_dots_and_ends_of_lines_where_the_figures_are() -> None:
    plots = script("plots")
    page = "| | loss |\n| --- | --- |\n| a | 1.0 (0.5 to 2.0) |\n| b | 4.0 (3.0 to 4.0) |\n"
    panel = plots.Panel("loss", "loss", {"a": "first", "b": "second"}, "b", (0, 4))
    drawn = plots.draw([panel], plots.tables(page))
    zero, four = plots.LABELS, plots.WIDTH - plots.RIGHT
    x = [zero + (four - zero) * value / 4 for value in (0.5, 2.0, 1.0, 3.0, 4.0, 4.0)]
    found = re.findall(r'interval" x1="([\d.]+)" x2="([\d.]+)".*\n<circle class="(?:ours )?mean" cx="([\d.]+)"', drawn)
    np.testing.assert_allclose([float(value) for line in found for value in line], x, atol=0.06)
    assert "first 1.0 (0.5 to 2.0), second 4.0 (3.0 to 4.0)" in drawn


def test_figures_that_the_readme_tells_of_are_those_of_the_tables() -> None:
    told = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## What federating brings")[1].split("## In Python")[0]
    )
    figures = set(re.findall(r"\d+\.\d+", told))
    assert figures
    pages = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("measured.md", "real-model.md"))
    assert figures <= set(re.findall(r"\d+\.\d+", pages))


def test_the_table_of_a_comparison_is_written_from_a_folder(tmp_path: Path) -> None:
    def interval(mean: float, p: float = 0.001) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.02, "p": p}

    def line(name: str, exact: float, p: float = 0.001) -> dict[str, Any]:
        scores = {"loss": interval(1 - exact), "rouge_l": interval(exact), "exact": interval(exact)}
        gaps = {} if name == "federated" else {"loss": interval(-0.2, p), "exact": interval(0.5 - exact, p)}
        categories = (
            {} if "own" in name else {"songs": {"exact": interval(exact)}, "letters": {"exact": interval(exact / 2)}}
        )
        return {"name": name, "scores": scores, "gaps": gaps, "categories": categories, "cost": {}}

    lines = [line("base", 0.0), line("local", 0.1), line("federated", 0.5), line("local, own categories", 0.45, p=0.2)]
    lines += [line("local, 1000 steps", 0.12), line("local, 1000 steps, own categories", 0.4)]
    (tmp_path / "table.json").write_text(json.dumps({"lines": lines, "clients": []}))
    for arm, exact in (("base", (0,)), ("local", (1, 0)), ("federated", (1,))):
        outcomes = [
            {
                "arm": arm,
                "seed": 5,
                "client": f"client-{number}" if arm == "local" else "",
                "categories": ["songs"],
                "totals": [{"rows": 1, "tokens": 4, "loss": 2.0, "generated": 1, "rouge_l": 0.5, "exact": value}],
                "answers": ["La."],
                "own": [],
                "groups": [],
                "curve": [],
                "clients": {},
                "cost": {},
            }
            for number, value in enumerate(exact)
        ]
        (tmp_path / arm / "seed-5").mkdir(parents=True)
        (tmp_path / arm / "seed-5" / "outcomes.json").write_text(json.dumps(outcomes))
    main, steps = script("comparison").block(tmp_path).split("With a thousand optimizer steps")
    assert "| federated | 0.500 (0.490 to 0.520) | 50.0 (49.0 to 52.0) | 50.0 (49.0 to 52.0) |  |  |" in main
    assert "not distinguishable" in next(row for row in main.splitlines() if row.startswith("| local, own categories"))
    assert "1000 steps" not in main
    assert "Of 2 clients in ten federations, 1 are better alone than the untuned base, and 1 are worse alone" in main
    table, categories = steps.split("Exact match by category")
    assert [row.split(" |")[0] for row in table.splitlines() if "steps" in row and row[0] == "|"] == [
        "| local, 1000 steps",
        "| local, 1000 steps, own categories",
    ]
    assert "| local | 5 | 10 |" in categories


if __name__ == "__main__":
    for page, mark, lines in (
        ("recipes.md", "fields", fields_table()),
        ("your-own-method.md", "compatible", compatible_table()),
    ):
        whole = (ROOT / "docs" / page).read_text(encoding="utf-8")
        head, _, rest = whole.partition(f"<!-- {mark}:begin -->\n")
        tail = rest[rest.index(f"<!-- {mark}:end -->") :]
        table = "".join(f"{line}\n" for line in lines)
        (ROOT / "docs" / page).write_text(f"{head}<!-- {mark}:begin -->\n{table}{tail}", encoding="utf-8")
