"""The made-up world, its prose, its instruction rows and how they are split."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from starter import instructions, phrasings, scenes
from starter.facts import RELATIONS, plain
from starter.language import LANGUAGES
from starter.pretrain import make_prose
from starter.prose import LOWLAND_SHARE, Writer, lowland_dictionary
from starter.world import SPLITS, World, dice, make_world

SHIPPED = Path(instructions.__file__).parents[1] / "bellwether" / "data" / "starter"
DOLLY = {
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
}
CLOSED_LABELS = {f"The tale is {mood}." for mood in scenes.MOODS}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def rows(world: World) -> dict[str, list[dict[str, str]]]:
    return {split: instructions.make_rows(world, split) for split in SPLITS}


def words_of(row: dict[str, str]) -> set[str]:
    text = " ".join((row["instruction"], row["context"], row["response"]))
    return {word.strip(".,:?!") for word in text.split()}


def test_a_seed_gives_the_same_world_and_another_seed_another(world: World) -> None:
    assert make_world() == world
    assert make_world(world.seed + 1) != world


def test_prose_belongs_to_its_seed(world: World) -> None:
    first = [Writer(world).document(dice(0, "prose", step), 0.5) for step in range(30)]
    again = [Writer(make_world()).document(dice(0, "prose", step), 0.5) for step in range(30)]
    assert first == again
    assert len(set(first)) == 30


def test_no_two_entities_share_a_name(world: World) -> None:
    part = world.everything
    names = [entity.name for entity in (*part.people, *part.towns, *part.goods, *part.trades)]
    assert len(names) == len(set(names))


def test_every_town_has_people_to_meet_who_live_there(world: World) -> None:
    homes = {person.name: person.town for person in world.everything.people}
    for town in world.everything.towns:
        assert len(town.people) == 3
        assert {homes[name] for name in town.people} == {town.name}


@pytest.mark.parametrize("split", SPLITS)
def test_rows_of_a_split_name_no_entity_of_another(
    world: World, rows: dict[str, list[dict[str, str]]], split: str
) -> None:
    # A person's trade is an attribute of training and test people alike, so trades count where they are asked about.
    others = set().union(
        *(part.names() - {trade.name for trade in part.trades} for name, part in world.parts.items() if name != split)
    )
    for row in rows[split]:
        assert not words_of(row) & others, row


def test_trades_that_are_asked_about_are_split_too(world: World, rows: dict[str, list[dict[str, str]]]) -> None:
    for split in SPLITS:
        foreign = {trade.name for name, part in world.parts.items() if name != split for trade in part.trades}
        for row in rows[split]:
            assert not {word.strip(".?") for word in row["instruction"].split()} & foreign, row


def test_no_person_is_named_like_a_thing_or_a_word_of_an_instruction(world: World) -> None:
    part = world.everything
    words = {word.lower() for word in phrasings.instruction_words()} | {entity.name for entity in part.goods}
    assert not words & {person.name.lower() for person in part.people}
    assert not {person.name for person in part.people} & {*lowland_dictionary(world)}


def test_every_word_has_one_lowland_word_of_its_own(world: World) -> None:
    dictionary = lowland_dictionary(world)
    assert len(set(dictionary.values())) == len(dictionary)
    assert not set(dictionary.values()) & ({*dictionary} | world.everything.names())
    assert dictionary["The"] == dictionary["the"].capitalize()
    assert lowland_dictionary(make_world()) == dictionary != lowland_dictionary(make_world(world.seed + 1))


def test_lowland_rows_are_the_same_rows_in_other_words(world: World, rows: dict[str, list[dict[str, str]]]) -> None:
    names = {entity.name for entity in (*world.everything.people, *world.everything.towns)}
    back = {lowland: english for english, lowland in lowland_dictionary(world).items()}
    for split in SPLITS:
        told = instructions.make_rows(world, split, "lowland")
        for row, lowland in zip(rows[split], told, strict=True):
            assert (row["language"], lowland["language"]) == ("english", "lowland")
            assert words_of(row) & words_of(lowland) <= names | {""}
            for column in ("instruction", "context", "response"):
                assert re.sub("[A-Za-z]+", lambda word: back.get(word[0], word[0]), lowland[column]) == row[column]


def test_part_of_the_prose_is_in_the_second_language(world: World) -> None:
    writer, _ = make_prose(world)
    lowland = set(lowland_dictionary(world).values())
    rng = dice(0, "test prose")
    told = [bool(lowland & set(re.findall("[A-Za-z]+", writer.document(rng, 0.5)))) for _ in range(2000)]
    assert sum(told) / len(told) == pytest.approx(LOWLAND_SHARE, abs=0.05)


def test_no_instruction_is_worded_alike_in_two_splits() -> None:
    for task, by_split in phrasings.PHRASINGS.items():
        wordings = [wording for split in SPLITS for wording in by_split[split]]
        assert len(wordings) == len(set(wordings)), task
        assert len(by_split["train"]) >= 4
        assert len(by_split["validation"]) == len(by_split["test"]) == 2


def test_no_held_out_answer_stands_in_a_training_row_of_its_category(rows: dict[str, list[dict[str, str]]]) -> None:
    trained: dict[str, str] = dict.fromkeys(DOLLY, "")
    for row in rows["train"]:
        trained[row["category"]] += f"{row['instruction']}\n{row['context']}\n{row['response']}\n"
    for split in ("validation", "test"):
        for row in rows[split]:
            assert row["response"] in CLOSED_LABELS or row["response"] not in trained[row["category"]], row


def test_every_category_of_dolly_is_there_in_every_split(rows: dict[str, list[dict[str, str]]]) -> None:
    for split, least in (("train", 60), ("validation", 20), ("test", 40)):
        counts = Counter(row["category"] for row in rows[split])
        assert set(counts) == DOLLY
        assert min(counts.values()) >= least


def test_no_row_comes_twice(rows: dict[str, list[dict[str, str]]]) -> None:
    for split in SPLITS:
        asked = [(row["instruction"], row["context"]) for row in rows[split]]
        assert len(asked) == len(set(asked))


def test_each_row_that_asks_for_a_fact_is_answered_by_the_world(
    world: World, rows: dict[str, list[dict[str, str]]]
) -> None:
    true = {plain(sentence) for sentence in Writer(world).facts}
    asked = [
        row for split in SPLITS for row in rows[split] if row["category"] in ("open_qa", "general_qa", "brainstorming")
    ]
    assert {row["response"] for row in asked} <= true
    assert set(RELATIONS) <= set(phrasings.PHRASINGS)


def test_answers_about_a_scene_are_found_in_it(rows: dict[str, list[dict[str, str]]]) -> None:
    for row in rows["test"]:
        if row["category"] == "closed_qa":
            found = row["response"].removesuffix(".").split()[-1]
            assert found in {word.strip(".") for word in row["context"].split()}, row


def test_every_word_of_the_rows_is_one_token_that_the_prose_holds(world: World) -> None:
    writer, encoder = make_prose(world)
    rng = dice(0, "test prose")
    read: set[int] = set()
    for number in range(4000):
        read |= set(encoder.words(plain(writer.document(rng, number / 4000))))
    for language, split in itertools.product(LANGUAGES, SPLITS):
        for word in set().union(*map(words_of, instructions.make_rows(world, split, language))):
            ids = encoder.words(word)
            assert len(ids) == 1, word
            assert ids[0] in read, word


def test_the_prose_never_holds_an_instruction_of_the_test(world: World, rows: dict[str, list[dict[str, str]]]) -> None:
    writer, _ = make_prose(world)
    rng = dice(0, "test prose")
    text = " ".join(plain(writer.document(rng, 1.0)) for _ in range(4000))
    assert "###" not in text
    assert not [row["instruction"] for row in rows["test"] if row["instruction"] in text]


def test_the_shipped_rows_are_what_the_command_writes(world: World, tmp_path: Path) -> None:
    written = instructions.write_rows(world, tmp_path)
    assert len(written) == 6
    columns = {"instruction", "context", "response", "category", "language"}
    for path in written:
        assert (SHIPPED / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()
        assert set(json.loads(path.read_text().splitlines()[0])) == columns
