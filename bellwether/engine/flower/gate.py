"""What sites may reach of the SuperLink, and how much of this process somebody can hold who is none.

uvicorn bounds neither the number of connections nor the time until a request's head is there: ``Doorway`` and
``Idle`` do. TLS itself must be agreed on within asyncio's 60 s.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import socket
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

# Before anything of Flower's.
import bellwether.engine.flower.quiet  # noqa: F401

# isort: split
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from bellwether.engine.flower.records import owners_word

LARGEST_REQUEST = 2**23  # bytes that a site may send at once; Flower cuts arrays into pieces of 5 MiB
LARGEST_MESSAGE = 2**18  # bytes of any other request; it names every such piece by 70 bytes
SLOWEST_REQUEST = 120.0  # seconds that a site may take for a request
SLOWEST_HEAD = 30.0  # seconds that a connection may be there without a whole head of a request
MOST_CONNECTIONS = 256  # at once, of one address, behind which there may be many sites

_PUSH_OBJECT, _PUSH_MESSAGES = "/v1/fleet/push-object", "/v1/fleet/push-messages"
_KEY, _SIGNATURE, _TIME = (
    name.lower().encode() for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
)


class ForSites:
    """Flower's own part for sites, bounded in size, in sum and in time: a request is passed on once it is whole.

    Args:
        app: the SuperLink, as ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._most: Mapping[str, int] = {}
        self._taken = Counter[str]()
        self._known: dict[bytes, str] = {}  # names, by keys
        self._is_open = False

    def open(self) -> None:
        """Serve sites from now on; until then they are told to come again, since a SuperNode that is refused ends."""
        self._is_open = True

    def admit(self, name: str, public_key: bytes) -> None:
        """Let a site in, by its key for Flower as PEM; requests that it has not signed are not read."""
        others = {key: known for key, known in self._known.items() if known != name}
        self._known = {**others, base64.b64encode(public_key): name}  # at once: a SuperNode that is refused ends

    def dismiss(self, name: str) -> None:
        """Let a site in no more."""
        self._known = {key: known for key, known in self._known.items() if known != name}

    def expect(self, most: Mapping[str, int]) -> None:
        """Take so many bytes of each site from now on that Flower writes to its database, by the site's name."""
        self._most, self._taken = most, Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, as ASGI asks for."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await _refuse(send, 404)
            return
        headers = dict(reversed(scope["headers"]))  # of two with one name, Flower reads the first
        site = self._known.get(headers.get(_KEY, b""))
        if site is None or not _is_signed(headers):
            await _refuse(send, 401 if self._is_open else 503)
            return
        taken, kept = self._taken, scope["path"] in (_PUSH_OBJECT, _PUSH_MESSAGES)
        most = LARGEST_REQUEST if scope["path"] == _PUSH_OBJECT else LARGEST_MESSAGE
        left = self._most.get(site, LARGEST_REQUEST) if kept else most
        body = await _whole(receive, most, left, taken if kept else Counter(), site)
        if body is None:
            await _refuse(send, 413)
            return
        if scope["path"] == _PUSH_MESSAGES and not _is_reply(body):
            await _refuse(send, 400)
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Any:
            return next(given, None) or await receive()

        async def noted(message: Any) -> None:
            if kept and message["type"] == "http.response.start" and message["status"] != 200:
                taken[site] -= len(body)  # Flower has not written it
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


def _is_signed(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a request's head was signed just now with the key that it names, as Flower looks for later."""
    try:
        stamp, signature = headers[_TIME].decode("ascii"), base64.b64decode(headers[_SIGNATURE], validate=True)
        age = (now() - datetime.fromisoformat(stamp)).total_seconds()
        key = bytes_to_public_key(base64.b64decode(headers[_KEY], validate=True))
    except (KeyError, ValueError, TypeError):
        return False
    in_time = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    return in_time and bool(verify_signature(key, stamp.encode("ascii"), signature))


def _is_reply(body: bytes) -> bool:
    """Return whether a message is a site's own answer; Flower would pass on one to other sites as the coordinator's."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    abouts = [message.metadata for message in request.messages_list]
    own = [about for about in abouts if about.reply_to_message_id and about.src_node_id == request.node.node_id]
    return len(own) == len(abouts) == len(request.message_object_trees) == 1


async def _whole(receive: Any, most: int, left: int, taken: Counter[str], site: str) -> bytes | None:
    """Return the body of a request, counted while it comes; None where it is too large, too slow, or was broken off.

    Args:
        receive: gives its pieces, as ASGI has them.
        most: bytes that it may have.
        left: bytes that the site's requests may have together.
        taken: bytes of each site that have come, those of this request included from now on.
        site: whose it is.
    """
    parts, length = list[bytes](), 0
    try:
        async with asyncio.timeout(SLOWEST_REQUEST):
            while True:
                message = await receive()
                parts.append(message.get("body", b""))
                length += len(parts[-1])
                taken[site] += len(parts[-1])
                if message["type"] != "http.request" or length > most or taken[site] > left:
                    break
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        pass
    taken[site] -= length
    return None


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
