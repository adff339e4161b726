"""On what, when and with which commit and versions was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "sve")


def describe(quick: bool) -> dict[str, Any]:
    """Return the facts of the machine and the run, as plain values; ``quick`` marks what is no measurement."""
    facts = _processor()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "quick": quick,
        "date": str(datetime.date.today()),
        "commit": _commit(),
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _processor() -> dict[str, str]:
    """Return what Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str:
    """Return the commit, and whether there are changes beside it."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "bellwether", "benchmarks/*.py")
    return f"{commit or 'unknown'}{' with changes' if changed else ''}"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
