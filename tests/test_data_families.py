"""Chats of every family of models: templates of our own in each one's manner, and the trained text worked out by hand.

Tokens of the markup are added to a small byte-level tokenizer, marked special or not as the family does it.
"""

# ruff: noqa: E501 - templates are read line by line.
import datetime
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
from data_tokenizers import CORPUS, chat, with_chat
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bellwether.data.columns import Layout, make_row
from bellwether.data.prompts import end_of_turn, prompt, render
from bellwether.data.rows import Row, Turn
from bellwether.data.tokens import tokenise
from bellwether.errors import DataError
from bellwether.recipe.recipe import Data

TURNS = (
    Turn("user", "The sky?"),
    Turn("assistant", "Blue."),
    Turn("user", "And the hill?"),
    Turn("assistant", "Green."),
)
SYSTEM = (Turn("system", "Be brief."), *TURNS)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Beside text: calls of tools in an assistant's turn, answers of tools in a turn of the user, tools in the system's.
QWEN2 = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if m.content }}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts of earlier turns go; the last one has at least an empty thought; without thinking the prompt has it, too.
QWEN3 = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA2 = (
    "{% set first = messages[0].role == 'system' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if first and loop.first }}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Prints the date, and ends a turn that calls a tool by another token.
LLAMA31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today: {{ strftime_now('%d %b %Y') }}{% for tool in tools or [] %}\n{{ tool | tojson }}{% endfor %}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<|eom_id|>{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The end of sequence stands after the whole chat only.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
R1 = DEEPSEEK.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}")
GENERATION = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}\n",
)
# An answer ends with the next turn, and the last one with the end of sequence.
OPEN_END = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)

IM = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
# Name: template, added tokens, whether they are marked special, whether a system message is taken, the trained texts.
FAMILIES = {
    "ChatML": (CHATML, IM, True, True, ["Blue.<|im_end|>", "Green.<|im_end|>"]),
    "ChatML, tokens not marked special": (CHATML, IM, False, True, ["Blue.<|im_end|>", "Green.<|im_end|>"]),
    "ChatML as plain text": (CHATML, (), True, True, ["Blue.<|im_end|>", "Green.<|im_end|>"]),
    "with generation marks": (GENERATION, IM, True, True, ["Blue.<|im_end|>", "Green.<|im_end|>"]),
    "Qwen 2": (QWEN2, IM, True, True, ["Blue.<|im_end|>", "Green.<|im_end|>"]),
    "Qwen 3": (QWEN3, IM, True, True, ["Blue.<|im_end|>", "Green.<|im_end|>"]),
    "Llama 2": (LLAMA2, (), True, True, [" Blue. </s>", " Green. </s>"]),
    "Llama 3": (LLAMA3, HEADER, True, True, ["Blue.<|eot_id|>", "Green.<|eot_id|>"]),
    "Llama 3.1": (LLAMA31, HEADER, True, True, ["Blue.<|eot_id|>", "Green.<|eot_id|>"]),
    "Mistral": (MISTRAL, (), True, False, [" Blue.</s>", " Green.</s>"]),
    "Gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), True, False, ["Blue.<end_of_turn>", "Green.<end_of_turn>"]),
    "Phi 3": (PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), True, True, ["Blue.<|end|>", "Green.<|end|>"]),
    "Phi 4": (PHI4, (*IM, "<|im_sep|>"), True, True, ["Blue.<|im_end|>", "Green.<|im_end|>"]),
    "DeepSeek": (
        DEEPSEEK,
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        True,
        True,
        ["Blue.<｜end▁of▁sentence｜>", "Green.<｜end▁of▁sentence｜>"],
    ),
    "ended by the next turn": (OPEN_END, ("<|user|>", "<|assistant|>"), True, True, ["Blue.", "Green.</s>"]),
}


@functools.cache
def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def made(template, added, special=True):
    """A byte-level tokenizer with BOS and EOS, some added tokens, and a chat template."""
    tokenizer = with_chat(byte_level(), template)
    if added:
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in added])
    return tokenizer


def of(name):
    template, added, special, _, _ = FAMILIES[name]
    return made(template, added, special)


def trained(tokens, tokenizer):
    """The texts of what is trained, run by run."""
    starts = np.flatnonzero(np.diff(np.concatenate([[0], tokens.trained_T.astype(int), [0]])))
    return [tokenizer.decode(tokens.ids_T[a:b].tolist()) for a, b in zip(starts[::2], starts[1::2], strict=True)]


def row_of(turns, **more):
    return Row(turns[-2].text, turns[-1].text, turns=tuple(turns), **more)


