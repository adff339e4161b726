"""A judge over HTTP: scripted servers that answer well, badly, late or not at all, and one of transformers' own."""

from __future__ import annotations

import importlib.util
import json
import shlex
import signal
import socket
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import Command, Outcome, call, json_lines, write_rows
from judge_server import Asked, Raw, Script, Server, failure, serving

from bellwether.ask.answerers import find_answerer
from bellwether.ask.judge import Judgement, JudgeSettings, judge
from bellwether.ask.judge_api import TIMEOUT, Judge, find_judge
from bellwether.errors import JudgeAway, JudgeError

SECRET = "sk-very-secret-0123456789"
KINDS = ("writing", "maths")
TEXTS = ("Why is it 0?", "Name three colours of the rainbow.", "Who jumps over the lazy dog?", "0123456789 0123456789")
QUESTIONS = [
    {"question_id": f"q{number}", "category": KINDS[number % 2], "turns": [text]} for number, text in enumerate(TEXTS)
]

Judging = Callable[..., Judgement]
Judged = Callable[..., Outcome]
Models = tuple[Path, Path]


def by_length(asked: Asked, number: int = 0) -> str:
    """A judge without a preference for a place: an answer's score depends on its text alone."""
    return "{} {}\nThe scores follow from the words.".format(*map(score, asked.answers))


def score(answer: str) -> int:
    return 1 + sum(answer.encode()) % 10


def of_the_first(asked: Asked, number: int) -> str:
    """A judge that prefers what it sees first."""
    return "8 6\nThe first."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Models:
    """A tiny base, and a folder with an adapter that makes it say other things."""
    from tiny_models import random_adapter

    from bellwether.exchange.adapter import adapter_files
    from bellwether.model.base import load_base
    from bellwether.recipe import recipe
    from bellwether.tools.atomic import write_folder_atomic

    adapter = random_adapter(load_base(recipe.Model(path=str(tiny_llama))), dtype="float32", seed=2, alpha=45)
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    write_folder_atomic(folder, adapter_files(adapter))
    return tiny_llama, folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "questions.jsonl", QUESTIONS)


