"""Freed memory that the C library keeps, told by the page faults of a process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy
from bellwether.model.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
parts = [numpy.ones(500_000) for _ in range(4)]  # 4 MB each, as a training step has several
del parts
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    parts = [numpy.ones(500_000) for _ in range(4)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, check=True).stdout)
        for way in ("given back", "kept")
    }
    assert faults["kept"] < faults["given back"] / 10
