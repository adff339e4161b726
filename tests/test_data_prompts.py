import pytest
from data_tokenizers import BARE, BRACKETS, CHATML, CONTRARY, THINKING, chat, family, with_chat

from bellwether.data.prompts import end_of_turn, prompt, render, resolve_template
from bellwether.data.rows import Row, Turn
from bellwether.errors import DataError
from bellwether.recipe.recipe import Data

CHAT = Row(
    "And?",
    "Green.",
    turns=(Turn("user", "The sky?"), Turn("assistant", "Blue."), Turn("user", "And?"), Turn("assistant", "Green.")),
)


@pytest.fixture(scope="module")
def tokenizer():
    return family("byte-level BPE")


@pytest.fixture(scope="module")
def chatty(tokenizer):
    return with_chat(tokenizer, CHATML)


def spans(rendered):
    return [rendered.text[start:end] for start, end in rendered.response_spans]


def test_alpacas_format_without_input(tokenizer):
    rendered = render(Row("Name it.", "Blue."), None, tokenizer)
    assert rendered.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName it.\n\n### Response:\nBlue."
    )
    assert spans(rendered) == ["Blue."]
    assert not rendered.closed


def test_alpacas_format_with_input(tokenizer):
    rendered = render(Row("Sum up.", "Fox.", "The fox runs."), None, tokenizer)
    assert rendered.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSum up.\n\n### Input:\nThe fox runs."
        "\n\n### Response:\nFox."
    )


def test_a_chat_in_alpacas_format_ends_earlier_responses_with_the_end_of_sequence(tokenizer):
    rendered = render(CHAT, None, tokenizer)
    assert spans(rendered) == ["Blue.<|endoftext|>", "Green."]
    assert rendered.text.endswith(
        "### Instruction:\nThe sky?\n\n### Response:\nBlue.<|endoftext|>\n\n"
        "### Instruction:\nAnd?\n\n### Response:\nGreen."
    )


@pytest.mark.parametrize("kind", ["alpaca", "chat"])
@pytest.mark.parametrize("context", ["", "The fox."])
@pytest.mark.parametrize("source", [CHATML, THINKING])
def test_the_prompt_is_the_beginning_of_the_rendered_row(tokenizer, source, kind, context):
    chatty = with_chat(tokenizer, source)
    template = resolve_template(Data(template=kind), chatty)
    rendered = render(Row("Name it.", "Blue.", context), template, chatty)
    assert prompt("Name it.", context, template, chatty) == rendered.text[: rendered.prompt_end]
    rendered = render(CHAT, template, chatty)
    assert prompt("And?", "", template, chatty, history=CHAT.turns[:2]) == rendered.text[: rendered.prompt_end]


def test_a_chat_template_is_rendered_as_the_tokenizer_does(chatty):
    rendered = render(Row("Sum up.", "Fox.", "The fox runs."), chat(chatty), chatty)
    messages = [
        {"role": "user", "content": "Sum up.\n\nThe fox runs."},
        {"role": "assistant", "content": "Fox."},
    ]
    assert rendered.text == chatty.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert spans(rendered) == ["Fox.<|im_end|>"]
    assert rendered.closed


def test_spans_are_found_where_the_template_trims_contents(tokenizer):
    bracketed = with_chat(family("Metaspace, BOS"), BRACKETS)
    rendered = render(Row("  Name it. ", "  Blue.  "), chat(bracketed), bracketed)
    assert rendered.text == "<s>[INST] Name it. [/INST] Blue.</s>"
    assert spans(rendered) == [" Blue.</s>"]


def test_a_template_that_marks_no_end_leaves_the_row_open(tokenizer):
    bare = with_chat(tokenizer, BARE)
    assert not render(Row("Name it.", "Blue."), chat(bare), bare).closed


def test_every_answer_is_found_where_earlier_ones_are_shown_otherwise_than_the_prompt(tokenizer):
    thinking = with_chat(tokenizer, THINKING)
    rendered = render(CHAT, chat(thinking), thinking)
    assert spans(rendered) == ["Blue.<|im_end|>", "Green.<|im_end|>"]
    assert rendered.text[: rendered.prompt_end].count("<think>") == 1
    assert rendered.text[: rendered.prompt_end].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_template_whose_prompt_does_not_begin_the_chat_is_refused(tokenizer):
    contrary = with_chat(tokenizer, CONTRARY)
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*set data.template to alpaca"):
        render(Row("Name it.", "Blue.", place="rows.jsonl:3"), chat(contrary), contrary)


def test_what_the_template_says_when_it_refuses_a_chat_is_passed_on():
    bracketed = with_chat(family("Metaspace, BOS"), BRACKETS)
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*no system message here.*alpaca"):
        render(
            Row("a", "b", turns=(Turn("system", "x"), *CHAT.turns), place="rows.jsonl:3"), chat(bracketed), bracketed
        )


def test_auto_takes_the_chat_template_where_there_is_one(tokenizer, chatty):
    assert resolve_template(Data(), chatty) == resolve_template(Data(template="chat"), chatty) is not None
    assert resolve_template(Data(), tokenizer) is None
    assert resolve_template(Data(template="alpaca"), chatty) is None
    with pytest.raises(DataError, match="has no chat template"):
        resolve_template(Data(template="chat"), tokenizer)


def test_generation_stops_at_the_end_of_sequence_and_the_end_of_turn(tokenizer, chatty):
    eos, turn = chatty.eos_token_id, chatty.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(None, chatty) == [eos]
    assert end_of_turn(chat(chatty), chatty) == [eos, turn]
    bare = with_chat(tokenizer, BARE)
    assert end_of_turn(chat(bare), bare) == [eos]
