"""Files that grow by whole lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from bellwether.errors import CheckpointError
from bellwether.tools import journal


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    values = [{"text": "one\ntwo\u2028three"}, {"text": "\x1b[31m\ud800"}, {"text": ""}]
    for value in values:
        journal.append(tmp_path / "lines.jsonl", value)
    assert journal.read(tmp_path / "lines.jsonl", dict) == values
    assert (tmp_path / "lines.jsonl").read_bytes().count(b"\n") == 3


def test_a_torn_last_line_is_cut_off_and_the_next_one_follows_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    journal.append(path, {"n": 1})
    with path.open("ab") as file:
        file.write(b'{"n": 2')
    assert journal.read(path, dict) == [{"n": 1}]
    journal.append(path, {"n": 3})
    assert journal.read(path, dict) == [{"n": 1}, {"n": 3}]


def test_a_whole_line_that_is_broken_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\nnothing\n{"n": 3}\n')
    with pytest.raises(CheckpointError, match=r"lines.jsonl:2: this line is not as it was written"):
        journal.read(path, dict)


def test_a_line_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"m": 1}\n')
    with pytest.raises(CheckpointError, match=r"lines.jsonl:1: "):
        journal.read(path, lambda line: line["n"])


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert journal.read(tmp_path / "none.jsonl", dict) == []
