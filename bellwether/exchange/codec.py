"""Tasks and replies as bytes: one flat array of all values, and a manifest that says what stands where in it.

    manifest   JSON: the kind of message, its fields, and for each array its part, name, precision and shape
    body       the values of all arrays in that order, little-endian, without gaps

With Flower the number of arrays, not their size, decides how long a message takes; so a message has one. What a
manifest claims is compared with the body's length before memory is taken for any array. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bellwether.errors import UpdateRejected, first_line
from bellwether.exchange.adapter import Adapter, AdapterConfig, Arrays
from bellwether.exchange.checks import LONGEST_NAME, MOST_NAMES, check_packed
from bellwether.exchange.messages import (
    EvaluateTask,
    Payload,
    Reply,
    SecureTask,
    Survey,
    SurveyTask,
    Task,
    TrainTask,
    Update,
)
from bellwether.exchange.packing import Packed, split, unpack
from bellwether.exchange.scores import Totals
from bellwether.exchange.secure_codec import (
    SECURE_KINDS,
    SecuredFields,
    masking_of,
    masking_parts,
    secure_kind,
    secured_of,
    secured_parts,
    task_of,
    task_parts,
)
from bellwether.recipe.recipe import Compression, Evaluation, Privacy, Selection, Training
from bellwether.tools.json_text import KEPT, Count, Number, from_json, plain, typed
from bellwether.tools.randomness import Draws

Kind = Literal["train", "survey", "evaluate", "announce", "share", "unmask"]

LONGEST_MANIFEST = 2**22  # bytes; 10,000 arrays and 1,000 categories stay below it
MOST_ARRAYS = 20_000
MOST_DIMENSIONS = 8

# The parts of a message that arrays belong to.
ADAPTER, ARRAYS, FOLDED, TENSORS, CENTROIDS = "adapter", "arrays", "folded", "tensors", "centroids"
PACKED, SECURED = "packed", "secured"

_Precision = Literal["float16", "float32", "float64", "uint8", "uint32", "uint64"]
_Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Name = Annotated[str, Field(max_length=1000)]
_Shape = Annotated[tuple[Count, ...], Field(max_length=MOST_DIMENSIONS)]


@dataclass(frozen=True)
class _Array:
    """An array in the body."""

    __pydantic_config__ = KEPT

    part: Literal["adapter", "arrays", "folded", "tensors", "centroids", "packed", "secured"]
    name: _Name
    precision: _Precision
    shape: _Shape

    @property
    def bytes(self) -> int:
        """How many bytes its values take."""
        return math.prod(self.shape) * np.dtype(self.precision).itemsize


@dataclass(frozen=True)
class _Manifest:
    """What a message holds."""

    __pydantic_config__ = KEPT

    kind: Kind
    fields: dict[str, Any]
    arrays: Annotated[list[_Array], Field(max_length=MOST_ARRAYS)]


@dataclass(frozen=True)
class _PackedFields:
    """What of an adapter travels packed, without its arrays: keys of all tensors, shapes of those packed."""

    __pydantic_config__ = KEPT

    kind: Literal["8bit", "4bit"]
    keys: tuple[_Name, ...]
    shapes: dict[_Name, _Shape | None]


@dataclass(frozen=True)
class _PayloadFields:
    """A payload without its arrays."""

    __pydantic_config__ = KEPT

    config: AdapterConfig
    trained: tuple[str, ...] | None
    returned: tuple[str, ...] | None
    folded: AdapterConfig | None
    packed: _PackedFields | None = None


@dataclass(frozen=True)
class _TrainFields:
    """A ``TrainTask`` without its arrays."""

    __pydantic_config__ = KEPT

    round: Count
    payload: _PayloadFields
    training: Training
    rounds: Count
    draws: dict[str, _Seed]
    selection: Selection
    kept: list[Count] | None
    settled: Count
    certain: Count
    compression: Compression
    privacy: Privacy
    masking: dict[str, Any] | None = None


@dataclass(frozen=True)
class _SurveyFields:
    """A ``SurveyTask`` without its arrays."""

    __pydantic_config__ = KEPT

    round: Count
    payload: _PayloadFields | None
    selection: Selection
    draws: dict[str, _Seed]


@dataclass(frozen=True)
class _EvaluateFields:
    """An ``EvaluateTask`` without its arrays."""

    __pydantic_config__ = KEPT

    round: Count
    payload: _PayloadFields
    evaluation: Evaluation
    settled: Count
    shared: bool


@dataclass(frozen=True)
class _ReplyFields:
    """A ``Reply`` without its arrays; who sends it, and for which round, its seal says."""

    __pydantic_config__ = KEPT

    failure: Annotated[str, Field(max_length=1000)] | None = None
    rows: Annotated[int, Field(strict=True)] | None = None
    metrics: Annotated[dict[_Name, Number], Field(max_length=MOST_NAMES)] | None = None
    totals: Annotated[dict[_Name, Totals], Field(max_length=MOST_NAMES)] | None = None
    groups: Annotated[dict[_Name, Totals], Field(max_length=MOST_NAMES)] | None = None
    secured: SecuredFields | None = None


def kind_of(task: Task) -> Kind:
    """Return the kind of a task."""
    if isinstance(task, SecureTask):
        return secure_kind(task)
    return "train" if isinstance(task, TrainTask) else "survey" if isinstance(task, SurveyTask) else "evaluate"


def encode_task(task: Task) -> tuple[bytes, bytes]:
    """Return manifest and body of a task."""
    if isinstance(task, SecureTask):
        asked, secured = task_parts(task)
        return _encode(kind_of(task), asked, {SECURED: secured})
    payload, beside = task.payload, dict[str, Arrays]()
    fields: dict[str, Any] = {"round": task.round, "payload": None if payload is None else _payload_fields(payload)}
    if isinstance(task, TrainTask):
        fields |= {"training": task.training.model_dump(mode="json"), "rounds": task.rounds}
        fields |= {"kept": None if task.kept is None else list(task.kept)}
        fields |= {"settled": task.settled, "certain": task.certain}
        fields |= {"compression": task.compression.model_dump(mode="json")}
        fields |= {"privacy": task.privacy.model_dump(mode="json")}
        if task.masking is not None:
            fields["masking"], beside[SECURED] = masking_parts(task.masking)
    if isinstance(task, TrainTask | SurveyTask):
        fields |= {"selection": task.selection.model_dump(mode="json"), "draws": dict(task.draws.seeds)}
    else:
        fields |= {"evaluation": task.evaluation.model_dump(mode="json")}
        fields |= {"settled": task.settled, "shared": task.shared}
    return _encode(kind_of(task), fields, {**({} if payload is None else _payload_arrays(payload)), **beside})


def decode_task(manifest: bytes, body: bytes) -> Task:
    """Return the task behind manifest and body.

    Raises:
        UpdateRejected: they hold none, as one clause.
    """
    try:
        head, arrays = _decode(manifest, body)
        if head.kind in SECURE_KINDS:
            return task_of(head.kind, head.fields, arrays.get(SECURED, {}))
        if head.kind == "train":
            fields: _TrainFields = typed(head.fields, _TrainFields)
            return TrainTask(
                fields.round,
                _payload(fields.payload, arrays),
                fields.training,
                fields.rounds,
                Draws(fields.draws),
                fields.selection,
                fields.kept,
                fields.settled,
                fields.certain,
                fields.compression,
                fields.privacy,
                None if fields.masking is None else masking_of(fields.masking, arrays.get(SECURED, {})),
            )
        if head.kind == "survey":
            asked: _SurveyFields = typed(head.fields, _SurveyFields)
            payload = None if asked.payload is None else _payload(asked.payload, arrays)
            return SurveyTask(asked.round, payload, asked.selection, Draws(asked.draws))
        scored: _EvaluateFields = typed(head.fields, _EvaluateFields)
        payload = _payload(scored.payload, arrays)
        return EvaluateTask(scored.round, payload, scored.evaluation, scored.settled, scored.shared)
    except ValueError as error:
        raise UpdateRejected(f"the task cannot be read ({first_line(error)})") from error


def encode_reply(reply: Reply, kind: Kind) -> tuple[bytes, bytes]:
    """Return manifest and body of a reply; losses of single steps, and the client's own clock, stay at the client."""
    fields: dict[str, Any] = {"failure": reply.failure and reply.failure[:1000]}
    arrays: dict[str, Arrays] = {}
    if reply.update is not None:
        fields |= {"rows": reply.update.rows, "metrics": plain(reply.update.metrics)}
        arrays = {TENSORS: reply.update.tensors, ARRAYS: reply.update.arrays, PACKED: reply.update.packed}
    if reply.survey is not None:
        arrays = {CENTROIDS: {"": reply.survey.centroids_Cd}}
    if reply.secured is not None:
        fields["secured"], arrays[SECURED] = secured_parts(reply.secured)
    if reply.totals is not None:
        fields |= {"totals": plain(reply.totals), "groups": plain(reply.groups)}
    return _encode(kind, fields, arrays)


