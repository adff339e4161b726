"""The records of a run as lines of JSON and as tables, and the state of a method as files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import CheckpointError, first_line
from bellwether.exchange.records import EvaluationRecord, Record, RoundRecord
from bellwether.exchange.scores import Scores, Totals, macro, means
from bellwether.tools.json_text import KEPT, check_depth, from_json, from_json_lines, json_lines, plain, typed
from bellwether.tools.spreadsheet import csv_table

MACRO, POOLED = "(macro)", "(all rows)"
PREFERRED = "preferred"
COLUMNS = ("round", "part", "category", "rows", "loss", "perplexity", "rouge_l", "exact")

_KINDS: dict[str, type[Any]] = {"round": RoundRecord, "evaluation": EvaluationRecord}


# Records ------------------------------------------------------------------------------------------


def dump_records(records: Iterable[Record]) -> bytes:
    """Return records as JSON lines; the field ``kind`` says which is which.

    Numbers that JSON lacks stand as the texts ``NaN``, ``Infinity`` and ``-Infinity``.
    """
    names = {cls: kind for kind, cls in _KINDS.items()}
    return json_lines({"kind": names[type(record)], **plain(record)} for record in records)


def load_records(data: bytes) -> tuple[Record, ...]:
    """Return the records behind JSON lines of ``dump_records``.

    Raises:
        ValueError: a line is not a record.
    """
    return tuple(from_json_lines(data, _record))


def _record(line: Any) -> Record:
    """Return the record behind the value of a line."""
    values = dict(typed(line, dict[str, Any]))
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"a record of kind {kind!r:.40}")
    record: Record = typed(values, _KINDS[kind])
    return record


def round_lines(records: Iterable[Record]) -> bytes:
    """Return one line of JSON per round."""
    return json_lines(record for record in records if isinstance(record, RoundRecord))


# Scored rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredRow:
    """One scored row, as a run keeps it.

    Args:
        category: of the row.
        answer: what the model answered; None where no answer was generated.
        totals: of this row alone.
    """

    __pydantic_config__ = KEPT

    category: str
    answer: str | None
    totals: Totals


def dump_rows(rows: Iterable[ScoredRow]) -> bytes:
    """Return scored rows as lines of JSON: category, answer and totals."""
    return json_lines({"category": row.category, "answer": row.answer, **plain(row.totals)} for row in rows)


def load_rows(data: bytes) -> tuple[ScoredRow, ...]:
    """Return the scored rows behind the lines of ``dump_rows``.

    Raises:
        ValueError: a line holds no scored row.
    """
    return tuple(from_json_lines(data, _scored_row))


def _scored_row(line: Any) -> ScoredRow:
    """Return the scored row behind the value of a line, which has the totals beside category and answer."""
    totals = dict(typed(line, dict[str, Any]))
    own = {name: totals.pop(name) for name in ("category", "answer") if name in totals}
    row: ScoredRow = typed({**own, "totals": totals}, ScoredRow)
    return row


# Tables -------------------------------------------------------------------------------------------


def evaluation_rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return one row per evaluation and category, each evaluation opened by its macro mean.

    The columns are ``COLUMNS``: loss in nats per response token, ``rouge_l`` and ``exact`` in 0..1; None where nothing
    was scored. Where preference rows were scored, ``preferred`` follows, in 0..1. Where an evaluation has scores by
    group, a last column ``group`` names the group of rows of the category ``POOLED``, the means over all rows of that
    group; it is empty elsewhere.
    """
    evaluations = [record for record in records if isinstance(record, EvaluationRecord)]
    grouped = any(record.groups for record in evaluations)
    paired = any(totals.pairs for record in evaluations for totals in record.categories.values())
    rows: list[dict[str, Any]] = []
    for record in evaluations:
        scores = [(MACRO, "", macro(record.categories))]
        scores += [(name, "", means(record.categories[name])) for name in sorted(record.categories)]
        scores += [(POOLED, name, means(record.groups[name])) for name in sorted(record.groups)]
        for category, group, scored in scores:
            row = _score_row(record, category, scored) | ({PREFERRED: scored.preferred} if paired else {})
            rows.append(row | ({"group": group} if grouped else {}))
    return rows


