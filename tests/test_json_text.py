"""Reading JSON that anybody may have damaged: typed values, or one line on what is wrong where."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bellwether.errors import CheckpointError
from bellwether.tools.json_text import (
    DEEPEST,
    KEPT,
    Amount,
    Count,
    Finite,
    Loss,
    Number,
    Truth,
    from_json,
    from_json_lines,
    json_lines,
    read_json,
    reading,
    typed,
)


@dataclass(frozen=True)
class Kept:
    __pydantic_config__ = KEPT

    name: str
    rows: Count = 0
    parts: tuple[Number, ...] = ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), "nested too deep"),
        (b"9" * 5000, "a number has too many digits"),
    ],
)
def test_what_is_no_json_is_told_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        from_json(data)


def test_what_is_not_nested_too_deep_is_read() -> None:
    value: Any = 1
    for _ in range(DEEPEST):
        value = [value]
    assert from_json(json.dumps(value).encode()) == value


def test_lines_come_back_and_a_wrong_one_is_told_by_its_number() -> None:
    values = [{"name": "a\u2028b\u0085\r\n"}, {"name": "\ud800", "parts": [math.inf, 0.1 + 0.2]}]
    data = json_lines(values)
    made = [Kept("a\u2028b\u0085\r\n"), Kept("\ud800", 0, (math.inf, 0.1 + 0.2))]
    assert from_json_lines(data, lambda line: typed(line, Kept)) == made
    assert from_json_lines(data.rstrip(b"\n"), lambda line: typed(line, Kept)) == made
    assert from_json_lines(b"", dict) == []
    for second, says in (
        (b"[]\n", "it is a list of 0, not a mapping"),
        (b"\n", "Expecting value"),
        (b"\xff\n", "UTF-8"),
    ):
        with pytest.raises(ValueError, match=f"^line 2: .*{says}"):
            from_json_lines(data.splitlines(keepends=True)[0] + second, lambda line: typed(line, Kept))


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (True, Count, "it is True, not a whole number"),
        (-1, Count, "it is -1, input should be greater than or equal to 0"),
        (2**70, Count, f"it is {2**70}, input should be less than or equal to {2**53}"),
        (3.0, Count, "it is 3.0, not a whole number"),
        ("3", Count, "it is '3', not a whole number"),
        (1, Truth, "it is 1, neither true nor false"),
        (True, Number, "it is True, not a number"),
        ("nan", Number, "it is 'nan', not a number"),
        ("NaN", Finite, "it is 'NaN', not a finite number"),
        (math.inf, Amount, "it is inf, not a finite number"),
        (-0.5, Amount, "it is -0.5, input should be greater than or equal to 0"),
        (1e200, Loss, "it is 1e+200, larger than any loss"),
        (None, str, "it is None, not a text"),
        ([], Mapping[str, int], "it is a list of 0, not a mapping"),
        ({}, tuple[int, ...], "it is a mapping of 0, not a list"),
        ("abc", list[str], "it is 'abc', not a list"),
        ({"rows": 1}, Kept, "name is missing"),
        ({"name": "x", "rosw": 1}, Kept, "rosw is unknown"),
        ([{"name": "x"}, {"name": "x", "parts": [1, None]}], list[Kept], "1.parts.1 is None, not a number"),
        ({"a\n\x1b[2J": "x"}, dict[str, Count], "a??[2J is 'x', not a whole number"),
        ({"a": "x" * 10_000}, dict[str, Count], "a is 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…, not a whole number"),
    ],
)
def test_a_value_of_another_type_is_told_with_its_place_and_no_longer_than_a_line(
    value: Any, kind: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        typed(value, kind)
    assert says.isprintable()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0, Count),
        (2**53, Count),
        (False, Truth),
        ("Infinity", Number),
        (3, Number),
        (1e-300, Amount),
        ("-Infinity", Loss),
    ],
)
def test_values_of_the_type_come_back(value: Any, kind: Any) -> None:
    found = typed(value, kind)
    assert found == (float(value) if isinstance(value, str) else value)


def test_one_sentence_names_the_file_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_bytes(b'{"name": 3}')
    for name, why in (("kept.json", "name is 3, not a text"), ("gone.json", "No such file or directory")):
        with pytest.raises(CheckpointError) as caught:
            read_json(tmp_path / name, Kept, "restore it")
        assert str(caught.value) == f"{tmp_path / name} cannot be read ({why}); restore it."
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path, Kept, "restore it")


def test_a_mistake_of_our_own_is_not_taken_for_a_damaged_file() -> None:
    with pytest.raises(KeyError), reading("x", "restore it"):
        raise KeyError("ours")
