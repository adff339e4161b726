"""Trivial rivals, on rows small enough to work by hand."""

import numpy as np
import pytest

from bellwether.arms import rivals
from bellwether.arms.rivals import most_frequent, nearest
from bellwether.data.rows import Row


def asked(text="", category="", context=""):
    return Row(text, "never looked at", context, category)


def rows(*parts):
    """Rows of text, category and response."""
    return [Row(text, response, category=category) for text, category, response in parts]


TRAIN = rows(
    ("is tin heavy", "facts", "yes"),
    ("is cork heavy", "facts", "no"),
    ("is foam heavy", "facts", "no"),
    ("colour of tin", "colours", "grey"),
    ("colour of grass", "colours", "green"),
    ("colour of clay", "colours", "grey"),
    ("colour of leaves", "colours", "green"),
    ("is tin cheap", "prices", "no"),
)


def test_the_most_frequent_response_of_the_category_is_given():
    assert most_frequent(TRAIN, [asked(category="facts"), asked(category="prices")]) == ["no", "no"]


def test_of_equally_frequent_responses_the_first_in_order_is_given():
    # 'grey' and 'green' come twice each; 'grey' comes first, and last if the rows are reversed.
    assert most_frequent(TRAIN, [asked(category="colours")]) == ["grey"]
    assert most_frequent(TRAIN[::-1], [asked(category="colours")]) == ["green"]


def test_a_category_without_training_rows_gets_the_most_frequent_response_of_all():
    # 'no' three times, 'grey' and 'green' twice.
    assert most_frequent(TRAIN, [asked(category="unheard of")]) == ["no"]


def test_the_response_of_the_row_with_the_nearest_text_is_given():
    assert nearest(TRAIN, [asked("What colour has grass?"), asked("Is CORK a heavy thing?")]) == ["green", "no"]


def test_a_rare_word_counts_more_than_a_frequent_one():
    # Each row shares one word of its two with 'b d': 'b' is in two rows, 'd' in one.
    train = rows(("a b", "", "by a frequent word"), ("b c", "", "the same"), ("c d", "", "by a rare word"))
    assert nearest(train, [asked("b d")]) == ["by a rare word"]


def test_the_cosine_does_not_prefer_long_texts():
    # By hand: cosines 1/√2 against 1/√1 for counts, whatever the weights of x are.
    train = rows(("one two three four tin", "", "long"), ("tin", "", "short"))
    assert nearest(train, [asked("tin")]) == ["short"]


def test_similarities_equal_the_formula_worked_by_hand():
    # idf = ln((1 + rows) / (1 + rows with the word)) + 1, with two rows.
    rare, common = np.log(3 / 2) + 1, 1.0
    first = np.array([common, rare, 0, 0]) / np.hypot(common, rare)  # 'x a' in words x, a, b, c
    second = np.array([common, 0, rare, rare]) / np.sqrt(common**2 + 2 * rare**2)  # 'x b c'
    # 'b' beside some 'x': with more of the shared 'x' the shorter text is nearer.
    six, eight = np.array([6 * common, 0, rare, 0]), np.array([8 * common, 0, rare, 0])
    assert six @ second > six @ first
    assert eight @ first > eight @ second
    train = rows(("x a", "", "first"), ("x b c", "", "second"))
    assert nearest(train, [asked("x " * 6 + "b"), asked("x " * 8 + "b")]) == ["second", "first"]


def test_the_context_is_part_of_what_is_asked():
    train = [Row("what is it", "grey", "a tin box"), Row("what is it", "green", "a grass field")]
    assert nearest(train, [asked("what is it", context="grass")]) == ["green"]


def test_single_letters_and_digits_are_words():
    train = rows(("3 and 4", "", "seven"), ("3 and 5", "", "eight"))
    assert nearest(train, [asked("5 and 3")]) == ["eight"]


def test_equally_near_rows_and_texts_without_known_words_give_the_first():
    train = rows(("other words", "", "first"), ("tin is grey", "", "second"), ("grey is tin", "", "third"))
    assert nearest(train, [asked("is tin grey"), asked("nothing known"), asked("")]) == ["second", "first", "first"]
    assert nearest(rows(("…", "", "first"), ("", "", "second")), [asked("tin")]) == ["first"]


def test_blocks_of_test_rows_come_back_in_order(monkeypatch):
    monkeypatch.setattr(rivals, "_BLOCK", 2)
    questions = [asked(row.instruction) for row in TRAIN]
    assert nearest(TRAIN, questions) == [row.response for row in TRAIN]
    assert nearest(TRAIN, []) == []


@pytest.mark.parametrize("rival", [most_frequent, nearest])
def test_no_training_rows_are_refused(rival):
    with pytest.raises(ValueError, match="no training rows"):
        rival([], [asked("tin")])
