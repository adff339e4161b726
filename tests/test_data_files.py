"""Files as people have them: packed, encoded, delimited and named in other ways, with columns of their own."""

import bz2
import gzip
import json
import zipfile
from pathlib import Path

import pytest

from bellwether.data.federated import load_federated, with_splits
from bellwether.data.sources import read_rows
from bellwether.errors import DataError, RecipeError
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Columns, Data, Partition, SourceColumns
from bellwether.tools.randomness import Randomness

ROWS = [{"instruction": f"What is {n}?", "response": f"Ein Schlüssel, „{n}“."} for n in range(4)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(*sources: Path | str, **settings: object) -> tuple[list[tuple[str, str]], list[str]]:
    rows, notes = read_rows([str(source) for source in sources], Data(**settings))
    return [(row.instruction, row.response) for row in rows], notes


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


EXPECTED = [(row["instruction"], row["response"]) for row in ROWS]


# Packed -------------------------------------------------------------------------------------------


def zst(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.JSONL.ZST", zst)])
def test_packed_files_are_unpacked(tmp_path, name, pack):
    found, _ = read(write(tmp_path / name, pack(LINES.encode())))
    assert found == EXPECTED


def test_several_packed_pieces_in_one_file_are_one_file(tmp_path):
    half = len(LINES) // 2
    for name, pack in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zst)):
        data = pack(LINES[:half].encode()) + pack(LINES[half:].encode())
        assert read(write(tmp_path / name, data))[0] == EXPECTED


def test_packed_files_of_a_folder_are_clients_by_their_names(tmp_path):
    write(tmp_path / "north.jsonl.gz", gzip.compress(LINES.encode()))
    write(tmp_path / "south.csv", "instruction,response\na,b\n")
    rows, _ = read_rows([str(tmp_path)], Data())
    assert {row.client for row in rows} == {"north", "south"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_what_is_not_packed_as_its_name_says_is_one_sentence(tmp_path, name):
    for content in (LINES.encode(), bz2.compress(LINES.encode()), gzip.compress(LINES.encode())[:20]):
        with pytest.raises(DataError, match="the file is not packed as"):
            read(write(tmp_path / name, content))


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zst)])
def test_a_file_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr("bellwether.data.opening.UNPACKED", 3_000_000)
    with pytest.raises(DataError, match="holds more than 3.0 MB when it is unpacked"):
        read(write(tmp_path / name, pack(LINES.encode() + b" " * 5_000_000)))


# Encodings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz"])
def test_unicodes_forms_are_told_by_their_marks(tmp_path, encoding, ending):
    text = LINES
    if ending == "json":
        text = json.dumps(ROWS, ensure_ascii=False)
    if ending == "csv":
        text = "instruction,response\n" + "".join(f'"{a}","{b}"\n' for a, b in EXPECTED)
    content = text.encode(encoding)
    path = write(tmp_path / f"a.{ending}", gzip.compress(content) if ending.endswith("gz") else content)
    assert read(path)[0] == EXPECTED


def test_another_encoding_is_named_in_the_recipe_and_asked_for_where_it_is_not(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES.encode("cp1252"))
    with pytest.raises(DataError, match=r"a.jsonl:1: byte \d+ is not UTF-8; .* name its encoding in data.encoding"):
        read(path)
    assert read(path, encoding="cp1252")[0] == EXPECTED
    with pytest.raises(RecipeError, match="data.encoding is 'klingon': no encoding of that name is known"):
        load_recipe(None, ["data.encoding=klingon"])
    with pytest.raises(DataError, match="a.jsonl: the file is not utf-16"):
        read(path, encoding="utf-16")


# Delimiters, indexes, names -----------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_file_is_found_out(tmp_path, delimiter):
    text = (
        f'instruction{delimiter}response\n"Line one\nLine two; with, comma ""quoted"""{delimiter}A | thing\n'.replace(
            "A | thing", '"A | thing"'
        )
    )
    found, _ = read(write(tmp_path / "a.csv", text))
    assert found == [('Line one\nLine two; with, comma "quoted"', "A | thing")]


