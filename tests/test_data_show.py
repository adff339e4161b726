"""`bellwether data --show`: rows as the model sees them, with what is trained of each."""

import io
from pathlib import Path

import pytest
from conftest import Command, write_rows
from data_tokenizers import CHATML, chat, family, with_chat
from rich.console import Console

from bellwether.data.rows import Row, Tokenised, Turn
from bellwether.data.tokens import tokenise
from bellwether.recipe.recipe import Data
from bellwether.report.rows import shown_rows, trained_runs

TURNS = (
    Turn("user", "The sky?"),
    Turn("assistant", "Blue.", trained=False),
    Turn("user", "And the hill?"),
    Turn("assistant", "Green."),
)
CHAT = Row("And the hill?", "Green.", turns=TURNS, category="colours", place="a.jsonl:3")


def tokenised(*rows: Row) -> tuple[Tokenised, object]:
    tokenizer = with_chat(family("byte-level BPE"), CHATML)
    return tokenise(rows, tokenizer, Data(), chat(tokenizer)), tokenizer


def printed(text: object, **settings: object) -> str:
    console = Console(file=io.StringIO(), width=200, **settings)
    console.print(text, soft_wrap=True)
    return console.file.getvalue()


def test_runs_are_the_whole_row_and_say_what_is_trained():
    made, tokenizer = tokenised(CHAT)
    runs = list(trained_runs(made.rows[0], tokenizer))
    assert "".join(text for text, _ in runs) == tokenizer.decode(made.rows[0].ids_T.tolist())
    assert [text for text, trained in runs if trained] == ["Green.<|im_end|>"]
    assert "Blue.<|im_end|>" in runs[0][0]


def test_marks_stand_around_what_is_trained_where_there_are_no_colours():
    made, tokenizer = tokenised(CHAT)
    (text,) = shown_rows({"north": made}, tokenizer, 5, marks=("[[", "]]"))
    shown = printed(text)
    assert shown.splitlines()[0] == f"a.jsonl:3 · north · colours · {len(made.rows[0])} tokens, " + (
        f"{made.rows[0].trained_tokens} of them trained"
    )
    assert "assistant\n[[Green.<|im_end|>]]\n" in shown
    assert shown.count("[[") == 1


def test_colours_stand_behind_what_is_trained_where_there_are():
    made, tokenizer = tokenised(CHAT)
    (text,) = shown_rows({"north": made}, tokenizer, 1, marks=None)
    assert "\x1b[30;42mGreen.<|im_end|>\x1b[0m" in printed(text, force_terminal=True, color_system="standard")


def test_rows_of_the_clients_come_in_turn():
    first, tokenizer = tokenised(*(Row(f"a{n}", "b", place=f"one:{n}") for n in range(3)))
    second, _ = tokenised(Row("c", "d", place="two:0"))
    shown = [str(text).split(" ")[0] for text in shown_rows({"x": first, "y": second}, tokenizer, 4, marks=("[", "]"))]
    assert shown == ["one:0", "two:0", "one:1", "one:2"]


def test_nothing_in_a_row_steers_the_terminal():
    made, tokenizer = tokenised(Row("a\x1b[31m\u202e", "b", place="p\x1b:1"))
    (text,) = shown_rows({"x": made}, tokenizer, 1, marks=("[", "]"))
    assert "\x1b" not in str(text)
    assert "\u202e" not in str(text)


@pytest.mark.parametrize("count", [0, 2])
def test_the_command_shows_as_many_rows_as_it_is_asked_for(bellwether: Command, tiny_recipe: Path, tmp_path, count):
    outcome = bellwether("data", tiny_recipe, "--show", count, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("of them trained") == count
    assert outcome.out.count("⟦") == count


def test_what_is_dropped_of_messages_is_told_with_the_table(bellwether: Command, tiny_recipe: Path, tmp_path):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "c", "mood": "fine"},
    ]
    write_rows(tmp_path / "chats.jsonl", [{"messages": messages, "source": "x"}] * 20)
    outcome = bellwether("data", tiny_recipe, "--data", tmp_path / "chats.jsonl", "--show", 1, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "chats.jsonl: not used: 'source'." in outcome.out
    assert "Messages: not used: the field 'mood', of 20 chats." in outcome.out
    assert "reasoning_content is not used" in outcome.out