def evaluation_csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the rows of ``evaluation_rows`` as CSV, safe to open in a spreadsheet; an empty cell is nothing scored."""
    rows = list(rows)
    heads = tuple(rows[0]) if rows else COLUMNS
    return csv_table(heads, ([row[head] for head in heads] for row in rows))


def _score_row(record: EvaluationRecord, category: str, scores: Scores) -> dict[str, Any]:
    """Return one row of the evaluation table."""
    values = (record.round, record.part, category, scores.rows)
    return dict(zip(COLUMNS, (*values, scores.loss, scores.perplexity, scores.rouge_l, scores.exact), strict=True))


# State --------------------------------------------------------------------------------------------


def dump_state(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files that hold a state: arrays in safetensors, everything else in JSON.

    Args:
        state: nested mappings with text keys, lists and tuples, of NumPy arrays, texts, numbers,
            truth values and None. Reading it back gives the same types, dtypes and bits.

    Raises:
        CheckpointError: something in it can not be kept so.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {}
    try:
        tree = _take_apart(state, arrays, "state")
        check_depth(tree)
    except (RecursionError, ValueError) as error:
        raise CheckpointError("The state cannot be kept: it is nested too deep; give it fewer levels.") from error
    try:
        return {"state.json": json.dumps(tree).encode(), "state.safetensors": save(arrays)}
    except SafetensorError as error:
        raise CheckpointError(f"The state cannot be kept: {error}; use arrays of another dtype.") from error


def load_state(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the state behind the files of ``dump_state``.

    Raises:
        ValueError: they do not hold a state.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(files["state.safetensors"])
    except (SafetensorError, KeyError) as error:  # a KeyError for a dtype that NumPy does not have
        raise ValueError(f"the state's arrays are broken ({first_line(error)})") from error
    state = _put_together(from_json(files["state.json"]), arrays)
    if not isinstance(state, dict):
        raise ValueError("the state is not a mapping")
    return state


# A mapping becomes ["map", {...}], a list ["list", ...], and so on: no key of a state can be taken for a mark.


def _take_apart(value: Any, arrays: dict[str, NDArray[Any]], place: str) -> Any:
    """Return a value as JSON, its arrays put into ``arrays`` under numbers."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, Mapping):
        return ["map", {_text(key, place): _take_apart(v, arrays, f"{place}.{key}") for key, v in value.items()}]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_take_apart(item, arrays, f"{place}[{i}]") for i, item in enumerate(value))]
    if isinstance(value, np.ndarray | np.generic):
        key = str(len(arrays))
        arrays[key] = np.asarray(value, order="C")
        return ["array" if isinstance(value, np.ndarray) else "number", key]
    raise CheckpointError(
        f"{place} is a {type(value).__name__}, which a checkpoint cannot hold: "
        "use NumPy arrays, texts, numbers, lists and mappings with text keys."
    )


def _text(key: Any, place: str) -> str:
    """Return a key that is a text."""
    if not isinstance(key, str):
        raise CheckpointError(f"The key {key!r} in {place} is not a text, as a checkpoint needs: use str({key!r}).")
    return key


def _put_together(tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Return the value behind ``_take_apart``."""
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case ["map", dict(items)]:
            return {key: _put_together(item, arrays) for key, item in items.items()}
        case ["list", *items]:
            return [_put_together(item, arrays) for item in items]
        case ["tuple", *items]:
            return tuple(_put_together(item, arrays) for item in items)
        case ["array", str(key)] if key in arrays:
            return arrays[key]
        case ["number", str(key)] if key in arrays and arrays[key].ndim == 0:
            return arrays[key][()]
    raise ValueError(f"the state holds {repr(tree)[:40]}, which stands for nothing")
