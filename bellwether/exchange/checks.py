"""The one strict check of every kind of reply, before anything is computed with it.

What a client sends may be anything: a list in place of a tensor, a loss of a thousand digits, counts of rows that no
site has. Nothing here trusts a type, a size or a number. No torch here.

Shape legend: C centroids of a client, d dimensions of the space.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Arrays, Tensors, flat
from bellwether.exchange.messages import Payload, Reply, Survey, Update
from bellwether.exchange.packing import (
    BITMAP,
    CODES,
    INDICES,
    LARGEST,
    LEVELS,
    SCALES,
    VALUES,
    forms,
    levels,
    split,
    unpack,
)
from bellwether.exchange.scores import Totals
from bellwether.recipe.recipe import Compression
from bellwether.tools.words import counted

MOST_CENTROIDS = 10_000  # of one client; more would make the server cluster for hours
MOST_NAMES, LONGEST_NAME = 1_000, 200  # of categories, groups and figures
MOST_FIGURES = 32  # of an update's metrics
LARGEST_LOSS = 1e6  # per token; any that is meant is far smaller
LONGEST_ROW = 2**24  # tokens; more than any model takes
MOST_TOKENS = 2**40  # of one client, so that sums over thousands of them are whole numbers in float64, too
SHOWN = 60  # characters of a value in a sentence

Shapes = Mapping[str, tuple[int, ...]]

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = SHOWN


def check_seconds(reply: Reply, deadline: float | None) -> None:
    """Refuse a reply that took no believable time, or longer than the server waits.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    seconds = reply.seconds
    if not _is_finite(seconds) or seconds < 0:
        raise UpdateRejected(f"its {shown(seconds)} seconds are no time")
    if deadline is not None and seconds > deadline:
        raise UpdateRejected(f"it took {seconds:.1f} s, and the deadline is {deadline:g} s")


def check_update(
    reply: Reply,
    payload: Payload,
    returns: Shapes,
    round: int,
    max_rows: int,
    max_norm: float,
    compression: Compression | None = None,
    received: Payload | None = None,
    bound: float = math.inf,
) -> Update:
    """Refuse a reply that must not be aggregated; return its update.

    Args:
        reply: what the engine delivered.
        payload: what this client was sent, as the server has it exactly: what comes back has its keys, shapes and
            precision.
        returns: the shapes of the arrays that the method expects beside the tensors, by name.
        round: the round that is being closed.
        max_rows: rows that one update may claim.
        max_norm: the largest norm of the change of all tensors, and of each array.
        compression: the recipe's section, which says how it comes; None is as whole tensors.
        received: what the client made of the payload, which it began with; None is the payload.
        bound: the largest norm of the change of all tensors that the method takes.

    Returns:
        The update with whole tensors: the server's exact ones and the client's change, since it received them.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    update = check_claims(reply, round, max_rows)
    expected = payload.expected
    update = _with_tensors(update, expected, (received or payload).expected, compression or Compression())
    check_tensors(update.tensors, expected)
    check_names("arrays", update.arrays, returns)
    precision = next(iter(payload.adapter.tensors.values())).dtype
    for name, shape in returns.items():
        check_array(name, update.arrays[name], shape, precision)
    # In float64, where the squares of everything that float32 holds are finite.
    squares = (np.square(update.tensors[key].astype(np.float64) - sent).sum() for key, sent in expected.items())
    _check_norm("its change", sum(squares), min(max_norm, bound))
    for name in returns:
        _check_norm(name, np.square(update.arrays[name].astype(np.float64)).sum(), max_norm)
    return update


def check_claims(reply: Reply, round: int, max_rows: int) -> Update:
    """Refuse an update that must not be used whatever its values are; return it.

    Args:
        reply: what the engine delivered.
        round: the round that is being closed.
        max_rows: rows that one update may claim.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    update: Update = brought(reply, reply.update, Update, "an update")
    _check_signature("update", update, reply, round)
    _check_count("rows", update.rows, 1, max_rows)
    _check_figures(update.metrics, max_rows)
    return update


