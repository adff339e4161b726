r"""The chat template that goes with a tuned model: what transformers or vLLM render with it is what was trained on.

    tokenizer.apply_chat_template([{"role": "user", "content": "Name three colours."}], add_generation_prompt=True)

Alpaca's format becomes a template; the context of a question is a field ``context`` of the user's last message. A
template that the tokenizer brought keeps the recipe's date, and shows reasoning where the recipe trained it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bellwether.data.chat import ChatFormat, dated
from bellwether.data.encoding import leading_ids
from bellwether.data.prompts import WITH_INPUT, WITHOUT_INPUT, Template
from bellwether.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As ``prompts._alpaca_prompt``: system messages stand before everything, sections and answers in their order.
_ALPACA = """\
{%- set said = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- set context = (said | selectattr('role', 'equalto', 'user') | list | last).context | default('', true) -%}
{{- BEGIN -}}
{%- for m in messages | selectattr('role', 'equalto', 'system') | list | reverse -%}
{{- m.content + '\\n\\n' -}}
{%- endfor -%}
{{- (WITH if context else WITHOUT) + '\\n\\n' -}}
{%- for m in said -%}
{%- if m.role == 'user' -%}
{%- set given = said[loop.index:] | selectattr('role', 'equalto', 'user') | list | length == 0 and context -%}
{{- '### Instruction:\\n' + m.content + '\\n\\n' -}}
{{- ('### Input:\\n' + context + '\\n\\n') if given else '' -}}
{{- '### Response:\\n' -}}
{%- elif m.role == 'assistant' -%}
{{- m.content + eos_token + ('' if loop.last else '\\n\\n') -}}
{%- else -%}
{{- raise_exception("Alpaca's format has no place for the role " + m.role) -}}
{%- endif -%}
{%- endfor -%}
"""


def trained_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    """Return the chat template that renders as rows were rendered for training.

    Args:
        template: as ``resolve_template`` returns it.
        tokenizer: the base's; brings the chat template, or what stands before a text.

    Returns:
        A Jinja template; of a tokenizer that has several, all of them by name.

    Raises:
        DataError: the tokenizer puts something before texts that cannot be written in a template.
    """
    if template is None:
        texts = {"BEGIN": _beginning(tokenizer), "WITH": WITH_INPUT, "WITHOUT": WITHOUT_INPUT}
        written = _ALPACA
        for name in ("BEGIN", "WITHOUT", "WITH"):  # the longer name before the one that it begins with
            written = written.replace(name, json.dumps(texts[name]))
        return written
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        return {name: _as_trained(str(source), template) for name, source in own.items()}
    return _as_trained(str(own), template)


def _as_trained(source: str, format: ChatFormat) -> str:
    """Return a template with the recipe's date, and its word on reasoning where nobody says otherwise."""
    source = dated(source, format.date)
    if "enable_thinking" not in source:
        return source
    shown = "true" if format.reasoning else "false"
    # The empty text keeps a line break that may follow.
    word = f"{{%- set enable_thinking = enable_thinking if enable_thinking is defined else {shown} -%}}"
    return f"{word}{{{{- '' }}}}{source}"


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that becomes what the tokenizer puts before a text, since templates write that themselves."""
    ids = leading_ids(tokenizer, None).tolist()
    if not ids:
        return ""
    text = WITHOUT_INPUT
    wanted = [*ids, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    for gap in ("", " "):  # some tokenizers begin a text with a space, but not where a token stands before it
        beginning = "".join(tokenizer.convert_ids_to_tokens(ids)) + gap
        if tokenizer(beginning + text, add_special_tokens=False)["input_ids"] == wanted:
            return beginning
    raise DataError(
        f"the tokenizer puts {tokenizer.convert_ids_to_tokens(ids)} before texts, which no chat template can write for "
        "it; render prompts as docs/results.md shows."
    )
