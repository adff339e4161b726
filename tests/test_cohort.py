import json

import numpy as np
import pytest

from bellwether.data.trace import read_trace
from bellwether.errors import DataError
from bellwether.method.cohort import Sampling, cohort_size, everyone_last, make_sampler, make_trace
from bellwether.recipe.recipe import Availability, Federation
from bellwether.tools.randomness import Randomness, derive_seed

CLIENTS = [f"client-{n:03d}" for n in range(100)]


@pytest.mark.parametrize(
    ("fraction", "clients", "size"),
    [
        (0.05, 100, 5),
        (0.1, 10, 1),
        (0.01, 10, 1),
        (0.5, 5, 3),
        (0.25, 10, 3),
        (1.0, 7, 7),
        (0.049, 100, 5),
        (0.29, 50, 15),
    ],
)
def test_the_cohort_is_the_rounded_fraction_but_at_least_one(fraction, clients, size):
    assert cohort_size(Federation(fraction=fraction), clients) == size


def test_a_number_of_clients_goes_before_a_fraction():
    assert cohort_size(Federation(fraction=0.5, cohort_size=7), 100) == 7


def test_uniform_cohorts_repeat_with_the_seed_and_differ_between_rounds():
    sample = make_sampler(Federation(fraction=0.1), None)
    first = sample(drawing(CLIENTS, 1, Randomness(0)))
    assert first == sample(drawing(CLIENTS, 1, Randomness(0)))
    assert first != sample(drawing(CLIENTS, 2, Randomness(0)))
    assert first != sample(drawing(CLIENTS, 1, Randomness(1)))
    assert len(set(first)) == 10


def drawing(clients, round, randomness):
    return Sampling(round, clients, {}, None, randomness)


def test_uniform_cohorts_take_every_client_equally_often():
    sample = make_sampler(Federation(fraction=0.1), None)
    counts = dict.fromkeys(CLIENTS, 0)
    for round in range(1, 2001):
        for client in sample(drawing(CLIENTS, round, Randomness(3))):
            counts[client] += 1
    # Each count is binomial(2000, 0.1): mean 200, standard deviation 13.4; chi-square over 100 clients.
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 150


def test_the_available_sampler_never_asks_a_client_that_is_away():
    availability = Availability(away=0.5)
    federation = Federation(sampler="available", fraction=0.2, availability=availability)
    trace = make_trace(availability, Randomness(0))
    sample = make_sampler(federation, trace)
    away = 0
    for round in range(1, 50):
        cohort = sample(drawing(CLIENTS, round, Randomness(0)))
        assert len(cohort) == 20
        assert all(trace(client, round).available for client in cohort)
        away += sum(not trace(client, round).available for client in CLIENTS)
    assert 0.45 < away / (49 * 100) < 0.55


def test_a_client_keeps_its_speed_over_rounds_and_speeds_spread_log_normally():
    availability = Availability(rows_per_second=20.0, speed_spread=0.5)
    trace = make_trace(availability, Randomness(1))
    speeds = [trace(client, 1).rows_per_second for client in CLIENTS]
    assert speeds == [trace(client, 9).rows_per_second for client in CLIENTS]
    logs = np.log(speeds)
    assert abs(logs.mean() - np.log(20.0)) < 0.2
    assert 0.4 < logs.std() < 0.6


def test_a_trace_file_says_what_holds_from_its_round_on(tmp_path):
    lines = [
        {"client": "b", "round": 1, "available": True, "rows_per_second": 5},
        {"client": "a", "round": 3, "available": False, "rows_per_second": 1.5},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    trace = make_trace(Availability(trace=str(path), rows_per_second=9), Randomness(0), read_trace(path, ["a", "b"]))
    assert [trace("a", round).available for round in (1, 2, 3, 4)] == [True, True, False, False]
    assert trace("a", 1).rows_per_second == 9
    assert trace("b", 7).rows_per_second == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: a line of a trace has"),
        ('{"client": "a"}', ":1: a line of a trace has"),
        ('{"client": "z", "round": 1, "available": true, "rows_per_second": 1}', "no client 'z'"),
        ('{"client": ' * 100_000, ":1: a line of a trace has"),
        ('{"client": "%s", "round": 1, "available": true, "rows_per_second": 1}' % ("z" * 9000), "no client 'zzz"),
        ('{"client": "a", "round": 1, "available": 1, "rows_per_second": 1}', "true or false"),
        ('{"client": "a", "round": 1, "available": true, "rows_per_second": 0}', "above 0"),
    ],
    ids=range(7),
)
def test_a_broken_trace_file_is_refused_with_its_line(tmp_path, line, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as caught:
        read_trace(path, ["a"])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_seeds_differ_in_every_part_and_do_not_run_together():
    seeds = {
        derive_seed(0, "order"),
        derive_seed(1, "order"),
        derive_seed(0, "orders"),
        derive_seed(0, "order", round=1),
        derive_seed(0, "order", client="a"),
        derive_seed(0, "order", round=1, client="1"),
        derive_seed(0, "order", round=11, client=""),
        derive_seed(0, "der", client="or"),
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_in_the_last_round_everybody_is_asked_who_is_there_where_the_recipe_looks_at_that():
    availability = Availability(away=0.5)
    trace = make_trace(availability, Randomness(0))
    for sampler in ("uniform", "available"):
        federation = Federation(rounds=9, sampler=sampler, fraction=0.2, availability=availability)
        usual = make_sampler(federation, trace)
        sample = everyone_last(usual, federation, trace)
        assert sample(drawing(CLIENTS, 8, Randomness(0))) == usual(drawing(CLIENTS, 8, Randomness(0)))
        there = {client for client in CLIENTS if sampler == "uniform" or trace(client, 9).available}
        assert set(sample(drawing(CLIENTS, 9, Randomness(0)))) == there
        assert len(there) > 30
