"""Damaged folders: whatever a file holds, a command succeeds as if it were whole, or says in one sentence what to do.

The files of a run, a run whose clients choose rows, a comparison and a judgement are damaged one by one, see
``damages.py``; of all damages and commands each test takes some, drawn by its seed, and the slow ones very many.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_RECIPE, Outcome, call, json_lines, write_rows
from damages import Damage, forge, of_file, of_values
from judge_server import Asked, serving

from bellwether.arms.compare import compare
from bellwether.ask.answerers import find_answerer
from bellwether.ask.judge import JudgeSettings, judge
from bellwether.ask.judge_api import Judge
from bellwether.ask.questions import AnswerSettings, make_question
from bellwether.ask.talk import open_talk
from bellwether.errors import BellwetherError, CheckpointError
from bellwether.model.export import export
from bellwether.recipe.file import load_recipe
from bellwether.report.report import report
from bellwether.runner.run import run
from bellwether.store.comparison import read_comparison
from bellwether.store.finished import read_run
from bellwether.tools.atomic import TEMPORARY

CHOOSE = [
    *("selection.method=hierarchical", "selection.min_cluster_rows=2", "selection.dimensions=4"),
    *("selection.rotate=true", "federation.fraction=1"),
]
SECONDS = 120  # after which something hangs

Act = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Case:
    """A file that is damaged, and what is done with its folder then."""

    file: str
    damage: Damage
    act: str
    forged: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.damage.name}{' (forged)' if self.forged else ''}, then {self.act}"


# What is done with a folder, beside the whole one -------------------------------------------------


def shown(folder: Path, truth: Path) -> None:
    """Write the report, but for one on what is all the same, of which the page is known."""
    if _told(folder) != _told(truth):
        report(folder)
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")


def _told(folder: Path) -> str:
    """What a report is made of."""
    if (folder / "inputs.json").is_file() or (folder / "comparison.json").is_file():
        table = folder / "table.json"
        runs = [read_run(path.parent) for path in sorted(folder.glob("*/*/run/recipe.yaml"))]
        return repr((read_comparison(folder), runs, table.read_bytes() if table.exists() else None))
    return repr(read_run(folder))


def resumed(folder: Path, truth: Path) -> None:
    told = list[Any]()
    run(resume=folder, watch=told.append)
    if any("without what a client kept" in getattr(event, "text", "") for event in told):
        return  # it says so
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (truth / "adapter" / name).read_bytes()


def gone_on(folder: Path, truth: Path) -> None:
    """Go on with a run that was stopped before its last round."""
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    shutil.rmtree(folder / "checkpoints" / max(path.name for path in (truth / "checkpoints").iterdir()))
    resumed(folder, truth)


def exported(folder: Path, truth: Path) -> None:
    out = folder.parent / "merged"
    try:
        export(folder, out)
    except BellwetherError:
        assert not out.exists()
        raise
    assert (out / "config.json").is_file()


def asked(folder: Path, truth: Path) -> None:
    talk = open_talk(folder)
    *_, said = talk.answer(make_question("Task 1?"), talk.names, AnswerSettings(max_new_tokens=2))
    assert [answer.name for answer in said] == talk.names


def compared(folder: Path, truth: Path) -> None:
    """Go on with a comparison, which is finished."""
    kept = read_comparison(truth)
    found = compare(load_recipe(truth.parent / "tiny.yaml"), folder)
    assert [outcome.adapter for outcome in found.outcomes] == [outcome.adapter for outcome in kept.outcomes]


def judged(folder: Path, truth: Path) -> None:
    """Go on with a judgement, with a judge that would score as before."""
    with serving(by_length) as server:
        tally = _judged(folder, truth, server.address)
        assert len(tally.judged) == 2
        assert tally.sums is not None


ACTS: dict[str, Act] = {
    "report": shown,
    "resume": resumed,
    "go on": gone_on,
    "export": exported,
    "chat": asked,
    "compare": compared,
    "judge": judged,
}


def tried(case: Case, truth: Path, place: Path) -> str | None:
    """Damage a copy of a folder, do something with it, and return what is wrong with what came of it."""
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(truth, place / truth.name))
    file = folder / case.file
    case.damage.do(file)
    if case.forged:
        forge(file.parent)
    before, whole = contents(folder), contents(truth / "adapter")
    adapter = contents(folder / "adapter")
    try:
        with limited(SECONDS):
            ACTS[case.act](folder, truth)
    except BellwetherError as error:
        told = str(error)
        if not all(line.isprintable() and line.endswith((".", "?")) for line in told.splitlines()):
            return f"no sentence: {told!r}"
        if "\n" in told and file.name != "recipe.yaml":  # which has a sentence for each field that is wrong
            return f"more than a sentence: {told!r}"
        if not any(name in told for name in (file.name, str(file.parent), *NAMED.get(file.name, ()))):
            return f"the file is not named: {told!r}"
        changed = {name for name, content in contents(folder).items() if before.get(name) != content}
        if changed & {"report.html", "comparison.json", "result.json"}:
            return f"refused, but left {sorted(changed)}"
        if contents(folder / "adapter") not in (adapter, whole, {}):
            return f"half an adapter: {told}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"
    left = list(place.rglob(f"{TEMPORARY}*"))
    return f"left {left}" if left else None


# What a sentence says in place of a file's name: a recipe's fields have names of their own.
NAMED = {"recipe.yaml": ("recipe", "model.path", "data.", "selection.", "rows.jsonl", "holds no", "began with another")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hang(BaseException):
    """Something takes too long; nothing that catches errors shall catch this."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """End what takes longer."""

    def end(*_: Any) -> None:
        raise Hang(f"it took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Folders that are damaged -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where damaged copies stand."""
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dolly_like: Path) -> Path:
    """A finished run whose clients choose rows after a survey, those first that they used least. Read only."""
    folder = tmp_path_factory.mktemp("choosing")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.format(model=tiny_llama, data=dolly_like))
    run(load_recipe(folder / "tiny.yaml", [*CHOOSE, f"output.folder={folder / 'run'}"]))
    return folder / "run"


