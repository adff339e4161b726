"""The run folder: everything a run writes, made so that no crash can spoil it.

    recipe.yaml        the resolved recipe
    environment.json   versions, threads, device
    clients.json       what each client holds: counts by category
    clients/3-NAME/    the client's own files, where it chooses rows or the method keeps something: see client_state.py
    checkpoints/0003/  one commit per round, complete in itself:
        adapter_model.safetensors, adapter_config.json    the adapter after the round
        state.safetensors, state.json                     what the method remembers
        history.jsonl                                     all records so far
        recipe.yaml                                       the recipe that made it
        manifest.json                                     size and SHA-256 of the files above
    privacy.json, charges.jsonl   what leaves clients, what is promised of it and was spent: see privacy.py
    rounds.jsonl       one line per round
    evaluation.jsonl, evaluation.csv   scores per evaluation and category
    answers/0003.jsonl category, answer and totals of every scored row, one file per evaluation
    samples.jsonl      some answers before and after
    adapter/           the result in PEFT's format, with a model card
    report.html        all this as a page, by bellwether.report.report
    log.txt            what was told while it ran
    .lock, .owner      held by the process that writes here

Round 0 is the initial adapter with the scores of the untuned base.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bellwether.errors import BellwetherError, CheckpointError, RecipeError, first_line
from bellwether.exchange.adapter import Adapter, adapter_files
from bellwether.exchange.records import Record
from bellwether.recipe.file import differences, dump_recipe, load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.store.checkpoint import RECIPE, Checkpoint, checkpoint_files, read_checkpoint
from bellwether.store.history import evaluation_csv, evaluation_rows, round_lines
from bellwether.store.privacy import CHARGES, PRIVACY
from bellwether.tools.atomic import (
    TEMPORARY,
    cannot_write,
    make_folder,
    remove,
    remove_leftovers,
    slug,
    sync_folder,
    write_atomic,
    write_folder_atomic,
)
from bellwether.tools.json_text import from_json, json_lines, reading, typed
from bellwether.tools.lock import LOCK, OWNER, acquire, release

ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
JOINED = "federation.json"  # in the adapter's folder at a site: whose result it is
ANSWERS = "answers"
LOG = "log.txt"
CLIENTS = "clients.json"
OWN = "clients"
SAMPLES = "samples.jsonl"

MOST_THREADS = 1024  # as in recipes

__all__ = ["Checkpoint", "RunFolder", "check_new", "describe_environment", "next_folder", "write_atomic"]


class RunFolder:
    """A run folder that this process alone may write to, until it is closed.

    Make one with ``create`` or ``reopen``; it is a context manager.

    Args:
        path: the folder.
        recipe: the recipe of the run in it.
        lock: the lock that is held.
    """

    def __init__(self, path: Path, recipe: Recipe, lock: Any) -> None:
        self.path = path
        self.recipe = recipe
        self._lock: Any = lock

    @classmethod
    def create(cls, path: Path, recipe: Recipe, environment: Mapping[str, Any]) -> RunFolder:
        """Begin a run in a new or empty folder.

        Args:
            path: the folder; parents are made.
            recipe: the resolved recipe.
            environment: see ``describe_environment``.

        Raises:
            CheckpointError: the folder holds a run or other files, is in use, or cannot be written.
        """
        check_new(path)
        make_folder(path)
        try:
            lock = acquire(path)
        except BaseException:
            with contextlib.suppress(OSError):  # it is not empty where another process is in it
                path.rmdir()
            raise
        folder = cls(path, recipe, lock)
        try:
            check_new(path, locked=True)  # another process may have begun a run here in the meantime
        except BaseException:
            folder.close()
            raise
        try:
            folder._begin(environment)
        except BaseException:
            folder.discard()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path, recipe: Recipe | None = None) -> RunFolder:
        """Open the folder of a run that shall go on.

        Args:
            path: the folder.
            recipe: the recipe that the caller means to run; None takes the folder's own.

        Raises:
            CheckpointError: there is no run, it is in use, or its recipe is another one.
        """
        if not _holds_run(path):
            raise CheckpointError(f"{path} holds no run to go on with; leave out --resume to begin one.")
        folder = cls(path, _read_recipe(path / RECIPE), acquire(path))
        try:
            if recipe is not None:
                _check_same(path, folder.recipe, recipe)
            own = [
                place for place in (path / OWN).rglob("*") if place.is_dir() and not place.name.startswith(TEMPORARY)
            ]
            for place in (path, path / CHECKPOINTS, path / ANSWERS, *own):
                remove_leftovers(place)
        except BaseException:
            folder.close()
            raise
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder to other processes."""
        if self._lock is not None:
            release(self.path, self._lock)
            self._lock = None

    @property
    def environment(self) -> dict[str, Any]:
        """What ``environment.json`` says of the process that began the run.

        Raises:
            CheckpointError: it cannot be read.
        """
        remedy = (
            "restore it, since a run goes on only with the data and the base with which it began; "
            f"its last adapter is in the newest folder below {self.path / CHECKPOINTS}"
        )
        return read_environment(self.path / ENVIRONMENT, remedy)

    def commit(self, round: int, adapter: Adapter, state: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Make a round durable: after this returns, nothing short of a broken disk undoes it.

        Args:
            round: the round; 0 for the start.
            adapter: the adapter after it.
            state: whatever must be remembered besides; see ``bellwether.store.history.dump_state``.
            records: all records of the run so far, in order.

        Raises:
            CheckpointError: it cannot be written; the checkpoints before are untouched.
        """
        files = checkpoint_files(round, adapter, state, records, dump_recipe(self.recipe))
        for path in self._checkpoints():
            if int(path.name) > round:  # a future that was given up as corrupt
                remove(path)
        write_folder_atomic(self.path / CHECKPOINTS / f"{round:04d}", files)
        self._prune()
        self._write_tables(records)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None where nothing was ever committed.

        Raises:
            CheckpointError: there were commits, but none of them can be used.
        """
        notes: list[str] = []
        for path in reversed(self._checkpoints()):
            try:
                checkpoint, recipe = read_checkpoint(path), load_recipe(path / RECIPE)
            except (OSError, ValueError, BellwetherError) as error:
                notes.append(f"The checkpoint {path} is corrupt and was left out: {first_line(error)}.")
                continue
            _check_same(self.path, recipe, self.recipe)
            return replace(checkpoint, notes=tuple(notes))
        if notes or self._was_committed():
            raise CheckpointError(
                f"No checkpoint in {self.path / CHECKPOINTS} can be used, so the run cannot go on; "
                f"begin it anew in another folder. {' '.join(notes)}".rstrip()
            )
        return None

    def finish(
        self, adapter: Adapter, card: str, records: Sequence[Record], samples: Iterable[Mapping[str, Any]]
    ) -> None:
        """Write the results; doing so again, with the same or other content, is harmless.

        Args:
            adapter: the final adapter.
            card: its model card, in Markdown; see ``bellwether.store.model_card``.
            records: all records of the run.
            samples: one mapping per sample answer.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._prune()  # a process that was killed right after its last commit could not
        self._write_tables(records)
        write_atomic(self.path / SAMPLES, json_lines(samples))
        files = {**adapter_files(adapter), "README.md": card.encode("utf-8", "backslashreplace")}
        if not _holds(self.path / ADAPTER, files):
            write_folder_atomic(self.path / ADAPTER, files)

    @property
    def finished(self) -> bool:
        """Whether the results have been written."""
        return (self.path / ADAPTER).is_dir()

    def discard(self) -> None:
        """Remove a run of which nothing was committed, and close; a run with commits is only closed."""
        if not self._was_committed():
            for name in (RECIPE, ENVIRONMENT, CLIENTS, PRIVACY, CHARGES, LOG, ANSWERS, CHECKPOINTS, OWN, LOCK):
                remove(self.path / name)
            remove_leftovers(self.path)
        self.close()
        with contextlib.suppress(OSError):  # it is not empty where a person put something in it
            self.path.rmdir()

    def _begin(self, environment: Mapping[str, Any]) -> None:
        """Write what a new run consists of; the recipe comes last, since it marks the folder as a run."""
        remove_leftovers(self.path)
        try:
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        write_atomic(self.path / ENVIRONMENT, (json.dumps(environment, indent=2) + "\n").encode())
        write_atomic(self.path / RECIPE, dump_recipe(self.recipe, comments=True).encode())

    def _checkpoints(self) -> list[Path]:
        """Return the folders of committed rounds, oldest first."""
        paths = [path for path in (self.path / CHECKPOINTS).glob("*") if path.name.isdecimal()]
        return sorted(paths, key=lambda path: int(path.name))

    def _was_committed(self) -> bool:
        """Return whether a round was ever committed here, even if its checkpoint is gone."""
        return bool(self._checkpoints()) or (self.path / "rounds.jsonl").exists()

    def _prune(self) -> None:
        """Remove the oldest checkpoints beyond those to keep."""
        for path in self._checkpoints()[: -self.recipe.output.keep_checkpoints]:
            remove(path)

    def _write_tables(self, records: Sequence[Record]) -> None:
        """Write the tables that follow from the records."""
        rows = evaluation_rows(records)
        write_atomic(self.path / "rounds.jsonl", round_lines(records))
        write_atomic(self.path / "evaluation.jsonl", json_lines(rows))
        write_atomic(self.path / "evaluation.csv", evaluation_csv(rows))


class _Environment(BaseModel):
    """What others take from ``environment.json``, which holds more for people."""

    model_config = ConfigDict(extra="allow", strict=True)

    threads: int = Field(1, ge=1, le=MOST_THREADS)
    device: str = ""
    dtype: str = ""
    data: str = ""
    base: str = ""
    proxy: str = ""
    versions: dict[str, str | None] = {}


def read_environment(path: Path, remedy: str) -> dict[str, Any]:
    """Return what a file ``environment.json`` holds.

    Args:
        path: the file.
        remedy: what a person can do where it cannot be read.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(path, remedy):
        found: dict[str, Any] = typed(from_json(path.read_bytes()), dict[str, Any])
        typed(found, _Environment)
    return found


def check_new(path: Path, *, locked: bool = False) -> None:
    """Check, leaving no trace, that a run can begin in a folder.

    Args:
        path: the folder, which need not exist.
        locked: whether this process holds the folder's lock.

    Raises:
        CheckpointError: the folder holds a run or other files, is in use, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file, not a folder; give another run folder with --out.")
    if not locked and (path / LOCK).exists():
        release(path, acquire(path))
    if _holds_run(path):
        raise CheckpointError(
            f"{path} already holds a run: go on with it by bellwether run --resume {path}, or give another folder."
        )
    foreign = _foreign(path)
    if foreign:
        raise CheckpointError(f"{path} is not empty (it holds {foreign[0]}): give a new or empty folder.")
    _check_writable(path)


def client_folders(path: Path, clients: Sequence[str]) -> dict[str, Path]:
    """Return each client's own part of a run folder, into which only a simulation's report looks beside it.

    Args:
        path: the run folder.
        clients: all clients, in their order; names that are no folder's are told apart by their number.
    """
    return {client: path / OWN / f"{number}-{slug(client)}" for number, client in enumerate(clients, start=1)}


def next_folder(name: str, under: Path = Path("runs")) -> Path:
    """Return the first of ``runs/NAME-1``, ``runs/NAME-2``, … that does not exist."""
    number = 1
    while (under / f"{name}-{number}").exists():
        number += 1
    return under / f"{name}-{number}"


def describe_environment(**facts: Any) -> dict[str, Any]:
    """Return what ``environment.json`` shall say: versions, platform, command, and the given facts.

    Args:
        facts: what the caller knows, such as ``device``, ``threads`` and ``dtype``.
    """
    packages = ("bellwether", "torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "tokenizers")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        **facts,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "command": sys.argv,
    }


# Helpers ------------------------------------------------------------------------------------------


def _holds_run(path: Path) -> bool:
    """Return whether a run was begun in a folder; a person's own recipe alone makes none."""
    return (path / RECIPE).is_file() and ((path / CHECKPOINTS).is_dir() or (path / ENVIRONMENT).is_file())


def _foreign(path: Path) -> list[str]:
    """Return the names in a folder that no run that was killed while it began could have left."""
    if not path.is_dir():
        return []
    ours = {LOCK, OWNER, ENVIRONMENT, LOG} if (path / LOCK).exists() else set()
    if ours and (path / CHECKPOINTS).is_dir() and not any((path / CHECKPOINTS).iterdir()):
        ours.add(CHECKPOINTS)
    names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if not name.startswith(TEMPORARY) and name not in ours]


def _check_writable(path: Path) -> None:
    """Check that a folder can be made or written, by making a temporary one and removing it."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=nearest):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def _read_recipe(path: Path) -> Recipe:
    """Read a recipe that a run has kept."""
    try:
        return load_recipe(path)
    except RecipeError as error:
        raise CheckpointError(
            f"The recipe of this run cannot be read, so it cannot go on; begin it anew in another folder. {error}"
        ) from error


def _check_same(path: Path, old: Recipe, new: Recipe) -> None:
    """Check that a run goes on with the recipe it began with; where its folder lies is of no matter."""
    changed = [line for line in differences(old, new) if not line.startswith("output.folder:")]
    if changed:
        raise CheckpointError(
            f"The run in {path} began with another recipe, so it cannot go on with this one; "
            "undo the change or begin a new run. Changed: " + "; ".join(changed) + "."
        )


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Return whether a folder holds exactly these files."""
    try:
        return {entry.name: entry.read_bytes() for entry in folder.iterdir()} == dict(files)
    except OSError:
        return False
