"""Flower's SuperLink in the coordinator's own process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import sqlite3
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before anything of Flower's.
from bellwether.engine.flower.quiet import log_to

# isort: split
import uvicorn
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore import sql_mixin
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.main import create_app

from bellwether.engine.certificate import Certificate
from bellwether.engine.flower.dispatch import Dispatch, acquired
from bellwether.engine.flower.gate import Doorway, ForOwner, ForSites, Idle
from bellwether.engine.flower.records import LINK_ERRORS, Owner
from bellwether.errors import FederationError, first_line

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


# Flower's SQLite gives up a write after 5 s behind others, and what a site was sending is lost then; on a busy machine
# it waits longer.
sql_mixin.SQLITE_PRAGMAS = tuple(
    (name, "120000" if name == "busy_timeout" else value) for name, value in sql_mixin.SQLITE_PRAGMAS
)


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


class Link:
    """Flower's SuperLink in this process: an inner port on loopback for it alone, and an outer one for the sites alone.

    Args:
        folder: where Flower keeps its database and its log.
        inner: the certificate of the inner port, for 127.0.0.1.
        outer: the certificate of the outer port.
        host: the address on which the outer port listens.
        port: its number; 0 takes any that is free.
        alone: whether the sites of an earlier process have ended with it, so that they need not be waited for.

    Raises:
        FederationError: a port cannot be had, or a certificate cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        inner: Certificate,
        outer: Certificate,
        host: str,
        port: int,
        *,
        clients: Path | None = None,
        alone: bool = False,
    ) -> None:
        os.environ["FLWR_HOME"] = str(folder)
        log_to(folder / "flower.log")
        self._secret, self._inner = secrets.token_bytes(32), inner
        outside = _listening(host, port)
        inside = _listening("127.0.0.1", 0)
        self.port: int = outside.getsockname()[1]
        self._address = f"127.0.0.1:{inside.getsockname()[1]}"
        if alone and (folder / "flower.db").exists():
            _forget_connected(folder / "flower.db")
        # SQLite gives what it writes beside a database the same rights.
        (folder / "flower.db").touch(mode=0o600)
        app = create_app(self._settings(folder / "flower.db"), SuperLinkLifespan)
        self._gate = ForSites(app)
        self._servers = [_serving(ForOwner(app, self._secret), inside, inner, lifespan="on")]
        asked = {} if clients is None else {"ssl_ca_certs": str(clients), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        self._servers.append(_serving(self._gate, outside, outer, lifespan="off", loop="asyncio", **asked))
        os.chmod(folder / "flower.db", 0o600)

    def expect(self, most: Mapping[str, int]) -> None:
        """Take at most so many bytes of answers of each site from now on, by its name, until this is said again."""
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
        try:
            if name not in {node.name for node in self.nodes()}:
                with self._control() as control:
                    control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        except LINK_ERRORS as error:
            raise FederationError(
                f"The key of site {name} cannot be registered ({first_line(error)}): a key that was revoked once, or "
                "is another site's, is never taken again; let the site make new ones (bellwether site keygen)."
            ) from error
        self._gate.admit(name, public_key)

    def unregister(self, name: str) -> None:
        """Let a site connect no more; one that is not registered stays so."""
        self._gate.dismiss(name)
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
        """Yield what delivers messages, and let sites in; messages that an earlier process has left are given up."""
        with self._control() as control:
            for number, run in control.ListRuns(ListRunsRequest()).run_dict.items():
                if run.status.status != "finished":
                    control.StopRun(StopRunRequest(run_id=number))
            content = _empty_app()
            shipped = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
            control.StartRun(StartRunRequest(fab=shipped))
        with acquired(self._address, self._secret, TaskType.SERVER_APP, self._inner) as token:
            dispatch = Dispatch(self._address, self._inner, self._secret, token)
        self._gate.open()
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
            [Owner(self._secret), RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            yield client
        finally:
            client.close()


def _forget_connected(database: Path) -> None:
    """Let sites come back at once that could not tell that they go; Flower would wait for a minute."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE node SET status = 'offline', online_until = 0 WHERE status = 'online'")


def _serving(
    app: Any, listening: socket.socket, certificate: Certificate, **more: Any
) -> tuple[uvicorn.Server, threading.Thread]:
    """Serve an application on a socket, from a thread of its own."""
    try:
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            ws="none",
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
    settings.callback_notify, settings.timeout_notify = Idle(server.server_state.connections).drop, 0
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.02)  # seconds
    if not server.started:
        raise FederationError(
            "Flower's SuperLink did not start: see flower.log in the federation's folder, and whether the disk is full."
        )
    return server, thread


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket on which a server can listen."""
    listening: socket.socket | None = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = Doorway(family[0])
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


def _empty_app() -> bytes:
    """Return what Flower asks to be shipped with a run: names and no code."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(_APP.format(version="0.1.0"))
        (Path(folder) / "nothing.py").write_text('raise RuntimeError("a federation of bellwether runs no such code")\n')
        content: bytes = build_fab_from_disk(Path(folder))
    return content
