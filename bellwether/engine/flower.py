"""Flower's deployment engine as it is used here: all of its internals that are relied upon stand in this file.

A coordinator hosts Flower's SuperLink in its own process and takes the task of a server app itself; a site runs
Flower's SuperNode beside a process of its own that takes the tasks of a client app. No code travels: what Flower asks
to be shipped with a run is empty, and is installed and imported nowhere.

    coordinator process                                          site
    round loop → Dispatch → SuperLink (inner port, loopback)
                            SuperLink (outer port, TLS) ← HTTPS ─ SuperNode ← loopback ─ Inbox → resident process

These internals change between versions, so the version is pinned, and ``tests/test_flower.py`` holds the contract.
"""

from __future__ import annotations

import os

# Nothing is told to anybody: Flower reads these when it is imported.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1"
)

import asyncio
import contextlib
import hashlib
import logging
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.logger import FLOWER_LOGGER
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from bellwether.errors import FederationError, first_line
from bellwether.exchange.seal import Parcel

# What Flower itself is asked over HTTP, and may fail in.
LINK_ERRORS = (httpx.HTTPError, FlowerError, OSError)

LARGEST_REQUEST = 2**23  # bytes that a site may send at once; Flower cuts arrays into pieces of 5 MiB
SLOWEST_REQUEST = 120.0  # seconds that a site may take for a request
_ACQUIRE = {"/flwr.proto.Runtime/AcquireTask"}
_PUSH_OBJECT = "/v1/fleet/push-object"
_APP = """\
[project]
name = "bellwether"
version = "{version}"
dependencies = []
[tool.flwr.app]
publisher = "bellwether"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
[tool.flwr.app.config]
"""


# The SuperNode ends gently when the process that began it is killed, so that the site can come back at once; where the
# system cannot do so (Linux can), Flower takes it for connected until it has missed its heartbeats, 50 seconds.
_SUPERNODE = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == {parent}:
    from flwr.supernode.cli.flower_supernode import flower_supernode
    flower_supernode()
"""


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key, and the authority by which others know it; all are files in PEM."""

    chain: Path
    key: Path
    authority: Path


@dataclass(frozen=True)
class Node:
    """A site as Flower knows it.

    Args:
        number: Flower's number for it.
        name: the name under which it was registered.
        online: whether its SuperNode has been heard of lately.
    """

    number: int
    name: str
    online: bool


@dataclass(frozen=True)
class Arrived:
    """What came of one message.

    Args:
        message: its identifier.
        parcel: what the site answered; None where there is no answer.
        failure: why there is none, in one clause.
    """

    message: str
    parcel: Parcel | None = None
    failure: str = ""


