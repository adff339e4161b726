"""What a person sees while a run goes on, the table at its end, and what trackers get."""

import io
import math
import re
import sys
import types
from dataclasses import replace

import pytest
from rich.console import Console

from bellwether.errors import RecipeError
from bellwether.exchange.records import (
    ClientFailed,
    ClientFinished,
    ClientRecord,
    Evaluated,
    EvaluationRecord,
    Expected,
    Note,
    RoundFinished,
    RoundRecord,
    RoundStarted,
    RunFinished,
    RunStarted,
)
from bellwether.exchange.scores import Totals
from bellwether.recipe.recipe import Recipe
from bellwether.tell.live import sparkline, view, watching
from bellwether.tell.narrate import plain_lines, summary, tell_all, write_log
from bellwether.tell.status import RunStatus
from bellwether.tell.trackers import check_trackers, open_trackers, scalars
from bellwether.tools.progress import Advanced
from bellwether.tools.words import byte_size, clean, duration

EVIL = "evil\x1b[2J[bold]\r\n\u202e:smile:"
STARTED = RunStarted("default", "runs/default-1", 4, 0, 10, 2)
BASE = EvaluationRecord(0, "test", {"qa": Totals(10, 100, 300.0, 10, 1.0, 0), EVIL: Totals(10, 100, 100.0)}, 1.0)
FINAL = EvaluationRecord(2, "test", {"qa": Totals(10, 100, 200.0, 10, 4.0, 5), EVIL: Totals(10, 100, 150.0)}, 1.0)


def a_round(number, loss=2.0, **changes):
    client = ClientRecord("a", 30, 30, 600, loss, 1.5)
    record = RoundRecord(
        number, ("a", EVIL), (client,), {EVIL: "holds [red]NaN\x07"}, 1e-3, loss, 30, 30, 600, 2_500_000, 1500,
        {"train": 2.0}, 2.0, "f" * 64,
    )  # fmt: skip
    return replace(record, **changes)


def events():
    yield STARTED
    yield Note("The column 'source' is not used.")
    yield Evaluated(BASE)
    for number in (1, 2):
        record = a_round(number, 3.0 - number)
        yield RoundStarted(number, record.cohort)
        yield ClientFinished(number, record.clients[0])
        yield ClientFailed(number, EVIL, record.left_out[EVIL])
        if number == 2:
            yield Evaluated(FINAL)
        yield RoundFinished(record)
    yield Note("Look\nhere", warning=True)
    yield RunFinished(75.0)


