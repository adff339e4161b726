"""An interrupt is one quiet sentence and exit code 130, wherever it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OTHER = "bellwether: interrupted; nothing is left half done, and the same command begins anew."
MODULE = ["-m", "bellwether"]
SCRIPT = ["-c", "from bellwether.cli.main import main; main()"]


# An interrupt where the next module is looked for once one is loaded, however fast that is.
AFTER = """\
import os, signal, sys


class Interrupts:
    def find_spec(self, name, path=None, target=None):
        loaded = sys.modules.get("{module}")
        if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Interrupts())
"""


@pytest.mark.parametrize(
    ("way", "words", "module", "said"),
    [
        (MODULE, ["run"], "click.core", OTHER),
        (MODULE, ["recipe", "shepherd"], "pydantic_core", OTHER),
        (SCRIPT, ["recipe", "shepherd"], "yaml", OTHER),
        (SCRIPT, ["run"], "torch._C", OTHER),
    ],
)
def test_an_interrupt_while_libraries_are_loaded(
    tmp_path: Path, way: list[str], words: list[str], module: str, said: str
) -> None:
    (tmp_path / "loaded").mkdir()
    (tmp_path / "loaded" / "sitecustomize.py").write_text(AFTER.format(module=module))
    (tmp_path / "here").mkdir()
    path = os.pathsep.join([str(tmp_path / "loaded"), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *way, *words], cwd=tmp_path / "here", env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == (f"{said}\n", 130)
    assert not list((tmp_path / "here").iterdir())


BEGIN = """\
import os, signal, time


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


class Fleeting:
    def __del__(self):
        interrupt()


"""
# What libraries do with an interrupt that comes while they are loaded.
HABITS = {
    "raise another error": "try:\n    interrupt()\nexcept KeyboardInterrupt:\n    pass\nraise RuntimeError('lost')\n",
    "be amid a destructor": "Fleeting()\ntime.sleep(600)\n",
    "run code that is a text": "exec('interrupt()')\n",
}


@pytest.mark.parametrize("habit", HABITS)
def test_an_interrupt_that_a_library_makes_something_else_of(tmp_path: Path, habit: str) -> None:
    (tmp_path / "yaml.py").write_text(BEGIN + HABITS[habit])
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command = [sys.executable, *SCRIPT, "recipe", "shepherd"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, timeout=300
    )
    assert (done.stderr, done.returncode) == (f"{OTHER}\n", 130)


WORKERS = """\
import multiprocessing, os, signal
from bellwether.tools.workers import interrupts_held, work_off


def holds(piece=None):
    held = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.write(1, f"{held}\\n".encode())  # at once, since two do


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


FOREIGN = """\
import os, sys
from bellwether.tools.workers import work_off


def look(piece):
    found = (sys.modules["colorsys"].__file__, os.environ.get("WORD"), "PYTHONSAFEPATH" in os.environ)
    os.write(1, "{} {} {}\\n".format(*found).encode())


if __name__ == "__main__":
    for os.environ["WORD"] in ("first", "second"):
        work_off(look, [1, 2], 2, lambda piece, found: None, ["colorsys"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux only")
def test_what_workers_need_is_imported_before_from_no_current_folder_and_the_environment_is_of_now(
    tmp_path: Path,
) -> None:
    import colorsys

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "colorsys.py").touch()
    (tmp_path / "foreign.py").write_text(FOREIGN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "foreign.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path / "here")
    said = [f"{colorsys.__file__} {word} False" for word in ("first", "first", "second", "second")]
    assert done.stdout.splitlines() == said