class Link:
    """Flower's SuperLink in this process: an inner port on loopback, and an outer one for the sites alone.

    Args:
        folder: where Flower keeps its database and its log.
        inner: the certificate of the inner port, for 127.0.0.1.
        outer: the certificate of the outer port.
        host: the address on which the outer port listens.
        port: its number; 0 takes any that is free.
        clients: the authority by which sites' own client certificates are known; None asks for none.

    Raises:
        FederationError: a port cannot be had, or a certificate cannot be used.
    """

    def __init__(
        self, folder: Path, inner: Certificate, outer: Certificate, host: str, port: int, clients: Path | None = None
    ) -> None:
        os.environ["FLWR_HOME"] = str(folder)
        _log_to(folder / "flower.log")
        self._secret, self._inner = secrets.token_bytes(32), inner
        outside = _listening(host, port)
        inside = _listening("127.0.0.1", 0)
        self.port: int = outside.getsockname()[1]
        self._address = f"127.0.0.1:{inside.getsockname()[1]}"
        app = create_app(self._settings(folder / "flower.db"), SuperLinkLifespan)
        asked = {"ssl_cert_reqs": 2, "ssl_ca_certs": str(clients)} if clients is not None else {}
        self._gate = _ForSites(app)
        self._servers = [_serving(app, inside, inner, lifespan="on")]
        self._servers.append(_serving(self._gate, outside, outer, lifespan="off", **asked))
        os.chmod(folder / "flower.db", 0o600)

    def expect(self, most: int) -> None:
        """Take at most so many bytes of answers of each site from now on, until this is said again."""
        self._gate.expect(most)

    def _settings(self, database: Path) -> SuperLinkLifespanConfig:
        certificates = tuple(path.read_bytes() for path in (self._inner.authority, self._inner.chain, self._inner.key))
        return SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host="127.0.0.1",
            port=0,
            insecure=False,
            certificates=certificates,
            superexec_auth_secret=self._secret,
            authn_plugin=load_control_authn_plugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type="grpc-rere",
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=str(self._inner.authority),
            ssl_certfile=str(self._inner.chain),
            ssl_keyfile=str(self._inner.key),
            database=str(database),
            isolation="process",
            runtime_dependency_install=False,
        )

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End both ports."""
        for server, thread in reversed(self._servers):
            server.should_exit = server.force_exit = True
            thread.join(10)  # seconds

    def register(self, name: str, public_key: bytes) -> None:
        """Let a site connect; one that is registered already stays so.

        Args:
            name: its name.
            public_key: its key for Flower, as PEM.

        Raises:
            FederationError: Flower refuses the key, such as one that was revoked.
        """
        if name in {node.name for node in self.nodes()}:
            return
        try:
            with self._control() as control:
                control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        except LINK_ERRORS as error:
            raise FederationError(
                f"The key of site {name} cannot be registered ({first_line(error)}): a key that was revoked once, or "
                "is another site's, is never taken again; let the site make new ones (bellwether site keygen)."
            ) from error

    def unregister(self, name: str) -> None:
        """Let a site connect no more; one that is not registered stays so."""
        with self._control() as control:
            for node in self.nodes():
                if node.name == name:
                    control.UnregisterNode(UnregisterNodeRequest(node_id=node.number))

    def nodes(self) -> list[Node]:
        """Return all sites that are registered."""
        with self._control() as control:
            found = control.ListNodes(ListNodesRequest()).nodes_info
        return [Node(one.node_id, one.name, one.status == "online") for one in found if one.status != "unregistered"]

    @contextlib.contextmanager
    def dispatch(self) -> Iterator[Dispatch]:
        """Yield what delivers messages; those that an earlier process has left are given up."""
        with self._control() as control:
            for number, run in control.ListRuns(ListRunsRequest()).run_dict.items():
                if run.status.status != "finished":
                    control.StopRun(StopRunRequest(run_id=number))
            content = _empty_app()
            shipped = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
            control.StartRun(StartRunRequest(fab=shipped))
        with _acquired(self._address, self._secret, TaskType.SERVER_APP, self._inner) as token:
            dispatch = Dispatch(self._address, self._inner, token)
        try:
            yield dispatch
        finally:
            dispatch.close()

    @contextlib.contextmanager
    def _control(self) -> Iterator[ControlHttpClient]:
        client = ControlHttpClient.from_server_address(
            self._address,
            False,
            self._inner.authority.read_bytes(),
            [RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            yield client
        finally:
            client.close()


class Dispatch:
    """Sends messages to sites and picks up what they answer, as Flower's server app does.

    Args:
        address: the SuperLink's inner port.
        inner: its certificate.
        token: Flower's, for the one task.
    """

    def __init__(self, address: str, inner: Certificate, token: str) -> None:
        self._grid = HttpGrid(address, False, inner.authority.read_bytes(), token=token)
        self._client = self._grid._runtime_client
        self._beat = HeartbeatSender(make_task_heartbeat_fn_http(self._client))
        self._beat.start()
        given = self._client.PullTaskInput(PullTaskInputRequest())
        self._identity = given.task_id, given.run.run_id, given.context.node_id
        self._context = given.context
        self._grid.set_run(run_from_proto(given.run))

    def online(self) -> Mapping[str, int]:
        """Return Flower's numbers of the sites whose SuperNodes have been heard of lately, by name."""
        return {node.name: node.node_id for node in self._grid.get_nodes()}

    def send(self, node: int, parcel: Parcel, seconds: float) -> str | None:
        """Send a message to a site; return its identifier, or None where Flower does not take it.

        Args:
            node: Flower's number of the site.
            parcel: the message.
            seconds: how long it is worth delivering.
        """
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self._identity  # Message() reads them
        message = Message(_record(parcel), dst_node_id=node, message_type="train", ttl=seconds)
        return next(iter(self._grid.push_messages([message])), None)

    def arrived(self, messages: Sequence[str]) -> list[Arrived]:
        """Return what has come of messages; nothing of those that wait for an answer still."""
        return [_arrived(message) for message in self._grid.pull_messages(messages)] if messages else []

    def close(self) -> None:
        """End Flower's run."""
        with contextlib.suppress(*LINK_ERRORS):
            self._client.PushTaskOutput(
                PushTaskOutputRequest(context=self._context, sub_status="completed", details="")
            )
        if self._beat.is_running:
            self._beat.stop()
        self._grid.close()


