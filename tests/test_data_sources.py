import json

import pandas
import pytest

from bellwether.data.rows import Turn
from bellwether.data.sources import STARTER_ROWS, read_rows
from bellwether.data.tables import _batch_size
from bellwether.errors import DataError
from bellwether.recipe.recipe import Columns, Data

DOLLY = [
    {"instruction": "Name a colour.", "context": "", "response": "Blue.", "category": "open_qa"},
    {"instruction": "Sum up.", "context": "The fox, runs\nfar.", "response": 'A "fox".', "category": "summarization"},
]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return str(path)


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(*sources, **settings):
    return read_rows(sources, Data(sources=sources, **settings))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files_that_pandas_wrote_are_read(tmp_path, suffix):
    frame, path = pandas.DataFrame(DOLLY), tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == "jsonl")
    rows, notes = read(str(path))
    assert [(row.instruction, row.context, row.response, row.category) for row in rows] == [
        tuple(values.values()) for values in DOLLY
    ]
    assert notes == []
    assert {row.client for row in rows} == {""}


def test_rows_know_the_line_they_stand_in(tmp_path):
    def places(name, text):
        return [row.place for row in read(write(tmp_path / name, text))[0]]

    row = json.dumps(DOLLY[0])
    assert places("a.jsonl", f"{row}\n\n{row}\n") == ["a.jsonl:1", "a.jsonl:3"]
    assert places("a.json", f'[\n{row},\n\n{{"instruction": "x",\n"response": "y"}}\n, {row}]') == [
        "a.json:2",
        "a.json:4",
        "a.json:6",
    ]
    assert places("a.csv", 'instruction,response\n"x\ny",z\nu,v\n') == ["a.csv:2", "a.csv:4"]


def test_a_byte_order_mark_and_line_separators_inside_texts_do_no_harm(tmp_path):
    text = json.dumps({"instruction": "a\u2028b", "response": "c"}, ensure_ascii=False)
    rows, _ = read(write(tmp_path / "a.jsonl", f"{text}\r\n{text}", "utf-8-sig"))
    assert [row.instruction for row in rows] == ["a\u2028b"] * 2
    rows, _ = read(write(tmp_path / "a.csv", "instruction,response\na,b\n", "utf-8-sig"))
    assert rows[0].instruction == "a"


def test_alpacas_columns_and_null_inputs(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "input": None, "output": "b"}])
    [row], _ = read(source)
    assert (row.instruction, row.context, row.response) == ("a", "", "b")


def test_columns_named_in_the_recipe_go_before_the_usual_ones(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"q": "a", "doc": "d", "a": "b", "kind": 3, "instruction": "no"}])
    [row], notes = read(source, columns=Columns(instruction="q", context="doc", response="a", category="kind"))
    assert (row.instruction, row.context, row.response, row.category) == ("a", "d", "b", "3")
    assert notes == ["a.jsonl: not used: 'instruction'."]


def test_unused_columns_are_named_once_for_a_folder(tmp_path):
    for name in "abc":
        jsonl(tmp_path / f"{name}.jsonl", [{**DOLLY[0], "source": "x", "score": 1}])
    write(tmp_path / "README.md", "text")
    rows, notes = read(str(tmp_path))
    assert [row.client for row in rows] == ["a", "b", "c"]
    assert notes == [f"{tmp_path}: not read: README.md.", "a.jsonl and 2 more: not used: 'source', 'score'."]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
SHARE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def test_chats_become_turns(tmp_path):
    rows, _ = read(
        jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES, "category": "talk"}]),
        jsonl(tmp_path / "b.jsonl", [{"id": "x", "conversations": SHARE}]),
    )
    assert rows[0].turns == tuple(Turn(message["role"], message["content"]) for message in MESSAGES)
    assert (rows[0].instruction, rows[0].response, rows[0].category) == ("c", "d", "talk")
    assert rows[1].turns == (Turn("user", "a"), Turn("assistant", "b"))


