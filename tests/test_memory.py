"""What a process takes of memory: what it freed is used again, and long texts are not tokenised whole."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

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


READING = """
import sys
from pathlib import Path

from bellwether.data.rows import Row
from bellwether.data.sources import read_rows
from bellwether.data.tokens import tokenise
from bellwether.errors import DataError
from bellwether.recipe.recipe import Data
from data_tokenizers import byte_bpe

def peak():
    # Not of getrusage, which begins with what the process that started this one took.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

tokenizer, settings = byte_bpe(), Data(sources=(sys.argv[1],), max_tokens=64)
tokenise([Row("Sum up.", "A fox.", "The fox runs.")], tokenizer, settings, None)
before = peak()
try:
    made = tokenise(read_rows([sys.argv[1]], settings)[0], tokenizer, settings, None)
    print(made.shortened, made.left_out, made.cut)
except DataError as error:
    print(error)
print(peak() - before)
"""


def taken(path: Path) -> tuple[str, int]:
    """Return what came of a file of rows, and by how many bytes the process grew that read and tokenised it."""
    command = [sys.executable, "-W", "ignore", "-c", READING, str(path)]
    here = str(Path(__file__).parent)
    done = subprocess.run(command, capture_output=True, check=True, text=True, cwd=here)
    said, grown = done.stdout.splitlines()[-2:]
    return said, int(grown)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process so")
@pytest.mark.parametrize(
    ("field", "characters", "says", "times"),
    [
        # Tokenised whole, these took 160 to 320 times as many bytes as characters.
        ("context", 4_000_000, "1 0 0", 10),
        ("response", 4_000_000, "0 0 1", 10),
        # Of a line that is refused, only its beginning is ever in memory.
        ("response", 40_000_000, "rows.jsonl:1: this row has 40,000,043 characters, but at most 10,000,000 are", 1.5),
    ],
)
def test_a_long_line_takes_a_few_times_its_own_size(field, characters, says, times, tmp_path):
    path, words = tmp_path / "rows.jsonl", "the fox runs over the hill. "
    text = (words * (characters // len(words) + 1))[:characters]
    path.write_text(json.dumps({"instruction": "Sum up.", "response": "A fox."} | {field: text}) + "\n")
    said, grown = taken(path)
    assert says in said
    assert grown < times * characters
