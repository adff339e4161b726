"""The web page for talking, in a real browser, and what it tells other machines."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import forked
import pytest
from browser import DESKTOP, PHONE, browser, console, foreign, missing, picture, resize
from conftest import Command
from ui_server import serving

from bellwether.ask.talk import open_talk

pytest.importorskip("fastapi", reason="fastapi is not installed; pip install -e '.[ui]'")

# Where several processes share the tests, one of them takes all of these: they share a server and a browser.
pytestmark = pytest.mark.xdist_group("browser")

EVIL = (
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'></textarea></script>"
    "<svg onload='window.hacked=3'> **bold** \u202eright to left\u202c שלום [x](javascript:window.hacked=4)"
)


@pytest.fixture(scope="module")
def page(tiny_comparison):
    """The address of a page that a process of its own serves."""
    done, said, end = forked.start("ui", tiny_comparison, "--port", 0), "", time.monotonic() + 300
    try:
        while not said.endswith("\n") and done.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            said, _ = done.said()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, done.said()
        yield found[0]
    finally:
        done.send_signal(signal.SIGINT)
        assert (done.wait(), *done.said()) == (0, said, ""), "the page does not end quietly"


class Tab:
    """The page as somebody sees and uses it."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        parts = ("#instruction", "#ask", "#who input", "#examples", "#conversation summary", ".answer")
        self.until(lambda: all(map(self.find, parts)), "the page does not open")

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, condition, what, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(Exception):  # a field that is being drawn anew
                if found := condition():
                    return found
            time.sleep(0.02)
        raise AssertionError(what)

    def write(self, name, text):
        """Put a text into a field as pasting does, since a driver's keys know few scripts."""
        (field,) = self.find(f"#{name}")
        self.driver.execute_script(
            "const [field, text] = arguments, kind = Object.getPrototypeOf(field);"
            "Object.getOwnPropertyDescriptor(kind, 'value').set.call(field, text);"
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            field,
            text,
        )

    def value(self, name):
        (field,) = self.find(f"#{name}")
        return field.get_property("value" if field.tag_name == "textarea" else "textContent")

    def press(self, name):
        (button,) = self.until(lambda: self.find(f"#{name}"), f"there is no {name}")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        self.until(button.is_enabled, f"{name} cannot be pressed")
        button.click()

    def answers(self):
        """The answers by who gave them."""
        boxes = [box for box in self.find(".answer") if box.is_displayed()]
        labels = [box.find_element("css selector", "h2").text for box in boxes]
        texts = [box.find_element("css selector", ".text").get_property("textContent") for box in boxes]
        return dict(zip(labels, texts, strict=True))

    def ask(self, text, context=""):
        """Ask, and return the answers when they are there."""
        self.write("instruction", text)
        self.write("context", context)
        self.press("ask")
        return self.until(self.finished, "no answers")

    def open_settings(self):
        self.find("#settings summary")[0].click()
        self.until(self.find("#seed")[0].is_displayed, "they stay closed")

    def finished(self):
        answers = self.answers()
        over = self.find("#ask")[0].is_enabled()
        return answers if over and answers and all("token" in label for label in answers) else None

    def problem(self):
        shown = self.find("#problem")[0].is_displayed
        return self.until(lambda: shown() and self.value("problem"), "nothing is said to be wrong")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads):
    """One browser for all tests of the page, since it takes a while to start."""
    if reason := missing():
        pytest.skip(reason)
    with browser(downloads=downloads) as driver:
        yield driver


@pytest.fixture
def tab(driver, page):
    """The page, opened anew."""
    return Tab(driver, page)


def test_several_answer_one_question_side_by_side(tab):
    answers = tab.ask("Task 1?", "Note 1.")
    names = [label.split(" · ")[0] for label in answers]
    assert names == ["base", "local, client-01", "federated"]
    assert all(answers.values())
    boxes = [box.rect for box in tab.find(".answer") if box.is_displayed()]
    assert len({box["y"] for box in boxes}) == 1
    assert len({box["x"] for box in boxes}) == 3


def test_answers_are_those_of_the_terminal(tab, bellwether: Command, tiny_comparison, monkeypatch):
    import io

    shown = tab.ask("Task 2?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Task 2?\n/save talk.json\n"))
    assert bellwether("chat", tiny_comparison).code == 0
    (exchange,) = json.loads(Path("talk.json").read_text())["exchanges"]
    assert list(shown.values()) == [answer["text"] for answer in exchange["answers"]]