@pytest.fixture
def judged(
    tmp_path: Path,
    questions: Path,
    models: Models,
    bellwether: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> Judged:
    """The command, for a base and an adapter over it."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def judge_at(server: Server | str, *words: object) -> Outcome:
        address = server if isinstance(server, str) else server.address
        given = ("--questions", questions, "--judge", "gpt-4", "--address", address, "--max-new-tokens", 6)
        return bellwether("judge", *models, *given, "--out", tmp_path / "out", *words)

    return judge_at


@pytest.fixture
def judging(tmp_path: Path, questions: Path, models: Models) -> Judging:
    """The function behind it, with few tries and little patience."""

    def judge_at(server: Server, retries: int = 1, timeout: float = 30.0, **settings: Any) -> Judgement:
        a, b = (find_answerer(str(folder)) for folder in models)
        whom = Judge("gpt-4", server.address, timeout=timeout, retries=retries)
        return judge(a, b, questions, JudgeSettings(whom, max_new_tokens=6, **settings), tmp_path / "out")

    return judge_at


def result(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "result.json").read_text())


def answers(tmp_path: Path) -> dict[tuple[str, str], str]:
    return {
        (line["model"], line["question"]): line["answer"] for line in json_lines(tmp_path / "out" / "answers.jsonl")
    }


# What comes out -----------------------------------------------------------------------------------


def test_sums_and_ratio_are_of_what_the_judge_said_of_each_model(judged: Judged, tmp_path: Path) -> None:
    with serving(by_length) as server:
        outcome = judged(server)
    assert (outcome.code, outcome.err) == (0, "")
    given, found = answers(tmp_path), result(tmp_path)
    sums = {name: sum(score(text) for (model, _), text in given.items() if model == name) for name in "AB"}
    assert len(given) == 8
    assert (found["sums"]["a"]["mean"], found["sums"]["b"]["mean"]) == pytest.approx((sums["A"], sums["B"]))
    assert found["sums"]["ratio"]["mean"] == pytest.approx(sums["B"] / sums["A"])
    assert sums["A"] != sums["B"]  # else the test would not see them swapped
    assert len(set(given.values())) > 5
    assert found["orders"] == {"pairs": 4, "inconsistent": 0, "first": 0, "second": 0, "share": 0}
    assert (found["prompt_tokens"], found["reply_tokens"], found["replies"]) == (800, 80, 8)
    assert found["judges"] == ["gpt-4-0613"]
    assert f"{sums['B'] / sums['A']:.3f}" in outcome.out
    assert "The two orders disagree in 0 of 4 pairs of verdicts" in " ".join(outcome.out.split())


def test_every_pair_is_shown_in_both_orders(judged: Judged, tmp_path: Path) -> None:
    with serving(by_length) as server:
        assert judged(server, "--repeats", 2).code == 0
    given = answers(tmp_path)
    wanted = Counter[tuple[str, str]]()
    for question in QUESTIONS:
        a, b = (given[model, question["question_id"]] for model in "AB")
        wanted.update({(a, b): 2})
        wanted.update({(b, a): 2})
    assert Counter(asked.answers for asked in server.asked) == wanted


def test_a_judge_that_prefers_the_first_place_is_found_out_and_favours_nobody(judged: Judged, tmp_path: Path) -> None:
    with serving(of_the_first) as server:
        assert judged(server).code == 0
    found = result(tmp_path)
    assert found["sums"]["a"]["mean"] == found["sums"]["b"]["mean"] == 4 * 7
    assert found["orders"] == {"pairs": 4, "inconsistent": 4, "first": 4, "second": 0, "share": 1}


def test_answers_are_those_of_peft_and_transformers(
    judged: Judged, tmp_path: Path, models: Models, tiny_llama: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bellwether.data.prompts import prompt

    with serving(by_length) as server:
        assert judged(server).code == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), models[1])
    given = answers(tmp_path)
    for question in QUESTIONS:
        text = prompt(question["turns"][0], "", None, tokenizer)
        for name, model in (("A", plain), ("B", tuned)):
            ids = tokenizer(text, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert given[name, question["question_id"]] == tokenizer.decode(out, skip_special_tokens=True).strip()


def test_a_limit_and_categories_choose_questions(judged: Judged, tmp_path: Path) -> None:
    with serving(by_length) as server:
        assert judged(server, "--category", "maths", "--limit", 1).code == 0
    assert [one["question"] for one in result(tmp_path)["judged"]] == ["q1"]
    assert len(server.asked) == 2


def test_requests_run_side_by_side_with_the_same_result(judged: Judged, tmp_path: Path) -> None:
    def after_a_second_one_came(asked: Asked, number: int) -> str:
        wait_for(lambda: server.most > 1, 120)
        return by_length(asked)

    with serving(after_a_second_one_came) as server:
        assert judged(server, "--jobs", 4).code == 0
    assert 2 <= server.most <= 4
    several = result(tmp_path)
    with serving(by_length) as server:
        assert judged(server, "--out", tmp_path / "one").code == 0
    assert server.most == 1
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    assert one["sums"] == several["sums"]


def test_a_temperature_is_sent_where_one_is_given(judged: Judged, tmp_path: Path) -> None:
    with serving(by_length) as server:
        assert judged(server, "--limit", 1).code == 0
        assert judged(server, "--limit", 1, "--temperature", 0.2, "--out", tmp_path / "cool").code == 0
    assert [asked.body.get("temperature") for asked in server.asked] == [None, None, 0.2, 0.2]
    assert {frozenset(asked.body) for asked in server.asked[:2]} == {frozenset({"model", "messages"})}


def test_a_server_that_counts_no_tokens_is_said_to_count_none(judged: Judged, tmp_path: Path) -> None:
    with serving(by_length, usage=False) as server:
        outcome = judged(server, "--limit", 1)
    assert "Spent: not known" in " ".join(outcome.out.split())
    assert result(tmp_path)["prompt_tokens"] is None


# Replies that cannot be read ----------------------------------------------------------------------


def test_a_reply_that_cannot_be_read_is_asked_for_again_with_a_reminder(judged: Judged, tmp_path: Path) -> None:
    malformed = ["I prefer the second one.", "8/10 and 7/10"]

    def script(asked: Asked, number: int) -> str:
        return malformed[number] if number < len(malformed) else by_length(asked)

    with serving(script) as server:
        assert judged(server).code == 0
    assert result(tmp_path)["unreadable"] == 0
    assert len(server.asked) == 8 + 2
    first, second, third = (asked.prompt for asked in server.asked[:3])
    assert second == third != first
    assert second.startswith(first)
    lines = json_lines(tmp_path / "out" / "verdicts.jsonl")
    assert [(line["attempt"], line["reply"]["text"]) for line in lines[:2]] == [(1, malformed[0]), (2, malformed[1])]
    assert [line["scores"] is None for line in lines[:3]] == [True, True, False]


def test_after_three_replies_a_verdict_counts_as_unreadable_and_nothing_is_guessed(
    judged: Judged, tmp_path: Path
) -> None:
    def script(asked: Asked, number: int) -> str:
        return "10 out of 10 for both." if TEXTS[2] in asked.prompt else by_length(asked)

    with serving(script) as server:
        outcome = judged(server)
        assert judged(server).code == 0
    assert len(server.asked) == 6 + 2 * 3
    found = result(tmp_path)
    assert (found["unreadable"], found["verdicts"], found["left_out"]) == (2, 8, ["q2"])
    assert sorted(one["question"] for one in found["judged"]) == ["q0", "q1", "q3"]
    assert "2 of 8 verdicts could not be read after 3 replies" in " ".join(outcome.out.split())
    assert "1 question (q2)" in " ".join(outcome.out.split())


def test_a_judge_that_is_never_understood_ends_without_sums(judged: Judged, tmp_path: Path) -> None:
    with serving(lambda asked, number: "") as server:
        outcome = judged(server)
    assert outcome.code == 0
    assert result(tmp_path)["sums"] is None
    assert "8 of 8 verdicts could not be read" in " ".join(outcome.out.split())


# Servers in trouble -------------------------------------------------------------------------------


def once(trouble: Raw) -> Script:
    """Answer the first request with trouble, the others well."""
    return lambda asked, number: trouble if number == 0 else by_length(asked)


def test_after_a_rate_limit_it_waits_as_long_as_the_server_asks(judged: Judged, tmp_path: Path) -> None:
    with serving(once(failure(429, "slow down", Retry_After="1"))) as server:
        assert judged(server, "--limit", 1).code == 0
    assert len(server.asked) == 3
    assert server.asked[1].time - server.asked[0].time >= 0.95
    assert server.asked[1].body == server.asked[0].body
    assert result(tmp_path)["verdicts"] == 2


@pytest.mark.parametrize("status", [500, 502, 503])
def test_after_a_server_error_it_asks_again(judging: Judging, status: int) -> None:
    with serving(once(failure(status, "oops"))) as server:
        assert judging(server, limit=1).tally.verdicts == 2
    assert len(server.asked) == 3


def test_after_a_time_out_it_asks_again(judging: Judging) -> None:
    with serving(once(Raw(200, "{}", held_back=True))) as server:
        assert judging(server, timeout=3.0, limit=1).tally.verdicts == 2
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (failure(429, "quota exceeded"), "still does not answer after 2 tries (Error code: 429"),
        (failure(503, "loading"), "still does not answer after 2 tries (Error code: 503"),
        (Raw(200, "{}", held_back=True), "did not answer within 3 s, in 2 tries"),
    ],
)
def test_trouble_that_lasts_ends_with_one_sentence_and_the_next_call_goes_on(
    judging: Judging, tmp_path: Path, trouble: Raw, says: str
) -> None:
    with serving(lambda asked, number: by_length(asked) if number < 3 else trouble) as server:
        with pytest.raises(JudgeAway) as raised:
            judging(server, timeout=3.0)
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)
        assert len(json_lines(tmp_path / "out" / "verdicts.jsonl")) == 3
        server.script = by_length
        asked = len(server.asked)
        assert judging(server).tally.verdicts == 8
        assert len(server.asked) - asked == 5


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_it_at_once_and_stays_secret(judged: Judged, tmp_path: Path, status: int) -> None:
    refusal = failure(status, f"Incorrect API key provided: {SECRET}")
    with serving(by_length, models=refusal) as server:
        early = judged(server)
    assert (len(server.asked), server.greeted) == (0, 1)
    with serving(lambda asked, number: refusal) as server:
        late = judged(server)
    assert len(server.asked) == 1
    for outcome in (early, late):
        assert outcome.code == 2
        assert f"refuses the key in OPENAI_API_KEY (Error code: {status}" in outcome.err
        assert outcome.err.count("\n") == 1
        assert SECRET not in outcome.err + outcome.out


def test_without_a_key_a_server_that_wants_one_is_told_of(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(by_length, models=failure(401, "no key")) as server:
        outcome = judged(server)
    assert outcome.code == 2
    assert "wants a key; set OPENAI_API_KEY" in outcome.err


def test_without_a_key_a_server_that_wants_none_is_asked(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(by_length) as server:
        assert judged(server, "--limit", 1).code == 0


def test_an_unknown_model_ends_it_at_once_and_another_may_take_its_place(judged: Judged) -> None:
    with serving(lambda asked, number: failure(404, "The model does not exist")) as server:
        outcome = judged(server)
        assert outcome.code == 2
        assert "does not know the model 'gpt-4'" in outcome.err
        assert len(server.asked) == 1
        server.script = by_length
        assert judged(server, "--judge", "gpt-5").code == 0


def test_one_refused_pair_counts_as_unreadable_and_the_others_are_judged(judged: Judged, tmp_path: Path) -> None:
    def filtered(asked: Asked, number: int) -> str | Raw:
        refused = "Name three colours" in asked.prompt
        return failure(400, f"content filter, says {SECRET}") if refused else by_length(asked)

    with serving(filtered) as server:
        outcome = judged(server)
        assert (outcome.code, outcome.err) == (0, "")
        assert len(server.asked) == 6 + 2 * 3  # as often as any other that cannot be read
        assert judged(server).code == 0
        assert len(server.asked) == 12
    found = result(tmp_path)
    assert (found["verdicts"], found["unreadable"], found["replies"]) == (8, 2, 12)
    assert found["judges"] == ["gpt-4-0613"]
    assert found["prompt_tokens"] is None
    kept = [line["reply"] for line in json_lines(tmp_path / "out" / "verdicts.jsonl") if line["question"] == "q1"]
    assert len(kept) == 6
    assert all("Error code: 400 - " in one["text"] and "content filter, says [OPENAI" in one["text"] for one in kept)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_key_or_a_model_that_is_refused_later_ends_it_at_once(judged: Judged, tmp_path: Path, status: int) -> None:
    with serving(lambda asked, number: failure(status, "no") if number > 2 else by_length(asked)) as server:
        assert judged(server).code == 2
    assert len(json_lines(tmp_path / "out" / "verdicts.jsonl")) == 3


def test_a_refusal_of_the_very_first_request_ends_it_at_once(judged: Judged) -> None:
    with serving(lambda asked, number: failure(400, "context too long")) as server:
        outcome = judged(server)
    assert (outcome.code, len(server.asked)) == (2, 1)
    assert "refuses the request (Error code: 400 - {'error': {'message': 'context too long'" in outcome.err


def test_nobody_at_the_address_is_noticed_before_any_answer_is_made(judged: Judged, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        outcome = judged(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert outcome.code == 1
    assert "cannot be reached" in outcome.err
    assert not (tmp_path / "out" / "answers.jsonl").exists()


@pytest.mark.parametrize(
    "odd",
    [
        Raw(200, "<html>Welcome</html>", {"Content-Type": "text/html"}),
        Raw(200, "{"),
        Raw(200, "{}"),
        Raw(200, '{"choices": []}'),
        Raw(200, '{"choices": [{"message": null}]}'),
        Raw(200, "[1, 2]"),
    ],
)
def test_what_is_no_completion_is_refused(judging: Judging, odd: Raw) -> None:
    with serving(lambda asked, number: odd) as server, pytest.raises(JudgeError, match="but not as an OpenAI-compat"):
        judging(server, retries=0)


# Secrets, strangers' text -------------------------------------------------------------------------


def test_the_key_is_sent_and_stands_nowhere(judged: Judged, tmp_path: Path) -> None:
    def script(asked: Asked, number: int) -> str:
        return "what?" if number == 0 else by_length(asked) + f"\nYour key is {asked.headers['Authorization']}."

    with serving(script) as server:
        outcome = judged(server)
    assert {asked.headers["Authorization"] for asked in server.asked} == {f"Bearer {SECRET}"}
    assert SECRET not in outcome.out + outcome.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "out" / "verdicts.jsonl" in files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert "Your key is Bearer [OPENAI_API_KEY]." in (tmp_path / "out" / "verdicts.jsonl").read_text()


def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(judged: Judged, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-“quoted”-key")
    with serving(by_length) as server:
        outcome = judged(server)
    assert outcome.code == 2
    assert "OPENAI_API_KEY has characters that no key has" in outcome.err
    assert "quoted" not in outcome.err


@pytest.mark.parametrize("address", ["https://me:hunter2@host/v1", "https://host/v1?key=hunter2"])
def test_an_address_with_a_secret_is_refused_without_being_shown(judged: Judged, address: str) -> None:
    outcome = judged(address)
    assert outcome.code == 2
    assert "give the key in OPENAI_API_KEY instead" in outcome.err
    assert "hunter2" not in outcome.err + outcome.out


@pytest.mark.parametrize("address", ["host/v1", "ftp://host", "http://", "http://[::1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(JudgeError, match="which is no URL"):
        find_judge("gpt-4", address, None)


def test_without_an_address_that_of_the_environment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert find_judge("gpt-4", None, None).address == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1/")
    assert find_judge("gpt-4", None, None).address == "http://127.0.0.1:1/v1"


def test_what_a_server_and_a_file_of_questions_say_cannot_steer_a_terminal_or_a_page(
    judged: Judged, questions: Path, tmp_path: Path
) -> None:
    rows = [
        {"question_id": f"<script>{number}\x1b[2J", "category": f"<b>|{number}\u202e", "turns": ["Why?"]}
        for number in (1, 2)
    ]
    write_rows(questions, rows)

    def script(asked: Asked, number: int) -> str | Raw:
        return (
            failure(404, "\x1b[31mred\u202e") if number > 4 else "\x1b[31m8 7" if number == 0 else "8 7\n\ud800\x1b[2J"
        )

    with serving(script) as server:
        outcome = judged(server)
        refused = judged(server, "--repeats", 2)
    assert outcome.code == 0
    assert refused.code == 2
    shown = outcome.out + refused.out + refused.err
    assert not {"\x1b", "\u202e"} & set(shown)
    page = (tmp_path / "out" / "result.md").read_text()
    assert "<script>" not in page
    assert "&lt;b&gt;\\|1" in page
    assert json_lines(tmp_path / "out" / "verdicts.jsonl")[1]["reply"]["text"] == "8 7\n\ud800\x1b[2J"


def test_without_the_package_it_says_how_to_install_it(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "openai" else find(name, *more)
    )
    outcome = judged("http://127.0.0.1:1/v1")
    assert outcome.code == 2
    assert "pip install -e '.[judge]'" in outcome.err


# Going on -----------------------------------------------------------------------------------------


def test_a_finished_judgement_asks_nobody(judged: Judged, tmp_path: Path) -> None:
    with serving(by_length) as server:
        assert judged(server).code == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.js*")}
    outcome = judged(server.address)  # where nobody is any more
    assert (outcome.code, outcome.err) == (0, "")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.js*")} == kept


def test_without_a_judge_answers_are_kept_and_one_who_comes_later_goes_on_from_them(
    judged: Judged, questions: Path, tmp_path: Path, models: Models, bellwether: Command
) -> None:
    words = ("judge", *models, "--questions", questions, "--max-new-tokens", 6, "--out", tmp_path / "out")
    alone = bellwether(*words)
    assert (alone.code, alone.err) == (0, "")
    assert "The answers of both to 4 questions are in" in " ".join(alone.out.split())
    kept = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()
    with serving(by_length) as server:
        assert judged(server).code == 0
        assert len(server.asked) == 8
    facts = (tmp_path / "out" / "judgement.json").read_bytes()
    assert bellwether(*words).code == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == kept
    assert (tmp_path / "out" / "judgement.json").read_bytes() == facts  # what the verdicts rest on stays said
    refused = bellwether(*words, "--address", "http://127.0.0.1:1/v1")
    assert refused.code != 0
    assert "--address is given, but without --judge nobody is asked" in refused.err


def test_more_repeats_and_more_questions_are_added_to_what_is_there(judged: Judged, tmp_path: Path) -> None:
    with serving(by_length) as server:
        assert judged(server, "--limit", 2).code == 0
        assert judged(server, "--limit", 3, "--repeats", 2).code == 0
        assert len(server.asked) == 3 * 2 * 2
        assert result(tmp_path)["verdicts"] == 12
        assert judged(server, "--limit", 1).code == 0
    assert len(server.asked) == 12
    assert result(tmp_path)["verdicts"] == 2
    assert len(answers(tmp_path)) == len(json_lines(tmp_path / "out" / "answers.jsonl")) == 6


def test_a_folder_of_another_judgement_is_refused(
    judged: Judged, questions: Path, tmp_path: Path, models: Models, bellwether: Command
) -> None:
    with serving(by_length) as server:
        assert judged(server, "--limit", 1).code == 0
        others = {
            "judge": ["--judge", "gpt-5"],
            "temperature": ["--temperature", 1],
            "max_new_tokens": ["--max-new-tokens", 5],
        }
        for fact, words in others.items():
            outcome = judged(server, "--limit", 1, *words)
            assert outcome.code == 2
            assert f"holds a judgement with another {fact};" in outcome.err
        given = ("--questions", questions, "--judge", "gpt-4", "--address", server.address, "--max-new-tokens", 6)
        outcome = bellwether("judge", models[1], models[1], *given, "--out", tmp_path / "out")
        assert "holds a judgement with another adapter of A;" in outcome.err
        write_rows(questions, QUESTIONS[:2])
        assert "holds a judgement with another questions;" in judged(server, "--limit", 1).err
        assert len(server.asked) == 2
    with serving(by_length) as server:
        assert "holds a judgement with another" in judged(server, "--limit", 1).err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    assert "is not empty" in judged(server, "--out", tmp_path / "mine").err


def test_a_killed_judgement_goes_on_where_it_was(
    questions: Path, tmp_path: Path, models: Models, judged: Judged
) -> None:
    def stuck(asked: Asked, number: int) -> str | Raw:
        return by_length(asked) if number < 5 else Raw(200, "{}", held_back=True)

    verdicts = tmp_path / "out" / "verdicts.jsonl"
    with serving(stuck) as server:
        words = ["--questions", questions, "--judge", "gpt-4", "--address", server.address, "--max-new-tokens", "6"]
        command = ["judge", *models, *words, "--out", tmp_path / "out"]
        process = forked.start(*command)
        wait_for(lambda: len(server.asked) == 6 or process.poll() is not None, 300)
        process.kill()
        process.wait()
        before = verdicts.read_bytes()
        assert before.count(b"\n") == 5
        with verdicts.open("ab") as file:
            file.write(b'{"question": "q2", "swapped": tr')
        made = (tmp_path / "out" / "answers.jsonl").read_bytes()
        server.script = by_length
        assert judged(server).code == 0
        assert len(server.asked) == 6 + 3
    assert verdicts.read_bytes().startswith(before)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == made
    assert result(tmp_path)["verdicts"] == len(json_lines(verdicts)) == 8


def test_an_interrupt_ends_it_at_once_and_says_how_to_go_on(questions: Path, tmp_path: Path, models: Models) -> None:
    with serving(lambda asked, number: Raw(200, "{}", held_back=True)) as server:
        words = ["--questions", questions, "--judge", "gpt-4", "--address", server.address, "--max-new-tokens", "6"]
        process = forked.start("judge", *models, *words, folder=tmp_path)
        wait_for(lambda: server.asked or process.poll() is not None, 300)
        process.send_signal(signal.SIGINT)
        # It waits neither for the reply nor for its time to be up.
        wait_for(lambda: process.poll() is not None, TIMEOUT / 2)
    err = process.communicate()[1]
    assert process.returncode == 130
    said = err.removeprefix("bellwether: interrupted; answers and verdicts are kept in judgement; go on with: ")
    assert shlex.split(said) == ["bellwether", "judge", *map(str, [*models, *words])]


def wait_for(happened: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


# Two bases, chats ---------------------------------------------------------------------------------


def test_models_of_different_bases_are_judged_and_a_shared_base_is_loaded_once(
    tmp_path: Path,
    questions: Path,
    tiny_llama: Path,
    models: Models,
    bellwether: Command,
    monkeypatch: Any,
) -> None:
    from tiny_models import tiny_folder

    from bellwether.model import base

    loaded: list[str] = []
    load = base.load_base

    def counted(settings: Any) -> Any:
        loaded.append(settings.path)
        return load(settings)

    monkeypatch.setattr(base, "load_base", counted)
    other = tiny_folder("gpt2", tmp_path / "other")
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": chat * 2}])
    with serving(by_length) as server:
        given = ("--judge", "m", "--address", server.address, "--max-new-tokens", 2)
        assert bellwether("judge", *models, "--questions", questions, *given).code == 0
        assert len(loaded) == 1
        outcome = bellwether("judge", other, models[1], "--questions", chats, *given, "--out", "two")
        assert (outcome.code, len(loaded)) == (2, 1 + 1)  # 96 positions are too few
        assert "chats.jsonl:1: this question takes" in outcome.err
        outcome = bellwether("judge", tiny_llama, models[1], "--questions", chats, *given, "--out", "chat")
        assert (outcome.code, outcome.err) == (0, "")
    assert "user: Hi.\n\nassistant: Hello.\n\nuser: Hi." in server.asked[-1].prompt


# A real server ------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}{{ '<s>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template that has learned to answer everything with ``8 6``."""
    import torch
    from tiny_models import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        reply = torch.tensor([[1, *tokenizer("8 6", add_special_tokens=False)["input_ids"], 2]])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for _ in range(150):
            before = torch.randint(3, 300, (8, int(torch.randint(1, 40, ()))))
            ids = torch.cat([before, reply.expand(8, -1)], dim=1)
            labels = ids.clone()
            labels[:, : before.shape[1] + 1] = -100
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp("judge") / "model"
    model.save_pretrained(folder)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real_server(judge_folder: Path) -> Iterator[str]:
    """``transformers serve`` with that model, as a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(judge_folder), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]

    def serve() -> None:
        from transformers.cli.transformers import main

        sys.argv = ["transformers", *words]
        main()

    process = forked.Forked(serve)
    try:

        def healthy() -> bool:
            assert process.poll() is None, process.communicate()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    return True
            except OSError:
                return False

        wait_for(healthy, 300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def test_a_real_server_judges(
    real_server: str,
    judge_folder: Path,
    questions: Path,
    tmp_path: Path,
    models: Models,
    monkeypatch: Any,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    given = ("--judge", judge_folder, "--address", real_server, "--max-new-tokens", 6, "--limit", 2, "--jobs", 2)
    outcome = call("judge", *models, "--questions", questions, *given, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    found = result(tmp_path)
    assert (found["sums"]["a"]["mean"], found["sums"]["b"]["mean"]) == (14, 14)
    assert (found["orders"]["pairs"], found["orders"]["first"], found["unreadable"]) == (2, 2, 0)
    assert found["reply_tokens"] == 4 * 4
    assert found["prompt_tokens"] > 4 * 200
    wrong = call(
        "judge", *models, "--questions", questions, "--judge", "another", "--address", real_server,
        "--max-new-tokens", 6, "--out", tmp_path / "wrong",
    )  # fmt: skip
    assert wrong.code == 2
    assert "refuses the request (Error code: 400" in wrong.err
