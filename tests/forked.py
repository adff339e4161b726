"""Commands in forks of the process that the tests run in: they can be killed and interrupted, and import nothing anew.

Sound because they compute with one thread and without a GPU: a pool of threads that the tests have does not live on in
a fork, and whoever uses it there is killed. Workers of such a command are forks of the one process that all workers of
the tests come from.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn

import torch

from bellwether.cli.main import main


class Forked:
    """A process that does something, with the methods of ``subprocess.Popen`` that tests need.

    Args:
        do: what it does; its exit code is 0 then, or that of ``SystemExit``.
        environment: what is added to the variables of this one.
        folder: where it works.
    """

    def __init__(
        self, do: Callable[[], object], environment: dict[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self.returncode: int | None = None
        self._said = [os.memfd_create(name) for name in ("out", "err")]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be(do, self._said, environment or {}, folder or Path.cwd())

    def poll(self) -> int | None:
        """Return the exit code, negative where a signal ended it, or None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        """Return the exit code once it has ended."""
        code = self._look(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Return what it wrote to its output and of its errors, once it has ended."""
        self.wait()
        return self.said()

    def said(self) -> tuple[str, str]:
        """Return what it has written so far to its output and of its errors."""
        out, err = (os.pread(file, 1 << 24, 0).decode() for file in self._said)
        return out, err

    def __del__(self) -> None:
        for file in self._said:
            os.close(file)

    def _look(self, flags: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def start(*words: object, folder: Path | None = None, **environment: str) -> Forked:
    """Start the command ``bellwether``, which has its words and meets interrupts as in a process of its own."""
    command = ["bellwether", *map(str, words)]

    def do() -> None:
        sys.argv = command
        main()

    return Forked(do, environment, folder)


def family(pid: int) -> list[int]:
    """Return the processes that a process began, and those that these began."""
    begun = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in begun for one in (child, *family(child))]


def alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def _be(do: Callable[[], object], files: list[int], environment: dict[str, str], folder: Path) -> NoReturn:
    """Be the forked process: do it, and end without a word of what the tests have open."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
            os.dup2(file, number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(environment, TOKENIZERS_PARALLELISM="false")
        torch.set_num_threads(1)
        os.chdir(folder)
        multiprocessing.process._children = set()  # those of the tests
        if forkserver._forkserver._forkserver_pid is not None:  # it is no child of this process, which could not wait
            forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        do()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