def decode_reply(manifest: bytes, body: bytes, kind: Kind, client: str, round: int, seconds: float) -> Reply:
    """Return the reply behind manifest and body, still to be checked as that of any client.

    Args:
        manifest: what a site sent.
        body: what a site sent.
        kind: what the client was asked.
        client: who was asked.
        round: for which round.
        seconds: how long it took, by the clock of the one who asked.

    Raises:
        UpdateRejected: they hold no reply, as one clause.
    """
    try:
        head, arrays = _decode(manifest, body)
        if head.kind != kind:
            raise ValueError(f"it answers {head.kind}, where {kind} was asked")
        fields: _ReplyFields = typed(head.fields, _ReplyFields)
        named = fields.secured if kind in SECURE_KINDS else None
        secured = None if named is None else secured_of(kind, named, arrays.get(SECURED, {}))
    except ValueError as error:
        raise UpdateRejected(f"its message cannot be read ({first_line(error)})") from error
    update = survey = None
    if kind == "train" and fields.rows is not None:
        tensors, more = arrays.get(TENSORS, {}), arrays.get(ARRAYS, {})
        packed = arrays.get(PACKED, {})
        update = Update(client, round, tensors, fields.rows, fields.metrics or {}, more, packed)
    if kind == "survey" and "" in arrays.get(CENTROIDS, {}):
        survey = Survey(client, round, arrays[CENTROIDS][""])
    totals = fields.totals if kind == "evaluate" else None
    groups = fields.groups or {}
    return Reply(client, seconds, update, totals, fields.failure, groups=groups, survey=survey, secured=secured)


