r"""From rows to token rows of whatever length: ids, what is trained, and where the last response starts.

Every row is tokenised twice in one batched call: its prompt alone, and whole. The prompt's ids are
those of the prompt alone, so that training and generation start from the same ids; the response's
ids are those of the whole text behind the border. Where a token of the whole text lies across the
border, what it holds of the response is tokenised by itself:

    prompt alone   ... | : | \n |
    whole          ... | : | \n\n  | F | oo |      the response starts with a line break
    row            ... | : | \n | \n | F | oo |

Shape legend: T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bellwether.data.chat import Rendered
from bellwether.data.prompts import Template, render_unplaced
from bellwether.data.rows import Row, TokenRow
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.texts import portions

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One text as tokens.

    Args:
        ids_T: token ids, without those that the tokenizer puts around a text.
        encoding: what the tokenizers library knows of the text; None for a tokenizer without offsets.
    """

    ids_T: NDArray[np.int64]
    encoding: Encoding | None

    @property
    def offsets_T2(self) -> NDArray[np.int64]:
        """Start and end of each token in characters; read late, since few rows need them."""
        assert self.encoding is not None
        return np.array(self.encoding.offsets, np.int64).reshape(-1, 2)


# A row's tokens with what is remarkable of its rendering, or why it cannot be rendered.
Made = tuple[TokenRow, tuple[str, ...]] | str


def prompt_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: Template) -> list[NDArray[np.int64]]:
    """Return the ids of prompts, as they stand at the beginning of token rows.

    Args:
        texts: prompts as ``prompts.prompt`` renders them.
        tokenizer: the tokenizer.
        template: the template that they were rendered with.
    """
    leading = leading_ids(tokenizer, template)
    return [
        np.concatenate([leading, encoded.ids_T])
        for portion in portions([len(text) for text in texts])
        for encoded in encode(texts[portion], tokenizer)
    ]


def leading_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> NDArray[np.int64]:
    """Return what the tokenizer puts before a text, such as BOS; nothing for chats, whose template writes it."""
    if template is not None:
        return np.empty(0, np.int64)
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed = list(tokenizer("a")["input_ids"])
    for length in range(len(framed) - len(bare) + 1):
        if framed[length : length + len(bare)] == bare:
            return np.array(framed[:length], np.int64)
    raise DataError(f"the tokenizer's special tokens change the text itself ({bare} became {framed}); use another.")


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenise texts in one call, without the special tokens around them."""
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    encodings = batch.encodings or [None] * len(texts)
    return [
        Encoded(np.array(ids, np.int64), encoding) for ids, encoding in zip(batch["input_ids"], encodings, strict=True)
    ]


class RowEncoder:
    """Rows to token rows, for one tokenizer and template; says nothing about lengths."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, settings: recipe.Data) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.settings = settings
        self.leading_T = leading_ids(tokenizer, template)

    def rows(self, rows: Sequence[Row]) -> list[Made]:
        """Return token rows, whatever their lengths; those with two answers as one."""
        made = iter(self._single([answer for row in rows for answer in row.answers]))
        return [_joined(row, [next(made) for _ in row.answers]) for row in rows]

    def _single(self, rows: Sequence[Row]) -> list[Made]:
        """Return token rows of rows with one answer."""
        rendered = [self._rendered(row) for row in rows]
        good = [item for item in rendered if isinstance(item, Rendered)]
        parts = self._parts(good) if self.tokenizer.is_fast else self._parts_without_offsets(good)
        return [
            item if isinstance(item, str) else (self._row(row, item, next(parts)), item.remarks)
            for row, item in zip(rows, rendered, strict=True)
        ]

    def _rendered(self, row: Row) -> Rendered | str:
        try:
            return render_unplaced(row, self.template, self.tokenizer)
        except DataError as error:
            return str(error)

    def _parts(self, rendered: Sequence[Rendered]) -> Iterator[_Parts]:
        """Yield ids of prompt and response, from the offsets of one call."""
        texts = [item.text[: item.prompt_end] for item in rendered] + [item.text for item in rendered]
        encoded = encode(texts, self.tokenizer)
        for item, prompt, whole in zip(rendered, encoded, encoded[len(rendered) :], strict=False):
            earlier = [span for number, span in enumerate(item.response_spans[:-1]) if number not in item.untrained]
            yield _Parts(prompt.ids_T, _within(prompt, earlier), _behind(prompt, whole, item, self.tokenizer))

    def _parts_without_offsets(self, rendered: Sequence[Rendered]) -> Iterator[_Parts]:
        """Yield the same of a tokenizer that tells no offsets: every span and what lies between them alone."""
        pieces = [(number, *piece) for number, item in enumerate(rendered) for piece in _pieces(item)]
        encoded = encode([text for _, _, text in pieces], self.tokenizer)
        by_row: list[list[tuple[bool, NDArray[np.int64]]]] = [[] for _ in rendered]
        for (number, is_trained, _), piece in zip(pieces, encoded, strict=True):
            by_row[number].append((is_trained, piece.ids_T))
        for found in by_row:
            prompt, (_, response_T) = found[:-1], found[-1]
            earlier = [np.full(len(ids_T), is_trained) for is_trained, ids_T in prompt]
            yield _Parts(np.concatenate([ids_T for _, ids_T in prompt]), np.concatenate(earlier), response_T)

    def _row(self, row: Row, rendered: Rendered, parts: _Parts) -> TokenRow:
        """Put leading tokens, prompt, response and end of sequence together."""
        end_T = np.empty(0, np.int64) if rendered.closed else np.array([self._eos()], np.int64)
        ids_T = np.concatenate([self.leading_T, parts.prompt_T, parts.response_T, end_T])
        prompt_length = len(self.leading_T) + len(parts.prompt_T)
        response_T = np.zeros(len(ids_T), bool)
        response_T[len(self.leading_T) : prompt_length] = parts.earlier_T
        response_T[prompt_length:] = True
        trained_T = response_T
        if self.settings.loss_on == "all":
            trained_T = np.ones(len(ids_T), bool)
            trained_T[: len(self.leading_T)] = False
            trained_T[:1] &= ids_T[:1] != self.tokenizer.bos_token_id
        elif len(rendered.response_spans) - 1 in rendered.untrained:
            trained_T = response_T & (np.arange(len(ids_T)) < prompt_length)
        # A response without a token of its own (white space that the tokenizer drops) counts as none.
        return TokenRow(ids_T, trained_T, response_T, prompt_length if len(parts.response_T) else len(ids_T), row)

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the tokenizer names no end-of-sequence token, so a model could not learn to stop; "
                "set eos_token in its tokenizer_config.json."
            )
        return int(eos)


