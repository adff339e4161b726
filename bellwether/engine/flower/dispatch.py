"""The coordinator's end of Flower's messages, as a server app has it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

# Before anything of Flower's.
import bellwether.engine.flower.quiet  # noqa: F401

# isort: split
from flwr.app import Message
from flwr.common.serde import run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from bellwether.engine.certificate import Certificate
from bellwether.engine.flower.records import (
    LINK_ERRORS,
    Arrived,
    TooLarge,
    arrived,
    heartbeat,
    pulled,
    record_of,
    runtime_client,
)
from bellwether.errors import FederationError, first_line
from bellwether.exchange.seal import Parcel

SHELL = 2**16  # bytes, and one of a hundred beside, by which Flower's objects are larger than what is in them
PAUSES = 0.2, 1.0, 5.0  # seconds after which the SuperLink in this process, which may be busy, is asked again

T = TypeVar("T")


class Dispatch:
    """Sends messages to sites and picks up what they answer, as Flower's server app does.

    Args:
        address: the SuperLink's inner port.
        inner: its certificate.
        secret: the inner port's.
        token: Flower's, for the one task.
    """

    def __init__(self, address: str, inner: Certificate, secret: bytes, token: str) -> None:
        self._grid = HttpGrid(address, False, token=token)
        # Its own would show no secret, and interrupt this process where a task is not its own any more.
        self._client = runtime_client(address, secret, token, inner.authority.read_bytes())
        self._grid._client = self._client
        self._beat = heartbeat(self._client)
        self._beat.start()
        given = self._client.PullTaskInput(PullTaskInputRequest())
        self._identity = given.task_id, given.run.run_id, given.context.node_id
        self._context = given.context
        self._grid.set_run(run_from_proto(given.run))
        self._coming: set[str] = set()
        self._most: dict[str, int] = {}  # bytes of an answer's objects, by message
        self._come: queue.SimpleQueue[Arrived] = queue.SimpleQueue()

    def online(self) -> Mapping[str, int]:
        """Return Flower's numbers of the sites whose SuperNodes have been heard of lately, by name."""
        return _tried(lambda: {node.name: node.node_id for node in self._grid.get_nodes()})

    def send(self, node: int, parcel: Parcel, seconds: float, most: int) -> str | None:
        """Send a message to a site; return its identifier, or None where Flower does not take it.

        Args:
            node: Flower's number of the site.
            parcel: the message.
            seconds: how long it is worth delivering.
            most: bytes that its answer may have.
        """
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self._identity  # Message() reads them
        message = Message(record_of(parcel), dst_node_id=node, message_type="train", ttl=seconds)
        number = _tried(lambda: next(iter(self._grid.push_messages([message])), None))
        if number is not None:
            self._most[number] = most + most // 100 + SHELL
        return number

    def arrived(self, messages: Sequence[str]) -> list[Arrived]:
        """Return what has come of messages, whole; nothing of those whose answer is awaited or on its way."""
        asked = [message for message in messages if message not in self._coming]
        if asked:
            found = _tried(lambda: self._client.PullMessages(PullAppMessagesRequest(message_ids=asked)))
            for about, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                message = about.metadata.reply_to_message_id
                self._coming.add(message)
                # Flower tells of an answer before it is there as a whole; nobody else waits for it meanwhile.
                given = about, tree, self._most[message]
                threading.Thread(target=self._fetch, args=given, daemon=True).start()
        come: list[Arrived] = []
        with contextlib.suppress(queue.Empty):
            while True:
                come.append(self._come.get_nowait())
        self._coming -= {one.message for one in come}
        for one in come:
            self._most.pop(one.message, None)
        return [one for one in come if one.message in messages]

    def _fetch(self, about: Any, tree: Any, most: int) -> None:
        """Fetch the parts of an answer as they come, and put it among those that have come."""
        message, answer, run = about.metadata.reply_to_message_id, about.metadata.message_id, self._identity[1]
        received = ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=answer)
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._grid.node, run)
        try:
            numbers = [part.object_id for part in iterate_object_tree(tree)]
            parts = pulled(numbers, pull, most)
            self._client.ConfirmMessageReceived(received)
            self._come.put(replace(arrived(inflate_object_from_contents(answer, parts)), message=message))
        except TooLarge:
            with contextlib.suppress(*LINK_ERRORS):  # so that Flower keeps it no longer
                self._client.ConfirmMessageReceived(received)
            self._come.put(Arrived(message, failure=f"its answer has more than the {most} bytes that are taken"))
        except Exception as error:  # whatever a site has sent must not end this thread in silence
            self._come.put(Arrived(message, failure=f"its answer did not come whole ({type(error).__name__})"))

    def close(self) -> None:
        """End Flower's run."""
        if self._beat.is_running:  # after the end a beat would be refused
            self._beat.stop()
        with contextlib.suppress(*LINK_ERRORS):
            self._client.PushTaskOutput(
                PushTaskOutputRequest(context=self._context, sub_status="completed", details="")
            )
        self._grid.close()


@contextlib.contextmanager
def acquired(address: str, secret: bytes, kind: str, inner: Certificate) -> Iterator[str]:
    """Yield the token of a task that has just been made."""
    client = runtime_client(address, secret, authority=inner.authority.read_bytes())
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


def _tried(ask: Callable[[], T]) -> T:
    """Return what the SuperLink in this process answers, which may be busy for a moment.

    Raises:
        FederationError: it does not answer.
    """
    for seconds in PAUSES:
        with contextlib.suppress(*LINK_ERRORS):
            return ask()
        time.sleep(seconds)
    try:
        return ask()
    except LINK_ERRORS as error:
        raise FederationError(
            f"Flower's SuperLink does not answer ({first_line(error)}): see flower.log in the federation's folder, and "
            "whether the disk is full; finished rounds are kept, and the same command goes on."
        ) from error
