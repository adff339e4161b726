"""Freed memory that the C library keeps, told by the page faults of a process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, json, mmap, resource, sys
import numpy
from bellwether.model.memory import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: every page has the system's page size
ARRAYS, NUMBERS, PASSES = 4, 500_000, 20  # 4 MB each, as a training step has several


def faults_of(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def fresh():
    memory = mmap.mmap(-1, 8 * NUMBERS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for place in range(0, len(memory), mmap.PAGESIZE):
        memory[place] = 1


def step():
    parts = [numpy.ones(NUMBERS) for _ in range(ARRAYS)]


if sys.argv[1] == "kept":
    assert keep_freed_memory()
step()
print(json.dumps({
    "pages": 8 * NUMBERS // mmap.PAGESIZE,  # of an array
    "fresh": faults_of(fresh),
    "arrays": ARRAYS * PASSES,
    "faults": faults_of(lambda: [step() for _ in range(PASSES)]),
}))
"""


def told(way: str) -> dict[str, int]:
    """What a fresh process says of itself, whatever allocator this one was given."""
    ways = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    own = {name: value for name, value in os.environ.items() if not name.startswith(ways)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], env=own, capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    given_back, kept = told("given back"), told("kept")
    if given_back["fresh"] < given_back["pages"]:
        pytest.skip("this system does not count page faults")
    assert given_back["faults"] > given_back["arrays"] * given_back["pages"] / 2, "there is nothing to keep"
    assert kept["faults"] < kept["pages"], "in all passes together, less than one array is new"
