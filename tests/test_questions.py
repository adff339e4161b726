"""Open questions as files: Vicuna's format, and rows of instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from bellwether.ask.question_files import choose, read_questions
from bellwether.errors import DataError


def texts(path: Path) -> list[tuple[str, str, str]]:
    return [(one.name, one.row.category, one.text) for one in read_questions(path).questions]


def test_both_forms_of_vicunas_questions_are_read(tmp_path: Path) -> None:
    rows = [
        {"question_id": 7, "category": "writing", "turns": ["Write a letter."]},
        {"question_id": 9, "category": "maths", "text": "What is 2 + 2?"},
    ]
    path = write_rows(tmp_path / "q.jsonl", rows)
    assert texts(path) == [("7", "writing", "Write a letter."), ("9", "maths", "What is 2 + 2?")]


def test_of_several_turns_the_first_is_asked_and_that_is_said(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "q.jsonl", [{"question_id": 1, "category": "x", "turns": ["One?", "Two?"]}])
    assert texts(path) == [("1", "x", "One?")]
    assert read_questions(path).notes == ["q.jsonl: 1 question of several turns; only the first is asked."]


def test_rows_of_instructions_are_questions_whose_responses_are_not_read(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name it.", "context": "It is red.", "response": "", "category": "a"},
        {"instruction": "Say hello.", "category": "b"},
    ]
    path = write_rows(tmp_path / "q.jsonl", rows)
    assert texts(path) == [("1", "a", "Name it.\n\nIt is red."), ("2", "b", "Say hello.")]
    assert not any(one.row.response for one in read_questions(path).questions)


def test_a_csv_of_questions_is_read(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("question\nWhy?\nWhat for?\n")
    assert texts(path) == [("2", "", "Why?"), ("3", "", "What for?")]


def test_of_a_chat_its_last_user_message_is_asked_after_those_before(tmp_path: Path) -> None:
    chat = [("user", "Hello."), ("assistant", "Hello!"), ("user", "Who are you?"), ("assistant", "A model.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    assert texts(path) == [("1", "", "user: Hello.\n\nassistant: Hello!\n\nuser: Who are you?")]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question_id": 1, "turns": ["A?"]}, {"question_id": 1, "turns": ["B?"]}], "q.jsonl:2: question_id '1'"),
        ([{"question_id": 1, "turns": [3]}], "q.jsonl:1: the field 'instruction' is a number"),
        ([{"question_id": 1, "turns": []}, {"question_id": 2, "turns": ["B?"]}], "q.jsonl:1: "),
        ([{"title": "A?"}], "no column holds questions (there are title)"),
        ([{"instruction": " "}], "q.jsonl:1: the field 'instruction' is empty"),
        (
            [{"instruction": "A?"}, {"instruction": "A?", "context": "x" * 1_000_000}],
            "q.jsonl:2: the question has 1,000,004 characters; give at most 1,000,000.",
        ),
        ([{f"c{number}": 1 for number in range(999)}], "no column holds questions (there are c0, c1, c2, c3, c4, "),
    ],
)
def test_bad_questions_are_refused_with_their_place(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError) as raised:
        read_questions(write_rows(tmp_path / "q.jsonl", rows))
    assert says in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("none.jsonl", "q.txt"):
        with pytest.raises(DataError, match="there is no such file of questions"):
            read_questions(tmp_path / name)


def test_a_limit_takes_of_all_categories_in_turn_and_keeps_the_order(tmp_path: Path) -> None:
    rows = [{"question_id": f"{kind}{n}", "category": kind, "turns": ["?"]} for kind in "abc" for n in range(4)]
    questions = read_questions(write_rows(tmp_path / "q.jsonl", rows)).questions

    def names(**wanted: Any) -> list[str]:
        return [one.name for one in choose(questions, **wanted)]

    assert names(limit=5) == ["a0", "a1", "b0", "b1", "c0"]
    assert set(names(limit=5)) < set(names(limit=7))
    assert names(categories=["c", "a"], limit=3) == ["a0", "a1", "c0"]
    assert len(names()) == len(names(limit=99)) == 12
    with pytest.raises(DataError, match="no question is of the category 'd'; there are 'a', 'b', 'c'"):
        names(categories=["d"])


def test_the_papers_questions_are_read(shared: Path) -> None:
    questions = read_questions(shared / "data" / "vicuna" / "question.jsonl").questions
    assert len(questions) == 80
    assert len({one.row.category for one in questions}) == 9
    twenty = choose(questions, limit=20)
    assert len(twenty) == 20
    assert len({one.row.category for one in twenty}) == 9