def test_chats_from_parquet(tmp_path):
    pandas.DataFrame({"prompt": ["x"], "messages": [MESSAGES]}).to_parquet(tmp_path / "a.parquet")
    [row], notes = read(str(tmp_path / "a.parquet"))
    assert len(row.turns) == 5
    assert notes == ["a.parquet: not used: 'prompt'."]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (MESSAGES[:4], "does not end with a message of the assistant"),
        (MESSAGES[:1], "does not end with a message of the assistant"),
        ([], "a list of messages is wanted"),
        ("hello", "is text, but a list of messages"),
        ([{"role": "judge", "content": "x"}], "message 1 has the role 'judge'"),
        ([{"role": "tool", "content": "x"}], "message 1 is of the tool, but one of the user is due"),
        ([MESSAGES[1], MESSAGES[1]], "message 2 is of the user, but one of the assistant"),
        ([MESSAGES[1], {"role": "assistant", "content": " "}], "message 2 is empty"),
        ([MESSAGES[1], {"role": "assistant", "content": ["x"]}], "message 2 has a part that is text, but objects of"),
        (
            [MESSAGES[1], {"role": "assistant", "content": [{"type": "image_url"}]}],
            "message 2 has a part that is 'image_url', but objects of the type 'text'",
        ),
        ([MESSAGES[1], {"role": "assistant", "content": "x", "weight": 0.5}], "message 2 has the weight 0.5, but 0 or"),
        (
            [MESSAGES[1], {"role": "assistant", "content": "x", "weight": 0}],
            "have a weight of 0, so nothing is trained",
        ),
        ([MESSAGES[1], {"role": "assistant", "content": "\u200b\ufeff"}], "message 2 is empty"),
        (
            [MESSAGES[1], {"role": "assistant", "tool_calls": [{"name": "f"}]}],
            "message 2 has tool_calls that are no list",
        ),
        (
            [MESSAGES[1], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "message 2 calls 'f' with arguments that are not JSON",
        ),
        (
            [MESSAGES[1], {"role": "assistant", "content": "x", "reasoning": 3}],
            "the reasoning of message 2 is a number",
        ),
        (["x"], "message 1 is text, but an object"),
    ],
)
def test_bad_chats_are_refused_with_place_and_reason(tmp_path, messages, said):
    with pytest.raises(DataError, match=r"^a\.jsonl:1: ") as caught:
        read(jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert said in str(caught.value)


GOOD = '{"instruction": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", GOOD + '{"instruction": \n', "a.jsonl:2: this line is not JSON (Expecting value, column 17)"),
        ("a.jsonl", GOOD + "[1]\n", "a.jsonl:2: a line holds one object, but this is a list"),
        ("a.jsonl", GOOD + '{"response": "b"}', "a.jsonl:2: the field 'instruction' is missing"),
        ("a.jsonl", GOOD + '{"instruction": " ", "response": "b"}', "a.jsonl:2: the field 'instruction' is empty"),
        ("a.jsonl", GOOD + '{"instruction": "a", "response": ""}', "a.jsonl:2: the field 'response' is empty"),
        ("a.jsonl", GOOD + '{"instruction": "a", "response": 3}', "a.jsonl:2: the field 'response' is a number"),
        ("a.jsonl", GOOD + '{"instruction": null, "response": "b"}', "a.jsonl:2: the field 'instruction' is null"),
        ("a.jsonl", '{"instruction": "\\ud800", "response": "b"}', "a.jsonl:1: the field 'instruction' holds half a"),
        ("a.jsonl", GOOD.encode() + b'{"instruction": "\xff"}', "a.jsonl:2: byte 55 is not UTF-8"),
        ("a.jsonl", b"\xef\xbb\xbf" + b"\xff", "a.jsonl:1: byte 3 is not UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16-le"), "a.jsonl:1: this line is not JSON"),
        ("a.jsonl", b"\xff\xfe" + GOOD.encode("utf-16-le") + b"\x00", "a.jsonl:2: byte 78 is not utf-16"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n \n", "the file is empty"),
        ("a.jsonl", '{"text": "a"}', "a.jsonl: no column holds the instruction (there are text); name it in data.col"),
        ("a.json", "[]", "the file holds no rows"),
        ("a.json", "{}", "a.json:1: a .json file holds a list of objects"),
        ("a.json", f"[{GOOD},\n{{]", "a.json:3: this is not JSON"),
        ("a.json", f"[{GOOD}{GOOD}]", "a.json:2: this is not JSON (a comma"),
        ("a.json", f"[{GOOD},]", "this is not JSON"),
        ("a.json", f"[{GOOD}", "this is not JSON"),
        ("a.json", f"[{GOOD}, 7]", "a.json:2: the list holds objects, but this is a number"),
        ("a.csv", "instruction,response\na,b\nc\n", "a.csv:3: this row has 1 fields, but the header names 2"),
        ("a.csv", "instruction,instruction\na,b\n", "a.csv:1: the header names a column twice"),
        ("a.csv", 'instruction,response\n"a,b\n', "a.csv:2: this is not CSV"),
        ("a.csv", "instruction,response\n", "the file holds no rows"),
        ("a.parquet", b"PAR1 and nothing", "a.parquet: this is not a Parquet file"),
        ("a.txt", "text", "files of this kind cannot be read"),
    ],
)
def test_bad_files_are_refused_with_place_and_reason(tmp_path, name, content, said):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content))
    assert said in str(caught.value)


