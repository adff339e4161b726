"""Values made of dataclasses, mappings, sequences and numbers as JSON, and as lines of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Return a value made of dataclasses, mappings, sequences and numbers as JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def json_lines(values: Iterable[Any]) -> bytes:
    """Return one line of JSON per value, in UTF-8; lone surrogates stay escaped."""
    lines = (json.dumps(plain(value), ensure_ascii=False, allow_nan=False) for value in values)
    # str.splitlines also splits at these, which JSON leaves bare; readers must see one line per value.
    breaks = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
    return "".join(f"{line.translate(breaks)}\n" for line in lines).encode("utf-8", "backslashreplace")
