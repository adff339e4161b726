"""Communication compression: what a client is sent, and what it sends, in few bytes.

Down, the tensors that are trained travel in 8 or 4 bits, and the client begins with what it received, y. Those that are
not trained, such as FFA-LoRA's A, must be the same at all clients, and travel whole; so do a method's arrays and what
is folded. Up travels the change since y, and the server adds it to x, its own exact tensors, so that the way down adds
no error that stays; where whole tensors z come, it takes z - y of them. With error feedback (Seide et al. 2014;
Karimireddy et al. 2019, arXiv 1901.09847) the client keeps what it could not send, and adds it next time:

    d = z - y + e          z its trained tensors, e what was left of its last update that counted, 0 at first
    sent  C(d)             server: x + C(d)
    e ← d - C(d)           so that over a client's rounds Σ C(d) = Σ (z - y) - e
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bellwether.exchange.adapter import Tensors, flat
from bellwether.exchange.messages import Payload, Update
from bellwether.exchange.packing import Packed, pack, split, unpack
from bellwether.recipe.recipe import Compression

UP, DOWN = "compression", "compression down"  # what client and server draw for when they round


def compress_payload(payload: Payload, kind: str, draw: np.random.Generator) -> Payload:
    """Return what a client receives of a payload: its trained tensors as few bits tell them.

    Args:
        payload: as the server has it.
        kind: the recipe's ``compression.down``.
        draw: rounds at random.
    """
    tensors = payload.adapter.tensors
    keys = tuple(tensors) if payload.trained is None else payload.trained
    if kind == "none" or not keys:
        return payload
    values_P = flat(tensors, keys)
    packed = Packed(kind, keys, pack(values_P, kind, draw))
    received_P = unpack(packed.arrays, kind, len(values_P), values_P.dtype)
    received = split(received_P, {key: tensors[key] for key in keys})
    return replace(payload, adapter=payload.adapter.updated(received), packed=packed)


def compress_update(
    update: Update, payload: Payload, settings: Compression, left: Tensors, draw: np.random.Generator
) -> tuple[Update, dict[str, np.ndarray]]:
    """Return an update as it travels, and what is left to be sent with the next one.

    Args:
        update: a client's, whose tensors are those that the payload expects.
        payload: as the client received it.
        settings: the recipe's compression section.
        left: what the last update left, by key; empty at first, and without error feedback.
        draw: rounds at random.
    """
    sent = payload.expected
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused where it arrives
        change = {key: update.tensors[key] - value + left.get(key, 0) for key, value in sent.items()}
        change_P = flat(change, sent)
        packed = pack(change_P, settings.up, draw, settings.keep)
        rest = split(change_P - unpack(packed, settings.up, len(change_P), change_P.dtype), sent)
    return replace(update, tensors={}, packed=packed), {**left, **rest}
