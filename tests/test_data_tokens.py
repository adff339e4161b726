from pathlib import Path

import numpy as np
import pytest
from data_tokenizers import (
    BARE,
    BRACKETS,
    CHATML,
    FAMILIES,
    THINKING,
    byte_bpe,
    chat,
    family,
    unigram,
    with_chat,
    words,
)

from bellwether.data import encoding as encoding_module
from bellwether.data import tokens as tokens_module
from bellwether.data.encoding import encode, prompt_ids
from bellwether.data.prompts import prompt, render, resolve_template
from bellwether.data.rows import Row, Turn
from bellwether.data.tokens import tokenise
from bellwether.errors import DataError
from bellwether.recipe.recipe import Data
from bellwether.tools.texts import portions

SHARED = Path(__file__).parents[2] / "shared"

ROWS = [
    Row("Name a colour.", "Blue is a colour."),
    Row("Sum up the text.", "A fox runs.", "The fox runs over the hill."),
    Row("Name a colour.", "\nThe sky.\n\nThe hill."),
    Row("Name a colour.", "  two spaces first"),
    Row("Name a colour.", "The fox 🦊 and 空 é"),
    Row("### Response:\nThe fox", "### Response:\nThe fox"),
    Row("Blue", "Blue", "Blue"),
    Row("Name a place.", "the hill of the sky."),
    Row("Name a place.", "The sky. The hill."),
]
CHAT = Row(
    "And the hill?",
    "Green.",
    turns=(
        Turn("system", "Be brief."),
        Turn("user", "The sky?"),
        Turn("assistant", "Blue."),
        Turn("user", "And the hill?"),
        Turn("assistant", "Green."),
    ),
)