ROW = '{"instruction": "a", "response": "%s"}\n'
LONG = "x" * 10_000_001
COLUMNS = ",".join(f"c{number}" for number in range(1001))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            GOOD + ROW % LONG + ROW % "" + ROW % ("y" * 20_000_000),
            "a.jsonl:2: this row has 10,000,038 characters, but at most 10,000,000 are read; shorten or remove it.\n"
            "a.jsonl:3: the field 'response' is empty; fill it or remove the row.\n"
            "a.jsonl:4: this row has 20,000,037 characters, but at most 10,000,000 are read; shorten or remove it.",
        ),
        ("a.json", f"[{GOOD},{ROW % LONG}]", "a.json:2: this row has 10,000,037 characters, but at most 10,000,000"),
        ("a.csv", f"instruction,response\na,b\na,{LONG}\n", "a.csv:3: this row has 10,000,004 characters, but at most"),
        (
            "a.csv",
            'instruction,response\na,"%s"\n' % (f"{'b' * 99}\n" * 101_000),
            "a.csv:2: a field has more than 10,000,000 char",
        ),
        (
            "a.csv",
            'instruction,response\n"{0}","{0}"\n'.format(f"{'a' * 99}\n" * 60_000),
            "a.csv:2: this row has 12,000,000 characters, but at most 10,000,000 are read",
        ),
        ("a.csv", COLUMNS + "\n" + COLUMNS, "a.csv:1: there are 1,001 columns, but at most 1,000 are read"),
        (
            "a.jsonl",
            GOOD + json.dumps(dict.fromkeys(COLUMNS.split(","))),
            "a.jsonl:2: there are 1,001 columns, but at most 1,000 are read; leave out those that are not used.",
        ),
        ("a.jsonl", GOOD + '{"instruction": 1e400, "response": "b"}', "a.jsonl:2: the field 'instruction' is a number"),
        ("a.jsonl", GOOD + '{"a": %s}' % ("9" * 10_000), "a.jsonl:2: this line is not JSON (a number has too many dig"),
        ("a.jsonl", GOOD + "[" * 100_000, "a.jsonl:2: this line is not JSON (nested too deep)"),
        ("a.jsonl", GOOD + '{"a": ' * 100_000, "a.jsonl:2: this line is not JSON (nested too deep)"),
        (
            "a.jsonl",
            '{"instruction": "a", "response": "b", "category": "%s"}' % ("k" * 1001),
            "a.jsonl:1: the field 'category' has 1,001 characters, but a name of at most 1,000 is wanted.",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "response": "b", "category": %s}' % ("7" * 1001),
            "a.jsonl:1: the field 'category' has 1,001 characters, but a name of at most 1,000 is wanted.",
        ),
        ("a.jsonl", json.dumps({"messages": [{"role": ["x" * 500]}]}), "message 1 has the role ['xxx"),
    ],
    ids=range(14),
)
def test_what_would_grow_without_bound_is_refused_with_place_and_size(tmp_path, name, content, said):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_row_of_exactly_the_longest_length_is_read(tmp_path):
    row = ROW % ("x" * (10_000_000 - len(ROW % "")))
    assert len(row) == 10_000_000
    rows, _ = read(write(tmp_path / "a.jsonl", row + GOOD))
    assert [len(row.response) for row in rows] == [9_999_963, 1]