def test_answers_grow_while_they_are_made(tab):
    tab.open_settings()
    tab.write("max_new_tokens", "1024")
    tab.write("instruction", "Task 3?")
    # The page watches itself: a driver on a busy machine may look only before the first token and after the last.
    tab.driver.execute_script(
        "window.lengths = []; setInterval(() => {"
        "  const shown = [...document.querySelectorAll('.answer .text')].map(field => field.textContent.length);"
        "  if (shown.length) window.lengths.push(shown)}, 5)"
    )
    tab.press("ask")
    final = {len(text) for text in tab.until(tab.finished, "no answers").values()}
    seen = tab.driver.execute_script("return window.lengths")
    partial = [length for shown in seen for length in shown if 0 < length < max(final)]
    assert len(set(partial) - final) > 6, "answers were hardly ever seen unfinished"


def test_stop_ends_an_answer_and_the_next_can_be_asked(tab):
    tab.open_settings()
    tab.write("max_new_tokens", "1024")
    tab.write("instruction", "Task 3?")
    tab.press("ask")
    tab.until(lambda: any(tab.answers().values()), "no answer begins")
    tab.press("stop")
    tab.until(tab.find("#ask")[0].is_enabled, "nothing can be asked after a stop")
    before = tab.answers()
    time.sleep(0.5)
    assert tab.answers() == before, "the answer goes on"
    tab.write("max_new_tokens", "5")
    assert tab.ask("Task 1?")


@pytest.mark.parametrize(
    ("text", "context", "words"),
    [
        ("", "", "The instruction is empty"),
        ("   ", "", "The instruction is empty"),
        ("Why? " * 600, "", "512 positions"),
        ("Clear\u001b[2J", "", "control character U+001B"),
        ("Why?", "a\u0000b", "control character U+0000"),
        ("Why?</s>", "", "special token"),
    ],
)
def test_bad_questions_are_refused_in_a_sentence_and_the_next_can_be_asked(tab, text, context, words):
    tab.write("instruction", text)
    tab.write("context", context)
    tab.press("ask")
    assert words in tab.problem()
    assert all(tab.ask("Task 1?").values())
    assert not [one for one in tab.find("#problem") if one.is_displayed()]


def test_a_refused_question_leaves_the_answers_of_the_one_before(tab):
    before = tab.ask("Task 1?")
    tab.write("instruction", "")
    tab.press("ask")
    assert tab.problem()
    assert tab.answers() == before


def test_a_setting_that_is_empty_is_refused(tab):
    tab.open_settings()
    tab.write("seed", "")
    tab.write("instruction", "Task 1?")
    tab.press("ask")
    assert "give every one a number" in tab.problem()


def test_markup_is_shown_as_text_and_never_run(tab):
    answers = tab.ask(EVIL, EVIL)
    assert all(answers.values())
    tab.find("#conversation summary")[0].click()
    tab.until(lambda: EVIL in tab.value("said"), "the conversation does not show what was asked")
    assert tab.driver.execute_script("return window.hacked") is None
    assert not tab.find("img[src=x], svg[onload]")


def choose_example(tab, number):
    """Choose from the list of examples, and return how the choice is listed."""
    from selenium.webdriver.support.ui import Select

    field = Select(tab.find("#examples")[0])
    assert len(field.options) > 1, "there are no examples"
    field.select_by_index(number)
    return field.options[number].get_property("textContent")


def test_examples_fill_the_fields_and_show_the_answer_in_the_data(tab):
    label = choose_example(tab, 1)
    tab.until(lambda: tab.value("instruction"), "the example is not taken")
    assert label.endswith(tab.value("instruction"))
    tab.press("ask")
    tab.until(tab.finished, "no answers")
    category = label.split(":")[0]
    assert tab.value("reference").startswith(category[:4])


def test_the_conversation_can_be_downloaded_and_forgotten(tab, downloads):
    first, second = tab.ask("Task 1?"), tab.ask("Wie heißt </script>?", "Köln")
    tab.find("#conversation summary")[0].click()
    tab.press("download")
    path = downloads / "conversation.json"
    tab.until(path.is_file, "nothing is downloaded")
    exchanges = json.loads(path.read_text())["exchanges"]
    assert [one["question"]["instruction"] for one in exchanges] == ["Task 1?", "Wie heißt </script>?"]
    for exchange, shown in zip(exchanges, (first, second), strict=True):
        assert [answer["text"] for answer in exchange["answers"]] == list(shown.values())
    tab.press("clear")
    tab.until(lambda: not tab.value("said"), "the conversation is still there")
    tab.ask("Task 3?")
    tab.until(lambda: tab.value("said").startswith("1. Task 3?"), "the conversation does not begin anew")


