"""A site's end of Flower's messages: the SuperNode as a process of its own, and the tasks that it has."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

# Before anything of Flower's.
from bellwether.engine.flower.quiet import log_to

# isort: split
from flwr.app import Message
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from bellwether.engine.flower.records import LINK_ERRORS, heartbeat, parcel_of, record_of, runtime_client
from bellwether.exchange.seal import Parcel
from bellwether.tools.atomic import cannot_write

SECRET = "supernode.secret"
SOONEST, LATEST = 5.0, 20.0  # seconds after its beginning that a SuperNode that has ended is begun again


class Delivery:
    """One message at a site, which must be answered once.

    Args:
        client: what speaks with the SuperNode for this task.
        beat: tells the SuperNode that the task is being worked at.
    """

    def __init__(self, client: RuntimeHttpClient, beat: HeartbeatSender) -> None:
        self._client, self._beat = client, beat
        self._message, self._context, _, _ = pull_task_input(client)  # what was shipped is not looked at
        self.parcel = parcel_of(self._message)

    def answer(self, parcel: Parcel) -> None:
        """Send the answer; where the SuperNode is gone meanwhile, the coordinator hears of that from Flower."""
        with contextlib.suppress(*LINK_ERRORS):
            push_message(self._client, Message(record_of(parcel), reply_to=self._message), self._context)
            push_task_output(client=self._client, context=self._context, sub_status="completed", details="")
        self._beat.stop()
        self._client.close()


class Inbox:
    """Flower's SuperNode as a process of its own, and the tasks that this process takes of it.

    Args:
        folder: where it keeps its secret and its logs: ``supernode.log``, and ``supernode.err`` of its last start.
        key: the file of the site's key for Flower.
        address: the coordinator's, as ``HOST:PORT``.
        authority: the file of the authority by which the coordinator's certificate is known.
        shown: the file of the certificate that the site shows where the coordinator asks for one; None has none.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(self, folder: Path, key: Path, address: str, authority: Path, shown: Path | None = None) -> None:
        log_to(folder / "flower.log")
        self._folder, self._key, self._superlink, self._authority = folder, key, address, authority
        self._shown = "" if shown is None else str(shown)
        self._secret = secrets.token_bytes(32)
        self.starts = 0  # of the SuperNode; more than one where it has ended
        self._patience = SOONEST
        self._begun, self._node = 0.0, self._start()
        self._client = runtime_client(self._address, self._secret)

    def __enter__(self) -> Inbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the SuperNode, which tells the SuperLink that it goes, and remove its secret."""
        self._client.close()
        self._node.terminate()
        try:
            self._node.wait(20)  # seconds
        except subprocess.TimeoutExpired:
            self._node.kill()
            self._node.wait()
        with contextlib.suppress(OSError):
            (self._folder / SECRET).unlink(missing_ok=True)

    def take(self) -> Delivery | None:
        """Return the next message, or None where there is none; begin the SuperNode again where it has ended."""
        if self._node.poll() is not None and time.monotonic() - self._begun > self._patience:
            self._client.close()
            self._node, self._client = self._start(), runtime_client(self._address, self._secret)
            self._patience = min(2 * self._patience, LATEST)
        try:
            token = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token
        except LINK_ERRORS:  # it begins, or ends
            return None
        if not token:
            return None
        self._patience = SOONEST
        return _delivery(self._address, self._secret, token)

    def _start(self) -> subprocess.Popen[bytes]:
        """Begin the SuperNode, which ends with this process however that ends."""
        self.starts += 1
        self._begun, port = time.monotonic(), _free_port()
        self._address = f"127.0.0.1:{port}"
        secret = self._folder / SECRET
        try:
            with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(self._secret)
        except OSError as error:
            raise cannot_write(secret, error) from error
        words = ["--superlink", self._superlink, "--root-certificates", str(self._authority)]
        words += ["--auth-supernode-private-key", str(self._key), "--host", "127.0.0.1", "--port", str(port)]
        words += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        with (self._folder / "supernode.err").open("wb") as said:  # what is no line of its log
            return subprocess.Popen(
                [sys.executable, "-m", "bellwether.engine.flower.supernode", str(os.getpid()), self._shown, *words],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, "FLWR_HOME": str(self._folder)},
                start_new_session=True,
            )


def _delivery(address: str, secret: bytes, token: str) -> Delivery | None:
    """Return the message of a task, or None where it cannot be had any more."""
    client = runtime_client(address, secret, token)
    beat = heartbeat(client)
    beat.start()
    try:
        return Delivery(client, beat)
    except (*LINK_ERRORS, RuntimeError, ValueError):
        beat.stop()
        client.close()
        return None


def _free_port() -> int:
    """Return a port of loopback that nothing listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