def test_a_long_text_of_a_parquet_file_is_refused_with_its_place(tmp_path):
    frame = pandas.DataFrame({"instruction": ["a", "a"], "response": ["b", LONG]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        read(str(tmp_path / "a.parquet"))
    assert str(caught.value) == (
        "a.parquet:2: the field 'response' has 10,000,001 characters, but at most 10,000,000 are read; shorten it. "
        "Set data.skip_bad_rows=true to leave bad rows out (init: --skip-bad-rows)."
    )


@pytest.mark.parametrize("kept", [True, False])
def test_a_parquet_file_that_unpacks_to_far_more_than_it_is_is_refused_at_the_bound(tmp_path, monkeypatch, kept):
    import pyarrow
    import pyarrow.parquet

    # One text, named by twenty thousand rows: 400 MB, and as much again, out of some kilobytes.
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), ["x" * 20_000])
    path, table = tmp_path / "a.parquet", pyarrow.table({"instruction": texts, "response": texts})
    pyarrow.parquet.write_table(table, path, store_schema=kept)  # whether it is read as a dictionary again
    assert path.stat().st_size < 200_000
    monkeypatch.setattr("bellwether.data.tables.UNPACKED", 30_000_000)
    with pytest.raises(DataError, match=r"^a\.parquet:74\d: the rows up to here take more than 30\.0 MB when they are"):
        read(str(path))


def test_rows_of_parquet_are_unpacked_by_the_fewer_the_larger_their_columns_are(tmp_path):
    import pyarrow.parquet

    sizes = []
    for characters in (10, 50_000_000):
        path = tmp_path / f"{characters}.parquet"
        pandas.DataFrame({"instruction": ["x" * characters], "response": ["b"]}).to_parquet(path, compression="zstd")
        sizes.append(_batch_size(pyarrow.parquet.ParquetFile(path).metadata))
    assert sizes == [64, 39], "39 texts of 50 MB take 2 GB"