def test_who_answers_can_be_chosen(tab):
    for name in ("local, client-01", "federated"):
        next(chip for chip in tab.find(".chip") if chip.text == name).click()
    tab.until(lambda: list(tab.answers()) == ["base"], "those who were taken away are still there")
    assert [label.split(" · ")[0] for label in tab.ask("Task 1?")] == ["base"]


def test_enter_asks_and_with_shift_it_breaks_the_line(tab):
    from selenium.webdriver import Keys

    (field,) = tab.find("#instruction")
    field.send_keys("Task", Keys.SHIFT, Keys.ENTER, Keys.NULL, "1?")
    assert tab.value("instruction") == "Task\n1?"
    assert not any(tab.answers().values())
    field.send_keys(Keys.ENTER)
    assert tab.until(tab.finished, "no answers")
    assert tab.value("instruction") == "Task\n1?"


def test_taking_no_example_empties_the_fields(tab):
    choose_example(tab, 1)
    tab.until(lambda: tab.value("instruction"), "the example is not taken")
    choose_example(tab, 0)
    tab.until(lambda: not tab.value("instruction"), "the example is still there")


def test_an_example_that_was_changed_shows_no_answer_of_the_data(tab):
    choose_example(tab, 1)
    tab.ask("Something else?")
    assert not tab.find("#data")[0].is_displayed()


def test_every_field_and_button_has_a_name(tab):
    tab.open_settings()
    tab.find("#conversation summary")[0].click()
    fields = [one for one in tab.find("input, textarea, select, button") if one.is_displayed()]
    assert len(fields) > 14
    assert all(field.accessible_name for field in fields)
    assert tab.find("[role=alert]#problem")
    assert tab.find("[role=status]#status")


def test_of_many_six_answer_at_most_and_names_can_be_searched(driver, talk):
    names = ["base", "federated", *(f"local, client-{number:02}" for number in range(1, 13))]
    many = dataclasses.replace(
        talk,
        answerers={name: dataclasses.replace(talk.answerers["federated"], name=name) for name in names}
        | {"base": talk.answerers["base"]},
        templates=dict.fromkeys(names, talk.templates["base"]),
    )
    with serving(many) as port:
        tab = Tab(driver, f"http://127.0.0.1:{port}")
        chips = {chip.text: chip for chip in tab.find(".chip")}
        assert list(chips) == names
        tab.write("filter", "CLIENT-0")
        tab.until(
            lambda: [name for name in names if chips[name].is_displayed()] == names[2:11], "they are not searched"
        )
        tab.write("filter", "")
        for name in names[-2:]:
            chips[name].click()
        assert len(tab.find("#who input:checked")) == 6
        assert len(tab.find("#who input:disabled")) == len(names) - 6
        assert [label.split(" · ")[0] for label in tab.ask("Task 1?")] == [*names[:4], *names[-2:]]


def test_a_page_for_other_machines_opens_with_the_token_of_its_address(driver, talk):
    with serving(talk, host=None, token="a-token-of-a-test") as port:
        driver.get(f"http://127.0.0.1:{port}/")
        assert "wants its token" in driver.page_source
        tab = Tab(driver, f"http://127.0.0.1:{port}/?token=a-token-of-a-test")
        assert all(tab.ask("Task 1?").values())
        assert driver.current_url == f"http://127.0.0.1:{port}/", "the token stays in sight"
        assert driver.execute_script("return document.cookie") == "", "scripts can read the token"
        driver.refresh()
        assert all(tab.ask("Task 1?").values())


def test_a_server_that_has_gone_is_said_to_be_gone(driver, talk):
    with serving(talk) as port:
        tab = Tab(driver, f"http://127.0.0.1:{port}")
    tab.write("instruction", "Task 1?")
    tab.press("ask")
    assert "is it still running?" in tab.problem()


