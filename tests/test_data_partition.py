import collections
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bellwether.data.partition import deal, fill_up
from bellwether.data.rows import Row
from bellwether.errors import DataError, RecipeError
from bellwether.randomness import Randomness
from bellwether.recipe import Partition

SHARED = Path(__file__).parents[2] / "shared"
METHODS = ["iid", "dirichlet", "categories", "shards", "quantity"]


def make_rows(**sizes):
    return [Row(f"{category} {n}", "b", category=category) for category, size in sizes.items() for n in range(size)]


ROWS = make_rows(a=50, b=40, c=30, d=23)


def dealt(rows=ROWS, seed=0, notes=None, **settings):
    return deal(rows, Partition(**settings), Randomness(seed), notes)


def texts(parts):
    return {client: [row.instruction for row in rows] for client, rows in parts.items()}


@pytest.mark.parametrize("method", METHODS)
def test_each_row_goes_to_exactly_one_client(method):
    parts = dealt(method=method, clients=7)
    assert list(parts) == [f"client-{n:02}" for n in range(1, 8)]
    assert sorted(row.instruction for rows in parts.values() for row in rows) == sorted(row.instruction for row in ROWS)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_who_gets_what_in_which_order(method):
    first, again, other = (dealt(method=method, clients=5, seed=seed) for seed in (1, 1, 2))
    assert texts(first) == texts(again)
    assert texts(first) != texts(other)


def test_iid_sizes_differ_by_one_at_most_and_categories_are_mixed():
    parts = dealt(method="iid", clients=4)
    assert sorted(len(rows) for rows in parts.values()) == [35, 36, 36, 36]
    assert all(len({row.category for row in rows}) == 4 for rows in parts.values())


def test_categories_gives_each_client_exactly_k_and_the_first_in_turn():
    for k in (1, 2, 3):
        parts = dealt(method="categories", clients=8, categories_per_client=k)
        found = [{row.category for row in rows} for rows in parts.values()]
        assert {len(categories) for categories in found} == {k}
        assert all("abcd"[number % 4] in categories for number, categories in enumerate(found))


def test_categories_that_fall_to_no_client_are_noted():
    notes = []
    parts = dealt(method="categories", clients=2, categories_per_client=1, notes=notes)
    assert sum(map(len, parts.values())) == 90
    assert notes == ["partition.method categories: 53 of 143 rows fell to no client, those of c, d."]


def test_shards_are_neighbours_in_the_order_of_categories():
    rows = make_rows(a=40, b=40, c=40)
    for parts in (dealt(rows, method="shards", clients=6, shards_per_client=2),):
        # 12 shards of 10 rows: each holds one category, so a client has one or two.
        for own in parts.values():
            assert len(own) == 20
            assert all(count % 10 == 0 for count in collections.Counter(row.category for row in own).values())


def test_shards_are_those_of_the_partitioner_where_no_row_is_left_over():
    from datasets import Dataset
    from flwr_datasets.partitioner import ShardPartitioner

    rows = make_rows(a=40, b=40, c=40)
    randomness = Randomness(5)
    reference = ShardPartitioner(
        6, "label", num_shards_per_partition=2, seed=randomness.small_seed("shards of clients")
    )
    reference.dataset = Dataset.from_dict({"label": [row.category for row in rows]})
    expected = [collections.Counter(reference.load_partition(n)["label"]) for n in range(6)]
    parts = deal(rows, Partition(method="shards", clients=6), randomness)
    assert [collections.Counter(row.category for row in own) for own in parts.values()] == expected


def test_rows_that_make_no_whole_shard_are_spread_over_the_clients():
    # 143 rows in 14 shards: 10 each, and 3 over.
    sizes = [len(rows) for rows in dealt(method="shards", clients=7).values()]
    assert sum(sizes) == 143
    assert min(sizes) == 20
    assert max(sizes) <= 22
    for clients, shards in ((5, 3), (9, 2), (13, 1), (71, 2), (1, 1)):
        parts = dealt(method="shards", clients=clients, shards_per_client=shards)
        assert sum(map(len, parts.values())) == 143


def test_a_small_alpha_is_more_uneven_than_a_large_one():
    from bellwether.describe import label_skew

    rows = make_rows(a=500, b=500, c=500)
    pooled = collections.Counter(row.category for row in rows)

    def skew(alpha):
        parts = dealt(rows, method="dirichlet", clients=10, alpha=alpha)
        return np.mean([label_skew(collections.Counter(row.category for row in own), pooled) for own in parts.values()])

    assert skew(0.1) > 0.4 > 0.15 > skew(100.0)