def test_a_parquet_file_of_too_many_columns_is_refused(tmp_path):
    pandas.DataFrame({name: ["a"] for name in COLUMNS.split(",")}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet: there are 1,001 columns, but at most 1,000 are read"):
        read(str(tmp_path / "a.parquet"))


def test_of_many_columns_or_long_ones_messages_and_notes_name_the_first(tmp_path):
    names = [f"column-{number}" for number in range(999)]
    source = jsonl(tmp_path / "a.jsonl", [dict.fromkeys(names, "x") | {"y" * 5000: "x"}])
    with pytest.raises(DataError) as caught:
        read(source)
    assert "(there are column-0, column-1, column-2, " in str(caught.value)
    assert "column-19 and 980 more)" in str(caught.value)
    _, notes = read(jsonl(tmp_path / "a.jsonl", [DOLLY[0] | {"y" * 5000: 1} | dict.fromkeys(names[:900])]))
    assert notes[0].startswith("a.jsonl: not used: 'yyy")
    assert notes[0].endswith("column-18' and 881 more.")
    assert len(notes[0]) < 500


HOW = "save the file as UTF-8, or name its encoding in data.encoding, such as cp1252 (init: --encoding cp1252)"


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_the_first_byte_that_is_not_utf8_is_named_wherever_it_stands(tmp_path, start):
    # Blocks of a mebibyte are looked through; here a character lies across the end of the first, and is cut off.
    text = start.encode() + GOOD.encode() * 3
    text += b" " * (1_048_575 - len(text)) + "é".encode()[:1]
    for rest, offset, line in [
        (b"\n", 1_048_575, 4),
        ("é".encode()[1:] + b"\n\n\xff", 1_048_579, 6),
        (b"", 1_048_575, 4),
    ]:
        with pytest.raises(UnicodeDecodeError) as expected:
            (text + rest).decode()
        assert (expected.value.start, (text + rest).count(b"\n", 0, offset) + 1) == (offset, line)
        for name in ("a.jsonl", "a.csv", "a.json"):
            with pytest.raises(DataError) as caught:
                read(write(tmp_path / name, text + rest))
            assert str(caught.value) == f"{name}:{line}: byte {offset} is not UTF-8; {HOW}."


def test_lines_that_only_a_carriage_return_ends_are_read_as_csv(tmp_path):
    rows, _ = read(write(tmp_path / "a.csv", 'instruction,response\ra,b\r"c\rd",e\r'))
    assert [(row.instruction, row.place) for row in rows] == [("a", "a.csv:2"), ("c\rd", "a.csv:3")]


def test_parquet_rows_are_counted_from_one(tmp_path):
    pandas.DataFrame({"instruction": ["a", ""], "response": ["b", "b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet:2: the field 'instruction' is empty"):
        read(str(tmp_path / "a.parquet"))


def test_of_many_bad_rows_three_are_shown_and_all_are_counted(tmp_path):
    with pytest.raises(DataError) as caught:
        read(jsonl(tmp_path / "a.jsonl", [{"instruction": "", "response": "b"}] * 40))
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines[:3]] == ["a.jsonl:1:", "a.jsonl:2:", "a.jsonl:3:"]
    assert lines[3:] == ["... and 37 more; 40 rows are bad in all."]  # none is good, so that none can be left out


def test_a_column_that_the_recipe_names_must_be_there(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", DOLLY)
    with pytest.raises(DataError, match=r"no column 'topic' \(data.columns.category\); there are instruction, context"):
        read(source, columns=Columns(category="topic"))
    with pytest.raises(DataError, match=r"no column 'site' \(partition.column\)"):
        read_rows([source], Data(), client_column="site")


# Clients ------------------------------------------------------------------------------------------


def test_a_column_names_clients(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{**DOLLY[0], "site": site} for site in ("north", "south", 7)])
    rows, notes = read_rows([source], Data(), client_column="site")
    assert [row.client for row in rows] == ["north", "south", "7"]
    assert notes == []


@pytest.mark.parametrize("name", ["", " ", "..", "a/b", "a\\b", "a\nb", "a\u202eb", "x" * 101, " a\t"])
def test_unsafe_client_names_are_refused(tmp_path, name):
    source = jsonl(tmp_path / "a.jsonl", [{**DOLLY[0], "site": name}])
    if name == " a\t":
        assert read_rows([source], Data(), client_column="site")[0][0].client == "a"
        return
    with pytest.raises(DataError, match=r"^a\.jsonl:1: the client's name"):
        read_rows([source], Data(), client_column="site")


def test_files_of_equal_stem_take_their_folders_name_along(tmp_path):
    sources = []
    for folder in ("north", "south"):
        (tmp_path / folder).mkdir()
        sources.append(jsonl(tmp_path / folder / "train.jsonl", DOLLY))
    assert sorted({row.client for row in read(*sources)[0]}) == ["north-train", "south-train"]


def test_files_that_name_one_client_twice_are_refused(tmp_path):
    jsonl(tmp_path / "a.jsonl", DOLLY)
    write(tmp_path / "a.csv", "instruction,response\na,b\n")
    with pytest.raises(DataError, match="both name the client"):
        read(str(tmp_path))


def test_a_file_name_with_control_characters_is_refused(tmp_path):
    jsonl(tmp_path / "a\x1b[31m.jsonl", DOLLY)
    with pytest.raises(DataError, match=r"control characters.*Rename the file"):
        read(str(tmp_path))


# Where rows come from -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["rows.jsonl", "./rows", "/nowhere/rows", "~/nowhere-rows", "a/b/c", "my rows"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, source):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match="there is no such file"):
        read(source)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="the folder holds no file to read"):
        read(str(tmp_path))


def test_a_hub_name_is_loaded_with_split_and_revision(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load(name, config, **arguments):
        asked.append((name, arguments, config))
        return datasets.Dataset.from_list(DOLLY)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, _ = read("owner/name", split="train_sft", revision="v1", config="main")
    assert asked == [("owner/name", {"split": "train_sft", "revision": "v1"}, "main")]
    assert [row.place for row in rows] == ["owner/name:1", "owner/name:2"]
    assert rows[1].context == DOLLY[1]["context"]


def test_a_hub_that_cannot_be_reached_is_one_clear_sentence(monkeypatch, tmp_path):
    import datasets

    def load(*_, **__):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"owner/name: .*'train'.*\(no route to host\); check the name"):
        read("owner/name")


def test_the_embedded_rows_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr("bellwether.data.sources.STARTER_ROWS", tmp_path)
    for number, name in enumerate(("train", "validation", "test")):
        jsonl(tmp_path / f"{name}.jsonl", DOLLY[:1] * (number + 1))
    assert [row.place for row in read("starter")[0]] == ["starter:train:1"]
    assert len(read("starter:validation")[0]) == 2
    assert len(read("starter:test")[0]) == 3
    (tmp_path / "lowland").mkdir()
    for number, name in enumerate(("train", "validation", "test")):
        jsonl(tmp_path / "lowland" / f"{name}.jsonl", DOLLY[:1] * (number + 4))
    assert [row.place for row in read("starter:lowland")[0]] == [f"starter:lowland:train:{n}" for n in range(1, 5)]
    assert len(read("starter:lowland:validation")[0]) == 5
    assert len(read("starter:lowland:test")[0]) == 6
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match="the embedded rows are not there"):
        read("starter:test")


