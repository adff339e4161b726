"""The run folder: commits, what is kept, what is refused, and what happens to corrupt checkpoints."""

import csv
import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_folder_harness import MODULES, initial, record, step, work

from bellwether.errors import CheckpointError
from bellwether.exchange.adapter import key_a, key_b, read_adapter
from bellwether.exchange.records import EvaluationRecord, RoundRecord
from bellwether.exchange.scores import Totals
from bellwether.recipe.recipe import Recipe
from bellwether.store.history import dump_records, dump_state, evaluation_csv, evaluation_rows, load_records, load_state
from bellwether.store.model_card import model_card
from bellwether.store.run_folder import RunFolder, check_new, describe_environment, next_folder
from bellwether.tools import atomic
from bellwether.tools.atomic import write_atomic, write_folder_atomic
from bellwether.tools.json_text import json_lines

RECIPE = Recipe.model_validate({"federation": {"rounds": 3}})
BASE = EvaluationRecord(0, "test", {"qa": Totals(2, 10, 20.0, 2, 0.5, 1), "b|d": Totals(1, 5, 5.0)}, 0.1)


def run_to(path: Path, rounds: int, recipe: Recipe = RECIPE) -> list:
    """Commit rounds 0..rounds in a new folder; return the adapters after them."""
    with RunFolder.create(path, recipe, {"threads": 2}) as folder:
        adapter, state, records = initial(), {}, [BASE]
        folder.commit(0, adapter, state, records)
        adapters = [adapter]
        for round in range(1, rounds + 1):
            adapter, state = step(round, adapter, state)
            records.append(record(round, adapter))
            folder.commit(round, adapter, state, records)
            adapters.append(adapter)
    return adapters


