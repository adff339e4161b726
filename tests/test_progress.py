"""How far long work is, told from deep inside to whoever listens around it."""

import pytest
from conftest import TINY_RECIPE

from bellwether.exchange.records import Evaluated, RunStarted
from bellwether.recipe.file import load_recipe
from bellwether.runner.run import run
from bellwether.tools.progress import Advanced, advance, listening, within


def test_who_listens_hears_what_is_done_inside_and_nothing_after():
    heard = []
    advance("nobody listens", 1, 2)
    with listening(heard.append):
        advance("tokenising", 200, 1000, "rows")
        with listening(None):
            advance("silent")
    advance("nobody listens any more")
    assert heard == [Advanced("tokenising", 200, 1000, "rows")]


def test_a_part_of_a_whole_says_which_and_how_much_of_the_whole_is_done():
    heard, done = [], []
    with listening(heard.append), within(done, 4, "clients trained"):
        advance("training", 5, 10, "steps")
        done.append("a")
        advance("training", 5, 10, "steps", clients=2)
    assert [(one.whole_done, one.whole_total, one.whole_unit) for one in heard] == [
        (0, 4, "clients trained"),
        (1, 4, "clients trained"),
    ]
    assert [one.share for one in heard] == [0.125, 0.5]


def test_work_inside_a_whole_that_nobody_watches_goes_on():
    with within([], 4, "clients trained"):
        advance("training", 1, 2)


@pytest.fixture(scope="module")
def told(tiny_llama, dolly_like, tmp_path_factory):
    """What a run tells whose clients are surveyed, choose rows, and hold some out."""
    events, place = [], tmp_path_factory.mktemp("told")
    (place / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like))
    fields = [
        "selection.method=hierarchical",
        "selection.min_cluster_rows=2",
        "selection.keep_lone=true",
        "partition.client_test_fraction=0.2",
        f"output.folder={place / 'run'}",
    ]
    run(load_recipe(place / "tiny.yaml", fields), watch=events.append)
    return events


def phases(events):
    return [event for event in events if isinstance(event, Advanced)]


@pytest.mark.parametrize(
    ("phase", "unit"),
    [
        ("tokenising", "rows"),
        ("computing features", "rows"),
        ("surveying rows", "clients"),
        ("training", "steps"),
        ("computing losses", "rows"),
        ("writing answers", "rows"),
        ("scoring at clients", "clients"),
    ],
)
def test_every_long_phase_of_a_run_counts_up_to_all_of_it(told, phase, unit):
    found = [event for event in phases(told) if event.phase == phase]
    assert {event.unit for event in found} == {unit}
    assert all(0 <= event.done <= event.total for event in found)
    assert any(event.done == event.total for event in found)


def test_what_cannot_be_counted_is_named(told):
    assert {"reading rows", "opening the base", "loading the base", "clustering rows", "checking the base"} <= {
        event.phase for event in phases(told)
    }


def test_a_run_says_beforehand_after_which_rounds_it_scores_and_how_long_it_may_take(told):
    [started] = [event for event in told if isinstance(event, RunStarted)]
    scored = {event.record.round for event in told if isinstance(event, Evaluated)}
    assert {0, *started.scored} == scored
    assert started.expected.training > 0
    assert started.expected.evaluation > 0