def test_the_embedded_rows_are_shipped():
    if not STARTER_ROWS.is_dir():
        pytest.skip("the embedded rows are not written yet")
    assert len({row.category for row in read("starter")[0]}) == 8


def groups_of(tmp_path, values, **columns):
    rows = [DOLLY[0] | ({} if value is MISSING else {"language": value}) for value in values]
    rows, notes = read(jsonl(tmp_path / "a.jsonl", rows), columns=Columns(**columns))
    return [row.group for row in rows], notes


MISSING = object()
NOT_USED = ["a.jsonl: not used: 'language'."]


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        (["en", " fr\n", None, MISSING, 3], ["en", "fr", "", "", "3"]),
        ([str(number) for number in range(20)], [str(number) for number in range(20)]),
        ([str(number) for number in range(21)], None),
        (["a" * 64, "b"], ["a" * 64, "b"]),
        (["a" * 65, "b"], None),
        (["a\nb", "c"], None),
        ([["en", "fr"], "en"], None),
        ([True, "en"], None),
        ([0.5, "en"], None),
    ],
)
def test_a_column_of_a_usual_name_is_the_group_where_it_holds_few_short_labels(tmp_path, values, groups):
    found, notes = groups_of(tmp_path, values)
    assert found == (groups or [""] * len(values))
    assert notes == ([] if groups else NOT_USED)


def test_what_is_no_language_leaves_the_group_to_the_domain(tmp_path):
    rows = [DOLLY[0] | {"language": [n], "domain": "law"} for n in range(3)]
    found, _ = read(jsonl(tmp_path / "a.jsonl", rows))
    assert {row.group for row in found} == {"law"}


def test_a_group_that_is_named_may_have_many_labels_and_an_empty_name_takes_none(tmp_path):
    many = [f"label {number}" for number in range(30)]
    assert groups_of(tmp_path, many, group="language") == (many, [])
    assert groups_of(tmp_path, ["en", "fr"], group="") == (["", ""], NOT_USED)
    with pytest.raises(DataError, match="a.jsonl:1: the field 'language' is a list, but text is wanted"):
        groups_of(tmp_path, [["en"]], group="language")