def test_a_delimiter_may_be_named_and_tsv_names_it(tmp_path):
    assert read(
        write(tmp_path / "a.tsv", "instruction\tresponse, short\nWhy?\tSo.\n"), columns={"response": "response, short"}
    )[0] == [("Why?", "So.")]
    assert read(write(tmp_path / "a.csv", "instruction#response\na#b\n"), delimiter="#")[0] == [("a", "b")]


@pytest.mark.parametrize(("first", "delimiter"), [("sep=;", ";"), ('"SEP=|"', "|"), ("sep=\t", "\t"), ("sep=^", "^")])
def test_excels_first_line_names_the_delimiter_and_is_no_header(tmp_path, first, delimiter):
    lines = [first, delimiter.join(["instruction", "response"]), delimiter.join(["a,b,c,d", "e"]), delimiter.join("f")]
    path = write(tmp_path / "a.csv", "\r\n".join(lines) + "\r\n")
    with pytest.raises(DataError, match=r"^a\.csv:4: this row has 1 fields"):
        read(path)
    assert read(path, skip_bad_rows=True)[0] == [("a,b,c,d", "e")]
    over = write(tmp_path / "b.csv", f"{first}\ninstruction#response\na#b\n")
    assert read(over, delimiter="#")[0] == [("a", "b")]


def test_a_header_that_begins_like_excels_first_line_is_one(tmp_path):
    path = write(tmp_path / "a.csv", "sep=x,response\na,b\n")
    assert read(path, columns={"instruction": "sep=x"})[0] == [("a", "b")]


def test_lines_of_nothing_but_delimiters_are_no_rows(tmp_path):
    path = write(tmp_path / "a.csv", ";\ninstruction;response\na;b\n;\n ; \n;;;;\nc;d\n;;;;\n")
    assert read(path)[0] == [("a", "b"), ("c", "d")]
    with pytest.raises(DataError, match="holds no rows"):
        read(write(tmp_path / "b.csv", "instruction;response\n;;;;\n"))


def test_a_column_without_a_name_is_pandas_index_and_is_told(tmp_path):
    found, notes = read(write(tmp_path / "a.csv", ",instruction,response\n0,a,b\n1,c,d\n"))
    assert found == [("a", "b"), ("c", "d")]
    assert notes == ["a.csv: not used: 'Unnamed: 0'."]


@pytest.mark.parametrize("start", ["", "\n \t\n"])
def test_a_list_of_objects_that_is_called_jsonl_is_read_as_one(tmp_path, start):
    found, _ = read(write(tmp_path / "a.jsonl", start + json.dumps(ROWS, indent=1)))
    assert found == EXPECTED


def test_zero_width_answers_are_empty(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:1: the field 'response' is empty"):
        read(write(tmp_path / "a.jsonl", json.dumps({"instruction": "a", "response": "\u200b\ufeff \u2060"})))


# Workbooks ----------------------------------------------------------------------------------------

SHEET = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{rows}</sheetData></worksheet>'
PARTS = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Override PartName="/xl/workbook.xml" ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.'
    'sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" ContentType="application/vnd.openxmlformats-'
    'officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship '
    'Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
    'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"><sheets><sheet name="S" sheetId="1" '
    'r:id="r1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet" '
    'Target="worksheets/sheet1.xml"/></Relationships>',
}