def _encode(kind: Kind, fields: Mapping[str, Any], parts: Mapping[str, Arrays]) -> tuple[bytes, bytes]:
    """Return manifest and body of a message."""
    arrays = [(part, name, np.asarray(value)) for part, named in parts.items() for name, value in named.items()]
    listed = [[part, name, value.dtype.name, list(value.shape)] for part, name, value in arrays]
    manifest = json.dumps({"kind": kind, "fields": fields, "arrays": listed}, allow_nan=False, separators=(",", ":"))
    return manifest.encode(), b"".join(_little_endian(value) for _, _, value in arrays)


def _little_endian(value: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()


def _decode(manifest: bytes, body: bytes) -> tuple[_Manifest, dict[str, dict[str, NDArray[Any]]]]:
    """Return what a message holds, and its arrays by part and name.

    Raises:
        ValueError: the manifest is none, or is not that of the body.
    """
    if len(manifest) > LONGEST_MANIFEST:
        raise ValueError(f"its manifest has {len(manifest)} bytes, where {LONGEST_MANIFEST} are taken")
    value = typed(from_json(manifest), dict[str, Any])
    listed = typed(value.get("arrays"), Annotated[list[list[Any]], Field(max_length=MOST_ARRAYS)])
    if any(len(one) != 4 for one in listed):
        raise ValueError("an array has not part, name, precision and shape")
    rows = [dict(zip(("part", "name", "precision", "shape"), one, strict=True)) for one in listed]
    head: _Manifest = typed({**value, "arrays": rows}, _Manifest)
    claimed = sum(one.bytes for one in head.arrays)
    if claimed != len(body):
        raise ValueError(f"its manifest claims {claimed} bytes of arrays, and {len(body)} came")
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    for one, values in zip(head.arrays, _cut(head.arrays, body), strict=True):
        named = arrays.setdefault(one.part, {})
        if one.name in named:
            raise ValueError(f"the array {one.name[:LONGEST_NAME]!r} is there twice")
        named[one.name] = values
    return head, arrays


def _cut(arrays: Sequence[_Array], body: bytes) -> Iterator[NDArray[Any]]:
    """Yield the arrays of a body, each with memory of its own, in this machine's order of bytes."""
    begin = 0
    for one in arrays:
        stored = np.dtype(one.precision).newbyteorder("<")
        values = np.frombuffer(body, stored, math.prod(one.shape), begin) if one.bytes else np.empty(0, stored)
        yield values.reshape(one.shape).astype(np.dtype(one.precision))
        begin += one.bytes


def _payload_fields(payload: Payload) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "config": plain(payload.adapter.config),
        "trained": plain(payload.trained),
        "returned": plain(payload.returned),
        "folded": None if payload.folded is None else plain(payload.folded.config),
    }
    if payload.packed is not None:
        kind, keys = payload.packed.kind, payload.packed.keys
        shapes = {key: list(one.shape) if key in keys else None for key, one in payload.adapter.tensors.items()}
        fields |= {"packed": {"kind": kind, "keys": list(keys), "shapes": shapes}}
    return fields


