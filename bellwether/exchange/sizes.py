"""How many bytes messages take on the way: their values, and name and shape of each.

All tensors of a message count as one flat array with a description, since with Flower the number of tensors, not their
size, decides how long a message takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from bellwether.exchange.adapter import Arrays, Tensors
from bellwether.exchange.checks import LONGEST_NAME, Shapes, shown
from bellwether.exchange.messages import Payload, Reply, SurveyTask, TrainTask
from bellwether.exchange.packing import forms
from bellwether.recipe.recipe import Compression


def payload_bytes(payload: Payload) -> int:
    """Return the bytes of what a client is sent, as it travels."""
    folded = payload.folded.tensors if payload.folded is not None else {}
    packed = payload.packed.arrays if payload.packed is not None else {}
    beside = sum(array_bytes(arrays) for arrays in (folded, packed) if arrays)
    return array_bytes({**payload.whole, **payload.arrays}) + beside


def due_bytes(expected: Tensors, arrays: Shapes, settings: Compression) -> int:
    """Return the bytes of an update that is as it shall be.

    Args:
        expected: the tensors that it tells of.
        arrays: the shapes of float32 arrays beside them, by name.
        settings: the recipe's compression section, which says how they come.
    """
    beside = {name: np.broadcast_to(np.float32(0), shape) for name, shape in arrays.items()}
    if settings.up == "none" or not expected:
        return array_bytes({**expected, **beside}) if expected or beside else 0
    due = forms(settings.up, sum(value.size for value in expected.values()), settings.keep)
    packed = {name: np.broadcast_to(dtype.type(0), shape) for name, (dtype, shape) in due.items()}
    return array_bytes(packed) + (array_bytes(beside) if beside else 0)


def task_bytes(task: TrainTask | SurveyTask, reply: Reply) -> int:
    """Return the bytes that a client was sent: those that travelled, else those of the payload."""
    if reply.bytes_down is not None:
        return reply.bytes_down
    return payload_bytes(task.payload) if reply.reached and task.payload is not None else 0


def update_bytes(update: Any) -> int:
    """Return the bytes of what a client sent, also where it must be refused: of all that are arrays, they travelled."""
    parts = [getattr(update, name, None) for name in ("tensors", "arrays", "packed")]
    named = [
        {
            key[:LONGEST_NAME] if isinstance(key, str) else shown(key): value
            for key, value in part.items()
            if type(value) is np.ndarray
        }
        if isinstance(part, Mapping)
        else {}
        for part in parts
    ]
    together = ({**named[0], **named[1]}, named[2])
    return sum(array_bytes(arrays) for arrays in together if arrays)


def array_bytes(arrays: Arrays) -> int:
    """Return the bytes that arrays take on the way: their values, and name and shape of each."""
    description = json.dumps([(key, arrays[key].shape) for key in sorted(arrays)]).encode()
    return sum(int(value.nbytes) for value in arrays.values()) + len(description)