def workbook(path: Path, rows: list[list[str | float]]) -> Path:
    """Write a workbook of one sheet by hand."""

    def cell(place: str, value: str | float) -> str:
        if isinstance(value, str):
            return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{value}</t></is></c>'
        return f'<c r="{place}"><v>{value}</v></c>'

    lines = [
        f'<row r="{n}">{"".join(cell("ABCDEF"[m] + str(n), value) for m, value in enumerate(row))}</row>'
        for n, row in enumerate(rows, 1)
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        for name, text in PARTS.items():
            book.writestr(name, text)
        book.writestr("xl/worksheets/sheet1.xml", SHEET.format(rows="".join(lines)))
    return path


def test_the_first_sheet_of_a_workbook_is_read(tmp_path):
    path = workbook(
        tmp_path / "a.xlsx", [["instruction", "response"], ["Why?", "So."], ["How many?", 12.0], ["And?", 0.5]]
    )
    rows, _ = read_rows([str(path)], Data())
    assert [(row.instruction, row.response) for row in rows] == [("Why?", "So."), ("How many?", "12"), ("And?", "0.5")]
    assert rows[1].place == "a.xlsx:3"


def test_a_workbook_that_is_none_or_far_too_large_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="a.xlsx: this is not a workbook that can be read"):
        read(write(tmp_path / "a.xlsx", "PK and nothing"))
    monkeypatch.setattr("bellwether.data.tables.UNPACKED", 100_000)
    path = workbook(tmp_path / "b.xlsx", [["instruction", "response"], ["a", "b" * 3_000_000]])
    with pytest.raises(DataError, match="b.xlsx: the workbook holds more than"):
        read(path)


# Columns ------------------------------------------------------------------------------------------


def test_a_column_has_one_role(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"input": "How?", "output": "So."}\n')
    rows, _ = read_rows([str(path)], Data(columns=Columns(instruction="input")))
    assert (rows[0].instruction, rows[0].context) == ("How?", "")
    with pytest.raises(DataError, match="data.columns.* both name the column 'input'"):
        read(path, columns=Columns(instruction="input", context="input"))


def test_a_role_may_be_said_to_have_no_column(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"instruction": "How?", "input": "never mind", "output": "So."}\n')
    rows, notes = read_rows([str(path)], Data(columns=Columns(context="")))
    assert rows[0].context == ""
    assert notes == ["a.jsonl: not used: 'input'."]


def test_sources_may_have_columns_of_their_own(tmp_path):
    write(tmp_path / "a.jsonl", '{"instruction": "A?", "response": "Yes."}\n')
    write(tmp_path / "b.jsonl", '{"Question": "B?", "Answer": "No.", "response": "ignore"}\n')
    own = (SourceColumns(source="b.jsonl", instruction="Question", response="Answer"),)
    rows, _ = read_rows([str(tmp_path)], Data(source_columns=own))
    assert [(row.instruction, row.response, row.client) for row in rows] == [("A?", "Yes.", "a"), ("B?", "No.", "b")]
    with pytest.raises(
        DataError, match=r"data.source_columns names 'c.jsonl', but there is no such file .* a.jsonl, b.jsonl"
    ):
        read(tmp_path, source_columns=(SourceColumns(source="c.jsonl", instruction="x"),))


def test_prompt_and_completion_may_be_texts_or_messages(tmp_path):
    text = {"prompt": "How?", "completion": "So."}
    chat = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}],
        "completion": [{"role": "assistant", "content": "So."}],
    }
    lines = "".join(json.dumps(row) + "\n" for row in (text, chat))
    rows, _ = read_rows([str(write(tmp_path / "a.jsonl", lines))], Data())
    assert [(row.instruction, row.response) for row in rows] == [("How?", "So.")] * 2
    assert [turn.role for turn in rows[1].turns] == ["system", "user", "assistant"]


def test_fields_of_messages_that_are_not_read_are_told_and_empty_ones_not(tmp_path):
    messages = [
        {"role": "user", "content": "a", "mood": "fine", "tool_calls": None},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}], "mood": None},
    ]
    rows, notes = read_rows([str(write(tmp_path / "a.jsonl", json.dumps({"messages": messages})))], Data())
    assert rows[0].response == "bc"
    assert notes == ["Messages: not used: the field 'mood', of 1 chat."]


# Bad rows -----------------------------------------------------------------------------------------