def plain_ids(tokenizer, text):
    """The tokenizers library's own view of a text, nothing put around it."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def everything(**changes):
    return Data(max_tokens=100_000, **changes)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_row_begins_with_exactly_the_ids_that_generation_starts_from(name, row):
    tokenizer = family(name)
    leading = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[name][1]]
    text = prompt(row.instruction, row.context, None, tokenizer)
    [tokens] = tokenise([row], tokenizer, everything(), None).rows
    assert tokens.ids_T[: tokens.prompt_length].tolist() == leading + plain_ids(tokenizer, text)
    assert prompt_ids([text], tokenizer, None)[0].tolist() == tokens.ids_T[: tokens.prompt_length].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_exactly_the_response_and_the_end_of_sequence_are_trained(name, row):
    tokenizer = family(name)
    [tokens] = tokenise([row], tokenizer, everything(), None).rows
    trained = tokens.ids_T[tokens.trained_T].tolist()
    assert tokens.ids_T[-1] == trained[-1] == tokenizer.eos_token_id
    assert trained.count(tokenizer.eos_token_id) == 1
    assert tokens.trained_T.tolist() == [False] * tokens.prompt_length + [True] * len(trained)
    start, rendered = len(FAMILIES[name][1]), render(row, None, tokenizer)

    def decoded(ids):
        return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)

    if FAMILIES[name][2]:
        assert decoded(tokens.ids_T[start : tokens.prompt_length]) == rendered.text[: rendered.prompt_end]
        assert decoded(tokens.ids_T[start:-1]) == rendered.text
    else:
        known = decoded(np.array(plain_ids(tokenizer, row.response)))
        assert decoded(tokens.ids_T[tokens.prompt_length : -1]).split() == known.split()


# The tokens of the others lie across the border even for an ordinary response.
@pytest.mark.parametrize("name", [name for name in FAMILIES if "across" not in name])
def test_an_ordinary_response_has_the_ids_of_the_whole_text_behind_the_prompt(name):
    # No seam: the response is not tokenised as if it were a text of its own (which would begin with ▁).
    tokenizer, row = family(name), ROWS[0]
    [tokens] = tokenise([row], tokenizer, everything(), None).rows
    whole = plain_ids(tokenizer, render(row, None, tokenizer).text)
    start = len(FAMILIES[name][1])
    assert tokens.ids_T[start:-1].tolist() == whole


@pytest.mark.parametrize("name", [name for name in FAMILIES if "across" in name])
def test_tokens_of_tokenizers_across_borders_really_lie_across_them(name):
    tokenizer = family(name)
    text = render(ROWS[-1], None, tokenizer).text
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens
    assert any("The" in token and token[0] in "\nĊ" for token in tokens)


def test_ids_and_mask_are_those_worked_out_by_hand():
    vocabulary = (
        "Below is an instruction that describes a task . Write response appropriately completes the request "
        "### Instruction : Response say hello blue sky"
    )
    tokenizer = words(vocabulary)
    number = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", *vocabulary.split()])}
    [tokens] = tokenise([Row("say hello", "blue sky")], tokenizer, Data(), None).rows
    head = "Below is an instruction that describes a task . Write a response that appropriately completes the request ."
    head += " ### Instruction : say hello ### Response :"
    expected = ["<s>", *head.split(), "blue", "sky", "</s>"]
    assert tokens.ids_T.tolist() == [number[name] for name in expected]
    assert tokens.trained_T.tolist() == [False] * (len(expected) - 3) + [True] * 3
    assert tokens.response_T.tolist() == tokens.trained_T.tolist()
    assert tokens.prompt_length == len(expected) - 3


def test_loss_on_all_trains_the_prompt_too_but_not_what_the_tokenizer_puts_before_it():
    for name, (_, leading, _) in FAMILIES.items():
        [tokens] = tokenise([ROWS[1]], family(name), everything(loss_on="all"), None).rows
        assert tokens.trained_T.tolist() == [False] * len(leading) + [True] * (len(tokens) - len(leading))
        assert tokens.response_T.tolist() == [False] * tokens.prompt_length + [True] * (
            len(tokens) - tokens.prompt_length
        )


def test_a_tokenizer_without_offsets_gets_the_same_masks_from_separate_calls():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    for row in [*ROWS, CHAT]:
        [tokens] = tokenise([row], tokenizer, everything(), None).rows
        text = render(row, None, tokenizer).text[: render(row, None, tokenizer).prompt_end]
        # ByT5's ids are the bytes plus three; </s> in the text is its id 1.
        expected = [[*part, 1] for part in ([byte + 3 for byte in piece.encode()] for piece in text.split("</s>"))]
        flat = [number for part in expected for number in part][:-1]
        assert tokens.ids_T[: tokens.prompt_length].tolist() == flat
        answer = [byte + 3 for byte in row.response.encode()]
        assert tokens.ids_T[tokens.prompt_length :].tolist() == [*answer, 1]
    earlier = tokens.ids_T[: tokens.prompt_length][tokens.response_T[: tokens.prompt_length]]
    assert earlier.tolist() == [*(byte + 3 for byte in b"Blue."), 1]


def test_a_tokenizer_without_offsets_shortens_contexts_to_valid_text():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    row = Row("Sum up.", "A fox.", "🦊é空" * 100)
    made = tokenise([row], tokenizer, Data(max_tokens=320), None)
    assert (len(made.rows), made.shortened) == (1, 1)
    assert 300 < len(made.rows[0]) <= 320
    assert bytes(token - 3 for token in made.rows[0].ids_T[:-1].tolist()).decode().count("🦊") > 3


def test_a_tokenizer_without_end_of_sequence_is_refused():
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        tokenise([ROWS[0]], tokenizer, Data(), None)


# Chats --------------------------------------------------------------------------------------------


def trained_texts(tokens, tokenizer):
    """The runs of trained tokens, as text."""
    runs, run = [], []
    for token, trained in zip(tokens.ids_T.tolist(), tokens.trained_T.tolist(), strict=True):
        if trained:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return [*runs, tokenizer.decode(run)]


def test_every_response_of_a_chat_is_trained_with_the_end_of_its_turn():
    tokenizer = with_chat(family("byte-level BPE"), CHATML)
    [tokens] = tokenise([CHAT], tokenizer, Data(), chat(tokenizer)).rows
    assert trained_texts(tokens, tokenizer) == ["Blue.<|im_end|>", "Green.<|im_end|>"]
    assert tokens.ids_T[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id not in tokens.ids_T
    reference = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in CHAT.turns[:-1]], add_generation_prompt=True
    )
    assert tokens.ids_T[: tokens.prompt_length].tolist() == list(reference["input_ids"])


def test_responses_that_equal_other_parts_of_the_chat_are_told_apart():
    tokenizer = with_chat(family("byte-level BPE"), CHATML)
    same = Row("Blue.", "Blue.", turns=tuple(Turn(role, "Blue.") for role in ("user", "assistant") * 3))
    [tokens] = tokenise([same], tokenizer, Data(), chat(tokenizer)).rows
    assert trained_texts(tokens, tokenizer) == ["Blue.<|im_end|>"] * 3


def test_a_template_that_writes_bos_does_not_get_a_second_one():
    tokenizer = with_chat(family("Metaspace, BOS"), BRACKETS)
    [tokens] = tokenise([Row("The sky?", "Blue.")], tokenizer, Data(), chat(tokenizer)).rows
    ids = tokens.ids_T.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[tokens.prompt_length : -1]) == "Blue."
    [everywhere] = tokenise([Row("The sky?", "Blue.")], tokenizer, Data(loss_on="all"), chat(tokenizer)).rows
    assert everywhere.trained_T.tolist() == [False] + [True] * (len(ids) - 1)


def test_a_template_without_end_of_turn_gets_the_end_of_sequence():
    tokenizer = with_chat(family("byte-level BPE"), BARE)
    [tokens] = tokenise([Row("The sky?", "Blue.")], tokenizer, Data(), chat(tokenizer)).rows
    assert tokens.ids_T[-1] == tokenizer.eos_token_id
    assert tokens.trained_T[-1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_prompt_that_ends_with_a_space_is_kept_and_no_space_is_added(name, row):
    tokenizer = with_chat(family(name), BARE)
    [tokens] = tokenise([row], tokenizer, everything(), chat(tokenizer)).rows
    rendered = render(row, chat(tokenizer), tokenizer)
    assert tokens.ids_T[: tokens.prompt_length].tolist() == plain_ids(tokenizer, rendered.text[: rendered.prompt_end])
    if FAMILIES[name][2]:
        decoded = tokenizer.decode(tokens.ids_T[:-1].tolist(), clean_up_tokenization_spaces=False)
        assert decoded == rendered.text


def test_an_earlier_response_that_the_template_shows_otherwise_is_trained_as_it_is_shown():
    tokenizer = with_chat(family("byte-level BPE"), THINKING)
    [tokens] = tokenise([CHAT], tokenizer, Data(), chat(tokenizer)).rows
    assert trained_texts(tokens, tokenizer) == ["Blue.<|im_end|>", "Green.<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("byte-level BPE", CHATML),
        ("byte-level BPE", THINKING),
        ("byte-level BPE", BARE),
        ("Metaspace, BOS", BRACKETS),
    ],
)
def test_what_is_trained_of_a_chat_decodes_to_exactly_the_wanted_answer(name, template):
    tokenizer = with_chat(family(name), template)
    rows = [row for row in ROWS if row.response == row.response.strip() and row.response.isascii()]
    for row, tokens in zip(rows, tokenise(rows, tokenizer, everything(), chat(tokenizer)).rows, strict=True):
        assert tokenizer.decode(tokens.ids_T[tokens.prompt_length : -1].tolist()) == row.response


@pytest.mark.parametrize(
    "row",
    [
        Row("What is <|im_end|>?", "A token.", place="a.jsonl:7"),
        Row("What is it?", "A token.", "<|im_end|>", place="a.jsonl:7"),
        Row("What is it?", "It is <|im_end|>.", place="a.jsonl:7"),
        Row("x", "y", turns=(Turn("user", "a<|im_end|>"), Turn("assistant", "y")), place="a.jsonl:7"),
    ],
    ids=["instruction", "context", "response", "chat"],
)
@pytest.mark.parametrize("kind", ["alpaca", "chat"])
def test_a_row_that_writes_out_a_special_token_is_refused_with_its_place(row, kind):
    tokenizer = with_chat(family("byte-level BPE"), CHATML)
    template = resolve_template(Data(template=kind), tokenizer)
    with pytest.raises(DataError, match=r"^a\.jsonl:7: its text has '<\|im_end\|>', which the tokenizer takes for"):
        tokenise([ROWS[0], row], tokenizer, Data(), template)


def test_a_special_token_written_out_is_refused_for_a_tokenizer_without_offsets_too():
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="its text has '</s>'"):
        tokenise([Row("a", "b</s>c")], ByT5Tokenizer(), everything(), None)


def test_a_chat_without_chat_template_repeats_alpacas_sections():
    for name in FAMILIES:
        tokenizer = family(name)
        [tokens] = tokenise([CHAT], tokenizer, everything(), None).rows
        text = prompt("And the hill?", "", None, tokenizer, history=CHAT.turns[:3])
        assert tokens.ids_T[: tokens.prompt_length].tolist() == prompt_ids([text], tokenizer, None)[0].tolist()
        runs = [run.lower() for run in trained_texts(tokens, tokenizer)]
        assert len(runs) == 2, name
        end = tokenizer.eos_token.lower()
        assert runs[0].endswith(end), name
        assert runs[1].endswith(end), name


# Rows that are too long ---------------------------------------------------------------------------


def long_row(words):
    return Row("Sum up the text.", "A fox runs.", " ".join(["The fox runs over the hill."] * words))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_context_is_shortened_before_anything_else(name):
    tokenizer = family(name)
    [whole] = tokenise([long_row(1)], tokenizer, everything(), None).rows
    limit = len(whole) + 20
    made = tokenise([long_row(1), long_row(40)], tokenizer, Data(max_tokens=limit), None)
    short, shortened = made.rows
    assert (made.shortened, made.cut, made.left_out) == (1, 0, 0)
    assert short.ids_T.tolist() == whole.ids_T.tolist()
    assert limit - 12 <= len(shortened) <= limit
    assert shortened.ids_T[shortened.response_T].tolist() == whole.ids_T[whole.response_T].tolist()
    assert shortened.row == long_row(40)
    text = tokenizer.decode(shortened.ids_T.tolist()[: shortened.prompt_length])
    assert text.lower().replace(" ", "").count("foxruns") >= 1


def test_a_shortened_context_ends_with_a_whole_character():
    tokenizer = family("byte-level BPE")
    row = Row("Sum up.", "A fox.", "🦊空é" * 200)
    for limit in range(200, 216):
        [tokens] = tokenise([row], tokenizer, Data(max_tokens=limit), None).rows
        assert "\ufffd" not in tokenizer.decode(tokens.ids_T.tolist())
        assert limit - 8 <= len(tokens) <= limit


def test_then_the_response_is_cut_and_gets_no_end_of_sequence():
    tokenizer = family("byte-level BPE")
    row = Row("Name it.", "The fox runs over the hill. " * 50, "A hill.")
    made = tokenise([row], tokenizer, Data(max_tokens=150), None)
    [tokens] = made.rows
    assert (made.shortened, made.cut, made.left_out) == (1, 1, 0)
    assert len(tokens) == 150
    assert tokenizer.eos_token_id not in tokens.ids_T
    assert row.response.startswith(tokenizer.decode(tokens.ids_T[tokens.prompt_length :].tolist()))
    assert "### Input" not in tokenizer.decode(tokens.ids_T.tolist())


def test_a_row_that_keeps_no_token_of_its_response_is_left_out_and_counted():
    tokenizer = family("byte-level BPE")
    [whole] = tokenise([ROWS[0]], tokenizer, everything(), None).rows
    at_border = tokenise([ROWS[0]], tokenizer, Data(max_tokens=whole.prompt_length), None)
    assert (len(at_border.rows), at_border.left_out) == (0, 1)
    above = tokenise([ROWS[0]], tokenizer, Data(max_tokens=whole.prompt_length + 1), None)
    assert (len(above.rows), above.left_out, above.cut) == (1, 0, 1)
    assert above.rows[0].trained_T.sum() == 1


def test_a_chat_loses_its_oldest_exchanges_and_keeps_its_system_message():
    tokenizer = with_chat(family("byte-level BPE"), CHATML)
    exchanges = [
        turn for n in range(30) for turn in (Turn("user", f"Question {n}?"), Turn("assistant", f"Answer {n}."))
    ]
    row = Row("Question 29?", "Answer 29.", turns=(Turn("system", "Be brief."), *exchanges))
    made = tokenise([row], tokenizer, Data(max_tokens=200), chat(tokenizer))
    text = tokenizer.decode(made.rows[0].ids_T.tolist())
    assert (made.shortened, made.cut, made.left_out) == (1, 0, 0)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion ")
    assert text.endswith("Answer 29.<|im_end|>")
    assert "Question 0?" not in text
    assert 150 < len(made.rows[0]) <= 200


def test_rows_stay_in_their_order_over_many_calls_of_the_tokenizer():
    rows = [Row("Name it.", f"Answer {number}.") for number in range(2500)]
    tokenizer = family("byte-level BPE")
    made = tokenise(rows, tokenizer, Data(), None)
    assert [token_row.row for token_row in made.rows] == rows
    assert tokenizer.decode(made.rows[2400].ids_T[made.rows[2400].prompt_length :].tolist()).startswith("Answer 2400.")


# Texts far beyond the limit --------------------------------------------------------------------------

SENTENCES = "The fox runs over the hill. Blue is a colour of the sky. "  # 57 characters


def far_too_long():
    """Rows with one text of 17,000 characters, where 64 a token make 9,600 of 150 tokens; and ordinary ones between."""
    long = SENTENCES * 300
    turns = [Turn("user", "Name a colour."), Turn("assistant", long), Turn("user", "And?"), Turn("assistant", "Blue.")]
    return [
        ROWS[0],
        Row("Sum up the text.", "A fox runs.", long),
        Row("Tell of the fox.", long),
        Row("Tell of the hill.", long, long),
        Row(long, "A fox runs."),
        Row("And?", "Blue.", turns=tuple(turns)),
        Row(long, "Blue.", turns=(*turns[:2], Turn("user", long), turns[3])),
        Row("Name a colour.", long, turns=tuple(turns[:2])),
        ROWS[1],
    ]


def content(made):
    """What a run sees of token rows."""
    rows = [
        (row.ids_T.tolist(), row.trained_T.tolist(), row.response_T.tolist(), row.prompt_length, row.row)
        for row in made.rows
    ]
    return rows, made.shortened, made.left_out, made.cut


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_the_same_whether_all_of_a_long_text_is_tokenised_or_its_beginning(name, monkeypatch):
    lengths = []

    def watched(texts, tokenizer):
        lengths.extend(map(len, texts))
        return encode(texts, tokenizer)

    for module in (encoding_module, tokens_module):
        monkeypatch.setattr(module, "encode", watched)
    made = content(tokenise(far_too_long(), family(name), Data(max_tokens=150), None))
    assert max(lengths) < 20_000, "the texts of a row together, each of them cut"
    monkeypatch.setattr(tokens_module, "CHARACTERS_PER_TOKEN", 1_000_000)
    assert content(tokenise(far_too_long(), family(name), Data(max_tokens=150), None)) == made
    assert max(lengths) > 34_000
    assert made[1:] == (3, 2, 3), "two contexts and a chat's beginning, two instructions, three responses"


@pytest.mark.parametrize("template", [CHATML, BRACKETS])
def test_long_chats_are_the_same_whether_all_of_them_is_tokenised_or_the_beginnings(template, monkeypatch):
    tokenizer = with_chat(family("byte-level BPE"), template)
    made = content(tokenise(far_too_long(), tokenizer, Data(max_tokens=150), chat(tokenizer)))
    monkeypatch.setattr(tokens_module, "CHARACTERS_PER_TOKEN", 1_000_000)
    assert content(tokenise(far_too_long(), tokenizer, Data(max_tokens=150), chat(tokenizer))) == made


def test_a_row_that_would_fit_only_since_its_text_was_cut_is_left_out():
    # A word of more than 100 characters is one unknown token of WordPiece, however long it is.
    endless, tokenizer = "a" * 10_000, family("WordPiece, CLS and SEP")
    rows = [
        Row("Name it.", endless),
        Row(endless, "Blue."),
        Row("Name it.", "Blue."),
        Row("Name it.", "Blue.", endless),
    ]
    made = tokenise(rows, tokenizer, Data(max_tokens=100), None)
    assert [row.row for row in made.rows] == rows[2:]
    assert (made.shortened, made.left_out, made.cut) == (1, 2, 0)


def test_of_a_chat_of_endless_turns_only_those_are_rendered_that_could_be_kept(monkeypatch):
    turns = tuple(turn for n in range(3000) for turn in (Turn("user", f"Question {n}?"), Turn("assistant", f"{n}.")))
    system, rendered = Turn("system", "Be brief."), []

    def watched(row, template, tokenizer):
        rendered.append(len(row.turns))
        return render(row, template, tokenizer)

    monkeypatch.setattr(encoding_module, "render_unplaced", watched)
    tokenizer = with_chat(family("byte-level BPE"), CHATML)
    whole, end = (Row("Question 2999?", "2999.", turns=(system, *some)) for some in (turns, turns[-20:]))
    made = tokenise([whole], tokenizer, Data(max_tokens=100), chat(tokenizer))
    assert max(rendered) == 101
    assert (made.shortened, made.left_out, made.cut) == (1, 0, 0)
    assert made.rows[0].row == whole
    [expected] = tokenise([end], tokenizer, Data(max_tokens=100), chat(tokenizer)).rows
    assert made.rows[0].ids_T.tolist() == expected.ids_T.tolist()


def test_a_tokenizer_is_given_few_texts_and_few_characters_at_once(monkeypatch):
    calls = []

    def watched(texts, tokenizer):
        calls.append((len(texts), sum(map(len, texts))))
        return encode(texts, tokenizer)

    for module in (encoding_module, tokens_module):
        monkeypatch.setattr(module, "encode", watched)
    texts = [*["The fox."] * 3000, *[SENTENCES * 4000] * 5]
    assert len(prompt_ids(texts, words("fox"), None)) == 3005
    assert sum(count for count, _ in calls) == 3005
    assert max(count for count, _ in calls) <= 1024
    assert max(characters for _, characters in calls) <= 1_000_000


def test_portions_take_every_text_once_and_in_order():
    for lengths in ([], [5], [0] * 3000, [10_000_000] * 3, [400_000] * 7, [1, 10_000_000, 1]):
        slices = list(portions(lengths))
        numbers = list(range(len(lengths)))
        assert [number for some in slices for number in numbers[some]] == numbers
        assert all(some.stop - some.start == 1 or sum(lengths[some]) <= 1_000_000 for some in slices)


def test_no_rows_make_no_token_rows():
    assert tokenise([], unigram(), Data(), None).rows == []


# Real tokenizers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the shared model folder is not here")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_real_sentencepiece_tokenizer_keeps_prompts_and_responses(stories):
    made = tokenise(ROWS, stories, everything(), None)
    for row, tokens in zip(ROWS, made.rows, strict=True):
        text = prompt(row.instruction, row.context, None, stories)
        assert tokens.ids_T[: tokens.prompt_length].tolist() == stories(text)["input_ids"]
        assert tokens.ids_T[0] == stories.bos_token_id
        assert stories.decode(tokens.ids_T[tokens.prompt_length : -1].tolist()) == row.response.removeprefix(" ")
        assert tokens.ids_T[-1] == stories.eos_token_id
        assert np.array_equal(tokens.trained_T, np.arange(len(tokens)) >= tokens.prompt_length)
