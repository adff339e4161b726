"""The messages of secure aggregation as fields and arrays of bytes, for ``exchange.codec``.

Values of one size stand below each other in one array, in the order of the names in the fields.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bellwether.exchange.adapter import Arrays
from bellwether.exchange.masks import KEY, SEALED, SIGNATURE
from bellwether.exchange.messages import (
    Announced,
    AnnounceTask,
    Dealt,
    Masking,
    Revealed,
    SecureTask,
    ShareTask,
    UnmaskTask,
)
from bellwether.recipe.recipe import SecureAggregation
from bellwether.tools.json_text import KEPT, Amount, Count, typed
from bellwether.tools.randomness import Draws
from bellwether.tools.shamir import BYTES

SecureKind = Literal["announce", "share", "unmask"]
SECURE_KINDS = ("announce", "share", "unmask")

_KEYS, _SHARES, _SEEDS = "keys", "shares", "seeds"
_Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Names = Annotated[tuple[Annotated[str, Field(max_length=1000)], ...], Field(max_length=100_000)]


@dataclass(frozen=True)
class _AnnounceFields:
    """An ``AnnounceTask``."""

    __pydantic_config__ = KEPT

    round: Count
    cohort: Count
    settings: SecureAggregation
    draws: dict[str, _Seed]


@dataclass(frozen=True)
class _NamedFields:
    """A ``ShareTask`` or an ``UnmaskTask``, without what stands below each other."""

    __pydantic_config__ = KEPT

    round: Count
    names: _Names


@dataclass(frozen=True)
class _MaskingFields:
    """A ``Masking``, likewise."""

    __pydantic_config__ = KEPT

    names: _Names
    max_rows: Count
    max_norm: Amount


@dataclass(frozen=True)
class SecuredFields:
    """What of an answer names whom each value is for, or of."""

    __pydantic_config__ = KEPT

    names: _Names = ()
    gone: _Names = ()


def secure_kind(task: SecureTask) -> SecureKind:
    """Return the kind of a task."""
    return "announce" if isinstance(task, AnnounceTask) else "share" if isinstance(task, ShareTask) else "unmask"


def task_parts(task: SecureTask) -> tuple[dict[str, Any], Arrays]:
    """Return fields and arrays of a task."""
    if isinstance(task, AnnounceTask):
        settings = task.settings.model_dump(mode="json")
        return {"round": task.round, "cohort": task.cohort, "settings": settings, "draws": dict(task.draws.seeds)}, {}
    if isinstance(task, UnmaskTask):
        return {"round": task.round, "names": list(task.survivors)}, {}
    return {"round": task.round, "names": list(task.keys)}, {_KEYS: _joined(task.keys)}


def task_of(kind: str, fields: Mapping[str, Any], arrays: Arrays) -> SecureTask:
    """Return the task behind ``task_parts``.

    Raises:
        ValueError: it is none.
    """
    if kind == "announce":
        asked: _AnnounceFields = typed(fields, _AnnounceFields)
        return AnnounceTask(asked.round, asked.cohort, asked.settings, Draws(asked.draws))
    named: _NamedFields = typed(fields, _NamedFields)
    if kind == "unmask":
        return UnmaskTask(named.round, named.names)
    return ShareTask(named.round, _announced(named.names, arrays.get(_KEYS)))


def masking_parts(masking: Masking) -> tuple[dict[str, Any], Arrays]:
    """Return fields and arrays of how an update is to be masked."""
    limits = {"max_rows": masking.max_rows, "max_norm": masking.max_norm}
    return {"names": list(masking.shares), **limits}, {_SHARES: _below(masking.shares, SEALED)}


def masking_of(fields: Any, arrays: Arrays) -> Masking:
    """Return what stands behind ``masking_parts``.

    Raises:
        ValueError: nothing does.
    """
    found: _MaskingFields = typed(fields, _MaskingFields)
    return Masking(_by_name(found.names, arrays.get(_SHARES), SEALED), found.max_rows, found.max_norm)


def secured_parts(secured: Announced | Dealt | Revealed) -> tuple[dict[str, Any], Arrays]:
    """Return fields and arrays of an answer."""
    if isinstance(secured, Announced):
        return {}, {_KEYS: _joined({"": secured})}
    if isinstance(secured, Dealt):
        return {"names": list(secured.shares)}, {_SHARES: _below(secured.shares, SEALED)}
    arrays = {_SEEDS: _below(secured.seeds, BYTES), _KEYS: _below(secured.keys, BYTES)}
    return {"names": list(secured.seeds), "gone": list(secured.keys)}, arrays


def secured_of(kind: str, fields: SecuredFields, arrays: Arrays) -> Announced | Dealt | Revealed:
    """Return the answer behind ``secured_parts``.

    Raises:
        ValueError: there is none.
    """
    if kind == "announce":
        return _announced(("",), arrays.get(_KEYS))[""]
    if kind == "share":
        return Dealt(_by_name(fields.names, arrays.get(_SHARES), SEALED))
    keys = _by_name(fields.gone, arrays.get(_KEYS), BYTES)
    return Revealed(_by_name(fields.names, arrays.get(_SEEDS), BYTES), keys)


def _joined(announced: Mapping[str, Announced]) -> NDArray[np.uint8]:
    """Return keys of clients below each other, all signed or none."""
    rows = {name: one.sealing + one.masking + one.pledge + one.signature for name, one in announced.items()}
    return _below(rows, 3 * KEY + (SIGNATURE if any(one.signature for one in announced.values()) else 0))


def _announced(names: Sequence[str], array: NDArray[Any] | None) -> dict[str, Announced]:
    """Return the keys behind ``_joined``.

    Raises:
        ValueError: they are not as many as the names, or of another size.
    """
    wide = array is not None and array.shape[1:] == (3 * KEY + SIGNATURE,)
    rows = _by_name(names, array, 3 * KEY + (SIGNATURE if wide else 0))
    ends = (0, KEY, 2 * KEY, 3 * KEY, None)
    return {name: Announced(*(row[a:b] for a, b in itertools.pairwise(ends))) for name, row in rows.items()}


def _below(values: Mapping[str, bytes], size: int) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(values.values()), np.uint8).reshape(len(values), size)


def _by_name(names: Sequence[str], array: NDArray[Any] | None, size: int) -> dict[str, bytes]:
    if array is None or array.dtype != np.uint8 or array.shape != (len(names), size):
        raise ValueError("its values are not as many as its names, or of another size")
    if len(set(names)) != len(names):
        raise ValueError("a name is there twice")
    return {name: row.tobytes() for name, row in zip(names, array, strict=True)}
