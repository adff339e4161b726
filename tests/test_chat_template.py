"""The chat template beside a tuned model renders, in transformers' hands, the rows as they were trained."""

from __future__ import annotations

import pytest
from data_tokenizers import BARE, CHATML, FAMILIES, THINKING, family, with_chat
from test_data_families import FAMILIES as CHATS
from test_data_families import of

from bellwether.data.chat_template import trained_template
from bellwether.data.prompts import resolve_template
from bellwether.data.rows import Row, Turn
from bellwether.data.tokens import tokenise
from bellwether.recipe.recipe import Data

SYSTEM = Turn("system", "Be brief.")
TURNS = (Turn("user", "Name it."), Turn("assistant", "Blue."), Turn("user", "And now?"), Turn("assistant", "Green."))
ROWS = {
    "a question": Row("Name a colour of the sky.", "Blue is a colour."),
    "a question with context": Row("Sum up the text.", "A fox runs.", context="The fox runs over\nthe hill."),
    "several turns": Row("And now?", "Green.", turns=TURNS),
    "a system message": Row("And now?", "Green.", turns=(SYSTEM, *TURNS)),
}


def messages_of(row, chat):
    if row.turns:
        return [{"role": turn.role, "content": turn.text} for turn in row.turns]
    if not chat:
        asked = {"role": "user", "content": row.instruction, "context": row.context}
    else:
        asked = {"role": "user", "content": f"{row.instruction}\n\n{row.context}" if row.context else row.instruction}
    return [asked, {"role": "assistant", "content": row.response}]


def check(row, tokenizer, settings):
    """Compare whole rows and prompts, as ids, with those that training makes of them."""
    template = resolve_template(settings, tokenizer)
    (tokens,) = tokenise([row], tokenizer, settings, template).rows
    served = with_chat(tokenizer, trained_template(template, tokenizer))
    messages = messages_of(row, template is not None)
    whole = served.apply_chat_template(messages, return_dict=False)
    prompt = served.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt == tokens.ids_T[: tokens.prompt_length].tolist()
    trained = tokens.ids_T.tolist()
    if template is not None and not template.last_end:
        trained.pop()  # the end of sequence that training puts where a template ends no turn
    assert whole[: len(trained)] == trained
    # A template may write more behind an answer, such as a line break or Phi 3's end of a text, which is not trained.
    assert served.decode(whole[len(trained) :], skip_special_tokens=True).strip() == ""
    if template is None:
        assert whole == trained


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if "across" not in name and "WordPiece" not in name])
def test_alpacas_format_as_a_template_gives_the_tokens_of_training(name, row):
    check(row, family(name), Data(template="alpaca", max_tokens=512))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "across" in name])
def test_prompts_are_those_of_training_also_where_tokens_lie_across_borders(name):
    tokenizer = family(name)
    for row in ROWS.values():
        (tokens,) = tokenise([row], tokenizer, Data(template="alpaca", max_tokens=2048), None).rows
        served = with_chat(tokenizer, trained_template(None, tokenizer))
        messages = messages_of(row, chat=False)[:-1]
        prompt = served.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == tokens.ids_T[: tokens.prompt_length].tolist()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", CHATS)
def test_a_tokenizers_own_template_gives_the_tokens_of_training(name, row):
    if row.turns and row.turns[0] == SYSTEM and not CHATS[name][3]:
        pytest.skip("this template takes no system message")
    check(row, of(name), Data(template="chat", max_tokens=512))


@pytest.mark.parametrize("reasoning", [True, False])
def test_reasoning_is_shown_as_it_was_trained_unless_somebody_asks_otherwise(reasoning):
    tokenizer = with_chat(family("byte-level BPE"), THINKING)
    template = resolve_template(Data(template="chat", reasoning=reasoning), tokenizer)
    served = with_chat(tokenizer, trained_template(template, tokenizer))
    asked = {
        "conversation": [{"role": "user", "content": "Name it."}],
        "tokenize": False,
        "add_generation_prompt": True,
    }
    assert ("</think>" in served.apply_chat_template(**asked)) is not reasoning
    assert "</think>" not in served.apply_chat_template(**asked, enable_thinking=True)
    assert "</think>" in served.apply_chat_template(**asked, enable_thinking=False)


def test_a_template_that_needs_no_word_of_the_recipe_stays_as_it_is():
    tokenizer = with_chat(family("byte-level BPE"), CHATML)
    assert trained_template(resolve_template(Data(), tokenizer), tokenizer) == CHATML


def test_templates_of_several_names_keep_their_names():
    tokenizer = with_chat(family("byte-level BPE"), {"default": CHATML, "tool_use": BARE})
    written = trained_template(resolve_template(Data(template="chat"), tokenizer), tokenizer)
    assert written == {"default": CHATML, "tool_use": BARE}