def by_length(asked: Asked, number: int = 0) -> str:
    """Score by length alone, so that a question that is asked again is judged alike."""
    return "{} {}\nBy length.".format(*(1 + len(answer) % 9 for answer in asked.answers))


def _judged(folder: Path, truth: Path, address: str) -> Any:
    # The address is one of the things that a judgement rests on, and every server has another.
    path = folder / "judgement.json"
    if path.is_file():
        path.write_bytes(path.read_bytes().replace(b"http://judge/v1", address.encode()))
    a = find_answerer(str(truth.parent / "run"))
    base = find_answerer(f"{truth.parent / 'run'}:base")
    settings = JudgeSettings(Judge("gpt-4", address, retries=0, timeout=30.0), max_new_tokens=2)
    return judge(base, a, truth.parent / "questions.jsonl", settings, folder).tally


@pytest.fixture(scope="module")
def judgement(tmp_path_factory: pytest.TempPathFactory, tiny_run: tuple[Path, Outcome]) -> Path:
    """A finished judgement on a run beside it. Read only."""
    folder = tmp_path_factory.mktemp("judgement")
    shutil.copytree(tiny_run[0], folder / "run")
    questions = [{"question_id": f"q{number}", "category": "x", "turns": [f"Task {number}?"]} for number in (1, 2)]
    write_rows(folder / "questions.jsonl", questions)
    with serving(by_length) as server:
        _judged(folder / "judged", folder / "judged", server.address)
    path = folder / "judged" / "judgement.json"
    path.write_bytes(path.read_bytes().replace(server.address.encode(), b"http://judge/v1"))
    return folder / "judged"


def cases(truth: Path, acts: Sequence[str], count: int, seed: int, match: Callable[[str], bool] = bool) -> list[Case]:
    """Draw cases: equally many of each file, of damages to the whole file and to one value, of each act in turn."""
    draw, found = random.Random(seed), []
    names = sorted(name for name in contents(truth) if not name.endswith(".lock") and match(name))
    for number, name in enumerate(names):
        path = truth / name
        kinds = [kind for kind in (of_file(path.stat().st_size, seed), of_values(path)) if kind]
        for turn in range(count):
            damage = draw.choice(kinds[turn % len(kinds)])
            found.append(Case(name, damage, acts[(number + turn) % len(acts)]))
    return found


