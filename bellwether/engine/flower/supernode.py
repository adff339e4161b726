"""A site's SuperNode: Flower's own program, which ends with the process that began it, and finds messages sooner.

python -m bellwether.engine.flower.supernode PARENT CERTIFICATE WORDS...

CERTIFICATE is the file of the certificate that the site shows where the coordinator asks for one, or empty.
"""

from __future__ import annotations

import ctypes
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before anything of Flower's.
from bellwether.engine.flower.quiet import log_to

# isort: split
import uvicorn
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection, main, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from bellwether.engine.certificate import show
from bellwether.engine.flower.gate import ForOwner
from bellwether.engine.flower.records import pulled
from bellwether.tools.pauses import Pauses

IDLE = 3.0  # seconds that Flower waits between two looks for a message
LARGEST_TASK = 2**32  # bytes of a message to a site; it has one at a time
SOON = 0.2  # seconds of the first such wait after a message


class Waits:
    """Waits as Flower's loop asks for, shorter after a message: the next one of a round mostly comes soon."""

    def __init__(self) -> None:
        self._pauses = Pauses(SOON, IDLE)

    def sleep(self, seconds: float) -> None:
        """Wait; Flower asks for less than ``IDLE`` while it has a message in hand."""
        if seconds < IDLE:
            self._pauses.begin()
            time.sleep(min(seconds, SOON))
        else:
            time.sleep(self._pauses.next())


def end_with(parent: int) -> None:
    """End gently once the parent has ended, however it did, so that the site can come back at once.

    Where the system cannot do so (Linux can), Flower takes the site for connected until it has missed its heartbeats,
    about 50 seconds. Linux tells of the end once for each thread of the parent, and a second SIGTERM would end the
    SuperNode before it has told the SuperLink.

    Args:
        parent: the number of the process that began this one.
    """

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)

    if sys.platform == "linux":
        signal.signal(signal.SIGUSR1, leave)
        ctypes.CDLL(None).prctl(1, signal.SIGUSR1)
    if os.getppid() != parent:  # it ended before that was said
        raise SystemExit(1)


def showing(shown: Path) -> type[FleetHttpClient]:
    """Return Flower's client of a SuperLink, which shows a certificate where it is asked for one."""

    class Showing(FleetHttpClient):  # type: ignore[misc]  # Flower has no types here
        def __init__(self, *words: Any, verify: ssl.SSLContext, **more: Any) -> None:
            show(verify, shown)
            super().__init__(*words, verify=verify, **more)

    return Showing


def bounded(most: int) -> Callable[..., dict[str, bytes]]:
    """Return what fetches a message's objects as Flower's function does, up to so many bytes; it fails beyond them."""

    def pull_objects(object_ids: Sequence[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        try:
            return pulled(object_ids, pull_object_fn, most)
        except RunNotRunningException as error:
            # Flower would leave its half of a task behind, and whoever takes that waits for the rest for two hours.
            raise ObjectPullError(next(iter(object_ids), ""), "its run has ended") from error

    return pull_objects


def for_owner(make: Callable[..., Any]) -> Callable[..., ForOwner]:
    """Return what makes Flower's application of a SuperNode, for the process alone that has the secret."""

    def create_app(*, superexec_auth_secret: bytes, **more: Any) -> ForOwner:
        return ForOwner(make(superexec_auth_secret=superexec_auth_secret, **more), superexec_auth_secret)

    return create_app


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    certificate = sys.argv.pop(1)
    if certificate:
        fleet_http_connection.FleetHttpClient = showing(Path(certificate))
    log_to(Path(os.environ["FLWR_HOME"]) / "supernode.log")
    uvicorn.config.LOGGING_CONFIG["loggers"].clear()  # else it would log to the terminal again
    start_client_internal.time = SimpleNamespace(sleep=Waits().sleep)  # what it takes of that module
    start_client_internal.pull_objects = bounded(LARGEST_TASK)
    main.create_app = for_owner(main.create_app)
    flower_supernode()
