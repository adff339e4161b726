"""A message of bellwether's as Flower's records, whose arrays are never interpreted here."""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Before anything of Flower's.
import bellwether.engine.flower.quiet  # noqa: F401

# isort: split
import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

from bellwether.exchange.seal import Parcel

# What Flower itself is asked over HTTP, and may fail in; the last is told of a disk that is full, too.
LINK_ERRORS = (httpx.HTTPError, FlowerError, OSError, ObjectPullError, ObjectPushError)

LONGEST_REASON = 300  # characters of why there is no answer, which any site may send unsigned

_ACQUIRE = {"/flwr.proto.Runtime/AcquireTask"}

_FAILURES = {
    2: "its process failed",
    3: "its answer did not come whole",
    4: "its answer came too late",
    5: "its site is not connected any more",
    8: "its site's process is gone",
}


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


def record_of(parcel: Parcel) -> RecordDict:
    """Return a message as Flower's records: small parts, and one flat array of bytes."""
    small = {"header": parcel.header, "signature": parcel.signature, "manifest": parcel.manifest}
    record = RecordDict({"parcel": ConfigRecord(small)})
    if parcel.body:
        record["body"] = ArrayRecord({"flat": Array("uint8", (len(parcel.body),), "bytes", parcel.body)})
    return record


def parcel_of(message: Message) -> Parcel | None:
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


def arrived(message: Message) -> Arrived:
    """Return what came of a message."""
    about = message.metadata.reply_to_message_id
    if message.has_error():
        said = "".join(character for character in message.error.reason if character.isprintable())
        return Arrived(about, failure=_FAILURES.get(message.error.code, f"Flower says: {said[:LONGEST_REASON]}"))
    parcel = parcel_of(message)
    return Arrived(about, parcel, "" if parcel is not None else "it sent no parcel")


class TooLarge(Exception):
    """Objects have more bytes than are taken."""


def pulled(numbers: Sequence[str], pull: Callable[[str], bytes], most: int) -> dict[str, bytes]:
    """Return objects of Flower's by their numbers, once they are there, and no more than so many bytes of them.

    Args:
        numbers: of the objects.
        pull: fetches one, as Flower asks for.
        most: bytes that all of them may have.

    Raises:
        TooLarge: they have more.
    """
    taken, lock = 0, threading.Lock()

    def counted(number: str) -> bytes:
        nonlocal taken
        content = pull(number)
        with lock:
            taken += len(content)
            if taken > most:
                raise TooLarge
        return content

    found: dict[str, bytes] = pull_objects(
        list(numbers),
        pull_object_fn=counted,
        initial_backoff=0.2,
        backoff_cap=5.0,  # seconds
    )
    return found


class Owner:
    """Shows with each request that it comes from whoever has the secret of an inner port, see ``gate.ForOwner``.

    Args:
        secret: the inner port's.
    """

    def __init__(self, secret: bytes) -> None:
        self._shown = owners_word(secret)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the word to a request, as Flower's clients ask for."""
        context.request.headers["authorization"] = self._shown
        return call_next(context)


def owners_word(secret: bytes) -> str:
    """Return what is shown to an inner port; the secret cannot be had from it, since a site shows it without TLS."""
    return f"Bearer {hmac.digest(secret, b'bellwether inner port', hashlib.sha256).hex()}"


def runtime_client(address: str, secret: bytes, token: str = "", authority: bytes | None = None) -> RuntimeHttpClient:
    """Return a client of the interface for tasks, which is authorised by the secret, or by it and a task's token."""
    name = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    own = (
        RuntimeTokenHttpInterceptor(token)
        if token
        else SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE)
    )
    return RuntimeHttpClient.from_server_address(address, authority is None, authority, [Owner(secret), name, own])


def heartbeat(client: RuntimeHttpClient) -> HeartbeatSender:
    """Return what tells Flower from now and then that a task is being worked at, once it is started.

    Where Flower has given the task up (this machine slept for a minute, say), its own function for that interrupts the
    whole process, or ends its thread by a traceback; here nothing happens, and whoever next asks for the task is told.

    Args:
        client: of the task.
    """

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False  # it is tried again
        except httpx.HTTPStatusError:
            return True
        return True

    return HeartbeatSender(beat)