class Delivery:
    """One message at a site, which must be answered once.

    Args:
        client: what speaks with the SuperNode for this task.
        beat: tells the SuperNode that the task is being worked at.
    """

    def __init__(self, client: RuntimeHttpClient, beat: HeartbeatSender) -> None:
        self._client, self._beat = client, beat
        self._message, self._context, _, _ = pull_task_input(client)  # what was shipped is not looked at
        self.parcel = _parcel(self._message)

    def answer(self, parcel: Parcel) -> None:
        """Send the answer."""
        push_message(self._client, Message(_record(parcel), reply_to=self._message), self._context)
        push_task_output(client=self._client, context=self._context, sub_status="completed", details="")
        self._beat.stop()
        self._client.close()


class Inbox:
    """Flower's SuperNode as a process of its own, and the tasks that this process takes of it.

    Args:
        folder: where it keeps its secret and its log.
        key: the file of the site's key for Flower.
        address: the coordinator's, as ``HOST:PORT``.
        authority: the file of the authority by which the coordinator's certificate is known.
    """

    def __init__(self, folder: Path, key: Path, address: str, authority: Path) -> None:
        _log_to(folder / "flower.log")
        self._folder, self._key, self._superlink, self._authority = folder, key, address, authority
        self._secret = secrets.token_bytes(32)
        self.starts = 0  # of the SuperNode; more than one where it has ended
        self._begun, self._node = 0.0, self._start()

    def __enter__(self) -> Inbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the SuperNode, which tells the SuperLink that it goes."""
        self._node.terminate()
        try:
            self._node.wait(20)  # seconds
        except subprocess.TimeoutExpired:
            self._node.kill()
            self._node.wait()

    def take(self) -> Delivery | None:
        """Return the next message, or None where there is none; begin the SuperNode again where it has ended."""
        if self._node.poll() is not None and time.monotonic() - self._begun > 5:  # seconds
            self._node = self._start()
        try:
            client = _runtime(self._address, self._secret)
            try:
                token = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token
            finally:
                client.close()
        except LINK_ERRORS:  # it begins, or ends
            return None
        return _delivery(self._address, token) if token else None

    def _start(self) -> subprocess.Popen[bytes]:
        """Begin the SuperNode, which ends with this process however that ends."""
        self.starts += 1
        self._begun, port = time.monotonic(), _free_port()
        self._address = f"127.0.0.1:{port}"
        secret = self._folder / "supernode.secret"
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(self._secret)
        code = _SUPERNODE.format(parent=os.getpid())
        words = ["--superlink", self._superlink, "--root-certificates", str(self._authority)]
        words += ["--auth-supernode-private-key", str(self._key), "--host", "127.0.0.1", "--port", str(port)]
        words += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        with (self._folder / "supernode.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "FLWR_HOME": str(self._folder)},
                start_new_session=True,
            )


def version() -> str:
    """Return the version of Flower, which all sites and the coordinator must share."""
    from importlib.metadata import version

    return version("flwr")


def _delivery(address: str, token: str) -> Delivery | None:
    """Return the message of a task, or None where it cannot be had any more."""
    client = _runtime(address, token=token)
    beat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beat.start()
    try:
        return Delivery(client, beat)
    except (*LINK_ERRORS, RuntimeError, ValueError):
        beat.stop()
        client.close()
        return None


def _runtime(address: str, secret: bytes = b"", token: str = "", authority: bytes | None = None) -> RuntimeHttpClient:
    """Return a client of the interface for tasks, which is authorised by the secret, or by the token of a task."""
    name = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    own = (
        RuntimeTokenHttpInterceptor(token)
        if token
        else SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE)
    )
    return RuntimeHttpClient.from_server_address(address, authority is None, authority, [name, own])


@contextlib.contextmanager
def _acquired(address: str, secret: bytes, kind: str, inner: Certificate) -> Iterator[str]:
    """Yield the token of a task that has just been made."""
    client = _runtime(address, secret, authority=inner.authority.read_bytes())
    try:
        for _ in range(100):
            token = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind])).token
            if token:
                yield token
                return
            time.sleep(0.1)  # seconds
    finally:
        client.close()
    raise FederationError("Flower gave no task to its own coordinator; see flower.log in the federation's folder.")


def _record(parcel: Parcel) -> RecordDict:
    """Return a message as Flower's records: small parts, and one flat array of bytes."""
    small = {"header": parcel.header, "signature": parcel.signature, "manifest": parcel.manifest}
    record = RecordDict({"parcel": ConfigRecord(small)})
    if parcel.body:
        record["body"] = ArrayRecord({"flat": Array("uint8", (len(parcel.body),), "bytes", parcel.body)})
    return record


