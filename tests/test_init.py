import json

import pytest

from bellwether.data.federated import load_federated
from bellwether.data.sources import STARTER_ROWS
from bellwether.errors import DataError, RecipeError
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Training
from bellwether.runner import init
from bellwether.runner.prepare import prepare
from bellwether.tools.randomness import Randomness


def propose(paths, **given):
    return init.propose(paths, **given).text


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dolly(size, **more):
    return [
        {"instruction": f"i {n}", "context": "c" * n, "response": "r", "category": f"k{n % 3}", **more}
        for n in range(size)
    ]


def loaded(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_one_file_with_categories_is_dealt_by_category(tmp_path):
    source = write(tmp_path / "my rows.jsonl", dolly(90, note="x"))
    text = propose([source])
    recipe = loaded(text, tmp_path)
    assert recipe.name == "my-rows"
    assert recipe.data.sources == (str(source),)
    assert (recipe.partition.method, recipe.partition.clients) == ("dirichlet", 4)
    assert recipe.data.test_rows_per_category == 5  # of 30, of which 15 % are 4.5
    assert "15 rows of 90 (17%)" in text
    assert "# Seen: 90 rows in 1 file." in text
    assert "3 categories with their rows: k0 (30), k1 (30), k2 (30)." in text
    assert "not used: 'note'" in text
    assert "recipe.yaml" not in text
    assert recipe.training.learning_rate == Training().learning_rate
    assert len(load_federated(recipe.data, recipe.partition, Randomness(0)).clients) == 4


def test_several_files_are_clients(tmp_path):
    sources = [write(tmp_path / f"site-{n}.jsonl", dolly(30 + n)) for n in range(3)]
    text = propose(sources)
    recipe = loaded(text, tmp_path)
    assert recipe.partition.method == "files"
    assert "the smallest has 30 rows, the largest 32" in text
    federated = load_federated(recipe.data, recipe.partition, Randomness(0))
    assert list(federated.clients) == ["site-0", "site-1", "site-2"]


def test_a_folder_is_one_source(tmp_path):
    folder = tmp_path / "sites"
    folder.mkdir()
    for n in range(30):
        write(folder / f"{n}.jsonl", dolly(9))
    recipe = loaded(propose([folder]), tmp_path)
    assert recipe.data.sources == (str(folder),)
    assert recipe.federation.fraction == 0.1


def test_rows_without_categories_are_dealt_evenly(tmp_path):
    recipe = loaded(
        propose([write(tmp_path / "a.jsonl", [{"input": "x", "prompt": "a", "output": "b"}] * 50)]), tmp_path
    )
    assert (recipe.partition.method, recipe.partition.clients) == ("iid", 2)


def test_columns_of_other_names_are_mapped(tmp_path):
    rows = [{"Query": f"a {n}", "Passage": "p", "completion": "b", "Topic": "t"} for n in range(30)]
    recipe = loaded(propose([write(tmp_path / "a.jsonl", rows)]), tmp_path)
    assert recipe.data.columns.model_dump() == {
        "instruction": "Query",
        "context": "Passage",
        "response": None,  # a usual name
        "category": "Topic",
        "messages": None,
        "chosen": None,
        "rejected": None,
        "group": None,
    }
    assert len(load_federated(recipe.data, recipe.partition, Randomness(0)).test) == 5  # 15 % of 30, rounded up


def test_chats_are_recognised(tmp_path):
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    recipe = loaded(
        propose([write(tmp_path / "a.jsonl", [{"id": str(n), "conversations": chat} for n in range(30)])]), tmp_path
    )
    assert recipe.data.columns.messages is None
    rows = [{"id": str(n), "dialog": chat} for n in range(30)]
    assert loaded(propose([write(tmp_path / "b.jsonl", rows)]), tmp_path).data.columns.messages == "dialog"


def test_a_column_that_could_name_clients_is_pointed_out(tmp_path):
    rows = [{**row, "hospital": f"h{n % 4}", "id": n} for n, row in enumerate(dolly(60))]
    text = propose([write(tmp_path / "a.jsonl", rows)])
    assert "The column hospital could name 4 clients" in text
    assert "`method: column` and `column: hospital`" in text
    assert "column id could" not in text


def test_groups_are_told_with_how_to_give_them_clients(tmp_path):
    rows = [{"instruction": "a", "response": "b", "language": "en" if n % 3 else "fr"} for n in range(60)]
    source = write(tmp_path / "a.jsonl", rows)
    text = propose([source])
    assert loaded(text, tmp_path).partition.clients_per_group is None
    assert "Rows are of 2 groups: en (40), fr (20)." in text
    assert "clients_per_group" not in propose([write(tmp_path / "b.jsonl", rows[1:3] * 20)])


def test_no_text_of_the_files_leaves_its_comment(tmp_path):
    odd = "k\nseed: 7\u2028model: x"
    rows = [{"instruction": "a", "response": "b", "category": odd, "col\nseed: 8": "x"} for _ in range(30)]
    source = write(tmp_path / "a: [b] #c.jsonl", rows)
    recipe = loaded(propose([source]), tmp_path)
    assert recipe.seed == 0
    assert recipe.data.sources == (str(source),)


def test_columns_that_fit_nothing_are_shown_and_the_recipe_runs_once_they_are_chosen(tmp_path):
    rows = [{"foo": "Why?\n", "bar": "x" * 99, "n": n, "odd": None} for n in range(30)]
    proposal = init.propose([write(tmp_path / "a.jsonl", rows)])
    assert proposal.to_choose == ["instruction", "response"]
    lines = [line.split(maxsplit=3) for line in proposal.text.splitlines() if line.startswith("  #   ")]
    assert lines == [
        ["#", "foo", "30", '"Why?\\n"'],
        ["#", "bar", "30", f'"{"x" * 49}…"'],
        ["#", "n", "30", "0"],
        ["#", "odd", "0", "null"],
    ]
    with pytest.raises(RecipeError) as error:
        loaded(proposal.text, tmp_path)
    numbers = [n for n, line in enumerate(proposal.text.splitlines(), 1) if line.endswith(": ???")]
    assert len(numbers) == len(error.value.problems) == 2
    for number, role, said in zip(numbers, ("instruction", "response"), error.value.problems, strict=True):
        place = f"{tmp_path / 'recipe.yaml'}:{number}: data.columns.{role} is to be chosen; put it in place of ???"
        assert said.startswith(place)
    chosen = proposal.text.replace("instruction: ???", "instruction: foo").replace("response: ???", "response: bar")
    recipe = loaded(chosen, tmp_path)
    assert len(load_federated(recipe.data, recipe.partition, Randomness(0)).test) == 10
    over = load_recipe(tmp_path / "recipe.yaml", ["data.columns.instruction=foo", "data.columns.response=bar"])
    assert over == recipe


def test_columns_are_chosen_by_flags_for_all_files_or_one(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"foo": "q", "bar": "r", "baz": f"k{n % 2}", "category": "x"} for n in range(30)])
    b = write(tmp_path / "b.jsonl", [{"instruction": "q", "response": "r", "category": "y"} for n in range(30)])
    columns = {"instruction": ["foo"], "response": ["a.jsonl=bar"], "category": ["baz"]}
    recipe = loaded(propose([a, b], columns=columns), tmp_path)
    (own,) = recipe.data.source_columns
    assert (own.source, own.instruction, own.response, own.category) == ("a.jsonl", "foo", "bar", "baz")
    federated = load_federated(recipe.data, recipe.partition, Randomness(0))
    assert {row.category for rows in federated.clients.values() for row in rows} == {"k0", "k1", "y"}
    none = loaded(propose([b], columns={"category": [""]}), tmp_path)
    assert none.data.columns.category == ""
    for role, text, said in (
        (
            "instruction",
            "nope",
            r"--instruction: none of the files has a column 'nope'; there are foo, bar, baz, category",
        ),
        ("response", "b.jsonl=bar", r"--response: b\.jsonl has no column 'bar'; there are instruction, response"),
    ):
        with pytest.raises(DataError, match=said):
            propose([a, b], columns={role: [text]})


