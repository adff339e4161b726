"""The strict check of every reply of secure aggregation, and the bytes of what travels for it.

Whoever sends something else than what is due is left out, or, once its masks are in the sum, makes its round fail; a
wrong share of a secret is seen by the hash or key that its owner announced. A masked update looks like any other random
bytes: of it, size and form are all that the server can check, see ``bellwether.client.masking`` for what clients do.

Shape legend: P values of an update.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Tensors
from bellwether.exchange.checks import Shapes, brought, check_array, check_claims, check_names
from bellwether.exchange.masks import KEY, SEALED, SIGNATURE
from bellwether.exchange.messages import (
    MASKED,
    Announced,
    AnnounceTask,
    Dealt,
    Reply,
    Revealed,
    SecureTask,
    ShareTask,
    UnmaskTask,
    Update,
)
from bellwether.exchange.ring import size_of
from bellwether.exchange.sizes import array_bytes
from bellwether.tools.shamir import BYTES, PRIME

NUMBER = 8  # bytes of a cohort's size


def check_announced(reply: Reply) -> Announced:
    """Refuse an announcement without the keys that are due; return it.

    Args:
        reply: what the engine delivered.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    announced: Announced = brought(reply, reply.secured, Announced, "an announcement")
    for name in ("sealing", "masking", "pledge"):
        _check_bytes(f"its {name}", getattr(announced, name), KEY)
    if announced.signature != b"":
        _check_bytes("its signature", announced.signature, SIGNATURE)
    return announced


def check_dealt(reply: Reply, others: Collection[str]) -> Dealt:
    """Refuse sealed shares for others than those that are due, or of another size; return them.

    Args:
        reply: what the engine delivered.
        others: the clients that they must be for.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    dealt: Dealt = brought(reply, reply.secured, Dealt, "a deal of shares")
    _check_named("sealed shares", dealt.shares, others, SEALED)
    return dealt


def check_masked(reply: Reply, size: int, round: int, max_rows: int) -> Update:
    """Refuse an update that is not masked, or not of the size that is due; return it.

    Args:
        reply: what the engine delivered.
        size: how many values it must have.
        round: the round that is being closed.
        max_rows: rows that it may claim.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    update = check_claims(reply, round, max_rows)
    check_names("tensors", update.tensors, {})
    check_names("arrays", update.arrays, {})
    check_names("masked values", update.packed, {MASKED: None})
    check_array("its masked update", update.packed[MASKED], (size,), np.dtype(np.uint64))
    return update


def check_revealed(reply: Reply, survivors: Collection[str], gone: Collection[str]) -> Revealed:
    """Refuse shares of other secrets than those that are due, or that are none; return them.

    Args:
        reply: what the engine delivered.
        survivors: the clients of whose own seeds a share is due.
        gone: the clients of whose masking keys a share is due.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    revealed: Revealed = brought(reply, reply.secured, Revealed, "an opening of shares")
    for what, shares, due in (("seeds", revealed.seeds, survivors), ("keys", revealed.keys, gone)):
        _check_named(f"shares of {what}", shares, due, BYTES)
        if any(int.from_bytes(share, "big") >= PRIME for share in shares.values()):
            raise UpdateRejected(f"one of its shares of {what} is none")
    return revealed


def task_bytes_of(task: SecureTask) -> int:
    """Return the bytes of what a client is asked, as it travels: names, keys and shares."""
    if isinstance(task, ShareTask):
        return sum(len(name.encode()) + secured_bytes(one) for name, one in task.keys.items())
    if isinstance(task, UnmaskTask):
        return sum(len(name.encode()) for name in task.survivors)
    return NUMBER * isinstance(task, AnnounceTask)  # the size of the cohort


def named_bytes(values: Any) -> int:
    """Return the bytes of values by name; of what is none, nothing."""
    if not isinstance(values, Mapping):
        return 0
    pairs = [(name, value) for name, value in values.items() if isinstance(name, str) and isinstance(value, bytes)]
    return sum(len(name.encode(errors="replace")) + len(value) for name, value in pairs)


def secured_bytes(secured: Any) -> int:
    """Return the bytes of what a client sent, also where it must be refused."""
    if not isinstance(secured, Announced | Dealt | Revealed):
        return 0
    parts = [getattr(secured, field.name) for field in fields(secured)]
    return sum(len(part) if isinstance(part, bytes) else named_bytes(part) for part in parts)


def masked_bytes(expected: Tensors, arrays: Shapes) -> int:
    """Return the bytes of a masked update.

    Args:
        expected: the tensors that it tells of.
        arrays: the shapes of arrays beside them, by name.
    """
    return array_bytes({MASKED: np.broadcast_to(np.uint64(0), (size_of(expected, arrays),))})


def agreement_bytes(clients: int, name: float) -> tuple[float, float]:
    """Return the bytes down and up, beside adapters and updates, of a round in which nobody falls away.

    Args:
        clients: of the cohort.
        name: bytes of a client's name, in the mean.
    """
    others, keys = clients - 1, 3 * KEY
    down = NUMBER + clients * (name + keys) + others * (name + SEALED) + clients * name
    return clients * down, clients * (keys + others * (name + SEALED) + clients * (name + BYTES))


def _check_named(what: str, sent: Any, due: Collection[str], size: int) -> None:
    """Refuse all but bytes of one size under the names that are due."""
    check_names(what, sent, dict.fromkeys(due))
    for name, value in sent.items():
        _check_bytes(f"one of its {what} ({name[:60]})", value, size)


def _check_bytes(what: str, value: Any, size: int) -> None:
    if type(value) is not bytes or len(value) != size:
        length = f"{len(value)} bytes" if type(value) is bytes else type(value).__name__
        raise UpdateRejected(f"{what} is {length}, where {size} bytes are due")