def brought(reply: Reply, part: Any, kind: type, what: str) -> Any:
    """Return a part of a reply, refusing where it is not there or of another kind.

    Args:
        reply: what the engine delivered.
        part: what is due of it.
        kind: what it must be.
        what: how that is called, with its article.

    Raises:
        UpdateRejected: the reason, as one clause.
    """
    if reply.failure is not None or part is None:
        raise UpdateRejected(_clause(reply.failure) or f"it sent no {what.split(maxsplit=1)[1]}")
    if not isinstance(part, kind):
        raise UpdateRejected(f"it sent {_kind(part)} in place of {what}")
    return part


def check_survey(reply: Reply, round: int, width: int) -> NDArray[Any]:
    """Refuse a survey that must not be clustered; return its centroids_Cd.

    Args:
        reply: what the engine delivered.
        round: the round that is being surveyed.
        width: how many dimensions are due.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    survey: Survey = brought(reply, reply.survey, Survey, "a survey")
    _check_signature("survey", survey, reply, round)
    points_Cd = survey.centroids_Cd
    if type(points_Cd) is not np.ndarray or points_Cd.ndim != 2 or points_Cd.dtype != np.float32:
        raise UpdateRejected("its centroids are no float32 matrix")
    if not points_Cd.shape[1]:
        raise UpdateRejected("its centroids have no dimension")
    if len(points_Cd) > MOST_CENTROIDS:
        raise UpdateRejected(f"it sent {counted(len(points_Cd), 'centroid')}, where {MOST_CENTROIDS:,} are taken")
    if not np.isfinite(points_Cd).all():
        raise UpdateRejected("a centroid holds values that are not finite")
    if len(points_Cd) and points_Cd.shape[1] != width:
        raise UpdateRejected(f"its centroids have {counted(points_Cd.shape[1], 'dimension')}, where {width} are due")
    return points_Cd


def check_scores(reply: Reply, max_rows: int) -> tuple[Mapping[str, Totals], Mapping[str, Totals]]:
    """Refuse scores that must not be added up; return totals by category and by group.

    Args:
        reply: what the engine delivered.
        max_rows: rows that one client may claim to have scored.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    if reply.failure is not None or reply.totals is None:
        raise UpdateRejected(_clause(reply.failure) or "it sent no scores")
    sums = []
    for what, parts in (("category", reply.totals), ("group", reply.groups)):
        if not isinstance(parts, Mapping) or len(parts) > MOST_NAMES:
            raise UpdateRejected(f"its scores are no mapping of at most {MOST_NAMES} names of {what} to totals")
        for name, totals in parts.items():
            _check_totals(what, name, totals, max_rows)
        sums.append(sum(totals.rows for totals in parts.values()))
    if sums[0] > max_rows:
        raise UpdateRejected(f"it claims {counted(sums[0], 'scored row')}, where {max_rows} are believed")
    if reply.groups and sums[1] != sums[0]:
        raise UpdateRejected(f"its groups have {counted(sums[1], 'row')} together, and its categories {sums[0]}")
    return reply.totals, reply.groups