class Clock:
    """A clock that goes on by a second whenever it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines_of(told):
    lines, clock = [], Clock()
    watcher = plain_lines(lines.append, clock)
    for event in told:
        clock.now += 1
        watcher(event)
    return lines


# Plain lines --------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_one_line_per_round_and_evaluation():
    assert lines_of(events()) == [
        "run default begins in runs/default-1: 4 rounds, 2 of 10 clients in each",
        "The column 'source' is not used.",
        "test of the untuned base: loss 2.000, ROUGE-L 10.0 %, exact 0.0 % (20 rows)",
        "round 1 of 4: loss 2.0000, 1 of 2 clients, 30 rows, 15 rows/s, 1.5 kB up, 2.5 MB down; about 9 s left",
        "  left out: evil?[2J[bold]???:smile:: holds [red]NaN?",
        "test after round 2: loss 2.000 -> 1.750, ROUGE-L 10.0 % -> 40.0 %, exact 0.0 % -> 50.0 % (20 rows)",
        "round 2 of 4: loss 1.0000, 1 of 2 clients, 30 rows, 15 rows/s, 1.5 kB up, 2.5 MB down; about 7 s left",
        "  left out: evil?[2J[bold]???:smile:: holds [red]NaN?",
        "warning: Look?here",
        "run ends after 1:15",
    ]


def test_plain_lines_hold_no_control_codes_even_where_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = io.StringIO()
    with watching(Console(file=output, width=30)) as watcher:
        for event in events():
            watcher(event)
    text = output.getvalue()
    assert not [mark for mark in text if ord(mark) < 32 and mark != "\n"]
    assert len(text.splitlines()) == 10


def test_a_character_that_the_output_lacks_is_escaped_and_does_not_end_the_run():
    raw = io.BytesIO()
    with watching(Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))) as watcher:
        watcher(Note("信息 é"))
    assert raw.getvalue() == b"\\u4fe1\\u606f \\xe9\n"


def test_a_failed_round_says_why_and_that_nothing_changed():
    lines = lines_of([STARTED, RoundFinished(a_round(1, failure="1 of 2 answered"))])
    assert lines[1].startswith("round 1 of 4 failed, the adapter stays as it was: 1 of 2 answered")


def test_a_run_that_goes_on_says_so():
    assert "goes on after round 3" in lines_of([replace(STARTED, done=3)])[0]


def test_the_log_appends_lines_with_their_time(tmp_path):
    for _ in range(2):
        with write_log(tmp_path / "log.txt") as log:
            tell_all([log, lambda event: None])(Note("x \ud800"))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ x \?", lines[1])


# The live view ------------------------------------------------------------------------------------


def shown(told, width=80, height=24, encoding="utf-8"):
    """Return what the live view shows after each event, as plain text."""
    raw, frames = io.BytesIO(), []
    console = Console(
        file=io.TextIOWrapper(raw, encoding=encoding, write_through=True),
        width=width,
        height=height,
        force_terminal=True,
        color_system=None,
        legacy_windows=False,
    )
    clock = Clock()
    status = RunStatus(clock=clock)
    for event in told:
        clock.now += 1
        status.take(event)
        with console.capture() as capture:
            console.print(view(status, width, height, console.options.ascii_only))
        frames.append(capture.get())
    return frames


def test_the_live_view_shows_rounds_clients_speed_loss_scores_and_remaining_time():
    frame = shown([event for event in events() if not isinstance(event, RunFinished)])[-2]
    assert "round 2 of 4" in frame
    assert "about 7 s left" in frame
    assert "training loss 1.000 █▁" in frame
    assert "15 rows/s, 300 tokens/s" in frame
    assert "test, round 2:  loss 2.000→1.750  ROUGE-L 10.0→40.0 %  exact 0.0→50.0 %" in frame
    assert "✓ a" in frame
    assert "loss 1.000, 30 rows, 1.5 s" in frame
    assert "left out: holds [red]NaN?" in frame


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (40, 12), (20, 5), (10, 3)])
def test_the_live_view_fits_its_terminal_and_holds_no_foreign_control_codes(width, height):
    for frame in shown(events(), width, height):
        assert not [mark for mark in frame if ord(mark) < 32 and mark != "\n"]
        assert "\u202e" not in frame
        assert max(map(len, frame.splitlines())) <= width
        if width >= 40:
            assert len(frame.splitlines()) <= height


def test_a_large_cohort_is_summed_up():
    cohort = tuple(f"client-{number:03d}" for number in range(100))
    told = [STARTED, RoundStarted(1, cohort)]
    told += [ClientFinished(1, ClientRecord(name, 5, 5, 50, 1.0, 0.1)) for name in cohort[:60]]
    frame = shown(told)[-1]
    assert len(frame.splitlines()) <= 24
    assert "60 done, 0 left out, 40 asked" in frame
    assert "✓ client-059" in frame
    assert "· client-060" in frame


def test_a_terminal_without_unicode_gets_ascii():
    told = [*events()][:-1]
    told.insert(4, Evaluated(replace(BASE, part="信")))
    for frame in shown(told, encoding="ascii"):
        assert frame.isascii(), frame


def test_the_live_view_is_drawn_in_place_and_leaves_notes_above_it():
    output = io.StringIO()
    console = Console(file=output, width=80, height=24, force_terminal=True, color_system=None)
    with watching(console, live=True) as watcher:
        for event in events():
            watcher(event)
    text = output.getvalue()
    assert "\x1b[?25l" in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
    assert "The column 'source' is not used." in text
    assert "round 2 of 4" in text


def test_an_error_in_a_run_gives_the_cursor_back():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True)

    def fail():
        with watching(console, live=True) as watcher:
            watcher(STARTED)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert output.getvalue().rstrip().endswith("\x1b[?25h")


def test_remaining_time_counts_down_between_rounds_and_does_not_count_earlier_processes():
    clock = Clock()
    status = RunStatus(clock=clock)
    status.take(replace(STARTED, rounds=10, done=5))
    clock.now += 50
    status.take(RoundStarted(6, ("a",)))
    clock.now += 10
    status.take(RoundFinished(a_round(6)))
    assert status.remaining == pytest.approx(40)
    clock.now += 3
    assert status.remaining == pytest.approx(37)


def advanced(phase, done, total, clients=1):
    return Advanced(phase, done, total, "rows", clients)


def test_remaining_time_counts_evaluations_to_come_and_the_one_that_is_going_on():
    clock = Clock()
    status = RunStatus(clock=clock)
    status.take(replace(STARTED, rounds=2, scored=(2,)))
    for seconds, event in [
        (0, advanced("computing losses", 0, 20)),
        (20, Evaluated(replace(BASE, seconds=20.0))),
        (0, RoundStarted(1, ("a",))),
        (10, RoundFinished(a_round(1))),
    ]:
        clock.now += seconds
        status.take(event)
    assert status.remaining == pytest.approx(10 + 20), "a round of 10 s and a scoring of 20 s are to come"
    status.take(RoundStarted(2, ("a",)))
    clock.now += 10
    status.take(advanced("computing losses", 0, 20))
    assert status.remaining == pytest.approx(20)
    clock.now += 5
    assert status.remaining == pytest.approx(15)
    status.take(advanced("writing answers", 5, 20))
    # A quarter of the answers is written after 5 of 20 s, as was expected.
    assert status.remaining == pytest.approx(15)
    clock.now += 15
    status.take(advanced("writing answers", 10, 20))
    # Half of them after 20 s: what was measured says 20 s more, what was expected 10 s, and both count alike.
    assert status.remaining == pytest.approx(15)


def test_before_anything_was_measured_remaining_time_is_the_plans():
    clock = Clock()
    status = RunStatus(clock=clock)
    assert status.remaining is None
    status.take(replace(STARTED, rounds=3, scored=(2, 3), expected=Expected(training=100.0, evaluation=7.0)))
    assert status.remaining == pytest.approx(3 * 100 + 2 * 7)
    status.take(Evaluated(replace(BASE, seconds=9.0)))
    assert status.remaining == pytest.approx(3 * 100 + 2 * 9)


def test_steps_of_a_client_say_how_far_the_first_round_is():
    clock = Clock()
    status = RunStatus(clock=clock)
    status.take(replace(STARTED, rounds=2))
    status.take(RoundStarted(1, ("a", "b", "c", "d")))
    assert status.remaining is None
    clock.now += 10
    status.take(advanced("training", 5, 10, clients=2))
    assert status.remaining == pytest.approx(30 + 40), "two of four clients are half done after 10 s"
    frame = io.StringIO()
    Console(file=frame, width=80).print(view(status, 80, 24))
    assert "round 1 of 2, 0 of 4 clients done: training 5/10 rows" in frame.getvalue()


def test_scoring_at_clients_is_timed_by_how_many_have_answered():
    clock = Clock()
    status = RunStatus(clock=clock)
    status.take(replace(STARTED, rounds=1, scored=(1,)))
    status.take(Evaluated(replace(BASE, seconds=4.0)))
    status.take(Evaluated(replace(BASE, part="clients", seconds=8.0)))
    status.take(RoundStarted(1, ("a",)))
    clock.now += 10
    status.take(advanced("writing answers", 0, 20))
    assert status.remaining == pytest.approx(4 + 8)
    clock.now += 4
    status.take(advanced("scoring at clients", 0, 4))
    status.take(advanced("writing answers", 3, 3))  # of one of the clients
    assert status.remaining == pytest.approx(8)
    clock.now += 2
    status.take(advanced("scoring at clients", 1, 4))
    assert status.remaining == pytest.approx(6)


def test_without_a_terminal_a_long_phase_has_a_line_every_ten_seconds():
    lines, clock = [], Clock()
    watcher = plain_lines(lines.append, clock)
    for done in range(101):
        watcher(advanced("tokenising", 1000 * done, 100_000))
        clock.now += 1
    assert lines[:2] == ["  tokenising 10,000/100,000 rows", "  tokenising 20,000/100,000 rows"]
    assert len(lines) == 10


# Summary and words --------------------------------------------------------------------------------


def test_the_summary_has_base_and_final_scores_by_category():
    output = io.StringIO()
    clients = replace(BASE, part="clients")
    Console(file=output, width=100).print(summary([BASE, a_round(1), clients, FINAL]))
    table = output.getvalue()
    assert "test: untuned base against round 2" in table
    assert "clients: untuned base against round 0" in table
    row = next(line for line in table.splitlines() if " qa " in line)
    assert row.split() == ["qa", "10", "3.000→2.000", "10.0→40.0", "%", "0.0→50.0", "%"]
    mean = next(line for line in table.splitlines() if "mean of categories" in line)
    assert "2.000→1.750" in mean
    assert "evil?[2J[bold]???:smile:" in table


GROUPS = {"en": Totals(15, 150, 300.0, 15, 3.0, 0), "fr": Totals(5, 50, 100.0, 5, 0.5, 0)}
LATER = {"en": Totals(15, 150, 150.0, 15, 6.0, 3), "fr": Totals(5, 50, 75.0, 5, 2.0, 1)}


def test_scores_by_group_are_a_table_lines_and_a_line_of_the_view():
    base, final = replace(BASE, groups=GROUPS), replace(FINAL, groups=LATER)
    output = io.StringIO()
    Console(file=output, width=100).print(summary([base, final]))
    assert "test by group: untuned base against round 2" in output.getvalue()
    assert "group (mean of rows)" in output.getvalue()
    row = next(line for line in output.getvalue().splitlines() if " en " in line)
    assert row.split() == ["en", "15", "2.000→1.000", "20.0→40.0", "%", "0.0→20.0", "%"]

    lines = []
    watcher = plain_lines(lines.append)
    for record in (base, final):
        watcher(Evaluated(record))
    assert lines[1:3] == [
        "  all rows of en: loss 2.000, ROUGE-L 20.0 %, exact 0.0 % (15 rows)",
        "  all rows of fr: loss 2.000, ROUGE-L 10.0 %, exact 0.0 % (5 rows)",
    ]
    assert lines[5] == (
        "  all rows of fr: loss 2.000 -> 1.500, ROUGE-L 10.0 % -> 40.0 %, exact 0.0 % -> 20.0 % (5 rows)"
    )

    status = RunStatus()
    for event in (STARTED, Evaluated(base), Evaluated(final)):
        status.take(event)
    shown = io.StringIO()
    Console(file=shown, width=100).print(view(status, 100, 24))
    assert "test, ROUGE-L by group:  en 20.0→40.0 %  fr 10.0→40.0 %" in shown.getvalue()


def test_without_generated_answers_the_view_shows_the_loss_of_groups():
    status = RunStatus()
    groups = {name: Totals(totals.rows, totals.tokens, totals.loss) for name, totals in GROUPS.items()}
    for event in (STARTED, Evaluated(replace(BASE, groups=groups))):
        status.take(event)
    shown = io.StringIO()
    Console(file=shown, width=100).print(view(status, 100, 24))
    assert "test, loss by group:  en 2.000  fr 2.000" in shown.getvalue()


def test_trackers_get_scores_by_group_beside_those_by_category():
    values = scalars(replace(BASE, groups=GROUPS))
    assert (values["test/group/en/loss"], values["test/group/fr/rouge_l"]) == (2.0, 0.1)
    assert not any("group" in name for name in scalars(BASE))


def test_texts_lose_what_could_steer_a_terminal():
    assert clean("a\x1b[31m\x9b\u202e\u2028\n\ud800é") == "a?[31m?????é"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (3599.9, "1:00:00"), (7387, "2:03:07")])
def test_durations_are_said_in_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e12, "2500.0 GB")])
def test_sizes_are_said_in_units(count, text):
    assert byte_size(count) == text


def test_the_trend_of_the_loss_survives_values_that_are_no_numbers():
    assert sparkline([3.0, math.nan, 1.0, math.inf, 2.0]) in ("█ ▁ ▄", "█ ▁ ▅")
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([math.nan]) == ""


# Trackers -----------------------------------------------------------------------------------------


def with_trackers(*names):
    return Recipe.model_validate({"output": {"trackers": list(names)}})


def test_tensorboard_gets_the_scalars_of_rounds_and_evaluations(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    notes = []
    with open_trackers(with_trackers("tensorboard"), tmp_path, notes.append) as watcher:
        for event in events():
            watcher(event)
    assert notes == []
    accumulator = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()

    def read(tag):
        return [(point.step, pytest.approx(point.value)) for point in accumulator.Scalars(tag)]

    assert read("train/loss") == [(1, 2.0), (2, 1.0)]
    assert read("traffic/bytes_up") == [(1, 1500.0), (2, 1500.0)]
    assert read("test/loss") == [(0, 2.0), (2, 1.75)]
    assert read("test/qa/rouge_l") == [(0, 0.1), (2, 0.4)]


def test_a_resumed_run_replaces_what_tensorboard_had_of_later_rounds(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, losses in ((0, (3.0, 9.0)), (1, (2.0,))):
        with open_trackers(with_trackers("tensorboard"), tmp_path, lambda event: None, done) as watcher:
            for number, loss in enumerate(losses, start=done + 1):
                watcher(RoundFinished(a_round(number, loss)))
    accumulator = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(point.step, point.value) for point in accumulator.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]


def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        check_trackers(["mlflow", "wandb"])
    assert len(caught.value.problems) == 2
    assert "pip install -e '.[mlflow]'" in caught.value.problems[0]
    assert "install bellwether" not in str(caught.value)


class Run:
    """Stands in for a run of Weights & Biases or trackio."""

    def __init__(self, fails=False):
        self.logged, self.finished, self.fails = [], False, fails
        self.config = types.SimpleNamespace(update=lambda values, allow_val_change: self.logged.append(values))

    def log(self, values, step=None):
        if self.fails:
            raise ConnectionError("the server is away\nsecond line")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def stand_in(monkeypatch, name, run):
    asked = {}

    def init(**options):
        asked.update(options)
        return run

    module = types.ModuleType(name)
    module.init, module.config = init, run.config
    module.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_recipe_and_the_scalars(name, monkeypatch, tmp_path):
    run = Run()
    asked = stand_in(monkeypatch, name, run)
    with open_trackers(with_trackers(name), tmp_path / "default-1", lambda event: None) as watcher:
        watcher(RoundFinished(a_round(1)))
    assert asked == {"project": "default", "name": "default-1"}
    parameters, (step, values) = run.logged
    assert parameters["training.batch_size"] == 8
    assert (step, values["train/loss"]) == (1, 2.0)
    assert run.finished


def test_a_tracker_that_fails_is_reported_once_and_does_not_end_the_run(monkeypatch, tmp_path):
    run, notes = Run(fails=True), []
    stand_in(monkeypatch, "wandb", run)
    with open_trackers(with_trackers("wandb"), tmp_path, notes.append) as watcher:
        watcher(RoundFinished(a_round(1)))
        watcher(RoundFinished(a_round(2)))
    assert notes == [Note("The tracker wandb failed and gets nothing more: the server is away", warning=True)]


def test_names_of_scalars_are_such_as_all_trackers_take():
    names = scalars(FINAL)
    assert set(names) == {
        *("test/loss", "test/perplexity", "test/rouge_l", "test/exact"),
        *("test/qa/loss", "test/qa/perplexity", "test/qa/rouge_l", "test/qa/exact"),
        *("test/evil__2J_bold_____smile_/loss", "test/evil__2J_bold_____smile_/perplexity"),
    }
    assert "train/loss" not in scalars(a_round(1, failure="below"))
