"""Runs the command ``bellwether``, and turns errors and interrupts into one sentence and an exit code.

Exit codes: 0 done; 1 the run itself failed, such as a round below its quorum or a judge that is away; 2 something in
the command, recipe, data or model must be changed; 130 interrupted.

Nothing is imported here before the interrupts of a person are met, who may lose patience while libraries load.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

INTERRUPTED = 130
# What is said after an interrupt, by command, where nothing is there to go on with.
_AFTERWARDS = {
    "chat": "what was answered was shown.",
    "ui": "the page was not opened.",
    "federation": "committed rounds are kept: go on with the same command, or a rehearsal with --resume FOLDER.",
    "site": "what was sent is in the ledger, and the same command goes on.",
}
_OTHERWISE = "nothing is left half done, and the same command begins anew."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error of ours becomes one sentence on stderr and an exit code.

    Args:
        arguments: None takes those of this process, which is the command's own, then.
    """
    own = arguments is None
    words = sys.argv[1:] if arguments is None else list(arguments)
    interrupts = _Interrupts()
    try:
        if own:
            interrupts.meet()
            _let_threads_sleep()
        _call(words)
    except BaseException as error:
        if own:
            interrupts.leave()
        code = _tell_interrupt(words, error) if interrupts.explain(error) else _tell(error)
        if code is None:
            raise
        sys.exit(code)


def _let_threads_sleep() -> None:
    """Have torch's threads sleep while they wait for each other, unless the person's own environment says otherwise.

    OpenMP lets them spin, which on a machine that is busy with other things as well takes the processor from the very
    thread that they wait for. It reads this once, when torch is loaded.
    """
    import os

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _call(words: Sequence[str]) -> None:
    """Call the command that the words name."""
    import io

    from bellwether.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show shall not end a run
    app(args=list(words), obj=list(words))


def _tell(error: BaseException) -> int | None:
    """Tell an error in a sentence, and return the exit code; None where it is a mistake of ours."""
    from bellwether.cli.say import complain
    from bellwether.errors import BellwetherError, JudgeAway, RoundFailed

    if isinstance(error, BellwetherError):
        complain(str(error))
        return 1 if isinstance(error, (RoundFailed, JudgeAway)) else 2
    if isinstance(error, OSError):
        # What no room foresaw, such as a path that is too long: the system's own words are clear enough.
        complain(f"{error.filename or 'The system'}: {error.strerror or error}; give another path, or mend this one.")
        return 2
    return None


def _tell_interrupt(words: Sequence[str], error: BaseException) -> int:
    """Tell of an interrupt in a sentence, and return the exit code."""
    from bellwether.cli.going_on import told

    said = told(error) or _AFTERWARDS.get(next(iter(words), ""), _OTHERWISE)
    sys.stderr.write(f"bellwether: interrupted; {said}\n")
    return INTERRUPTED


class _Interrupts:
    """The interrupts of a process: none is lost, and what a library makes of one is known for what it is."""

    def __init__(self) -> None:
        self._in_import = False

    def meet(self) -> None:
        """Meet them from now on."""
        import signal

        signal.signal(signal.SIGINT, self._raise)
        sys.unraisablehook = self._raise_later

    def leave(self) -> None:
        """Let the next one end the process at once, without a word: all is said, and Python only tidies up."""
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        exec("")  # where one came within code that was a text, Python would die by the signal, whatever the exit code

    def explain(self, error: BaseException) -> bool:
        """Return whether an error is an interrupt, or came of one."""
        if isinstance(error, SystemExit):
            return error.code == INTERRUPTED  # typer's own, for an interrupt within a command
        # A library that is being loaded may turn an interrupt into any error, as pydantic and NumPy do.
        return self._in_import or isinstance(error, KeyboardInterrupt)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """Raise an interrupt, and remember whether it came while something was imported."""
        while frame is not None and not self._in_import:
            self._in_import = frame.f_code.co_filename.startswith("<frozen importlib")
            frame = frame.f_back
        raise KeyboardInterrupt

    def _raise_later(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Raise an interrupt again that came where Python can raise nothing, as among its locks of imports."""
        import _thread

        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(_interrupt_soon, (_thread.get_ident(),))
        else:
            sys.__unraisablehook__(unraisable)


def _interrupt_soon(thread: int) -> None:
    """Interrupt a thread when it has left the place where it could raise nothing."""
    import signal
    import time

    time.sleep(0.05)  # seconds
    signal.pthread_kill(thread, signal.SIGINT)