def check(found: Sequence[Case], truth: Path, place: Path) -> None:
    """Try all cases, and tell all that are wrong."""
    wrong = {str(case): said for case in found if (said := tried(case, truth, place)) is not None}
    assert not wrong, "\n".join(f"{case}: {said}" for case, said in wrong.items())


RUN_ACTS = ("report", "resume", "go on", "export", "chat")


def test_a_run_with_a_damaged_file_goes_on_to_the_same_adapter_or_says_why_not(
    tiny_run: tuple[Path, Outcome], place: Path
) -> None:
    check(cases(tiny_run[0], RUN_ACTS, 2, seed=1), tiny_run[0], place)


def test_a_checkpoint_that_is_damaged_and_claims_to_be_whole_breaks_nothing(
    tiny_run: tuple[Path, Outcome], place: Path
) -> None:
    check_forged(
        cases(tiny_run[0], ("resume", "report"), 2, 2, lambda name: Path(name).name in FORGED), tiny_run[0], place
    )


FORGED = ("state.json", "history.jsonl", "adapter_config.json")


def check_forged(found: Sequence[Case], truth: Path, place: Path) -> None:
    """Try cases of checkpoints with manifests that fit; such a checkpoint may well hold another adapter."""
    forged = [Case(one.file, one.damage, one.act, forged=True) for one in found if one.file.startswith("checkpoints")]
    wrong = {str(case): said for case in forged if (said := tried(case, truth, place)) is not None}
    assert not [f"{case}: {said}" for case, said in wrong.items() if not said.startswith("AssertionError")]


def test_damaged_memories_of_clients_are_told_or_change_nothing(choosing: Path, place: Path) -> None:
    check(cases(choosing, ("go on", "report"), 1, 3, lambda name: name.startswith("clients")), choosing, place)


def of_comparison(name: str) -> bool:
    """Whether it is a file that a comparison reads, and not one of its runs."""
    return "/run/" not in name and not name.endswith((".csv", ".md", ".html"))


def test_a_comparison_with_a_damaged_file_goes_on_or_says_why_not(tiny_comparison: Path, place: Path) -> None:
    check(cases(tiny_comparison, ("compare", "report", "chat"), 3, 4, of_comparison), tiny_comparison, place)


def test_a_judgement_with_a_damaged_file_goes_on_or_says_why_not(judgement: Path, place: Path) -> None:
    check(cases(judgement, ("judge",), 8, 5), judgement, place)


@pytest.mark.slow
@pytest.mark.parametrize("act", RUN_ACTS)
def test_very_many_damages_of_a_run(act: str, tiny_run: tuple[Path, Outcome], place: Path) -> None:
    check(cases(tiny_run[0], (act,), 20, seed=6), tiny_run[0], place)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["report", "resume", "go on"])
def test_very_many_damages_of_checkpoints_that_claim_to_be_whole(
    act: str, tiny_run: tuple[Path, Outcome], choosing: Path, place: Path
) -> None:
    for truth in (tiny_run[0], choosing):
        check_forged(cases(truth, (act,), 25, 7, lambda name: Path(name).name in FORGED), truth, place)


@pytest.mark.slow
@pytest.mark.parametrize("act", RUN_ACTS)
def test_very_many_damages_of_a_run_whose_clients_choose_rows(act: str, choosing: Path, place: Path) -> None:
    check(cases(choosing, (act,), 8, seed=8), choosing, place)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["compare", "report", "chat"])
def test_very_many_damages_of_a_comparison(act: str, tiny_comparison: Path, place: Path) -> None:
    check(cases(tiny_comparison, (act,), 60, 9, of_comparison), tiny_comparison, place)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["compare", "report", "chat"])
def test_very_many_damages_of_a_run_within_a_comparison(act: str, tiny_comparison: Path, place: Path) -> None:
    check(cases(tiny_comparison, (act,), 5, 10, lambda name: "/run/" in name), tiny_comparison, place)


