"""Talking in the terminal: piped, at a real terminal, and with hostile texts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Command
from rich.console import Console

from bellwether.ask import chat as chatting
from bellwether.ask.questions import AnswerSettings
from bellwether.ask.talk import Answer
from bellwether.data.rows import Row

EVIL = "\x1b[2J\x1b]0;owned\x07 <b>bold</b> [red]no[/red] \u202eright\x00"


@pytest.fixture
def typed(monkeypatch):
    """Puts lines on standard input."""

    def put(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return put


class FakeTalk:
    """Somebody who answers at once with given texts."""

    def __init__(self, *texts, interrupted=False):
        self.names = [f"who {number}" for number in range(len(texts))]
        self.texts, self.interrupted, self.asked = texts, interrupted, []
        self.folder, self.notes, self.templates = Path("runs/some"), [], dict.fromkeys(self.names)
        self.base = SimpleNamespace(name="tiny", fingerprint="f")

    def answer(self, question, names, settings):
        self.asked.append((question, names, settings))
        said = dict(zip(self.names, self.texts, strict=True))
        for words in (1, 2):
            yield [Answer(name, " ".join(said[name].split(" ")[:words]), words) for name in names]
        if self.interrupted:
            raise KeyboardInterrupt
        yield [Answer(name, said[name], 9, ended=True) for name in names]


def session(talk, *lines, width=100):
    """A conversation at a terminal of a person who types these lines and then ends the input."""
    waiting = iter(lines)

    def read(_):
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    return chatting.Session(talk, console, read, live=True, names=list(talk.names))


def play(talk, *lines, width=100):
    """What such a terminal shows, and the conversation."""
    it = session(talk, *lines, width=width)
    while not it.over:
        chatting._step(it)
    return it.console.file.getvalue(), it


# Piped --------------------------------------------------------------------------------------------


def test_without_a_terminal_each_line_is_asked(bellwether: Command, tiny_run, typed):
    typed("/set max-new-tokens 4", "Task 1?", "", "Task 2?")
    outcome = bellwether("chat", tiny_run[0])
    assert (outcome.code, outcome.err) == (0, "")
    asked = [line for line in outcome.out.splitlines() if line.startswith("> ")]
    assert asked == ["> Task 1?", "> Task 2?"]
    assert [line.split(":")[0] for line in outcome.out.splitlines() if line.startswith(("base:", "fed"))] == [
        "base", "federated", "base", "federated",
    ]  # fmt: skip


def test_lines_that_are_refused_are_told_and_the_others_answered(bellwether: Command, tiny_run, typed):
    typed("bad \x1b[2J", "Why? " * 600, "/nonesuch", "/who 9", "/set heat 3", "/set seed x", "/save", "Task 1?")
    outcome = bellwether("chat", tiny_run[0], "--who", "base")
    assert outcome.code == 2
    told = outcome.err.splitlines()
    assert len(told) == 7
    for line, words in zip(
        told,
        ("U+001B", "512 positions", "no command '/nonesuch'", "answerers, 1 to 2", "no setting 'heat'", "seed is 'x'",
         "name a file"),
        strict=True,
    ):  # fmt: skip
        assert line.startswith("bellwether: ")
        assert words in line
    assert "> Task 1?\nbase: " in outcome.out
    assert "\x1b" not in outcome.out + outcome.err


def test_strangers_and_folders_without_models_are_refused(bellwether: Command, tiny_run, tmp_path, typed):
    typed("Task 1?")
    assert "nobody here is called 'me'" in bellwether("chat", tiny_run[0], "--who", "me").err
    outcome = bellwether("chat", tmp_path)
    assert outcome.code == 2
    assert "holds no run, comparison, adapter or model" in outcome.err


def test_context_choice_examples_and_settings_are_kept_in_the_saved_conversation(
    bellwether: Command, tiny_run, typed, tmp_path
):
    typed(
        "/context The sky is blue.", "/who 2", "/set max-new-tokens 3", "/set temperature 0.5", "Which colour?",
        "/context", "one", "two", "", "/who 2 1", "Again?", "/context", "", "/examples 1", "/save talk.json",
        "/save talk.json", "/save other/talk.json",
    )  # fmt: skip
    (tmp_path / "other").write_text("in the way")
    outcome = bellwether("chat", tiny_run[0])
    assert outcome.code == 2
    assert "other" in outcome.err.splitlines()[-1]
    first, second, third = json.loads((tmp_path / "talk.json").read_text())["exchanges"]
    assert first["question"]["context"] == "The sky is blue."
    assert [answer["name"] for answer in first["answers"]] == ["federated"]
    assert first["settings"] == {"temperature": 0.5, "top_p": 1.0, "max_new_tokens": 3, "seed": 0}
    assert second["question"]["context"] == "one\ntwo"
    assert [answer["name"] for answer in second["answers"]] == ["federated", "base"]
    assert third["question"]["instruction"].startswith("Task ")
    assert third["question"]["reference"]


def test_a_file_of_somebody_else_is_not_overwritten(bellwether: Command, tiny_run, typed, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    typed("/save mine.txt")
    outcome = bellwether("chat", tiny_run[0])
    assert outcome.code == 2
    assert "mine.txt exists already" in outcome.err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_is_no_text_is_refused(bellwether: Command, tiny_run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8"))
    outcome = bellwether("chat", tiny_run[0], "--who", "base")
    assert outcome.code == 2
    assert outcome.err.startswith("bellwether: the instruction holds the control character U+DCE9; remove it.")


# At a terminal ------------------------------------------------------------------------------------


def test_answers_stand_side_by_side_where_there_is_room_and_below_each_other_where_not():
    wide, _ = play(FakeTalk("left answer", "right answer"), "Why?")
    final = wide[wide.rindex("╭─ who 0") :]
    assert any("left answer" in line and "right answer" in line for line in final.splitlines())
    assert "9 tokens" in final
    narrow, _ = play(FakeTalk("left answer", "right answer"), "Why?", width=40)
    assert not any("left answer" in line and "right answer" in line for line in narrow.splitlines())


def test_nothing_that_a_model_or_the_data_says_steers_the_terminal(monkeypatch):
    talk = FakeTalk(EVIL, "second")
    rows = [Row(EVIL.replace("\x00", ""), EVIL, category=EVIL)]
    monkeypatch.setattr(chatting, "find_examples", lambda _: (rows, f"A note {EVIL}"))
    shown, it = play(talk, "Why?", "/examples", "/examples 1", "/set x" + EVIL, "/" + EVIL, f"Why {EVIL}?")
    assert it.refused == 3
    for mark in ("\x1b[2J", "\x1b]0", "\x07", "\u202e", "\x00"):
        assert mark not in shown
    assert "<b>bold</b> [red]no[/red]" in shown


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said():
    shown, it = play(FakeTalk("one two three", interrupted=True), "Why?", "/quit")
    assert "Stopped." in shown
    assert "one two" in shown
    (exchange,) = it.exchanges
    assert exchange.answers[0].text == "one two"
    assert not exchange.answers[0].ended


def test_an_interrupt_at_the_prompt_ends_the_conversation():
    _, it = play(FakeTalk("yes"), KeyboardInterrupt())
    assert it.over
    assert not it.exchanges


def test_an_interrupt_of_piped_questions_is_told_by_the_exit_code(bellwether: Command, tiny_run, typed, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    typed("Task 1?", "Task 2?")
    monkeypatch.setattr(chatting, "make_question", interrupted)
    outcome = bellwether("chat", tiny_run[0])
    assert outcome.code == 130
    assert "> Task" not in outcome.out


def test_without_examples_a_number_of_one_is_answered_by_the_reason_alone(monkeypatch):
    monkeypatch.setattr(chatting, "find_examples", lambda _: ([], "There are no examples, since none are."))
    shown, it = play(FakeTalk("yes"), "/examples 1", "/examples")
    assert shown.count("There are no examples, since none are.") == 2
    assert "is none of them" not in shown
    assert (it.refused, it.exchanges) == (0, [])


def test_help_lists_every_command_and_who_answers_can_be_chosen():
    talk = FakeTalk("a", "b", "c")
    shown, _ = play(talk, "/help", "/who 3, 1", "Why?", "/quit")
    for name in chatting.COMMANDS:
        assert name in shown
    assert talk.asked[0][1] == ["who 2", "who 0"]
    assert talk.asked[0][2] == AnswerSettings()


def test_a_real_terminal_shows_answers_and_ends_by_ctrl_d(tiny_run):
    pexpect = pytest.importorskip("pexpect", reason="pexpect, which plays a terminal, is not installed")
    words = ["-m", "bellwether", "chat", str(tiny_run[0])]
    child = pexpect.spawn(sys.executable, words, encoding="utf-8", timeout=300, dimensions=(40, 100))
    try:
        child.expect("Type an instruction, or /help")
        child.expect("ask> ")
        child.sendline("/set max-new-tokens 5")
        child.expect("max-new-tokens +5")
        child.sendline("Task 1?")
        child.expect("╭─.* base .*─╮.*╭─.* federated .*─╮")
        child.expect("ask> ")
        child.sendcontrol("d")
        child.expect(pexpect.EOF)
    finally:
        child.close()
    assert child.exitstatus == 0


def test_of_a_comparison_a_client_alone_answers_beside_the_federation(bellwether: Command, tiny_comparison, typed):
    typed("/who", "Task 1?")
    outcome = bellwether("chat", tiny_comparison)
    assert outcome.code == 0, outcome.err
    assert "  2 * local, client-01\n  3   local, client-02\n" in outcome.out
    assert [line.split(":")[0] for line in outcome.out.splitlines() if line.startswith(("base:", "loc", "fed"))] == [
        "base", "local, client-01", "federated",
    ]  # fmt: skip


def test_nothing_is_left_of_a_save_that_cannot_be_written(bellwether: Command, tiny_run, typed, tmp_path):
    typed("/save nowhere/talk.json")
    assert bellwether("chat", tiny_run[0]).code == 2
    assert not list(tmp_path.iterdir())