def test_quantity_is_uneven_and_keeps_the_smallest_size():
    parts = dealt(method="quantity", clients=6, alpha=0.3, min_rows=5)
    sizes = [len(rows) for rows in parts.values()]
    assert min(sizes) >= 5
    assert max(sizes) > 2 * np.median(sizes)
    assert sum(sizes) == 143


def test_a_minimum_that_no_draw_gives_is_filled_up_from_the_largest_and_noted():
    notes = []
    parts = dealt(method="dirichlet", clients=12, alpha=0.05, min_rows=10, notes=notes)
    assert min(len(rows) for rows in parts.values()) == 10
    assert len({row.instruction for rows in parts.values() for row in rows}) == 143
    assert len(notes) == 1
    assert notes[0].startswith("partition.method dirichlet: no draw gave every client 10 rows, so ")


def test_filling_up_moves_no_more_than_is_missing():
    parts = [list(range(10)), [10], [], list(range(11, 20))]
    assert fill_up(parts, 4, np.random.default_rng(0)) == 3 + 4
    assert sorted(map(len, parts)) == [4, 4, 6, 6]
    assert sorted(index for part in parts for index in part) == list(range(20))


def test_many_clients_are_numbered_with_leading_zeros():
    assert list(dealt(method="iid", clients=120))[:2] == ["client-001", "client-002"]


# What the rows say --------------------------------------------------------------------------------


def test_columns_and_files_keep_rows_in_their_order_under_sorted_names():
    rows = [Row(f"{n}", "b", client="zyx"[n % 3]) for n in range(9)]
    for method in ("column", "files"):
        assert texts(dealt(rows, method=method)) == {"x": ["2", "5", "8"], "y": ["1", "4", "7"], "z": ["0", "3", "6"]}


@pytest.mark.parametrize(
    ("rows", "method"),
    [
        ([Row("a", "b", client="x", category="c"), Row("a", "b", client="y", category="d")], "files"),
        (make_rows(a=20, b=20), "categories"),
        (make_rows(a=40), "iid"),
    ],
)
def test_auto_takes_files_then_categories_then_iid_and_says_so(rows, method):
    notes = []
    parts = dealt(rows, clients=2, notes=notes)
    assert notes[0].startswith(f"partition.method: auto is {method}, since ")
    assert texts(parts) == texts(dealt(rows, method=method, clients=2))


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        (make_rows(**{f"k{n}": 30 for n in range(40)}), {"clients": 10}, "40 categories are more than 10 clients"),
        (make_rows(a=50, b=9), {"clients": 10}, "the category 'b' has 9 rows, too few to be shared by 10 clients"),
        (make_rows(a=50, b=19), {"clients": 10, "min_rows": 2}, "the category 'b' has 19 rows"),
    ],
)
def test_auto_takes_dirichlet_where_categories_would_not_reach_all_rows_or_clients(rows, settings, reason):
    notes = []
    parts = dealt(rows, notes=notes, **settings)
    assert notes[0].startswith(f"partition.method: auto is dirichlet, since {reason}")
    assert sum(map(len, parts.values())) == len(rows)


def test_auto_takes_categories_only_where_every_seed_deals_all_rows():
    rows = make_rows(**{f"k{n}": 6 for n in range(6)})
    for seed in range(20):
        notes = []
        parts = dealt(rows, seed=seed, clients=6, notes=notes)
        assert notes == ["partition.method: auto is categories, since rows have 6 categories."]
        assert sum(map(len, parts.values())) == 36


def test_the_first_row_of_all_stays_with_its_neighbour_where_it_makes_no_whole_shard():
    # Sorted: a b b c c, in 3 shards of one row; those over are the first and the third.
    rows = make_rows(a=1, b=2, c=2)
    for seed in range(20):
        parts = dealt(rows, seed=seed, method="shards", clients=3, shards_per_client=1)
        assert {"a", "c"} not in [{row.category for row in own} for own in parts.values()]


