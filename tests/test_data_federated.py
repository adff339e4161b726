import collections
import json
from dataclasses import replace

import pytest

from bellwether.data.federated import load_federated, rows_fingerprint
from bellwether.errors import DataError
from bellwether.recipe.recipe import Columns, Data, Partition
from bellwether.tools.randomness import Randomness


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(sizes, **more):
    return [
        {"instruction": f"{category} {n}", "response": "b", "category": category, **more}
        for category, size in sizes.items()
        for n in range(size)
    ]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "rows.jsonl", rows_of({"a": 40, "b": 30, "c": 20}))


FOUR = Partition(method="iid", clients=4)


def load(source, seed=0, partition=FOUR, **data):
    return load_federated(Data(sources=(source,), **data), partition, Randomness(seed))


def instructions(rows):
    return [row.instruction for row in rows]


def training(federated):
    return [row for rows in federated.clients.values() for row in rows]


def test_so_many_rows_of_each_category_are_held_out_before_dealing(source):
    federated = load(source, test_rows_per_category=5, validation_rows_per_category=2)
    assert collections.Counter(row.category for row in federated.test) == {"a": 5, "b": 5, "c": 5}
    assert collections.Counter(row.category for row in federated.validation) == {"a": 2, "b": 2, "c": 2}
    everywhere = instructions([*training(federated), *federated.test, *federated.validation])
    assert len(everywhere) == len(set(everywhere)) == 90
    assert federated.held_out == {}


