"""What a person sees while a comparison goes on: how far it is, what is at work, scores so far, time that is left."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bellwether.exchange.records import (
    ArmFinished,
    ArmRun,
    ArmStarted,
    ArmTold,
    ClientFinished,
    ClientRecord,
    ComparisonStarted,
    Evaluated,
    EvaluationRecord,
    Expected,
    Note,
    RoundStarted,
    RunStarted,
    SurveyFinished,
    SurveyRecord,
)
from bellwether.exchange.scores import Scores
from bellwether.tell.comparing import ComparisonStatus, comparison_lines
from bellwether.tell.comparing_live import comparison_view, watching_comparison
from bellwether.tell.telling import now_and_then
from bellwether.tools.progress import Advanced

BASE, LOCAL, FEDERATED = (ArmRun(name, 5) for name in ("base", "local", "federated"))
LATER = [replace(run, seed=6) for run in (BASE, LOCAL, FEDERATED)]
STARTED = ComparisonStarted(
    "table",
    "compared",
    1,
    {run: Expected(90.0 * (run.arm != "base"), 10.0) for run in (BASE, LOCAL, FEDERATED, *LATER)},
)
SCORES = Scores(320, 2.0, 0.25, 0.1)


class Clock:
    """A clock that stands until it is told to go on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def status_after(*told):
    """Return the status after events, each with the seconds that pass before it."""
    clock = Clock()
    status = ComparisonStatus(clock=clock)
    for seconds, event in told:
        clock.now += seconds
        status.take(event)
    return status, clock


def shown(status, width=80, height=24, encoding="utf-8"):
    console = Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=width, height=height, color_system=None
    )
    with console.capture() as capture:
        console.print(comparison_view(status, width, height, console.options.ascii_only))
    return capture.get()


def test_before_anything_was_measured_the_time_left_is_the_plans():
    status, _ = status_after((0, STARTED))
    assert status.remaining == pytest.approx(10 + 100 + 100 + 10 + 100 + 100)


def test_two_processes_halve_the_time_left_but_end_no_sooner_than_the_longest_arm():
    side_by_side, _ = status_after((0, replace(STARTED, processes=2)))
    assert side_by_side.remaining == pytest.approx(420 / 2)
    many, _ = status_after((0, replace(STARTED, processes=50)))
    assert many.remaining == pytest.approx(100)


def test_an_arm_that_took_thrice_its_plan_is_expected_to_do_so_under_the_next_seed():
    status, _ = status_after((0, STARTED), (0, ArmStarted(LOCAL)), (300, ArmFinished(LOCAL, SCORES)))
    # Others: what was done took 300 of 100 planned seconds, and the plan counts as one more arm of average length, 70.
    others = (300 + 70) / (100 + 70) * (10 + 100 + 10 + 100)
    assert status.remaining == pytest.approx(300 + others)


def test_the_time_left_counts_down_with_the_steps_of_an_arm():
    status, clock = status_after((0, STARTED), (0, ArmStarted(BASE)), (10, ArmFinished(BASE, SCORES)))
    assert status.remaining == pytest.approx(410), "the first arm took what was planned"
    status.take(ArmStarted(LOCAL))
    clock.now += 45
    half = Advanced("training", 5, 10, "steps", whole_done=1, whole_total=3, whole_unit="clients trained")
    status.take(ArmTold(LOCAL, half))
    # Half of its 90 s of training after 45 s: as planned.
    assert status.remaining == pytest.approx(410 - 45)
    clock.now += 5
    assert status.remaining == pytest.approx(410 - 50)
    clock.now += 40
    status.take(ArmTold(LOCAL, Advanced("writing answers", 160, 320, "rows")))
    assert status.stages[LOCAL].done == pytest.approx(0.95), "all of 90 s of training and half of 10 s of scoring"


def test_a_federation_is_as_far_as_its_rounds():
    status, clock = status_after((0, STARTED), (0, ArmStarted(FEDERATED)))
    for event in (RunStarted("n", "f", 4, 0, 10, 2), RoundStarted(1, ("a", "b"))):
        status.take(ArmTold(FEDERATED, event))
    clock.now += 10
    status.take(ArmTold(FEDERATED, ClientFinished(1, ClientRecord("a", 5, 5, 50, 1.0, 10.0))))
    assert status.stages[FEDERATED].done == pytest.approx(1 / 8)
    assert "federated, seed 5: round 1 of 4" in shown(status)


def test_of_a_federation_that_goes_on_only_the_rounds_to_come_count():
    status, clock = status_after((0, STARTED), (0, ArmStarted(FEDERATED)))
    for event in (RunStarted("n", "f", 4, 3, 10, 2), RoundStarted(4, ("a", "b"))):
        status.take(ArmTold(FEDERATED, event))
    assert status.stages[FEDERATED].done == 0
    assert status.remaining == pytest.approx(10 + 100 + 100 / 4 + 10 + 100 + 100)
    clock.now += 12.5
    status.take(ArmTold(FEDERATED, ClientFinished(4, ClientRecord("a", 5, 5, 50, 1.0, 10.0))))
    assert status.stages[FEDERATED].done == pytest.approx(1 / 2)
    assert status.remaining == pytest.approx(10 + 100 + 12.5 + 10 + 100 + 100), "it is as fast as planned"


def test_what_was_finished_before_counts_as_done_but_says_nothing_of_the_pace():
    status, _ = status_after((0, STARTED), (50, ArmFinished(LOCAL, SCORES, before=True)))
    assert status.remaining == pytest.approx(10 + 100 + 10 + 100 + 100)
    assert "1 of 6 runs" in shown(status)