def test_files_with_columns_of_their_own_are_mapped_each_by_itself(tmp_path):
    folder = tmp_path / "sites"
    folder.mkdir()
    write(folder / "a.jsonl", dolly(12))
    write(folder / "b.jsonl", [{"Question": f"q{n}", "Answer": "r"} for n in range(12)])
    write(folder / "c.jsonl", [{"input": f"q{n}", "output": "r"} for n in range(12)])
    recipe = loaded(propose([folder]), tmp_path)
    named = [one.model_dump(exclude_unset=True) for one in recipe.data.source_columns]
    assert named == [
        {"source": "b.jsonl", "instruction": "Question", "response": "Answer"},
        {"source": "c.jsonl", "instruction": "input"},
    ]
    assert set(load_federated(recipe.data, recipe.partition, Randomness(0)).clients) == {"a", "b", "c"}


def test_a_folder_of_splits_brings_its_own_test(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, count in (("train", 40), ("validation", 6), ("test", 7)):
        write(folder / f"{name}.jsonl", dolly(count))
    text = propose([folder])
    recipe = loaded(text, tmp_path)
    assert "# Seen: 40 rows in 3 files." in text
    assert "Held out for the scores: validation.jsonl, test.jsonl." in text
    federated = load_federated(recipe.data, recipe.partition, Randomness(0))
    assert (len(federated.validation), len(federated.test)) == (6, 7)


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([180], 27),  # 15 %
        ([60, 60, 60], 9),
        ([2] * 90, 1),
        ([100_000], 400),  # enough for a score, and no more
        ([2000] * 8, 50),
        ([2000] * 100, 10),  # as in FedIT's paper
    ],
)
def test_about_15_percent_are_held_out_of_each_category_within_bounds(sizes, held_out):
    assert init._test_rows(sizes) == held_out


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["data/my rows.jsonl.gz"], "my-rows"),
        (["data/sites"], "sites"),
        (["clinic-a.jsonl", "clinic-b.jsonl"], "clinic"),
        (["clinic.jsonl", "clinical.jsonl"], "clinic-clinical"),
        (["a.jsonl", "b.csv"], "a-b"),
        ([f"{n}-{'x' * 30}.jsonl" for n in range(3)], f"0-{'x' * 30}-and-2-more"),
        (["问.jsonl"], "own-data"),
    ],
)
def test_the_name_is_of_all_files(sources, name):
    assert init._name(sources) == name


