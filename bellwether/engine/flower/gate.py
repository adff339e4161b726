"""What sites may reach of the SuperLink, and how much of this process somebody can hold who is none.

uvicorn bounds neither the number of connections nor the time until a request's head is there: ``Doorway`` and
``Idle`` do. TLS itself must be agreed on within asyncio's 60 s.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import socket
import time
from typing import Any

# Before anything of Flower's.
import bellwether.engine.flower.quiet  # noqa: F401

# isort: split
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from bellwether.engine.flower.records import owners_word

LARGEST_REQUEST = 2**23  # bytes that a site may send at once; Flower cuts arrays into pieces of 5 MiB
SLOWEST_REQUEST = 120.0  # seconds that a site may take for a request
SLOWEST_HEAD = 30.0  # seconds that a connection may be there without a whole head of a request
MOST_CONNECTIONS = 256  # at once, of one address, behind which there may be many sites

_PUSH_OBJECT = "/v1/fleet/push-object"


class ForSites:
    """Flower's own part for sites, bounded in size, in sum and in time: a request is passed on once it is whole.

    Args:
        app: the SuperLink, as ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._most, self._taken = LARGEST_REQUEST, dict[bytes, int]()
        self._known: dict[str, bytes] = {}  # by name
        self._is_open = False

    def open(self) -> None:
        """Serve sites from now on; until then they are told to come again, since a SuperNode that is refused ends."""
        self._is_open = True

    def admit(self, name: str, public_key: bytes) -> None:
        """Let a site in, by its key for Flower as PEM; requests of others are not read."""
        self._known[name] = base64.b64encode(public_key)

    def dismiss(self, name: str) -> None:
        """Let a site in no more."""
        self._known.pop(name, None)

    def expect(self, most: int) -> None:
        """Take so many bytes of objects of each site from now on."""
        self._most, self._taken = most, {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, as ASGI asks for."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await _refuse(send, 404)
            return
        site = dict(scope["headers"]).get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b"")
        if site not in self._known.values():
            await _refuse(send, 401 if self._is_open else 503)
            return
        counted = scope["path"] == _PUSH_OBJECT
        most = min(LARGEST_REQUEST, self._most - self._taken.get(site, 0)) if counted else LARGEST_REQUEST
        body = await _whole(receive, most)
        if body is None:
            await _refuse(send, 413)
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Any:
            return next(given, None) or await receive()

        async def noted(message: Any) -> None:
            # Counted once Flower has found that the site is the one that it claims to be.
            if counted and message["type"] == "http.response.start" and message["status"] == 200:
                self._taken[site] = self._taken.get(site, 0) + len(body)
            await send(message)

        await self._app(scope, again, noted)


class ForOwner:
    """An inner port of Flower's, all of it for the one process that has its secret: of anybody else nothing is read.

    Whoever has an account on the machine reaches loopback, and Flower asks nobody there who may end a run or strike a
    site off.

    Args:
        app: SuperLink or SuperNode, as ASGI application.
        secret: the port's, see ``records.Owner``.
    """

    def __init__(self, app: Any, secret: bytes) -> None:
        self._app, self._word = app, owners_word(secret).encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, as ASGI asks for."""
        if scope["type"] != "lifespan":
            shown = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(shown, self._word):
                await _refuse(send, 401)
                return
        await self._app(scope, receive, send)


class Doorway(socket.socket):
    """A socket that listens, and hangs up on an address that has too many connections already.

    asyncio's own loop accepts by this method; uvloop's does not.
    """

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection, as of any socket."""
        connection, address = super().accept()
        self._held = [one for one in getattr(self, "_held", ()) if one[0].fileno() >= 0]
        if sum(host == address[0] for _, host in self._held) >= MOST_CONNECTIONS:
            connection.close()
            raise ConnectionAbortedError
        self._held.append((connection, address[0]))
        return connection, address


class Idle:
    """Connections that wait for the head of a request, and since when.

    Args:
        connections: all there are, as uvicorn keeps them.
    """

    def __init__(self, connections: set[Any]) -> None:
        self._connections, self._since = connections, dict[Any, float]()

    async def drop(self) -> None:
        """Hang up on those that have waited for too long; uvicorn calls this about once a second."""
        now, since = time.monotonic(), dict[Any, float]()
        for one in list(self._connections):
            if one.cycle is None or one.cycle.response_complete:
                since[one, one.cycle] = self._since.get((one, one.cycle), now)
                if now - since[one, one.cycle] > SLOWEST_HEAD:
                    one.transport.abort()
        self._since = since


async def _whole(receive: Any, most: int) -> bytes | None:
    """Return the body of a request; None where it is too large, too slow, or was broken off."""
    parts, length = [], 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SLOWEST_REQUEST):
            while True:
                message = await receive()
                length += len(message.get("body", b""))
                if message["type"] != "http.request" or length > most:
                    return None
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    return b"".join(parts)
    return None


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