def _joined(row: Row, made: Sequence[Made]) -> Made:
    """Return what was made of a row's one answer, or of its two, of which nothing else is trained."""
    if row.rejected is None:
        return made[0]
    wrong = next((one for one in made if isinstance(one, str)), None)
    if wrong is not None:
        return wrong
    (chosen, remarks), (rejected, more) = (one for one in made if not isinstance(one, str))
    # The prompt's length is that of the whole row where an answer has no token of its own.
    start = min(chosen.prompt_length, rejected.prompt_length)
    if not np.array_equal(chosen.ids_T[:start], rejected.ids_T[:start]):
        return "its prompt is rendered otherwise before the one answer than before the other; remove the row."
    alone, beside = (replace(one, trained_T=_behind_prompt(one), response_T=_behind_prompt(one)) for one in
                     (chosen, rejected))  # fmt: skip
    return replace(alone, row=row, rejected=beside), tuple(dict.fromkeys((*remarks, *more)))


def _behind_prompt(tokens: TokenRow) -> NDArray[np.bool_]:
    """Return which tokens are those of the last answer."""
    return np.arange(len(tokens)) >= tokens.prompt_length


@dataclass(frozen=True)
class _Parts:
    """Ids before and behind the border, and which of those before it belong to earlier responses."""

    prompt_T: NDArray[np.int64]
    earlier_T: NDArray[np.bool_]
    response_T: NDArray[np.int64]


def _within(encoded: Encoded, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which tokens begin within one of the spans."""
    within_T = np.zeros(len(encoded.ids_T), bool)
    starts_T = encoded.offsets_T2[:, 0] if spans else within_T
    for start, end in spans:
        within_T |= (starts_T >= start) & (starts_T < end)
    return within_T


def _behind(
    prompt: Encoded, whole: Encoded, rendered: Rendered, tokenizer: PreTrainedTokenizerBase
) -> NDArray[np.int64]:
    """Return the ids of the last response, such that those of the prompt can stand before them."""
    length = len(prompt.ids_T)
    if np.array_equal(whole.ids_T[:length], prompt.ids_T):
        return whole.ids_T[length:]
    starts_T, ends_T = whole.offsets_T2.T
    # How far the tokens before each one reach. Some tokenizers leave white space out of the offsets of
    # the token that holds it, so that only a token that begins where the others end surely begins there.
    reached_T = np.concatenate([[0], np.maximum.accumulate(ends_T)])[: len(starts_T)]
    border = rendered.prompt_end
    sure = np.flatnonzero((starts_T >= border) & (starts_T == reached_T))
    first = int(sure[0]) if len(sure) else len(starts_T)
    piece_end = int(starts_T[first]) if len(sure) else len(rendered.text)
    piece = rendered.text[border:piece_end]
    return np.concatenate([_inner_ids(piece, tokenizer), whole.ids_T[first:]])


def _inner_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Return the ids of a text that stands inside another, behind a token border.

    Some tokenizers mark the beginning of what they are given (▁), which an anchor before it prevents.
    """
    for anchor in ("\n", ":"):
        before, both = encode([anchor, anchor + text], tokenizer)
        if np.array_equal(both.ids_T[: len(before.ids_T)], before.ids_T):
            return both.ids_T[len(before.ids_T) :]
    return encode([text], tokenizer)[0].ids_T


def _pieces(rendered: Rendered) -> Iterator[tuple[bool, str]]:
    """Yield the text in pieces, with whether each is a trained response; the last piece is the last response."""
    position = 0
    for number, (start, end) in enumerate(rendered.response_spans):
        yield False, rendered.text[position:start]
        yield number not in rendered.untrained, rendered.text[start:end]
        position = end