def test_a_model_of_ones_own_gets_settings_that_fit_it(tmp_path, tiny_llama):
    rows = [{"instruction": f"Task {n}?", "response": "Because it is so, and so on. " * 4} for n in range(40)]
    source = write(tmp_path / "a.jsonl", rows)
    proposal = init.propose([source], model=str(tiny_llama))
    recipe = loaded(proposal.text, tmp_path)
    assert (recipe.model.path, recipe.training.learning_rate, recipe.model.dtype) == (str(tiny_llama), 3e-4, "float32")
    prepared = prepare(recipe)
    lengths = [len(row) for tokenised in prepared.clients.values() for row in tokenised.rows]
    assert recipe.data.max_tokens // 2 < max(lengths) <= recipe.data.max_tokens
    assert not prepared.warnings
    assert not proposal.warnings
    hub = loaded(propose([source], model="org/name"), tmp_path)
    assert (hub.model.path, hub.model.dtype, hub.training.gradient_checkpointing) == ("org/name", "bfloat16", True)


def test_the_embedded_base_is_warned_of_on_text_that_it_cannot_spell_and_not_on_its_own(tmp_path):
    real = [{"instruction": "Which treaty ended the Thirty Years' War?", "response": "Westphalia"}] * 30
    (said,) = init.propose([write(tmp_path / "real.jsonl", real)]).warnings
    assert "tokens a word" in said
    assert "--model" in said
    assert not init.propose([STARTER_ROWS / "test.jsonl", STARTER_ROWS / "lowland" / "test.jsonl"]).warnings


