"""An interrupt is one quiet sentence and exit code 130, wherever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = "bellwether: interrupted; if rounds were committed, go on with --resume FOLDER."
OTHER = "bellwether: interrupted; nothing is left half done, and the same command begins anew."
MODULE = ["-m", "bellwether"]
SCRIPT = ["-c", "from bellwether.cli.main import main; main()"]


@pytest.mark.parametrize(
    ("way", "words", "module", "said"),
    [
        (MODULE, ["run"], "click.core", RUN),
        (MODULE, ["recipe", "shepherd"], "pydantic_core", OTHER),
        (SCRIPT, ["recipe", "shepherd"], "yaml", OTHER),
        (SCRIPT, ["run"], "torch._C", RUN),
    ],
)
def test_an_interrupt_while_libraries_are_loaded(
    tmp_path: Path, way: list[str], words: list[str], module: str, said: str
) -> None:
    command = [sys.executable, "-X", "importtime", *way, *words]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == module:  # it is loaded, and others follow
                process.send_signal(signal.SIGINT)
                break
        else:
            pytest.fail(f"{module} is not loaded by {words}")
        rest = process.stderr.read()
    assert [line for line in rest.splitlines() if not line.startswith("import time:")] == [said]
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


BEGIN = """\
import os, signal, time


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


class Fleeting:
    def __del__(self):
        interrupt()


"""
# What libraries do with an interrupt that comes while they are loaded.
HABITS = {
    "raise another error": "try:\n    interrupt()\nexcept KeyboardInterrupt:\n    pass\nraise RuntimeError('lost')\n",
    "be amid a destructor": "Fleeting()\ntime.sleep(60)\n",
    "run code that is a text": "exec('interrupt()')\n",
}


@pytest.mark.parametrize("habit", HABITS)
def test_an_interrupt_that_a_library_makes_something_else_of(tmp_path: Path, habit: str) -> None:
    (tmp_path / "yaml.py").write_text(BEGIN + HABITS[habit])
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command = [sys.executable, *SCRIPT, "recipe", "shepherd"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, timeout=50
    )
    assert (done.stderr, done.returncode) == (f"{OTHER}\n", 130)


WORKERS = """\
import multiprocessing, signal
from bellwether.tools.workers import interrupts_held, work_off


def holds(piece=None):
    held = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    print(held, flush=True)


if __name__ == "__main__":
    first = multiprocessing.get_context("spawn").Process(target=holds)
    with interrupts_held():
        first.start()
    first.join()
    work_off(holds, [1, 2], 2, lambda piece, found: None)
    holds()
"""


def test_workers_do_not_hear_an_interrupt_from_their_first_moment(tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "workers.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True", "True", "True", "False"]