@pytest.mark.slow
def test_very_many_damages_of_a_judgement(judgement: Path, place: Path) -> None:
    check(cases(judgement, ("judge",), 80, seed=11), judgement, place)


# What is made anew, and what is not ---------------------------------------------------------------


def stopped(truth: Path, place: Path) -> Path:
    """A copy of a run that was stopped before its last round."""
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(truth, place / truth.name))
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "0002")
    (folder / "answers" / "0002.jsonl").unlink()
    return folder


@pytest.mark.parametrize("content", [None, b"", b"\xff\n", b"[]\n", b"first line only"])
def test_answers_of_the_untuned_base_that_are_lost_are_made_anew_before_anything_is_trained(
    content: bytes | None, tiny_run: tuple[Path, Outcome], place: Path
) -> None:
    folder, told = stopped(tiny_run[0], place), list[Any]()
    answers = folder / "answers" / "0000.jsonl"
    whole = answers.read_bytes()
    answers.unlink()
    if content is not None:
        answers.write_bytes(whole.splitlines(keepends=True)[0] if content == b"first line only" else content)
    run(resume=folder, watch=told.append)
    kinds = [type(event).__name__ for event in told]
    notes = [number for number, event in enumerate(told) if "its rows are scored anew" in getattr(event, "text", "")]
    assert [told[number].warning for number in notes] == [True]
    assert "0000.jsonl cannot be read (" in told[notes[0]].text
    assert notes[0] < kinds.index("RoundStarted")
    for name in ("answers/0000.jsonl", "answers/0002.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tiny_run[0] / name).read_bytes(), name


def test_answers_that_are_whole_are_not_made_anew(
    tiny_run: tuple[Path, Outcome], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(tiny_run[0], place / "run"))
    monkeypatch.setattr("bellwether.client.score.score", lambda *_: pytest.fail("rows were scored"))
    run(resume=folder)
    assert (folder / "samples.jsonl").read_bytes() == (tiny_run[0] / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("threads", ["1000000000", "0", "-1", "NaN", "1e400", "true", '"2"', "[1]", "2.0", str(2**70)])
def test_threads_that_no_machine_has_are_refused_before_anything_is_loaded(
    threads: str, tiny_run: tuple[Path, Outcome], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(tiny_run[0], place)
    path = folder / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": "odd"}).replace('"odd"', threads))
    monkeypatch.setattr("bellwether.model.base.load_weights", lambda *_: pytest.fail("weights were loaded"))
    outcome = call("run", "--resume", folder)
    assert outcome.code == 2
    said = " ".join(outcome.err.split())
    assert "environment.json cannot be read (threads is " in said
    assert "restore it" in said
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["manifest.json", "history.jsonl", "state.json", "adapter_config.json", "recipe.yaml"])
@pytest.mark.parametrize("forged", [False, True])
def test_a_newest_checkpoint_nested_very_deep_lets_the_one_before_be_taken(
    name: str, forged: bool, tiny_run: tuple[Path, Outcome], place: Path
) -> None:
    shutil.rmtree(place, ignore_errors=True)
    folder, told = Path(shutil.copytree(tiny_run[0], place / "run")), list[Any]()
    shutil.rmtree(folder / "adapter")
    checkpoint = folder / "checkpoints" / "0002"
    (checkpoint / name).write_bytes(b"[" * 100_000)
    if forged and name != "manifest.json":
        forge(checkpoint)
    run(resume=folder, watch=told.append)
    (note,) = [event.text for event in told if "is corrupt and was left out" in getattr(event, "text", "")]
    assert str(checkpoint) in note
    for file in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (folder / file).read_bytes() == (tiny_run[0] / file).read_bytes()


def test_a_history_that_is_not_what_was_written_is_not_reported(tiny_run: tuple[Path, Outcome], place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(tiny_run[0], place / "run"))
    path = folder / "checkpoints" / "0002" / "history.jsonl"
    lines = json_lines(path)
    lines[1]["loss"] += 0.5  # a number like any other
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        CheckpointError, match=r"history.jsonl cannot be read \(history.jsonl is not what was written\)"
    ):
        report(folder)
    run(resume=folder)
    assert report(folder).is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held["clients"][0].update(client="nobody"), "names clients of whom clients.json says nothing"),
        (lambda held: held["clients"][0].update(client=held["clients"][1]["client"]), "two clients have one name"),
        (lambda held: held["clients"][0].update(rows=9999), "the counts of client-01 do not add up"),
        (lambda held: held["clients"][0].update(rows=True), "clients.0.rows is True, not a whole number"),
        (lambda held: held["clients"][0].update(held_out=-1), "clients.0.held_out is -1"),
        (lambda held: held["clients"][0].update(held_uot=0), "clients.0.held_uot is unknown"),
        (lambda held: held["clients"][0].pop("skew"), "clients.0.skew is missing"),
        (lambda held: held.update(clients=[]), "clients is a list of 0, too few"),
        (lambda held: held.update(notes="abc"), "notes is 'abc', "),
    ],
)  # fmt: skip
def test_what_clients_hold_is_refused_where_it_does_not_fit(
    change: Callable[[Any], Any], says: str, tiny_run: tuple[Path, Outcome], place: Path
) -> None:
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(tiny_run[0], place / "run"))
    held = json.loads((folder / "clients.json").read_text())
    change(held)
    (folder / "clients.json").write_text(json.dumps(held))
    with pytest.raises(CheckpointError) as caught:
        read_run(folder)
    assert says in str(caught.value)
    run(resume=folder)
    assert repr(read_run(folder)) == repr(read_run(tiny_run[0]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one.update(arm="other"), "it is of the arm 'other' under seed 3"),
        (lambda one: one.update(seed=4), "it is of the arm 'base' under seed 4"),
        (lambda one: one["totals"].pop(), "it has not as many totals as answers, categories and groups"),
        (lambda one: one.update(categories=one["categories"][::-1]), "its rows are not those of the arm"),
        (lambda one: one["totals"][0].update(loss="NaN"), "its losses are not finite"),
        (lambda one: one["totals"][0].update(tokens=-1), "0.totals.0.tokens is -1"),
        (lambda one: one.update(cost={"rows": 3}), "not all of rows, rows_of_all, "),
        (lambda one: one.update(adapter="../../../x"), "no folder of the arm"),
    ],
)  # fmt: skip
def test_outcomes_that_do_not_fit_their_place_or_the_others_are_refused(
    change: Callable[[Any], Any], says: str, tiny_comparison: Path, place: Path
) -> None:
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(tiny_comparison, place / "comparison"))
    path = folder / "base" / "seed-3" / "outcomes.json"
    (one,) = json.loads(path.read_text())
    change(one)
    path.write_text(json.dumps([one]))
    with pytest.raises(CheckpointError, match=r"outcomes.json cannot be read .*; remove it, and this arm is") as caught:
        read_comparison(folder)
    assert says in str(caught.value)
    if "rows are not" not in says:  # which is told of the next arm
        assert "base/seed-3/outcomes.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{" * 9, b'{"rows": [true]}', b'{"rows": [1e400]}', b"[" * 100_000])
def test_a_list_of_chosen_rows_that_is_damaged_is_told_by_name(content: bytes, choosing: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(choosing, place / "run"))
    path = folder / "clients" / "1-client-01" / "selected" / "0001.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"0001.json cannot be read \("):
        read_run(folder)
    shutil.rmtree(folder / "checkpoints" / "0002")
    with pytest.raises(CheckpointError, match=r"0001.json is not as it was written .*client-01 no longer knows"):
        run(resume=folder)


def test_what_a_client_has_lost_of_what_it_kept_is_told(choosing: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    folder, told = Path(shutil.copytree(choosing, place / "run")), list[Any]()
    gone = sorted(folder.glob("clients/1-client-01/selected/*.json"))
    for path in gone:
        path.unlink()
    run(resume=folder, watch=told.append)
    (text,) = [event.text for event in told if "without what a client kept" in getattr(event, "text", "")]
    assert text.startswith(f"{gone[0]} and {len(gone) - 1} more such files are gone: ")
    whole = Path(shutil.copytree(choosing, place / "whole"))
    run(resume=whole, watch=told.append)
    assert len([event for event in told if "without what a client kept" in getattr(event, "text", "")]) == 1
