"""Runs a small made-up run with faults, in processes that are really killed; the crash tests start it.

python tests/run_folder_harness.py run FOLDER ROUNDS HOLD        run or go on, to the end; while a file HOLD is there,
                                                                 not to the round that it holds
python tests/run_folder_harness.py faults WRITER FAULT PLACE     inject FAULT at every call; print JSON
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bellwether.errors import CheckpointError
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b, read_adapter
from bellwether.exchange.records import ClientRecord, EvaluationRecord, Record, RoundRecord
from bellwether.exchange.scores import Totals
from bellwether.recipe.file import dump_recipe, load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.store import run_folder
from bellwether.store.checkpoint import Checkpoint, checkpoint_files
from bellwether.store.history import load_records, load_state
from bellwether.store.run_folder import RunFolder
from bellwether.tools import atomic

MODULES = ("model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.2.q_proj")


def initial() -> Adapter:
    config = AdapterConfig(rank=2, alpha=4, dropout=0.1, modules=MODULES, base_model="base")
    tensors = {}
    for number, module in enumerate(MODULES):
        tensors[key_a(module)] = np.arange(6, dtype=np.float32).reshape(2, 3) + number
        tensors[key_b(module)] = np.zeros((4, 2), dtype=np.float32)
    return Adapter(config, tensors)


def step(round: int, adapter: Adapter, state: dict[str, Any]) -> tuple[Adapter, dict[str, Any]]:
    """Return what depends on everything before, so that a lost or doubled round shows."""
    momentum = state.get("momentum", {key: np.zeros_like(value) for key, value in adapter.tensors.items()})
    momentum = {key: np.float32(0.9) * value + np.float32(round) for key, value in momentum.items()}
    tensors = {key: np.float32(1.01) * value + momentum[key] for key, value in adapter.tensors.items()}
    return adapter.with_tensors(tensors), {"momentum": momentum, "rounds": (*state.get("rounds", ()), round)}


def record(round: int, adapter: Adapter) -> RoundRecord:
    client = ClientRecord("a", 3, 3, 10 * round, 1.0 / (round + 1), 0.5)
    return RoundRecord(
        round, ("a", "b"), (client,), {"b": "away"}, 1e-3, 0.5, 3, 3, 10, 100, 100, {"train": 1.0}, 1.0,
        adapter.fingerprint(),
    )  # fmt: skip


def work(path: Path, rounds: int = 2, folder_class: type[RunFolder] = RunFolder, hold: Path = Path(os.devnull)) -> None:
    """Begin a run or go on with it, and bring it to its end, or near a round that a file holds."""
    recipe = Recipe.model_validate({"federation": {"rounds": rounds}})
    begun = (path / "recipe.yaml").exists()
    with folder_class.reopen(path) if begun else folder_class.create(path, recipe, {"threads": 1}) as folder:
        checkpoint = folder.latest()
        if checkpoint is None:
            adapter, state = initial(), {}
            records: list[Record] = [EvaluationRecord(0, "test", {"qa": Totals(2, 10, 20.0, 2, 0.5, 1)}, 0.1)]
            folder.commit(0, adapter, state, records)
            done = 0
        else:
            adapter, state, records = checkpoint.adapter, dict(checkpoint.state), list(checkpoint.history)
            done = checkpoint.round
        for round in range(done + 1, rounds + 1):
            while hold.is_file() and round >= int(hold.read_text()):
                time.sleep(0.002)
            adapter, state = step(round, adapter, state)
            records.append(record(round, adapter))
            folder.commit(round, adapter, state, records)
        folder.finish(adapter, "card", records, [{"before": "x", "after": "y"}])


def digest(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a run but its lock."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in (".lock", ".owner"))
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# Writers that are broken on purpose ---------------------------------------------------------------


class InPlace(RunFolder):
    """Writes checkpoints in place and believes whatever it reads."""

    def commit(self, round: int, adapter: Adapter, state: Any, records: Any) -> None:
        target = self.path / "checkpoints" / f"{round:04d}"
        target.mkdir(exist_ok=True)
        for name, data in checkpoint_files(round, adapter, state, records, dump_recipe(self.recipe)).items():
            descriptor = os.open(target / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, data)
            os.fsync(descriptor)
            os.close(descriptor)
        self._write_tables(records)

    def latest(self) -> Checkpoint | None:
        paths = self._checkpoints()
        if not paths:
            return None
        files = {file.name: file.read_bytes() for file in paths[-1].iterdir()}
        history = load_records(files["history.jsonl"])
        return Checkpoint(int(paths[-1].name), read_adapter(paths[-1]), load_state(files), history)


def without_fsync() -> None:
    """Make the good writer forget to force its files to the disk."""

    def write(path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(descriptor, data)
        os.close(descriptor)

    atomic._write_synced = write


# Faults -------------------------------------------------------------------------------------------

ENOUGH = 5  # what is found of a broken writer before it is believed to be one
CALLS = ("write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open")


class Fault:
    """Counts the calls that change the disk, and strikes at one of them.

    kill: the process dies before the call. torn: it dies after it, a write being done by half.
    power: as kill, and every file that was not forced to the disk loses its second half.
    full: from then on nothing more can be written.
    """

    def __init__(self, kind: str, at: int, root: Path) -> None:
        self.kind, self.at, self.count, self.root = kind, at, 0, root
        self.unsynced: set[int] = set()
        self.real = {name: getattr(os, name) for name in CALLS}

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrap(name))

    def wrap(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self.count += 1
            if self.count == self.at and self.kind != "full":
                self.strike(name, arguments, options)
            full = self.kind == "full" and self.count >= self.at
            if full and name not in ("unlink", "rmdir", "rename"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = real(*arguments, **options)
            self.follow(name, arguments)
            return result

        return call

    def follow(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Keep account of which files were written but not yet forced to the disk, by inode."""
        if name == "write":
            self.unsynced.add(os.fstat(arguments[0]).st_ino)
        elif name == "fsync":
            self.unsynced.discard(os.fstat(arguments[0]).st_ino)

    def strike(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.kind == "torn":
            if name == "write":
                self.real["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
            else:
                with contextlib.suppress(OSError):
                    self.real[name](*arguments, **options)
        if self.kind == "power":
            self.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(self) -> None:
        for file in self.root.rglob("*"):
            if file.is_file() and file.stat().st_ino in self.unsynced:
                os.truncate(file, file.stat().st_size // 2)


def in_child(action: Callable[[], None]) -> int:
    """Do something in a forked process; return its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except CheckpointError as error:
            code = 3 if "disk is full" in str(error) else 2
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_quick() -> None:
    """Leave out what costs time and cannot matter here.

    What a killed process has written stays in the system's memory, so that forcing it to the disk changes
    nothing (the fault ``power`` keeps its own account of that); and the one recipe is read again and again.
    """
    os.fsync = lambda descriptor: None
    texts = functools.cache(dump_recipe)
    run_folder.dump_recipe = lambda recipe, comments=False: texts(recipe, comments=comments)
    recipes: dict[bytes, Recipe] = {}

    def load(path: Path) -> Recipe:
        text = path.read_bytes()
        if text not in recipes:
            recipes[text] = load_recipe(path)
        return recipes[text]

    run_folder.load_recipe = load


def faults(writer: str, kind: str, place: Path) -> dict[str, Any]:
    """Strike at every call of a run in turn; after each, go on without faults and compare with the truth."""
    folder_class = InPlace if writer == "in place" else RunFolder
    if writer == "no fsync":
        without_fsync()
    make_quick()
    truth, path = place / "truth", place / "run"
    work(truth, folder_class=folder_class)
    expected, bad, at = digest(truth), [], 0
    run_folder.load_recipe(truth / "recipe.yaml")  # once for all processes that are forked from this one
    gc.freeze()

    def go_on() -> None:
        work(path, folder_class=folder_class)

    while True:
        at += 1
        shutil.rmtree(path, ignore_errors=True)
        fault = Fault(kind, at, path)

        def struck(fault: Fault = fault) -> None:
            fault.install()
            go_on()

        code = in_child(struck)
        if code == 0 and kind != "full":
            return {"calls": at - 1, "bad": bad}
        if code not in (-signal.SIGKILL, 3, 0):
            bad.append(f"call {at}: ended with {code}")
        try:
            go_on()
        except Exception as error:
            bad.append(f"call {at}: could not go on ({type(error).__name__}: {error})")
        else:
            found = digest(path)
            if found != expected:
                names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
                bad.append(f"call {at}: other bytes in {names}")
        if code == 0 or len(bad) >= ENOUGH:
            return {"calls": at - 1, "bad": bad}


if __name__ == "__main__":
    if sys.argv[1] == "run":
        work(Path(sys.argv[2]), int(sys.argv[3]), hold=Path(sys.argv[4]))
    else:
        print(json.dumps(faults(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