def test_words_that_come_after_an_arm_is_finished_change_nothing():
    status, _ = status_after(
        (0, STARTED),
        (0, ArmFinished(BASE, SCORES)),
        (0, ArmStarted(BASE)),
        (0, ArmTold(BASE, Advanced("writing answers", 1, 2, "rows"))),
    )
    assert not status.running
    assert not status.stages


def test_the_view_shows_arms_with_mean_scores_over_seeds_and_what_is_at_work():
    status, _ = status_after(
        (0, STARTED),
        (0, ArmFinished(BASE, SCORES)),
        (0, ArmFinished(LATER[0], replace(SCORES, loss=3.0, exact=0.3))),
        (9, ArmTold(LOCAL, Advanced("training", 3, 40, "steps", 1, 1, 3, "clients trained"))),
    )
    lines = [" ".join(line.strip("│ ").split()) for line in shown(status, 60).splitlines()]
    assert "done loss ROUGE-L exact" in lines
    assert "✓ base 2/2 2.500 25.0 % 20.0 %" in lines
    assert "▸ local 0/2" in lines
    assert "· federated 0/2" in lines
    assert "local, seed 5: 1 of 3 clients trained: training 3/40 st…" in lines


def test_trials_have_a_line_of_their_own_and_no_part_in_the_scores():
    trial = ArmRun("local", 0, "rate 0.008, 10 passes")
    started = replace(STARTED, expected={trial: Expected(10.0, 1.0), **STARTED.expected})
    status, _ = status_after((0, started), (0, ArmFinished(trial, SCORES)))
    lines = [" ".join(line.strip("│ ").split()) for line in shown(status).splitlines()]
    assert "✓ trials 1/1" in lines
    assert status.scores("local").loss is None


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (60, 12), (40, 8), (20, 5)])
def test_the_view_of_many_arms_fits_its_terminal_and_holds_no_foreign_control_codes(width, height):
    runs = [ArmRun(f"arm {number}\x1b[2J\u202e", seed) for number in range(30) for seed in (1, 2)]
    status, _ = status_after(
        (0, replace(STARTED, expected=dict.fromkeys(runs, Expected(1.0, 1.0)))),
        *((0, ArmStarted(run)) for run in runs[:20]),
    )
    frame = shown(status, width, height)
    assert not [mark for mark in frame if (ord(mark) < 32 and mark != "\n") or mark == "\u202e"]
    assert max(map(len, frame.splitlines())) <= width
    if width >= 40:
        assert len(frame.splitlines()) <= height
    if width >= 60:
        assert "more" in frame


def test_a_terminal_without_unicode_gets_ascii():
    status, _ = status_after((0, STARTED), (0, ArmStarted(LOCAL)), (0, ArmFinished(BASE, SCORES)))
    assert shown(status, encoding="ascii").isascii()


def test_without_a_terminal_there_is_one_line_per_finished_arm_with_the_time_that_is_left():
    lines, clock = [], Clock()
    watcher = comparison_lines(lines.append, clock)
    trial = ArmRun("local", 0, "rate 0.008, 10 passes")
    for seconds, event in [
        (0, replace(STARTED, expected={trial: Expected(0.0, 0.0), **STARTED.expected})),
        (0, Note("1 of 7 are finished already.")),
        (0, ArmFinished(trial, Scores(0, None, None, None), failure="counts as the worst. It diverged.")),
        (0, ArmStarted(BASE)),
        (10, ArmFinished(BASE, SCORES)),
        (0, ArmStarted(LOCAL)),
        (5, ArmTold(LOCAL, Advanced("training", 1, 40, "steps"))),
        (6, ArmTold(LOCAL, Advanced("training", 2, 40, "steps"))),
    ]:
        clock.now += seconds
        watcher(event)
    assert lines == [
        "comparison table in compared: 3 arms, 1 trial and 6 runs, by the plan about 7:00",
        "1 of 7 are finished already.",
        "1/7 local, seed 0, trial of rate 0.008, 10 passes: counts as the worst. It diverged.; about 7:00 left",
        "2/7 base, seed 5: loss 2.000, ROUGE-L 25.0 %, exact 10.0 %; about 6:50 left",
        lines[4],
    ]
    assert lines[4].startswith("  local, seed 5: training 2/40 steps; about ")


def test_the_view_is_drawn_in_place_and_the_cursor_comes_back():
    output = io.StringIO()
    console = Console(file=output, width=80, height=24, force_terminal=True, color_system=None)
    with watching_comparison(console, live=True) as watcher:
        for event in (STARTED, Note("Look here."), ArmFinished(BASE, SCORES)):
            watcher(event)
    text = output.getvalue()
    assert "Look here." in text
    assert "1 of 6 runs" in text
    assert text.rstrip().endswith("\x1b[?25h")


def test_what_is_told_between_processes_is_little():
    told, clock = [], Clock()
    watcher = now_and_then(told.append, clock)
    survey = SurveyRecord({}, {}, {}, 0, {})
    for event in (Note("x"), SurveyFinished(1, survey)):
        watcher(event)
    assert told == []
    for step in range(1, 1001):
        clock.now += 0.001
        watcher(Advanced("training", step, 1000, "steps"))
    assert 5 <= len(told) <= 7, "one second of steps"
    assert told[-1].done == 1000
    evaluated = Evaluated(EvaluationRecord(0, "test", {}, 1.0))
    watcher(evaluated)
    assert told[-1] is evaluated