def test_the_page_asks_nothing_of_other_machines_and_says_nothing_of_errors(driver, page):
    driver.get("about:blank")
    console(driver), foreign(driver)  # of the page before
    Tab(driver, page).ask("Task 1?")
    assert foreign(driver) == []
    assert [line for line in console(driver) if line.startswith("SEVERE")] == []


@pytest.fixture
def phone(driver, page):
    """The page, opened anew on a phone."""
    resize(driver, *PHONE)
    yield Tab(driver, page)
    resize(driver, *DESKTOP)


def test_the_page_fits_a_phone(phone, tmp_path):
    tab, chromium = phone, phone.driver
    tab.ask("Task 1?")
    boxes = [box.rect for box in tab.find(".answer") if box.is_displayed()]
    assert len({box["y"] for box in boxes}) == 3, "answers stand below each other"
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0] for box in boxes)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
    assert picture(chromium, tmp_path / "phone.png").stat().st_size > 1000


# Without a browser --------------------------------------------------------------------------------


def test_a_name_of_another_machine_is_not_answered(page):
    request = urllib.request.Request(page, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=120)


@contextlib.contextmanager
def served(folder, talk, host, monkeypatch):
    """A page at some address of this machine, as the command serves it, and its port."""
    from bellwether.ask import ui

    said, servers, make_server = [], [], ui.make_server
    monkeypatch.setattr(ui, "open_talk", lambda *_, **__: talk)
    monkeypatch.setattr(ui, "make_server", lambda app: servers.append(make_server(app)) or servers[0])
    thread = threading.Thread(target=ui.serve, args=[folder], kwargs={"host": host, "port": 0, "say": said.append})
    thread.start()
    try:
        end = time.monotonic() + 120
        while not (servers and servers[0].started) and time.monotonic() < end:
            time.sleep(0.01)
        yield int(re.search(r"http://\S+:(\d+) \(", said[0])[1])
    finally:
        servers[0].should_exit = True
        thread.join(120)
    assert len(said) == 1, "what this machine alone can reach needs no warning"


@pytest.fixture(scope="module")
def talk(tiny_run):
    return open_talk(tiny_run[0])


def status(address, port, named):
    """What a request that names a host gets from the server at an address."""
    connection = http.client.HTTPConnection(address, port, timeout=120)
    with contextlib.closing(connection):
        connection.request("GET", "/", headers={"Host": named})
        return connection.getresponse().status


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_every_address_of_this_machine_alone_answers_to_this_machines_names_only(
    tiny_run, talk, host, monkeypatch, capfd
):
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with served(tiny_run[0], talk, host, monkeypatch) as port:
        good = [f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "[::1]", f"127.0.0.2:{port}", "LOCALHOST"]
        bad = ["evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example",
               "[::1].evil.example", "[::1", "192.0.2.7", "[2001:db8::1]:80", ""]  # fmt: skip
        assert {name: status(host, port, name) for name in good} == dict.fromkeys(good, 200)
        assert {name: status(host, port, name) for name in bad} == dict.fromkeys(bad, 400)
    assert capfd.readouterr() == ("", ""), "the page does not end quietly"


def test_every_answer_of_the_server_carries_the_policy(page):
    with urllib.request.urlopen(page, timeout=120) as answer:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "fonts.googleapis.com/css" not in answer.read().decode()


def test_an_address_that_is_taken_or_wrong_is_refused_in_a_sentence(bellwether: Command, tiny_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = bellwether("ui", tiny_run[0], "--port", port)
    assert outcome.code == 2
    assert outcome.err.startswith(f"bellwether: command line: no page can be served at 127.0.0.1, port {port} (")
    assert bellwether("ui", tiny_run[0], "--host", "no such host", "--port", 0).code == 2


def test_without_what_serves_pages_the_command_says_how_to_get_it(bellwether: Command, tiny_run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = bellwether("ui", tiny_run[0])
    assert outcome.code == 2
    assert "pip install -e '.[ui]'" in outcome.err


def test_a_page_for_other_machines_comes_with_a_token_and_a_warning(tiny_run, monkeypatch):
    from bellwether.ask import ui

    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    said = []
    for _ in range(2):
        ui.serve(tiny_run[0], host="0.0.0.0", port=0, say=said.append)
    assert said[0].startswith("Talk at http://0.0.0.0:")
    assert "everybody who can reach this address" in said[1]
    first, second = (re.search(r":\d+/\?token=([\w-]{43}) \(Ctrl-C ends\)\.$", text)[1] for text in said[::2])
    assert first != second