def test_bad_rows_are_told_in_the_order_of_their_lines_with_their_true_number(tmp_path):
    lines = ["{", LINES.splitlines()[0], '{"instruction": "", "response": "x"}', "[3]", '{"response": "x"}', "nonsense"]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(DataError) as caught:
        read(path)
    said = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in said] == ["a.jsonl:1:", "a.jsonl:3:", "a.jsonl:4:", "..."]
    remedy = "Set data.skip_bad_rows=true to leave bad rows out (init: --skip-bad-rows)."
    assert said[-1] == f"... and 2 more; 5 rows are bad in all. {remedy}"
    found, notes = read(path, skip_bad_rows=True)
    assert found == EXPECTED[:1]
    assert notes[0].startswith(
        "Bad rows are skipped, as data.skip_bad_rows says: 5 in all (a.jsonl:1: this line is not"
    )
    with pytest.raises(DataError, match="a.jsonl:1") as caught:
        read(write(tmp_path / "a.jsonl", "{\n{\n"), skip_bad_rows=True)
    assert remedy not in str(caught.value)  # no row would be left


# Splits and parts ---------------------------------------------------------------------------------


def folder(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        write(path / f"{name}.jsonl", text)
    return path


def lines(word: str, count: int = 6) -> str:
    return "".join(json.dumps({"instruction": f"{word} {n}?", "response": f"{word} {n}"}) + "\n" for n in range(count))


def test_files_that_are_named_after_splits_serve_as_such(tmp_path):
    place = folder(tmp_path / "set", train=lines("train"), dev=lines("dev"), test=lines("test"))
    write(place / "README.md", "about")
    partition = Partition(method="iid", clients=2)
    found = load_federated(Data(sources=(str(place),)), partition, Randomness(0))
    trained = {row.instruction.split()[0] for rows in found.clients.values() for row in rows}
    assert trained == {"train"}
    assert {row.instruction.split()[0] for row in found.validation} == {"dev"}
    assert {row.instruction.split()[0] for row in found.test} == {"test"}
    assert f"{place}: the rows of test.jsonl serve as test rows." in found.notes
    assert f"{place}: the rows of dev.jsonl serve as validation rows." in found.notes


def test_splits_go_behind_what_the_recipe_names(tmp_path):
    place = folder(tmp_path / "set", train=lines("train"), test=lines("test"))
    own = write(tmp_path / "own.jsonl", lines("own"))
    notes: list[str] = []
    found = with_splits(Data(sources=(str(place),), test_sources=(str(own),)), notes)
    assert found.test_sources == (str(own),)
    assert notes == [f"{place}: the rows of test.jsonl are not read, since data.test_sources names others."]


def test_a_split_among_files_of_clients_is_told(tmp_path):
    place = folder(tmp_path / "set", north=lines("north"), test=lines("test"))
    rows, notes = read_rows([str(place)], Data())
    assert {row.client for row in rows} == {"north", "test"}
    assert any("test.jsonl is dealt out for training; name it in data.test_sources" in note for note in notes)


def test_parts_of_a_data_set_are_one_source(tmp_path):
    parts = {f"train-{n:05}-of-00002": lines(f"part{n}") for n in range(2)}
    rows, _ = read_rows([str(folder(tmp_path / "one", **parts))], Data())
    assert {row.client for row in rows} == {""}
    place = folder(tmp_path / "two", **parts, **{"other-00000-of-00001": lines("other")})
    rows, _ = read_rows([str(place)], Data())
    assert {row.client for row in rows} == {"train", "other"}
    place = folder(tmp_path / "three", **parts, **{"test-00000-of-00001": lines("test")})
    found = with_splits(Data(sources=(str(place),)), [])
    assert [Path(source).name for source in found.sources] == [f"{name}.jsonl" for name in parts]
    assert [Path(source).name for source in found.test_sources] == ["test-00000-of-00001.jsonl"]
    assert {row.client for row in read_rows(found.sources, found)[0]} == {""}