def _parcel(message: Message) -> Parcel | None:
    """Return the parcel in Flower's records, whose array is never interpreted here; None where there is none."""
    content = message.content
    small, arrays = content.config_records.get("parcel"), content.array_records.get("body")
    parts = [small.get(name) if small is not None else None for name in ("header", "signature", "manifest")]
    flat: Any = arrays.get("flat") if arrays is not None else None
    body = flat.data if flat is not None else b"" if arrays is None else None
    header, signature, manifest, body = (part if isinstance(part, bytes) else None for part in (*parts, body))
    if header is None or signature is None or manifest is None or body is None:
        return None
    return Parcel(header, signature, manifest, body)


def _arrived(message: Message) -> Arrived:
    """Return what came of a message."""
    about = message.metadata.reply_to_message_id
    if message.has_error():
        return Arrived(about, failure=_FAILURES.get(message.error.code, f"Flower says: {message.error.reason}"))
    parcel = _parcel(message)
    return Arrived(about, parcel, "" if parcel is not None else "it sent no parcel")


_FAILURES = {
    2: "its process failed",
    3: "the task did not reach it whole",
    4: "its answer did not come whole",
    5: "its site is not connected any more",
    8: "its site's process is gone",
}


class _ForSites:
    """What sites may reach of the SuperLink: Flower's own part for them, bounded in size, in sum and in time."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._most, self._taken = LARGEST_REQUEST, dict[bytes, int]()

    def expect(self, most: int) -> None:
        """Take so many bytes of objects of each site from now on."""
        self._most, self._taken = most, {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, as ASGI asks for."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await _refuse(send, 404)
            return
        headers = dict(scope["headers"])
        site = headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b"")
        counted = scope["path"] == _PUSH_OBJECT
        length, end = 0, time.monotonic() + SLOWEST_REQUEST

        async def bounded() -> Any:
            nonlocal length
            message = await asyncio.wait_for(receive(), max(0.1, end - time.monotonic()))
            length += len(message.get("body", b""))
            if length > LARGEST_REQUEST or (counted and self._taken.get(site, 0) + length > self._most):
                raise _TooLarge
            return message

        async def noted(message: Any) -> None:
            # Counted once Flower has found that the site is the one that it claims to be.
            if counted and message["type"] == "http.response.start" and message["status"] == 200:
                self._taken[site] = self._taken.get(site, 0) + length
            await send(message)

        try:
            await self._app(scope, bounded, noted)
        except (_TooLarge, TimeoutError):
            with contextlib.suppress(RuntimeError):  # where an answer has begun already
                await _refuse(send, 413)


class _TooLarge(Exception):
    """A request is larger than it may be."""


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def _serving(
    app: Any, listening: socket.socket, certificate: Certificate, **more: Any
) -> tuple[uvicorn.Server, threading.Thread]:
    """Serve an application on a socket, from a thread of its own."""
    try:
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            ssl_certfile=str(certificate.chain),
            ssl_keyfile=str(certificate.key),
            timeout_graceful_shutdown=2,
            **more,
        )
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        raise FederationError(
            f"The certificate {certificate.chain} with the key {certificate.key} cannot be used ({first_line(error)}); "
            "give both in PEM, and such as belong together."
        ) from error
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.02)  # seconds
    if not server.started:
        raise FederationError("Flower's SuperLink did not start; see flower.log in the federation's folder.")
    return server, thread


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket on which a server can listen."""
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family[0])
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(family[4])
        listening.listen(128)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise FederationError(
            f"The coordinator cannot listen on {host}:{port} ({error.strerror or error}): end what uses that port, or "
            "give another address."
        ) from error
    return listening


def _free_port() -> int:
    """Return a port of loopback that nothing listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _empty_app() -> bytes:
    """Return what Flower asks to be shipped with a run: names and no code."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(_APP.format(version="0.1.0"))
        (Path(folder) / "nothing.py").write_text('raise RuntimeError("a federation of bellwether runs no such code")\n')
        content: bytes = build_fab_from_disk(Path(folder))
    return content


def _log_to(path: Path) -> None:
    """Let Flower write to a file what it would write to the terminal."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger in (FLOWER_LOGGER, *(logging.getLogger(name) for name in ("uvicorn", "alembic"))):
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)
