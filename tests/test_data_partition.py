import collections
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bellwether.data.categories import choose_categories
from bellwether.data.federated import load_federated
from bellwether.data.keep import draw_rows
from bellwether.data.partition import deal, fill_up
from bellwether.data.rows import Row
from bellwether.errors import DataError, RecipeError
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Data, Partition
from bellwether.tools.randomness import Randomness

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
    from bellwether.runner.describe import label_skew

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


def test_copies_deal_every_row_so_often_and_say_so():
    notes = []
    parts = dealt(method="iid", clients=400, copies=14, notes=notes)
    counts = collections.Counter(row for rows in parts.values() for row in rows)
    assert set(counts.values()) == {14}
    assert counts.keys() == set(ROWS)
    assert {len(rows) for rows in parts.values()} <= {143 * 14 // 400, 143 * 14 // 400 + 1}
    assert any("143 training rows are dealt 14 times" in note for note in notes)


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


# Ranges -------------------------------------------------------------------------------------------


def categories_of(own):
    return {row.category for row in own}


def test_a_range_of_categories_gives_each_number_to_some_client_and_the_first_in_turn():
    parts = list(dealt(method="categories", clients=30, categories_per_client=(1, 3)).values())
    assert {len(categories_of(own)) for own in parts} == {1, 2, 3}
    assert all("abcd"[number % 4] in categories_of(own) for number, own in enumerate(parts))
    assert sum(map(len, parts)) == len(ROWS)


def test_each_category_is_shared_in_equal_parts_by_those_that_hold_it():
    parts = dealt(method="categories", clients=9, categories_per_client=(1, 4))
    for category, rows in (("a", 50), ("b", 40), ("c", 30), ("d", 23)):
        counts = [sum(row.category == category for row in own) for own in parts.values()]
        held = [count for count in counts if count]
        assert sum(held) == rows
        assert max(held) - min(held) <= 1


def test_further_categories_are_those_that_the_fewest_clients_hold():
    # Firsts in turn: 0 1 2 3 4 0 1. Each client takes one more, so that no category is held three times before all
    # others are held twice: 14 places are 5 · 2 + 4.
    for seed in range(20):
        chosen = choose_categories(7, 5, 2, 2, np.random.default_rng(seed))
        assert [own[0] for own in chosen] == [0, 1, 2, 3, 4, 0, 1]
        assert all(len(set(own)) == 2 for own in chosen)
        assert sorted(collections.Counter(category for own in chosen for category in own).values()) == [2, 3, 3, 3, 3]


def test_a_range_of_categories_depends_on_the_seed():
    settings = {"method": "categories", "clients": 6, "categories_per_client": (1, 3)}
    assert texts(dealt(seed=1, **settings)) == texts(dealt(seed=1, **settings))
    assert texts(dealt(seed=1, **settings)) != texts(dealt(seed=2, **settings))


def test_auto_takes_a_range_of_categories_where_there_are_as_many():
    rows, notes = make_rows(a=60, b=60), []
    dealt(rows, clients=3, categories_per_client=(1, 2), notes=notes)
    dealt(rows, clients=3, categories_per_client=(1, 3), notes=notes)
    assert [note.split(",")[0] for note in notes] == [
        "partition.method: auto is categories",
        "partition.method: auto is iid",
    ]


def test_kept_rows_are_some_of_those_dealt_and_their_number_is_drawn_evenly():
    whole = dealt(method="iid", clients=4)
    sizes = collections.Counter()
    for seed in range(150):
        parts = dealt(method="iid", clients=1, rows_per_client=(3, 5), seed=seed)
        sizes.update(len(own) for own in parts.values())
    assert set(sizes) == {3, 4, 5}
    # 50 of each are expected, with a standard deviation of √(150 · 1/3 · 2/3) = 5.8.
    assert all(abs(count - 50) < 20 for count in sizes.values())

    notes = []
    kept = dealt(method="iid", clients=4, rows_per_client=(10, 20), notes=notes)
    for client, own in texts(kept).items():
        assert 10 <= len(own) <= 20
        assert [text for text in texts(whole)[client] if text in own] == own
    unused = 143 - sum(map(len, kept.values()))
    assert notes == [
        f"partition.rows_per_client: {unused} of 143 dealt rows are used by nobody, since each client keeps 10 to 20."
    ]


def test_what_a_client_keeps_depends_on_seed_and_client_and_not_on_the_other_clients():
    rows = [Row(f"{name} {n}", "b", client=name) for name in "xyz" for n in range(20)]
    settings = {"method": "files", "rows_per_client": (5, 9)}
    first, fewer = texts(dealt(rows, **settings)), texts(dealt(rows[:40], **settings))
    assert {"x": first["x"], "y": first["y"]} == fewer
    assert texts(dealt(rows, seed=1, **settings)) != first
    numbers = {client: [text.split()[1] for text in own] for client, own in first.items()}
    assert numbers["x"] != numbers["y"]


def test_a_client_with_fewer_rows_than_drawn_keeps_all_and_nothing_is_noted():
    notes = []
    parts = dealt(make_rows(a=12), method="iid", clients=2, rows_per_client=(6, 900), notes=notes)
    assert [len(own) for own in parts.values()] == [6, 6]
    assert notes == []


def test_no_category_is_lost_where_as_many_rows_are_kept():
    rows = make_rows(a=60, b=1, c=2)
    for seed in range(20):
        for own in dealt(rows, method="iid", clients=1, rows_per_client=(3, 3), seed=seed).values():
            assert categories_of(own) == {"a", "b", "c"}
            assert len(own) == 3
        (own,) = dealt(rows, method="iid", clients=1, rows_per_client=(2, 2), seed=seed).values()
        assert len(categories_of(own)) == 2


def test_rows_are_kept_alike_where_no_category_would_be_lost():
    drawn = collections.Counter()
    for seed in range(400):
        drawn.update(draw_rows(["a"] * 5 + ["b"] * 5, 5, np.random.default_rng(seed)))
    # Each of ten rows in half of 400 draws, with a standard deviation of 10.
    assert all(abs(count - 200) < 50 for count in drawn.values())


def test_a_client_with_fewer_rows_than_the_least_is_refused_with_what_is_feasible():
    rows = [Row("a", "b", client="x"), *[Row("a", "b", client="y")] * 9]
    said = r"begins at 5 rows, but 1 of 2 clients are dealt fewer: x gets 1; begin at 1 or lower, or take fewer clients"
    with pytest.raises(DataError, match=said):
        dealt(rows, method="files", rows_per_client=(5, 9))


def test_the_default_ranges_can_be_dealt_from_the_embedded_rows_with_any_seed():
    settings = load_recipe("default").partition
    for seed in range(20):
        federated = load_federated(Data(), settings, Randomness(seed))
        assert len(federated.clients) == 10
        assert all(20 <= len(own) <= 60 for own in federated.clients.values())
        assert all(1 <= len(categories_of(own)) <= 3 for own in federated.clients.values())
        assert len({row.category for own in federated.clients.values() for row in own}) == 8


# Groups -------------------------------------------------------------------------------------------


def grouped(**sizes):
    return [
        Row(f"{group} {category} {n}", "b", category=category, group=group)
        for group, size in sizes.items()
        for category in "abcd"
        for n in range(size)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_clients_of_a_group_hold_its_rows_only_and_count_on_in_the_order_of_the_groups(method):
    rows = grouped(en=10, fr=20)
    parts = dealt(rows, method=method, clients=5, clients_per_group={"fr": 3, "en": 2})
    assert list(parts) == [f"client-{n:02}" for n in range(1, 6)]
    assert [{row.group for row in own} for own in parts.values()] == [{"fr"}] * 3 + [{"en"}] * 2
    assert sorted(row.instruction for own in parts.values() for row in own) == sorted(row.instruction for row in rows)


def test_a_groups_rows_are_dealt_alike_whatever_the_other_groups_hold():
    settings = {"method": "dirichlet", "clients": 5, "clients_per_group": {"en": 3, "fr": 2}}
    one, other = (list(texts(dealt(grouped(en=10, fr=size), **settings)).values()) for size in (10, 15))
    assert one[:3] == other[:3]


def test_groups_are_dealt_by_draws_of_their_own():
    parts = dealt(grouped(en=10, fr=10), method="iid", clients=2, clients_per_group={"en": 1, "fr": 1})
    en, fr = ([text.split(maxsplit=1)[1] for text in own] for own in texts(parts).values())
    assert sorted(en) == sorted(fr)
    assert en != fr


def test_auto_is_resolved_for_each_group_and_never_takes_files_as_clients():
    rows = grouped(en=9) + [Row(f"fr {n}", "b", group="fr") for n in range(8)]
    rows = [replace(row, client=f"file {number % 2}") for number, row in enumerate(rows)]
    notes = []
    parts = dealt(rows, clients=6, clients_per_group={"en": 4, "fr": 2}, notes=notes)
    assert notes == [
        "en: partition.method: auto is categories, since rows have 4 categories.",
        "fr: partition.method: auto is iid, since rows name fewer than two categories.",
    ]
    assert [len(own) for own in parts.values()][4:] == [4, 4]


def test_ranges_hold_within_groups():
    settings = {"categories_per_client": (1, 2), "rows_per_client": (4, 6), "method": "categories"}
    parts = dealt(grouped(en=20, fr=20), clients=8, clients_per_group={"en": 4, "fr": 4}, **settings)
    assert all(4 <= len(own) <= 6 and len(categories_of(own)) <= 2 for own in parts.values())


@pytest.mark.parametrize(
    ("rows", "groups", "said"),
    [
        (
            grouped(en=1, fr=2),
            {"en": 1, "de": 1},
            "names 'de', but no row to deal .* there are en with 4 rows, fr with 8",
        ),
        (grouped(en=1, fr=2), {"en": 2}, "names en, but 8 rows are of the group 'fr'; give it clients, or leave these"),
        (
            grouped(en=1) + make_rows(a=3),
            {"en": 2},
            "3 rows name none; name theirs, .*there are .none. with 3 rows, en",
        ),
        (make_rows(a=3), {"en": 2}, "no row names a group; name the column in data.columns.group"),
        (grouped(en=1, fr=2), {"en": 5, "fr": 2}, "the group 'en': 4 rows cannot give 5 clients 1 row"),
    ],
)
def test_groups_that_do_not_fit_the_rows_are_refused_with_those_there_are(rows, groups, said):
    with pytest.raises(DataError, match=said):
        dealt(rows, method="iid", clients=sum(groups.values()), clients_per_group=groups)


# Partitions that cannot be made -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (make_rows(a=5), {"method": "iid", "clients": 6}, "5 rows cannot give 6 clients .* give 5 clients"),
        (
            make_rows(a=50, b=50),
            {"method": "dirichlet", "clients": 11, "min_rows": 10},
            "100 rows cannot give 11 clients 10 .* give 10 clients",
        ),
        (make_rows(a=50), {"method": "categories", "clients": 2}, "the rows have 1 category; give at most 1"),
        (
            make_rows(a=90, b=2),
            {"method": "categories", "clients": 6, "categories_per_client": 2},
            "category 'b' has only 2 rows to share; take 2 clients or fewer",
        ),
        (
            make_rows(a=90, b=2),
            {"method": "categories", "clients": 6, "categories_per_client": (1, 2)},
            "deals 1 to 2 of 2 categories .* category 'b' has only 2 rows to share; take 2 clients or fewer",
        ),
        (
            make_rows(a=50),
            {"method": "categories", "clients": 2, "categories_per_client": (1, 2)},
            "partition.categories_per_client is 1 to 2, but the rows have 1 category; give at most 1",
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