def _payload_arrays(payload: Payload) -> dict[str, Arrays]:
    folded = {} if payload.folded is None else payload.folded.tensors
    packed = {} if payload.packed is None else payload.packed.arrays
    return {ADAPTER: payload.whole, ARRAYS: payload.arrays, FOLDED: folded, PACKED: packed}


def _payload(fields: _PayloadFields, arrays: Mapping[str, Arrays]) -> Payload:
    packed = None
    tensors = arrays.get(ADAPTER, {})
    if fields.packed is not None:
        packed = Packed(fields.packed.kind, fields.packed.keys, arrays.get(PACKED, {}))
        tensors = _received(fields.packed, packed, tensors)
    adapter = Adapter(fields.config, tensors)
    unknown = {*(fields.trained or ()), *(fields.returned or ())} - adapter.tensors.keys()
    if not adapter.tensors or unknown:
        raise ValueError("its adapter has not the tensors that it names")
    folded = None if fields.folded is None else Adapter(fields.folded, arrays.get(FOLDED, {}))
    return Payload(adapter, arrays.get(ARRAYS, {}), fields.trained, fields.returned, folded, packed)


def _received(fields: _PackedFields, packed: Packed, whole: Arrays) -> dict[str, NDArray[Any]]:
    """Return all tensors of an adapter of which some came packed, in its order."""
    shapes = {key: shape for key, shape in fields.shapes.items() if shape is not None}
    if sorted(packed.keys) != sorted(shapes) or fields.shapes.keys() - shapes.keys() != whole.keys():
        raise ValueError("its packed tensors are not those that it names")
    size = sum(math.prod(shape) for shape in shapes.values())
    check_packed(packed.arrays, packed.kind, size)  # before memory is taken for what the shapes claim
    like = {key: np.broadcast_to(np.float32(0), shapes[key]) for key in packed.keys}
    found = split(unpack(packed.arrays, packed.kind, size, np.dtype(np.float32)), like)
    return {key: found[key] if key in found else whole[key] for key in fields.shapes}