def test_the_seed_decides_which_rows_are_held_out(source):
    first, again, other = (instructions(load(source, seed=seed).test) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_which_rows_of_a_category_are_held_out_does_not_depend_on_other_categories(source, tmp_path):
    fewer = write(tmp_path / "fewer.jsonl", rows_of({"a": 40, "c": 20}))
    known = [text for text in instructions(load(source).test) if not text.startswith("b")]
    assert instructions(load(fewer).test) == known


def test_unseen_categories_reach_no_client_and_serve_test_and_validation(source):
    federated = load(source, unseen_categories=("c",), test_rows_per_category=5, validation_rows_per_category=2)
    assert {row.category for row in training(federated)} == {"a", "b"}
    assert collections.Counter(row.category for row in federated.validation) == {"a": 2, "b": 2, "c": 2}
    assert collections.Counter(row.category for row in federated.test) == {"a": 5, "b": 5, "c": 5}
    assert not set(instructions(federated.validation)) & set(instructions(federated.test))
    assert "20 rows of c reach no client; 5 of them serve the test, 2 others validation." in federated.notes[-1]
    only_test = load(source, unseen_categories=("c",), test_rows_per_category=5)
    assert instructions(only_test.test) == instructions(federated.test)
    assert only_test.notes[-1].endswith("20 rows of c reach no client; 5 of them serve the test.")


def test_an_unseen_category_gives_all_of_its_rows_where_they_are_few(source):
    federated = load(source, unseen_categories=("c",), test_rows_per_category=15, validation_rows_per_category=10)
    assert sum(row.category == "c" for row in federated.test) == 15
    assert sum(row.category == "c" for row in federated.validation) == 5


def test_rows_of_unseen_categories_in_a_separate_test_are_counted(source, tmp_path):
    test = write(tmp_path / "test.jsonl", rows_of({"a": 2, "c": 7}, context="other"))
    federated = load(source, unseen_categories=("c",), test_sources=(test,))
    assert federated.notes == (
        "data.unseen_categories: 20 rows of c reach no client; 7 rows of the test are of these.",
    )


def test_an_unknown_unseen_category_names_those_there_are(source):
    with pytest.raises(DataError, match=r"no row is of the category 'z'; there are a, b, c\."):
        load(source, unseen_categories=("z",))


def test_half_of_a_small_category_stays_for_training_and_this_is_noted(tmp_path):
    federated = load(write(tmp_path / "rows.jsonl", rows_of({"a": 40, "tiny": 5})), test_rows_per_category=10)
    assert collections.Counter(row.category for row in federated.test) == {"a": 10, "tiny": 2}
    assert federated.notes == (
        "fewer rows than wanted are held out, since at least half of a category stays for training: tiny (5 rows).",
    )


def test_a_test_that_would_be_empty_is_refused(tmp_path):
    single = write(tmp_path / "rows.jsonl", rows_of({"a": 1, "b": 1}))
    with pytest.raises(DataError, match="data.test_rows_per_category to 0"):
        load(single, partition=Partition(method="iid", clients=1))
    assert len(load(single, partition=Partition(method="iid", clients=1), test_rows_per_category=0).test) == 0


def test_separate_sources_take_the_place_of_held_out_rows(source, tmp_path):
    test = write(tmp_path / "test.jsonl", rows_of({"x": 3}) + rows_of({"a": 2}))
    federated = load(source, test_sources=(test,), validation_rows_per_category=1)
    assert len(federated.test) == 5
    assert len(federated.validation) == 3
    assert len(training(federated)) == 87
    assert federated.notes == ("2 of 5 test rows stand among the training rows as well.",)


def test_max_rows_are_drawn_evenly_and_keep_their_order(source):
    federated = load(source, max_rows=30, test_rows_per_category=0, partition=Partition(method="iid", clients=1))
    taken = training(federated)
    assert len(taken) == 30
    assert len({row.category for row in taken}) == 3
    assert "data.max_rows: 30 of 90 rows are taken." in federated.notes


def test_a_client_that_max_rows_leaves_no_row_is_an_error_that_names_it(tmp_path):
    write(tmp_path / "large.jsonl", rows_of({"a": 500}))
    write(tmp_path / "lost.jsonl", [{"instruction": "x", "response": "b", "category": "a"}])
    for method in ("auto", "files"):
        with pytest.raises(DataError, match=r"the client 'lost' is left with no row, since data\.max_rows takes none"):
            load(str(tmp_path), partition=Partition(method=method), max_rows=20, test_rows_per_category=0)
    dealt = load(str(tmp_path), partition=FOUR, max_rows=20, test_rows_per_category=0)
    assert len(dealt.clients) == 4


def test_auto_takes_files_as_clients_only_where_every_row_has_one(tmp_path):
    named, starter = write(tmp_path / "two.jsonl", rows_of({"a": 60}, context="c")), tmp_path / "train.jsonl"
    write(starter, rows_of({"a": 60, "b": 60}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bellwether.data.sources.STARTER_ROWS", tmp_path)
        data = Data(sources=(named, "starter"), test_rows_per_category=0)
        federated = load_federated(data, Partition(clients=2), Randomness(0))
    assert list(federated.clients) == ["client-01", "client-02"]
    assert federated.notes[-1] == "partition.method: auto is categories, since rows have 2 categories."


def test_numbers_of_held_out_rows_without_effect_are_noted(source, tmp_path):
    other = write(tmp_path / "other.jsonl", rows_of({"a": 7}, context="other"))
    both = {"test_sources": (other,), "validation_sources": (other,)}
    assert load(source, **both).notes == ()
    assert load(source, **both, test_rows_per_category=3, validation_rows_per_category=2).notes == (
        "data.test_rows_per_category has no effect, since all 7 test rows come from a source of their own.",
        "data.validation_rows_per_category has no effect, since all 7 validation rows come from a source of their own.",
    )


@pytest.mark.parametrize(("name", "value"), [("split", "test"), ("revision", "v1")])
def test_what_says_which_part_of_the_hub_to_take_is_refused_for_files(source, name, value):
    with pytest.raises(DataError, match=f"data.{name} is '{value}', but no source is a data set on the Hugging Face"):
        load(source, **{name: value})


def test_rows_that_clients_hold_out_of_duplicates_are_noted(tmp_path):
    same = write(tmp_path / "same.jsonl", [{"instruction": "a", "response": "b"}] * 40)
    partition = Partition(method="iid", clients=2, client_test_fraction=0.25)
    assert load(same, partition=partition, test_rows_per_category=0).notes == (
        "10 of 10 rows that clients hold out stand among their own training rows as well.",
    )


def test_each_client_holds_out_its_own_share_and_keeps_a_row(tmp_path):
    for name, size in (("large", 40), ("small", 3), ("single", 1)):
        write(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {n}", "response": "b"} for n in range(size)])
    federated = load(
        str(tmp_path), partition=Partition(method="files", client_test_fraction=0.25), test_rows_per_category=0
    )
    assert {client: len(rows) for client, rows in federated.clients.items()} == {"large": 30, "single": 1, "small": 2}
    assert {client: len(rows) for client, rows in federated.held_out.items()} == {"large": 10, "small": 1}
    everywhere = instructions([*training(federated), *(row for rows in federated.held_out.values() for row in rows)])
    assert len(set(everywhere)) == 44


def test_a_file_whose_rows_are_all_held_out_is_an_error_that_names_the_client(tmp_path):
    write(tmp_path / "large.jsonl", rows_of({"a": 40}))
    write(tmp_path / "lost.jsonl", [{"instruction": "x", "response": "b", "category": "a"}])

    def load_with(seed):
        return load(str(tmp_path), seed=seed, partition=Partition(method="files"), test_rows_per_category=20)

    # 20 of 41 rows are held out, so about half of all seeds hold out the only row of one file.
    seeds = [
        seed for seed in range(20) if "x" in instructions(load(str(tmp_path), seed, test_rows_per_category=20).test)
    ]
    assert 3 < len(seeds) < 17
    with pytest.raises(DataError, match="the client 'lost' is left with no row"):
        load_with(seeds[0])
    assert "lost" in load_with(min(set(range(20)) - set(seeds))).clients


def test_a_file_of_unseen_categories_only_takes_no_part_and_is_noted(tmp_path):
    write(tmp_path / "here.jsonl", rows_of({"a": 40}))
    write(tmp_path / "elsewhere.jsonl", rows_of({"b": 40}))
    federated = load(str(tmp_path), partition=Partition(method="files"), unseen_categories=("b",))
    assert list(federated.clients) == ["here"]
    assert "1 client with rows of unseen categories only, who take no part: elsewhere." in federated.notes


def test_the_column_of_the_partition_is_read(tmp_path):
    rows = rows_of({"a": 20}, site="north") + rows_of({"a": 20}, site="south")
    federated = load(write(tmp_path / "rows.jsonl", rows), partition=Partition(method="column", column="site"))
    assert list(federated.clients) == ["north", "south"]


def test_the_embedded_rows_bring_their_own_test_and_validation(tmp_path, monkeypatch):
    monkeypatch.setattr("bellwether.data.sources.STARTER_ROWS", tmp_path)
    for number, name in enumerate(("train", "validation", "test"), 1):
        write(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {n}", "response": "b"} for n in range(10 * number)])
    federated = load("starter")
    assert (len(training(federated)), len(federated.validation), len(federated.test)) == (10, 20, 30)


def test_embedded_rows_of_two_languages_bring_the_test_and_validation_rows_of_both(tmp_path, monkeypatch):
    monkeypatch.setattr("bellwether.data.sources.STARTER_ROWS", tmp_path)
    (tmp_path / "lowland").mkdir()
    for number, name in enumerate(("train", "validation", "test"), 1):
        for folder, language, size in ((tmp_path, "english", 10), (tmp_path / "lowland", "lowland", 4)):
            rows = [{"instruction": f"{name} {n}", "response": language, "language": language} for n in range(size)]
            write(folder / f"{name}.jsonl", rows * number)

    def groups(*sources, partition=FOUR, **data):
        federated = load_federated(Data(sources=sources, **data), partition, Randomness(0))
        parts = (training(federated), federated.validation, federated.test)
        return [dict(collections.Counter(row.group for row in rows)) for rows in parts]

    assert groups("starter") == [{"english": 10}, {"english": 20}, {"english": 30}]
    assert groups("starter:lowland") == [{"lowland": 4}, {"lowland": 8}, {"lowland": 12}]
    both = [{"english": 10 * n, "lowland": 4 * n} for n in (1, 2, 3)]
    assert groups("starter", "starter:lowland") == both
    per_group = Partition(method="iid", clients=4, clients_per_group={"lowland": 1, "english": 3})
    assert groups("starter", "starter:lowland", partition=per_group) == both
    own_test = groups("starter", "starter:lowland", test_sources=("starter:lowland:test",), test_rows_per_category=10)
    assert own_test == [both[0], {}, {"lowland": 12}]


@pytest.mark.parametrize("column", ["language", "domain"])
def test_rows_name_their_group_in_usual_columns_or_in_one_that_the_recipe_names(tmp_path, column):
    rows = rows_of({"a": 9}, **{column: "law"}) + rows_of({"a": 9}, **{column: "clinic"})
    source = write(tmp_path / "rows.jsonl", rows)
    federated = load(source, test_rows_per_category=0)
    assert collections.Counter(row.group for row in training(federated)) == {"law": 9, "clinic": 9}
    assert federated.notes == ()
    named = write(tmp_path / "named.jsonl", rows_of({"a": 9}, field=3))
    federated = load(named, test_rows_per_category=0, columns=Columns(group="field"))
    assert {row.group for row in training(federated)} == {"3"}
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], column: "law"}]
    federated = load(write(tmp_path / "chats.jsonl", chats * 4), test_rows_per_category=0)
    assert {row.group for row in training(federated)} == {"law"}


def test_a_column_of_groups_that_is_not_there_is_named(source):
    with pytest.raises(DataError, match=r"there is no column 'tongue' \(data\.columns\.group\)"):
        load(source, columns=Columns(group="tongue"))


def test_files_are_no_clients_where_groups_have_theirs(tmp_path):
    write(tmp_path / "one.jsonl", rows_of({"a": 20}, language="en"))
    write(tmp_path / "two.jsonl", rows_of({"a": 20}, language="fr"))
    partition = Partition(clients=5, clients_per_group={"en": 2, "fr": 3})
    federated = load(str(tmp_path), partition=partition, test_rows_per_category=0)
    assert list(federated.clients) == [f"client-{n:02}" for n in range(1, 6)]


# Fingerprint --------------------------------------------------------------------------------------


def test_equal_data_has_an_equal_fingerprint_wherever_it_lies(source, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copied = str(moved / "other.jsonl")
    with open(source) as original, open(copied, "w") as copy:
        copy.write(original.read())
    assert rows_fingerprint(load(source)) == rows_fingerprint(load(copied))


def test_any_change_of_a_row_or_of_its_place_changes_the_fingerprint(source):
    federated = load(source, validation_rows_per_category=1, partition=Partition(clients=2, client_test_fraction=0.2))
    known = rows_fingerprint(federated)
    name, rows = next(iter(federated.clients.items()))
    changed = [
        replace(federated, test=federated.test[1:]),
        replace(federated, validation=[]),
        replace(federated, held_out={}),
        replace(federated, clients={**federated.clients, name: rows[::-1]}),
        *(
            replace(federated, clients={**federated.clients, name: [replace(rows[0], **{field: "x"}), *rows[1:]]})
            for field in ("instruction", "response", "context", "category", "group")
        ),
    ]
    assert len({known, *map(rows_fingerprint, changed)}) == len(changed) + 1