def check_array(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse an array of another kind or shape (which includes the rank), or with values that are not finite.

    Arrays of subclasses, such as masked ones, are refused, too: what hides a value would pass every check of it.

    Raises:
        UpdateRejected: the reason, as one clause.
    """
    if type(value) is not np.ndarray or value.dtype != dtype:
        raise UpdateRejected(f"{name} is {value.dtype if type(value) is np.ndarray else _kind(value)}, not {dtype}")
    if value.shape != shape:
        raise UpdateRejected(f"{name} has shape {value.shape}, not {shape}")
    if not np.isfinite(value).all():
        raise UpdateRejected(f"{name} holds {int((~np.isfinite(value)).sum())} values that are not finite")


def check_tensors(tensors: Any, expected: Tensors) -> None:
    """Refuse tensors of other keys, precision or shapes than those that come back, or that are not finite.

    Raises:
        UpdateRejected: the reason, as one clause.
    """
    check_names("tensors", tensors, expected)
    for key, sent in expected.items():
        check_array(key, tensors[key], sent.shape, sent.dtype)


def check_packed(arrays: Any, kind: str, size: int, keep: float = 1.0) -> None:
    """Refuse a packed vector of another form, or with contents that no packing gives.

    Args:
        arrays: whatever came in place of what ``packing.pack`` gives.
        kind: ``8bit``, ``4bit`` or ``top_k``.
        size: how many values the vector has.
        keep: the share of them that ``top_k`` takes.

    Raises:
        UpdateRejected: the reason, as one clause.
    """
    due = forms(kind, size, keep)
    check_names("packed arrays", arrays, due)
    for name, (dtype, shape) in due.items():
        check_array(f"its packed {name}", arrays[name], shape, dtype)
    if arrays[LARGEST][0] < 0:
        raise UpdateRejected("the largest entry of what it packed is negative")
    if kind == "top_k":
        _check_positions(arrays, size)
        if (np.abs(arrays[VALUES]) > 1).any():
            raise UpdateRejected("what it packed has entries above the largest")
        return
    scales_B, codes = arrays[SCALES], arrays[CODES]
    if ((scales_B < 0) | (scales_B > 1)).any():
        raise UpdateRejected("a scale of what it packed is not from 0 to 1")
    if (levels(codes, kind, size) > 2 * LEVELS[kind]).any() or (kind == "4bit" and size % 2 and codes[-1] >> 4):
        raise UpdateRejected("a code of what it packed is none that rounding gives")


def _check_positions(arrays: Arrays, size: int) -> None:
    """Refuse positions of entries that are not each once in a vector of so many values."""
    if INDICES in arrays:
        indices = arrays[INDICES].astype(np.int64)
        if (np.diff(indices) <= 0).any() or indices[-1] >= size:
            raise UpdateRejected(f"the indices of what it packed do not rise within 0 to {size - 1}")
        return
    bits = np.unpackbits(arrays[BITMAP], bitorder="little")
    if bits[size:].any() or int(bits.sum()) != len(arrays[VALUES]):
        raise UpdateRejected("the bitmap of what it packed does not mark as many entries as came")


def _with_tensors(update: Update, expected: Tensors, received: Tensors, settings: Compression) -> Update:
    """Return an update with its change of what was received added to the tensors that the server has."""
    if settings.up == "none" or not expected:
        check_names("packed arrays", update.packed, {})
        if all(received[key] is value for key, value in expected.items()):  # it came as the server has it
            return update
        check_tensors(update.tensors, expected)
        with np.errstate(over="ignore"):  # what is not finite is refused next
            changed = {key: expected[key] + (update.tensors[key] - value) for key, value in received.items()}
        return replace(update, tensors=changed)
    check_names("whole tensors", update.tensors, {})
    sent_P = flat(expected, expected)
    check_packed(update.packed, settings.up, len(sent_P), settings.keep)
    with np.errstate(over="ignore"):  # what is not finite is refused next
        values_P = sent_P + unpack(update.packed, settings.up, len(sent_P), sent_P.dtype)
    return replace(update, tensors=split(values_P, expected), packed={})


def _check_signature(what: str, message: Update | Survey, reply: Reply, round: int) -> None:
    """Refuse what names another client or round than the engine knows."""
    if not isinstance(message.client, str) or message.client != reply.client:
        raise UpdateRejected(f"its {what} is signed {shown(message.client)}")
    if type(message.round) is not int or message.round != round:
        raise UpdateRejected(f"its {what} belongs to round {shown(message.round)}, not {round}")


def _check_count(what: str, value: Any, least: int, most: int) -> None:
    """Refuse what is no whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UpdateRejected(f"it claims {shown(value)} {what}, where {least} to {most} are believed")


def _check_figures(metrics: Any, max_rows: int) -> None:
    """Refuse figures of a training that nobody can have measured."""
    if not isinstance(metrics, Mapping) or len(metrics) > MOST_FIGURES:
        raise UpdateRejected(f"its figures are no mapping of at most {MOST_FIGURES} names to numbers")
    for name, figure in metrics.items():
        _check_name("figure", name)
        if not _is_finite(figure):
            raise UpdateRejected(f"its {name!r} is {shown(figure)}, not a finite number")
    most = {"loss": LARGEST_LOSS, "tokens": MOST_TOKENS, "rows": MOST_TOKENS, "selected": max_rows}
    most |= {"preferred": 1.0, "margin": LARGEST_LOSS}
    for name, limit in most.items():
        least = -LARGEST_LOSS if name in ("loss", "margin") else 0
        if name in metrics and not least <= metrics[name] <= limit:
            raise UpdateRejected(
                f"its {name!r} is {shown(metrics[name])}, where {least:.17g} to {limit:.17g} are believed"
            )
    if metrics.get("tokens", 0) > 0 and "loss" not in metrics:
        raise UpdateRejected("it tells of trained tokens and not of their loss")


def _check_totals(what: str, name: Any, totals: Any, max_rows: int) -> None:
    """Refuse sums of scores that no rows can have."""
    _check_name(what, name)
    if not isinstance(totals, Totals):
        raise UpdateRejected(f"the {what} {shown(name)} has {_kind(totals)} in place of totals")
    counts = {"rows": max_rows, "tokens": MOST_TOKENS, "generated": max_rows, "exact": max_rows, "pairs": max_rows}
    for field, most in counts.items():
        _check_count(f"{field} in the {what} {shown(name)}", getattr(totals, field), 0, most)
    if not totals.exact <= totals.generated <= totals.rows:
        raise UpdateRejected(f"the {what} {shown(name)} has more answers than rows, or more right ones than answers")
    if totals.pairs > totals.rows:
        raise UpdateRejected(f"the {what} {shown(name)} has more pairs than rows")
    if totals.tokens > totals.rows * LONGEST_ROW:
        raise UpdateRejected(
            f"the {what} {shown(name)} has {counted(totals.tokens, 'token')} in {counted(totals.rows, 'row')}"
        )
    limits = {"loss": LARGEST_LOSS * totals.tokens, "rouge_l": totals.generated + 1e-6, "preferred": totals.pairs}
    for field, limit in limits.items():
        value = getattr(totals, field)
        if not _is_finite(value) or not 0 <= value <= limit:
            raise UpdateRejected(f"the {what} {shown(name)} has a {field} of {shown(value)} in all")


def check_names(what: str, sent: Any, expected: Mapping[str, Any]) -> None:
    """Refuse a mapping whose keys are not those that are due.

    Raises:
        UpdateRejected: the reason, as one clause.
    """
    if not isinstance(sent, Mapping) or not all(isinstance(key, str) for key in sent):
        raise UpdateRejected(f"its {what} are {_kind(sent)}, not a mapping of texts to arrays")
    missing, unknown = expected.keys() - sent.keys(), sent.keys() - expected.keys()
    if missing or unknown:
        raise UpdateRejected(f"its {what} are not those due: {_some(missing)} missing, {_some(unknown)} unknown")


def _check_name(what: str, name: Any) -> None:
    """Refuse what is no text of a believable length."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        raise UpdateRejected(f"it names a {what} {shown(name)}, where a text of at most {LONGEST_NAME} is due")


def _check_norm(what: str, square: float, most: float) -> None:
    """Refuse what is longer than anything that is meant."""
    if not math.sqrt(square) <= most:
        raise UpdateRejected(f"{what} has a norm of {math.sqrt(square):.3g}, where {most:g} is the largest believed")


def _is_finite(value: Any) -> bool:
    """Return whether something is a finite number that fits a float: no truth value, no thousand digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300 if isinstance(value, int) else math.isfinite(value)


def _kind(value: Any) -> str:
    return type(value).__name__


def _clause(failure: Any) -> str:
    """Return a client's own words for its failure, short and on one line."""
    if failure is None:
        return ""
    return " ".join((failure if isinstance(failure, str) else shown(failure)).split())[: 5 * SHOWN]


def shown(value: Any) -> str:
    """Return a value as it may stand in a sentence, however large it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python writes no number of more than some thousand digits, wherever it stands
        return f"a {_kind(value)} that cannot be written"


def _some(keys: Iterable[str]) -> str:
    """Return up to two keys, and how many there are."""
    shown = sorted(key[:120] for key in keys)
    return f"{len(shown)} ({', '.join(shown[:2])}{', …' if len(shown) > 2 else ''})" if shown else "none"