def corrupt(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    else:
        file.write_bytes(data[: {"empty": 0, "cut by one": len(data) - 1, "half": len(data) // 2}[how]])


# Commits ------------------------------------------------------------------------------------------


def test_a_commit_comes_back_with_the_same_bits_types_and_order(tmp_path):
    adapters = run_to(tmp_path / "run", 2)
    with RunFolder.reopen(tmp_path / "run") as folder:
        latest = folder.latest()
    assert latest.round == 2
    assert latest.notes == ()
    assert latest.adapter.fingerprint() == adapters[2].fingerprint()
    assert latest.adapter.config.modules == MODULES
    assert list(latest.adapter.tensors) == [key(module) for module in MODULES for key in (key_a, key_b)]
    assert latest.state["rounds"] == (1, 2)
    assert latest.history == (BASE, record(1, adapters[1]), record(2, adapters[2]))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_to(
        tmp_path / "run",
        3,
        RECIPE.model_copy(update={"output": RECIPE.output.model_copy(update={"keep_checkpoints": 3})}),
    )
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["0001", "0002", "0003"]


def test_a_new_folder_has_no_checkpoint_yet(tmp_path):
    with RunFolder.create(tmp_path / "run", RECIPE, {}) as folder:
        assert folder.latest() is None
        assert not folder.finished


def test_the_adapter_of_a_checkpoint_is_in_peft_format(tmp_path):
    run_to(tmp_path / "run", 1)
    stored = json.loads((tmp_path / "run/checkpoints/0001/adapter_config.json").read_text())
    assert (stored["peft_type"], stored["r"], stored["target_modules"]) == ("LORA", 2, list(MODULES))


def test_every_file_of_a_checkpoint_is_forced_to_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append((str(a), str(b))), real_rename(a, b))[1])
    write_folder_atomic(tmp_path / "new", {"a": b"1", "b": b"2"})
    temporary = calls[3][0]
    assert calls[:3] == [f"{temporary}/a", f"{temporary}/b", temporary]
    assert calls[3:] == [(temporary, str(tmp_path / "new")), str(tmp_path)]


def test_finishing_twice_leaves_the_same_files(tmp_path):
    run_to(tmp_path / "run", 1)
    contents = []
    for _ in range(2):
        with RunFolder.reopen(tmp_path / "run") as folder:
            latest = folder.latest()
            folder.finish(latest.adapter, "card", latest.history, [{"after": "x\ud800\u2028y"}])
            assert folder.finished
        contents.append({path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    assert read_adapter(tmp_path / "run/adapter").fingerprint() == latest.adapter.fingerprint()
    assert (tmp_path / "run/samples.jsonl").read_text().splitlines() == ['{"after": "x\\ud800\\u2028y"}']


def test_tables_follow_from_the_records(tmp_path):
    run_to(tmp_path / "run", 2)
    rounds = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert [(line["round"], line["cohort"], line["left_out"]) for line in rounds] == [
        (1, ["a", "b"], {"b": "away"}),
        (2, ["a", "b"], {"b": "away"}),
    ]
    table = list(csv.DictReader(io.StringIO((tmp_path / "run/evaluation.csv").read_text())))
    assert [row["category"] for row in table] == ["(macro)", "b|d", "qa"]
    assert float(table[0]["loss"]) == pytest.approx((20 / 10 + 5 / 5) / 2)
    assert float(table[2]["perplexity"]) == pytest.approx(math.exp(2))
    assert table[1]["rouge_l"] == ""
    lines = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [line["exact"] for line in lines] == [0.5, None, 0.5]


# Refusals -----------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_begun_again(tmp_path):
    run_to(tmp_path / "run", 0)
    for attempt in (check_new, lambda path: RunFolder.create(path, RECIPE, {})):
        with pytest.raises(CheckpointError, match="already holds a run.*--resume"):
            attempt(tmp_path / "run")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty \(it holds thesis.txt\)"):
        RunFolder.create(tmp_path, RECIPE, {})
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        check_new(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_new(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_new(tmp_path / "run")


def test_a_check_leaves_no_trace(tmp_path):
    check_new(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


def test_there_must_be_a_run_to_go_on_with(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        RunFolder.reopen(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_changed_recipe_is_refused_and_the_difference_shown(tmp_path):
    run_to(tmp_path / "run", 1)
    other = Recipe.model_validate({"federation": {"rounds": 3}, "training": {"learning_rate": 0.5}, "seed": 4})
    with pytest.raises(CheckpointError) as caught:
        RunFolder.reopen(tmp_path / "run", other)
    assert "seed: 0 → 4; training.learning_rate: 0.008 → 0.5" in str(caught.value)
    RunFolder.reopen(tmp_path / "run", RECIPE).close()


def test_a_moved_folder_goes_on(tmp_path):
    run_to(
        tmp_path / "run", 1, RECIPE.model_copy(update={"output": RECIPE.output.model_copy(update={"folder": "old"})})
    )
    (tmp_path / "run").rename(tmp_path / "moved")
    with RunFolder.reopen(tmp_path / "moved", RECIPE) as folder:
        assert folder.latest().round == 1


def test_a_recipe_that_was_edited_in_the_folder_is_refused(tmp_path):
    run_to(tmp_path / "run", 1)
    file = tmp_path / "run/recipe.yaml"
    file.write_text(file.read_text().replace("batch_size: 8", "batch_size: 4", 1))
    with (
        RunFolder.reopen(tmp_path / "run") as folder,
        pytest.raises(CheckpointError, match="training.batch_size: 8 → 4"),
    ):
        folder.latest()


@pytest.mark.integration
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from bellwether.store.run_folder import RunFolder\n"
        "folder = RunFolder.reopen(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    run_to(tmp_path / "run", 1)
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        for attempt in (RunFolder.reopen, check_new):
            with pytest.raises(CheckpointError, match=f"in use by process {process.pid}"):
                attempt(tmp_path / "run")
        process.send_signal(signal.SIGKILL)
        process.wait()
    RunFolder.reopen(tmp_path / "run").close()


# Corruption ---------------------------------------------------------------------------------------

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "history.jsonl",
    "manifest.json",
    "recipe.yaml",
    "state.json",
    "state.safetensors",
]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    path = tmp_path_factory.mktemp("committed") / "run"
    return path, run_to(path, 3)


@pytest.mark.parametrize("how", ["missing", "empty", "cut by one", "half", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(name, how, committed, tmp_path):
    truth, adapters = committed
    path = Path(shutil.copytree(truth, tmp_path / "run"))
    if (name, how) == ("manifest.json", "cut by one"):
        pytest.skip("its last byte is a line break that means nothing")
    corrupt(path / "checkpoints/0003" / name, how)
    with RunFolder.reopen(path) as folder:
        latest = folder.latest()
        assert latest.round == 2
        assert latest.adapter.fingerprint() == adapters[2].fingerprint()
        (note,) = latest.notes
        assert "0003 is corrupt and was left out" in note
        # Going on replaces the corrupt one.
        adapter, state = step(3, latest.adapter, latest.state)
        folder.commit(3, adapter, state, [*latest.history, record(3, adapter)])
        again = folder.latest()
        assert (again.round, again.notes) == (3, ())
        assert again.adapter.fingerprint() == adapters[3].fingerprint()


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_begin_anew_in_silence(committed, tmp_path):
    path = Path(shutil.copytree(committed[0], tmp_path / "run"))
    for number in ("0002", "0003"):
        corrupt(path / "checkpoints" / number / "state.json", "half")
    with RunFolder.reopen(path) as folder, pytest.raises(CheckpointError, match="No checkpoint .* can be used"):
        folder.latest()
    shutil.rmtree(path / "checkpoints")
    with RunFolder.reopen(path) as folder, pytest.raises(CheckpointError, match="No checkpoint .* can be used"):
        folder.latest()


def test_two_checkpoints_cannot_change_places(committed, tmp_path):
    path = Path(shutil.copytree(committed[0], tmp_path / "run"))
    shutil.rmtree(path / "checkpoints/0003")
    shutil.copytree(path / "checkpoints/0002", path / "checkpoints/0003")
    with RunFolder.reopen(path) as folder:
        latest = folder.latest()
    assert latest.round == 2
    assert "manifest.json is not what was written" in latest.notes[0]


def test_what_a_killed_process_left_behind_is_removed(committed, tmp_path):
    path = Path(shutil.copytree(committed[0], tmp_path / "run"))
    (path / "checkpoints/.tmp-1-0004").mkdir()
    (path / "checkpoints/.tmp-1-0004/half").write_text("x")
    (path / ".tmp-1-rounds.jsonl").write_text("x")
    RunFolder.reopen(path).close()
    assert not list(path.rglob(".tmp-*"))


# A full disk --------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", b"old")

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full: free some space.*--resume"):
        write_atomic(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "_write_synced", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        RunFolder.create(tmp_path / "run", RECIPE, {})
    assert os.listdir(tmp_path) == []


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    write_atomic(tmp_path / "file", bytes(range(256)))
    assert (tmp_path / "file").read_bytes() == bytes(range(256))


def test_discarding_spares_committed_rounds_and_other_peoples_files(tmp_path):
    folder = RunFolder.create(tmp_path / "a", RECIPE, {})
    (tmp_path / "a/thesis.txt").write_text("mine")
    folder.discard()
    assert os.listdir(tmp_path / "a") == ["thesis.txt"]
    run_to(tmp_path / "b", 1)
    RunFolder.reopen(tmp_path / "b").discard()
    assert (tmp_path / "b/checkpoints/0001").is_dir()


# Records and state --------------------------------------------------------------------------------


def test_records_come_back_equal(tmp_path):
    broken = RoundRecord(
        3, ("a",), (), {"a": "NaN\u2028"}, 1e-300, math.inf, 0, 0, 0, 1, 2, {"train": 0.1}, -math.inf, "", "below"
    )
    scored = EvaluationRecord(3, "clients", {"é\n": Totals(1, 2, 0.1 + 0.2)}, 1.0, {"c": {"é\n": Totals(1, 2, 0.3)}})
    assert load_records(dump_records([broken, scored])) == (broken, scored)
    (undefined,) = load_records(dump_records([record(1, initial()).__class__(**{**vars(broken), "loss": math.nan})]))
    assert math.isnan(undefined.loss)


def test_record_lines_are_json_without_constants_that_json_lacks():
    values = list(json_lines([{"loss": math.nan, "rate": np.float32(0.5), "rows": np.int64(3)}]).decode().splitlines())
    assert values == ['{"loss": "NaN", "rate": 0.5, "rows": 3}']


def test_a_category_that_is_named_like_the_mean_does_not_hide_it():
    rows = evaluation_rows([EvaluationRecord(0, "test", {"(macro)": Totals(1, 2, 2.0), "x": Totals(1, 1, 3.0)}, 0.0)])
    assert [row["loss"] for row in rows] == [2.0, 1.0, 3.0]


def test_scores_by_group_come_back_and_older_records_have_none():
    grouped = replace(BASE, groups={"en": Totals(2, 10, 20.0), "fr": Totals(1, 5, 5.0)})
    assert load_records(dump_records([grouped])) == (grouped,)
    values = json.loads(dump_records([BASE]))
    del values["groups"]
    assert load_records(json.dumps(values).encode()) == (BASE,)


def test_tables_name_the_group_of_rows_that_hold_its_means_and_have_no_such_column_without_groups():
    grouped = replace(BASE, groups={"fr": Totals(1, 5, 5.0), "en": Totals(2, 10, 40.0)})
    rows = evaluation_rows([BASE, grouped])
    assert [(row["category"], row["group"]) for row in rows[-5:]] == [
        ("(macro)", ""),
        ("b|d", ""),
        ("qa", ""),
        ("(all rows)", "en"),
        ("(all rows)", "fr"),
    ]
    assert [(row["rows"], row["loss"]) for row in rows[-2:]] == [(2, 4.0), (1, 1.0)]
    lines = evaluation_csv(rows).decode().splitlines()
    assert lines[0] == "round,part,category,rows,loss,perplexity,rouge_l,exact,group"
    assert lines[-1].startswith("0,test,(all rows),1,1.0,")
    assert lines[-1].endswith(",,,fr")
    plain = evaluation_rows([BASE])
    assert all("group" not in row for row in plain)
    header = "round,part,category,rows,loss,perplexity,rouge_l,exact"
    assert evaluation_csv(plain).decode().splitlines()[0] == header
    assert evaluation_csv([]).decode() == f"{header}\n"


def test_a_state_comes_back_with_types_dtypes_and_bits():
    state = {
        "a/b.c": {"": np.asarray(np.arange(6, dtype=np.float16).reshape(2, 3).T), "n": np.zeros((0, 2))},
        "scalar": np.float64(0.1),
        "zero-d": np.array(7, dtype=np.int8),
        "list": [1, 2.5, "x", None, True, (1, [2])],
        "large": 2**127,
        "nan": math.nan,
        "map": {"array": ["array", "0"]},
    }
    back = load_state(dump_state(state))
    assert repr(back) == repr(state)
    assert back["a/b.c"][""].dtype == np.float16
    back["zero-d"][...] = 1  # writable


@pytest.mark.parametrize("value", [{1: 2}, {"a": {"b": object()}}, {"a": [b"x"]}, {"a": np.array(["text"])}])
def test_a_state_that_cannot_be_kept_is_refused(value):
    with pytest.raises(CheckpointError):
        dump_state(value)


@pytest.mark.parametrize(
    "tree",
    [
        b"[]",
        b'["map"]',
        b'["map", 3]',
        b'["map", {}, {}]',
        b'["array", "7"]',
        b'["array", []]',
        b'["number"]',
        b'["number", "0"]',
        b'["other", 1]',
        b'{"a": 1}',
        b'["list", {}]',
        b'["map", {"a": ["tuple", ["array", {}]]}]',
        b'["map", {"a": ' * 2000,
        b"\xff",
        b"3",
        b"null",
    ],
)
def test_a_forged_state_is_no_state(tree):
    files = dump_state({"a": np.zeros(2)})
    with pytest.raises(ValueError, match="^(the state |nested too deep|byte 0 is not UTF-8|Expecting)"):
        load_state({**files, "state.json": tree})


def test_a_state_that_could_not_be_read_again_is_not_kept():
    deep, endless = {}, {}
    for _ in range(200):
        deep = {"a": deep}
    endless["a"] = endless
    for state in (deep, endless):
        with pytest.raises(CheckpointError, match="The state cannot be kept: it is nested too deep"):
            dump_state(state)


# Beside the run -----------------------------------------------------------------------------------


def test_folders_are_numbered(tmp_path):
    assert next_folder("x", tmp_path) == tmp_path / "x-1"
    (tmp_path / "x-1").mkdir()
    (tmp_path / "x-2").write_text("a file counts as well")
    assert next_folder("x", tmp_path) == tmp_path / "x-3"


def test_the_environment_says_versions_and_what_it_was_given():
    facts = describe_environment(device="cpu", threads=3)
    assert facts["threads"] == 3
    assert facts["versions"]["numpy"] == np.__version__
    json.dumps(facts)


def test_the_card_has_a_header_a_table_and_what_is_not_promised():
    final = EvaluationRecord(3, "test", {"qa": Totals(2, 10, 10.0, 2, 1.0, 1), "b|d": Totals(1, 5, 2.5)}, 0.1)
    card = model_card(RECIPE, [BASE, record(1, initial()), final], 10, describe_environment(device="cpu"))
    header = yaml.safe_load(card.split("---")[1])
    assert (header["library_name"], header["base_model"]) == ("peft", "starter")
    assert "| qa | 2 | 2.000 → 1.000 | 25.0 → 50.0 | 50.0 → 50.0 |" in card
    assert "| b\\|d | 1 | 1.000 → 0.500 | – → – | – → – |" in card
    assert "PeftModel.from_pretrained" in card
    assert "no guarantee of\nprivacy" in card
    assert "rounds: 3" in card


def test_the_card_has_a_table_by_group_where_there_are_several():
    base = replace(BASE, groups={"en": Totals(2, 10, 20.0), "fr": Totals(1, 5, 5.0)})
    final = replace(base, round=3, groups={"en": Totals(2, 10, 10.0), "fr": Totals(1, 5, 2.5)})
    card = model_card(RECIPE, [base, final], 10, describe_environment(device="cpu"))
    assert "Part `test` by group, means over all rows of each, after round 3:" in card
    assert "| fr | 1 | 1.000 → 0.500 | – → – | – → – |" in card


def test_a_run_of_the_harness_reaches_its_end(tmp_path):
    work(tmp_path / "run")
    assert (tmp_path / "run/adapter/README.md").read_text() == "card"
