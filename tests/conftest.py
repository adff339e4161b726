"""Shared fixtures: a tiny base, tiny rows, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before any import of torch or of the hub's client: one thread, since several workers share the cores and would wait
# for each other's, unless another number is asked for from outside; and no network.
for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

# What a script starts in its background ignores interrupts, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CATEGORIES = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)
WITH_CONTEXT = {"closed_qa", "information_extraction", "summarization"}

TINY_RECIPE = """\
name: tiny
model: {{path: "{model}", device: cpu, threads: 1}}
data: {{sources: ["{data}"], template: alpaca, max_tokens: 96, test_rows_per_category: 2}}
partition: {{method: iid, clients: 4}}
lora: {{rank: 2, alpha: 4, target_modules: [q_proj, v_proj]}}
training: {{learning_rate: 0.01, batch_size: 4}}
federation: {{rounds: 2, fraction: 0.5}}
evaluation: {{every: 0, max_new_tokens: 3, samples: 2}}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


# Tests that start processes, servers, a browser or a whole command, draw pages, or make a world and its base; all
# others are unit tests.
INTEGRATION_FIXTURES = {
    "bellwether",
    "choosing",
    "chromium",
    "compared",
    "driver",
    "page",
    "tiny_run",
    "tiny_comparison",
    "walked",
    "workers",
    "workshop",
}
INTEGRATION_FILES = {
    "test_bad_input.py",
    "test_benchmarks.py",
    "test_cli.py",
    "test_compare.py",
    "test_compare_python.py",
    "test_consent.py",
    "test_describe.py",
    "test_examples.py",
    "test_flower.py",
    "test_interrupt.py",
    "test_judge.py",
    "test_memory.py",
    "test_opened.py",
    "test_processes.py",
    "test_rehearsal.py",
    "test_report.py",
    "test_report_selection.py",
    "test_resume.py",
    "test_run_folder_crash.py",
    "test_selection_run.py",
    "test_shipped_recipes.py",
    "test_doc_site.py",
    "test_sites.py",
    "test_starter_base.py",
    "test_starter_world.py",
    "test_surface.py",
    "test_ui.py",
    "test_ui_attacks.py",
    "test_unseen.py",
}
# Files whose own fixtures take seconds: one process makes them, where several share the tests.
SHARING_FILES = {
    "test_audit.py",
    "test_judge.py",
    "test_report_selection.py",
    "test_doc_site.py",
    "test_starter_base.py",
    "test_unseen.py",
}
# Files whose workers are forks of one process that takes seconds to begin; others mark single tests so.
WORKERS_FILES = {"test_processes.py", "test_rehearsal.py", "test_selection_run.py", "test_sites.py"}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks, and dealt to processes by their groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes, a browser or a whole command, and what one process does alone."""
    for item in items:
        if item.path.name in SHARING_FILES:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if item.path.name in WORKERS_FILES:
            item.add_marker(pytest.mark.xdist_group("workers"))
        if INTEGRATION_FIXTURES & {*getattr(item, "fixturenames", ())} or item.path.name in INTEGRATION_FILES:
            item.add_marker("integration")


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Compute with as many threads as are given, however many the test before took."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} with real data and models is not on this machine")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer with 512 positions and its tokenizer, as a Hugging Face folder.

    Its weights have few bits, so that adapters of few bits can be merged into them without rounding.
    """
    import torch
    from rounding import coarse
    from tiny_models import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from bellwether.model.folder import quiet_transformers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer(vocabulary=512)
    tokenizer.model_max_length = 512
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.load_state_dict({name: coarse(weight) for name, weight in model.state_dict().items()})
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def dolly_rows(categories: Sequence[str], rows_per_category: int) -> list[dict[str, str]]:
    """Return short rows in Dolly's columns, categories in turn."""
    return [
        {
            "instruction": f"Task {number}?",
            "context": f"Note {number}." if category in WITH_CONTEXT else "",
            "response": f"{category[:4]} {number % 7}",
            "category": category,
        }
        for number in range(rows_per_category)
        for category in categories
    ]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dolly_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of four categories."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", dolly_rows(CATEGORIES[:4], 10))


@pytest.fixture(scope="session")
def dolly_like_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of eight categories, enough for a hundred clients with two shards each."""
    return write_rows(tmp_path_factory.mktemp("data") / "many.jsonl", dolly_rows(CATEGORIES, 40))


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_llama: Path, dolly_like: Path) -> Path:
    """A recipe of a run that takes a second, in the current folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like))
    return path


def call(*words: object) -> Outcome:
    """Run the command ``bellwether`` in this process."""
    from bellwether.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def bellwether(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command ``bellwether``, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])  # where own functions are searched is added to it
    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dolly_like: Path) -> tuple[Path, Outcome]:
    """A finished run of the tiny recipe: its folder, and what the command said. Read only."""
    place = tmp_path_factory.mktemp("finished")
    (place / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like))
    outcome = call("run", place / "tiny.yaml", "--out", place / "run")
    assert outcome.code == 0, outcome.err
    return place / "run", outcome


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Any]:
    """A selenium driver of a fresh headless Chromium; downloads go to the folder ``downloads``."""
    from browser import browser, missing

    reason = missing()
    if reason:
        pytest.skip(reason)
    (tmp_path / "downloads").mkdir()
    with browser(downloads=tmp_path / "downloads") as driver:
        yield driver


@pytest.fixture(scope="session")
def tiny_comparison(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dolly_like: Path) -> Path:
    """A finished comparison of the tiny recipe: base, two clients alone, federated. Read only."""
    place = tmp_path_factory.mktemp("compared")
    arms = "base: {trains: nobody}, local: {trains: alone, clients: [client-01, client-02]}, federated: {}"
    text = TINY_RECIPE.format(model=tiny_llama, data=dolly_like) + f"compare: {{seeds: [3], arms: {{{arms}}}}}\n"
    (place / "tiny.yaml").write_text(text)
    outcome = call("compare", place / "tiny.yaml", "--out", place / "comparison")
    assert outcome.code == 0, outcome.err
    return place / "comparison"