def tokens_of(row, tokenizer, **settings):
    (found,) = tokenise([row], tokenizer, Data(**settings), chat(tokenizer, **settings)).rows
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_trained_with_what_ends_it_and_nothing_else(name):
    tokenizer, expected = of(name), FAMILIES[name][4]
    tokens = tokens_of(row_of(TURNS), tokenizer)
    assert trained(tokens, tokenizer) == expected
    assert (tokens.trained_T == tokens.response_T).all()
    assert tokenizer.decode(tokens.ids_T[: tokens.prompt_length].tolist()) == prompt(
        "And the hill?", "", chat(tokenizer), tokenizer, TURNS[:2]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_single_exchange_is_trained_as_the_last_one_of_a_chat(name):
    tokenizer, expected = of(name), FAMILIES[name][4]
    assert trained(tokens_of(Row("And the hill?", "Green."), tokenizer), tokenizer) == expected[-1:]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_message_is_shown_or_refused_in_a_sentence(name):
    tokenizer, (_, _, _, takes, expected) = of(name), FAMILIES[name]
    if takes:
        tokens = tokens_of(row_of(SYSTEM), tokenizer)
        assert trained(tokens, tokenizer) == expected
        assert "Be brief." in tokenizer.decode(tokens.ids_T.tolist())
    else:
        with pytest.raises(DataError, match="the tokenizer's chat template refuses this chat"):
            tokens_of(row_of(SYSTEM), tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_message_of_weight_zero_is_shown_and_not_trained(name):
    tokenizer, expected = of(name), FAMILIES[name][4]
    for number, left in ((1, expected[1:]), (3, expected[:1])):
        turns = [replace(turn, trained=n != number) for n, turn in enumerate(TURNS)]
        tokens = tokens_of(row_of(turns), tokenizer)
        assert trained(tokens, tokenizer) == left
        assert tokenizer.decode(tokens.ids_T.tolist()) == tokenizer.decode(
            tokens_of(row_of(TURNS), tokenizer).ids_T.tolist()
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_where_training_ends_an_answer(name):
    tokenizer = of(name)
    last = tokens_of(row_of(TURNS), tokenizer).ids_T[-1]
    if name == "ChatML as plain text":  # of several tokens, none of which ends an answer by itself
        assert end_of_turn(chat(tokenizer), tokenizer) == [tokenizer.eos_token_id, "<|im_end|>"]
    else:
        assert last in end_of_turn(chat(tokenizer), tokenizer)


@pytest.mark.parametrize("name", ["ChatML", "ChatML, tokens not marked special", "Phi 3", "Gemma"])
def test_texts_that_write_out_a_mark_of_the_template_are_refused(name):
    tokenizer = of(name)
    for mark in FAMILIES[name][1]:
        with pytest.raises(DataError, match="which the tokenizer takes for a special token"):
            tokens_of(Row("What is it?", f"It is {mark} here.", place="a:1"), tokenizer)


# Dates --------------------------------------------------------------------------------------------


def test_a_date_in_a_template_is_the_recipes_in_english_whatever_the_clock_and_the_locale(monkeypatch):
    import locale

    tokenizer = of("Llama 3.1")
    assert "Today: 26 Jul 2024" in render(row_of(TURNS), chat(tokenizer), tokenizer).text
    for name in ("de_DE.UTF-8", "C.UTF-8", "C"):  # of those that the machine has
        try:
            locale.setlocale(locale.LC_TIME, name)
        except locale.Error:
            continue
        try:
            form = chat(tokenizer, date=datetime.date(2025, 5, 9))
            assert "Today: 09 May 2025" in render(row_of(TURNS), form, tokenizer).text
        finally:
            locale.setlocale(locale.LC_TIME, "C")


# Calls of tools -----------------------------------------------------------------------------------

CALL = {"id": "k1", "type": "function", "function": {"name": "price", "arguments": '{"item": "lamp"}'}}
TOOL = {"type": "function", "function": {"name": "price", "description": "finds it"}}
CALLING = {
    "messages": [
        {"role": "user", "content": "What is the price?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "k1", "content": "12"},
        {"role": "assistant", "content": "It is 12."},
    ],
    "tools": [TOOL],
}


def read(record):
    return make_row(record, Layout(messages="messages", tools="tools"), "a:1")


def test_calls_of_tools_are_trained_and_what_tools_answer_is_not():
    tokenizer = of("Qwen 2")
    tokens = tokens_of(read(CALLING), tokenizer)
    assert trained(tokens, tokenizer) == [
        '<tool_call>{"name": "price", "arguments": {"item": "lamp"}}</tool_call><|im_end|>',
        "It is 12.<|im_end|>",
    ]
    assert '"description": "finds it"' in tokenizer.decode(tokens.ids_T.tolist())


def test_sharegpts_calls_and_observations_are_read_as_what_they_are():
    call = '{"name": "price", "arguments": {"item": "lamp"}}'
    said = [("human", "What is the price?"), ("function_call", call), ("observation", "12"), ("gpt", "It is 12.")]
    record = {"messages": [{"from": role, "value": text} for role, text in said], "tools": json.dumps([TOOL])}
    tokenizer = of("Qwen 2")
    told, plain = tokens_of(read(record), tokenizer), tokens_of(read(CALLING), tokenizer)
    assert told.ids_T.tolist() == plain.ids_T.tolist()  # as the same chat with tool_calls
    assert trained(told, tokenizer) == trained(plain, tokenizer)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("price(lamp)", r"message 2 has the role function_call, but its text is not JSON; .* is wanted there; mend it"),
        ('{"tool": "price"}', "message 2 has the role function_call, but its text names no tool"),
        ("[]", "its text names no tool"),
        ('{"name": "price", "arguments": "lamp"}', "message 2 calls 'price' with arguments that are not JSON"),
        (None, "message 2 is null, but text is wanted"),
    ],
)
def test_a_function_call_whose_text_is_none_is_refused(text, said):
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": text}, {"from": "gpt", "value": "b"}]
    with pytest.raises(DataError, match=said):
        read({"messages": turns})


def test_a_turn_that_calls_a_tool_may_end_with_another_token():
    tokenizer = of("Llama 3.1")
    tokens = tokens_of(read(CALLING), tokenizer)
    assert trained(tokens, tokenizer) == [
        '{"name": "price", "arguments": {"item": "lamp"}}<|eom_id|>',
        "It is 12.<|eot_id|>",
    ]


def test_text_before_a_call_is_trained_with_it():
    record = {
        "messages": [CALLING["messages"][0], {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}]
    }
    tokenizer = of("Qwen 2")
    assert trained(tokens_of(read(record), tokenizer), tokenizer) == [
        'Let me look.\n<tool_call>{"name": "price", "arguments": {"item": "lamp"}}</tool_call><|im_end|>'
    ]


@pytest.mark.parametrize("name", ["ChatML", "Gemma", "Phi 3"])
def test_calls_that_a_template_cannot_render_are_refused(name):
    with pytest.raises(
        DataError, match="a:1: message 2 calls a tool or answers for one, which this chat template cannot"
    ):
        tokens_of(read(CALLING), of(name))


def test_rows_that_cannot_be_rendered_are_listed_in_the_order_of_their_lines_and_skipped_on_request():
    tokenizer = of("ChatML")
    calls = [make_row(CALLING, Layout(messages="messages"), f"a:{line}") for line in (11, 3, 9, 4)]
    special = replace(row_of(TURNS[:2]), place="a:7", turns=(Turn("user", "<|im_end|>"), TURNS[1]))
    good = replace(row_of(TURNS), place="a:5")
    rows = [calls[0], good, *calls[1:], special]
    with pytest.raises(DataError) as caught:
        tokenise(rows, tokenizer, Data(), chat(tokenizer))
    said = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in said] == ["a:3:", "a:4:", "a:7:", "..."]
    assert said[-1].startswith("... and 2 more; 5 rows are bad in all. Set data.skip_bad_rows=true")
    known = {}
    for _ in range(2):  # made, and looked up
        found = tokenise(rows, tokenizer, Data(skip_bad_rows=True), chat(tokenizer), known)
        assert [row.row for row in found.rows] == [good]
        assert ([place for place, _ in found.bad], found.left_out) == (["a:11", "a:3", "a:9", "a:4", "a:7"], 0)
    with pytest.raises(DataError, match="a:3: .*\na:4: ") as caught:
        tokenise(calls, tokenizer, Data(skip_bad_rows=True), chat(tokenizer))
    assert "skip_bad_rows" not in str(caught.value)  # no row would be left


def test_a_row_that_a_template_refuses_is_skipped_on_request():
    refusing = "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('no x') }}{% endif %}"
    tokenizer = with_chat(of("ChatML"), refusing + "{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}")
    rows = [replace(row_of([Turn("user", text), Turn("assistant", "a")]), place=f"a:{text}") for text in ("x", "y")]
    with pytest.raises(DataError, match=r"a:x: the tokenizer's chat template refuses this chat \(no x\)"):
        tokenise(rows, tokenizer, Data(), chat(tokenizer))
    found = tokenise(rows, tokenizer, Data(skip_bad_rows=True), chat(tokenizer))
    assert [row.row.place for row in found.rows] == ["a:y"]


def test_descriptions_of_tools_that_a_template_does_not_render_are_told():
    tokenizer = of("ChatML")
    row = replace(row_of(TURNS), tools="[{}]")
    found = tokenise([row, row_of(TURNS)], tokenizer, Data(), chat(tokenizer))
    assert found.remarks == {"descriptions of tools are not used, since the chat template does not render them": 1}


# Reasoning ----------------------------------------------------------------------------------------

THOUGHT = Turn("assistant", "Green.", reasoning="Grass is green.")
WRITTEN = Turn("assistant", "<think>\nGrass is green.\n</think>\n\nGreen.")


@pytest.mark.parametrize("turn", [THOUGHT, WRITTEN], ids=["in a field", "in the text"])
def test_reasoning_is_trained_where_the_recipe_wants_it(turn):
    tokenizer = of("Qwen 3")
    row = row_of([*TURNS[:3], turn])
    assert trained(tokens_of(row, tokenizer, reasoning=True), tokenizer) == [
        "Blue.<|im_end|>",
        "<think>\nGrass is green.\n</think>\n\nGreen.<|im_end|>",
    ]


def test_reasoning_in_a_field_is_told_where_it_is_not_trained_and_in_the_text_refused():
    tokenizer = of("Qwen 3")
    found = tokenise([row_of([*TURNS[:3], THOUGHT])], tokenizer, Data(), chat(tokenizer))
    assert found.remarks == {"reasoning_content is not used; data.reasoning true trains it": 1}
    assert trained(found.rows[0], tokenizer) == ["Blue.<|im_end|>", "Green.<|im_end|>"]
    with pytest.raises(DataError, match="to train its reasoning, set data.reasoning to true"):
        tokens_of(row_of([*TURNS[:3], WRITTEN]), tokenizer)


def test_earlier_reasoning_that_a_template_drops_is_told():
    tokenizer = of("Qwen 3")
    turns = [TURNS[0], replace(TURNS[1], reasoning="Air is blue."), TURNS[2], THOUGHT]
    found = tokenise([row_of(turns)], tokenizer, Data(), chat(tokenizer, reasoning=True))
    assert list(found.remarks) == ["earlier answers stand without their reasoning, as the chat template shows them"]
    assert trained(found.rows[0], tokenizer)[0] == "Blue.<|im_end|>"


@pytest.mark.parametrize(
    ("turn", "reasoning", "expected"),
    [
        (TURNS[3], False, "\n</think>\n\nGreen."),
        (TURNS[3], True, "\n</think>\n\nGreen."),
        (THOUGHT, True, "Grass is green.\n</think>\n\nGreen."),
        (WRITTEN, True, "Grass is green.\n</think>\n\nGreen."),
    ],
)
def test_a_template_whose_prompt_opens_a_thought_gets_it_closed_before_the_answer(turn, reasoning, expected):
    tokenizer = made(R1, FAMILIES["DeepSeek"][1])
    tokens = tokens_of(row_of([*TURNS[:3], turn]), tokenizer, reasoning=reasoning)
    assert trained(tokens, tokenizer) == ["Blue.<｜end▁of▁sentence｜>", f"{expected}<｜end▁of▁sentence｜>"]


# A folder of templates ----------------------------------------------------------------------------


def test_several_templates_of_which_none_is_the_default_are_one_sentence():
    tokenizer = made({"rag": CHATML, "tool_use": CHATML}, IM)
    with pytest.raises(
        DataError, match=r"chat templates of several names \(rag, tool_use\) and none that is called default"
    ):
        chat(tokenizer)


def test_calls_and_text_with_reasoning_are_not_dropped_in_silence_where_a_prompt_opens_a_thought():
    tokenizer = made(R1, FAMILIES["DeepSeek"][1])
    with pytest.raises(DataError, match="to train its reasoning, set data.reasoning to true"):
        tokens_of(row_of([*TURNS[:3], WRITTEN]), tokenizer)


def test_calls_and_tools_that_are_too_long_to_be_rendered_are_refused():
    long = {**CALLING, "tools": [{"name": "x" * 100_000}]}
    with pytest.raises(
        DataError, match="the field 'tools' has descriptions of 100,0.. characters, but at most 100,000"
    ):
        read(long)


def test_of_endless_turns_those_that_could_be_kept_are_found_at_once():
    tokenizer = of("ChatML")
    turns = tuple(Turn(role, "a") for _ in range(200_000) for role in ("user", "assistant"))
    tokens = tokens_of(Row("a", "a", turns=turns), tokenizer, max_tokens=40)
    assert len(tokens) <= 40
    assert trained(tokens, tokenizer)[-1] == "a<|im_end|>"