# Own partitions -----------------------------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_partition.py").write_text(
        "def halves(rows, settings, randomness):\n"
        "    order = randomness.numpy('halves').permutation(len(rows))\n"
        "    middle = len(rows) // 2\n"
        "    return {'left': [rows[i] for i in order[:middle]], 'right': [rows[i] for i in order[middle:]]}\n"
        "def some(rows, settings, randomness):\n    return {'only': rows[:3]}\n"
        "def twice(rows, settings, randomness):\n    return {'a': rows, 'b': rows}\n"
        "def unsafe(rows, settings, randomness):\n    return {'../a': rows}\n"
        "def numbered(rows, settings, randomness):\n    return {1: rows}\n"
        "def single(rows, settings, randomness):\n    return {'a': 5}\n"
        "def broken(rows, settings, randomness):\n    return {'a': {}['x']}\n"
        "def listed(rows, settings, randomness):\n    return [rows]\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_partition", None)


def test_an_own_function_deals_the_rows(own_module):
    parts = dealt(method="own_partition:halves")
    assert {client: len(rows) for client, rows in parts.items()} == {"left": 71, "right": 72}


def test_rows_that_an_own_function_leaves_out_are_noted(own_module):
    notes = []
    dealt(method="own_partition:some", notes=notes)
    assert notes == ["own_partition:some: 140 of 143 rows were dealt to no client."]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("twice", "b got a row twice"),
        ("unsafe", "has parts of a path"),
        ("numbered", "1 is no client's name"),
        ("listed", "returned list, but a dict"),
        ("single", r"^own_partition:single: 'a' got int, but a list of rows is wanted\.$"),
        ("broken", r"^partition.method own_partition:broken failed at .*own_partition\.py:\d+ \(KeyError: 'x'\)\.$"),
    ],
)
def test_what_an_own_function_returns_is_checked(own_module, function, said):
    with pytest.raises(DataError, match=said):
        dealt(method=f"own_partition:{function}")


def test_an_own_function_that_is_not_there_is_an_error_of_the_recipe():
    with pytest.raises(RecipeError, match="no_such_module"):
        dealt(method="no_such_module:deal")


# Partitions that cannot be made -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (make_rows(a=5), {"method": "iid", "clients": 6}, "5 rows cannot give 6 clients .* at most 5 clients"),
        (
            make_rows(a=50, b=50),
            {"method": "dirichlet", "clients": 11, "min_rows": 10},
            "100 rows cannot give 11 clients 10 .* at most 10 clients",
        ),
        (make_rows(a=50), {"method": "categories", "clients": 2}, "the rows have 1 categories; give at most 1"),
        (
            make_rows(a=90, b=2),
            {"method": "categories", "clients": 6, "categories_per_client": 2},
            "category 'b' has only 2 rows to share; take 2 clients or fewer",
        ),
        (
            make_rows(a=10),
            {"method": "shards", "clients": 4, "shards_per_client": 3},
            "10 rows cannot be cut in 12 shards .* take 3 clients or fewer",
        ),
        ([Row("a", "b")] * 9, {"method": "shards", "clients": 2}, "no row names a category"),
        ([Row("a", "b", place="x.jsonl:1")], {"method": "column"}, "x.jsonl:1: names no client"),
        ([], {"method": "iid"}, "no row to deal"),
        (
            [Row("a", "b", client="x"), *[Row("a", "b", client="y")] * 9],
            {"method": "column", "min_rows": 5},
            "gives 1 of 2 clients fewer than 5 rows .*: x gets 1; leave out its rows, or set min_rows to 1",
        ),
    ],
)
def test_a_partition_that_cannot_be_made_says_what_could_be(rows, settings, said):
    with pytest.raises(DataError, match=said):
        dealt(rows, **settings)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"method": "shards", "clients": 100}, (148, 152)),
        ({"method": "dirichlet", "clients": 100, "alpha": 0.5, "min_rows": 40}, (40, 1200)),
        ({"method": "categories", "clients": 100}, (40, 1200)),
    ],
)
def test_the_papers_partitions_of_dolly_can_be_made_with_any_seed(settings, sizes):
    path = SHARED / "data" / "databricks-dolly-15k.jsonl"
    if not path.is_file():
        pytest.skip("the shared Dolly rows are not here")
    rows = [Row(line, "b", category=json.loads(line)["category"]) for line in path.read_text("utf-8").splitlines()]
    for seed in range(2):
        parts = dealt(rows, seed=seed, **settings)
        assert len(parts) == 100
        assert sum(map(len, parts.values())) == len(rows)
        assert sizes[0] <= min(map(len, parts.values())) <= max(map(len, parts.values())) <= sizes[1]