def test_bad_rows_are_found_at_once(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: the field 'response' is empty"):
        propose([write(tmp_path / "a.jsonl", [*dolly(1), {"instruction": "a", "response": ""}])])
    (tmp_path / "a.jsonl").write_text("{\n" + (tmp_path / "a.jsonl").read_text())
    said = r"a\.jsonl:1: .* not JSON.*\n.*a\.jsonl:3: .* empty.*leave bad rows out \(init: --skip-bad-rows\)"
    with pytest.raises(DataError, match=said):
        propose([tmp_path / "a.jsonl"])
    with pytest.raises(DataError, match="there is no such file"):
        propose([tmp_path / "b.jsonl"])
    with pytest.raises(DataError, match="no file is named"):
        propose([])


def test_bad_rows_are_skipped_and_counted_on_request(bellwether, tmp_path):
    lines = [
        "nonsense",
        *map(json.dumps, dolly(30)),
        json.dumps({"instruction": "a", "response": "", "category": "k0"}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    outcome = bellwether("init", "a.jsonl")
    assert outcome.code == 2
    assert outcome.err.endswith("Set data.skip_bad_rows=true to leave bad rows out (init: --skip-bad-rows).\n")
    assert bellwether("init", "a.jsonl", "--skip-bad-rows").code == 0
    text = (tmp_path / "recipe.yaml").read_text()
    assert "  skip_bad_rows: true  # bad and left out: 2 rows\n" in text
    assert "# Seen: 30 rows in 1 file." in text
    assert "k0 (10), k1 (10), k2 (10)" in text
    outcome = bellwether("data", "recipe.yaml")
    assert outcome.code == 0, outcome.err
    assert "Bad rows are skipped, as data.skip_bad_rows says: 2 in all (a.jsonl:1: this line is not JSON" in outcome.out


def test_bad_rows_of_files_whose_columns_are_to_be_chosen_are_told_alike(bellwether, tmp_path):
    (tmp_path / "a.csv").write_text("foo,bar\na,b\nc\n" + "d,e\n" * 20)
    outcome = bellwether("init", "a.csv")
    assert "a.csv:3: this row has 1 fields" in outcome.err
    assert "(init: --skip-bad-rows)" in outcome.err
    assert bellwether("init", "a.csv", "--skip-bad-rows").code == 0
    text = (tmp_path / "recipe.yaml").read_text()
    said = "bad and left out: 1 row; what rows hold is not checked before columns are chosen"
    assert f"  skip_bad_rows: true  # {said}\n" in text


def test_encoding_and_delimiter_are_chosen_by_flags_and_stand_in_the_recipe(bellwether, tmp_path):
    rows = "".join(f"Wie heißt {n}?#Ärger\n" for n in range(30))
    (tmp_path / "a.csv").write_bytes(f"instruction#response\n{rows}".encode("cp1252"))
    outcome = bellwether("init", "a.csv", "--delimiter", "#")
    assert outcome.code == 2
    assert "name its encoding in data.encoding, such as cp1252 (init: --encoding cp1252)" in outcome.err
    outcome = bellwether("init", "a.csv", "--delimiter", "#", "--encoding", "klingon")
    assert "data.encoding is 'klingon': no encoding of that name is known" in outcome.err
    assert bellwether("init", "a.csv", "--delimiter", "#", "--encoding", "cp1252").code == 0
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.data.encoding, recipe.data.delimiter, recipe.data.skip_bad_rows) == ("cp1252", "#", False)
    test = load_federated(recipe.data, recipe.partition, Randomness(0)).test
    assert {row.response for row in test} == {"Ärger"}


def test_a_recipe_whose_columns_are_to_be_chosen_claims_no_number_of_held_out_rows(tmp_path):
    rows = [{"foo": f"Why {n}?", "bar": "x", "kind": f"k{n % 8}"} for n in range(400)]
    source = write(tmp_path / "a.jsonl", rows)
    text = propose([source])
    assert "test_rows_per_category:" not in text
    assert "15%" not in text
    assert "    # category: a column, where one holds it" in text
    chosen = text.replace("instruction: ???", "instruction: foo").replace("response: ???", "response: bar")
    chosen = chosen.replace("# category: a column, where one holds it", "category: kind")
    recipe = loaded(chosen, tmp_path)
    assert len(load_federated(recipe.data, recipe.partition, Randomness(0)).test) == 80  # ten of each, as it says
    flags = {"instruction": ["foo"], "response": ["bar"], "category": ["kind"]}
    fitting = propose([source], columns=flags)
    assert "64 rows of 400 (16%)" in fitting
    recipe = loaded(fitting, tmp_path)
    assert len(load_federated(recipe.data, recipe.partition, Randomness(0)).test) == 64
