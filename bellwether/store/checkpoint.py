"""One committed round on disk: which files it has, and how they are verified when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellwether.exchange.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, adapter_files, read_adapter
from bellwether.exchange.records import Record
from bellwether.store.history import dump_records, dump_state, load_records, load_state
from bellwether.tools.json_text import from_json

MANIFEST = "manifest.json"
HISTORY = "history.jsonl"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """One committed round.

    Args:
        round: the round; 0 is the start.
        adapter: the adapter after it.
        state: what the method remembers, as it was given to ``commit``.
        history: all records up to and including this round.
        notes: one sentence per later checkpoint that was found corrupt.
    """

    round: int
    adapter: Adapter
    state: Mapping[str, Any]
    history: tuple[Record, ...]
    notes: tuple[str, ...] = ()


def checkpoint_files(
    round: int, adapter: Adapter, state: Mapping[str, Any], records: Sequence[Record], recipe: str
) -> dict[str, bytes]:
    """Return the files of a checkpoint by name, the manifest last.

    Args:
        round: the round; 0 for the start.
        adapter: the adapter after it.
        state: see ``bellwether.store.history.dump_state``.
        records: all records so far.
        recipe: the resolved recipe in YAML.

    Raises:
        CheckpointError: the state cannot be kept.
    """
    files = {**adapter_files(adapter), **dump_state(state), HISTORY: dump_records(records), RECIPE: recipe.encode()}
    return {**files, MANIFEST: _manifest(round, files)}


def _manifest(round: int, files: Mapping[str, bytes]) -> bytes:
    """Return the list of a checkpoint's files with their sizes and SHA-256."""
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return (json.dumps({"format": 1, "round": round, "files": listed}, indent=2) + "\n").encode()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: it is not whole.
        OSError: it cannot be read.
        ModelError: its adapter cannot be read.
    """
    files = _verified(path, (WEIGHTS_FILE, CONFIG_FILE, "state.safetensors", "state.json", HISTORY, RECIPE))
    return Checkpoint(int(path.name), read_adapter(path), load_state(files), load_records(files[HISTORY]))


def read_history(path: Path) -> tuple[Record, ...]:
    """Read and verify the records in a checkpoint, whatever has become of its other files.

    Raises:
        ValueError: they are not what was written.
        OSError: they cannot be read.
    """
    return load_records(_verified(path, (HISTORY,))[HISTORY])


def _verified(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return files of a checkpoint by name, once they are known to be those of its manifest."""
    manifest = from_json((path / MANIFEST).read_bytes())
    files = {name: (path / name).read_bytes() for name in names}
    expected = from_json(_manifest(int(path.name), files))
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    found = {name: listed.get(name) for name in names} if isinstance(listed, dict) else {}
    if not isinstance(listed, dict) or {**manifest, "files": found} != expected:
        wrong = [name for name in names if found.get(name) != expected["files"][name]]
        raise ValueError(f"{', '.join(wrong) or MANIFEST} is not what was written")
    return files
