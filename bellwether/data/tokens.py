r"""From rows to token rows: ids, what is trained, and where the last response starts.

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

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bellwether.data.chat import Rendered
from bellwether.data.prompts import Template, forbidden_marks, not_plain, render_unplaced, row_texts
from bellwether.data.records import SKIP, Problems
from bellwether.data.rows import Row, Tokenised, TokenRow, Turn
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.progress import advance
from bellwether.tools.texts import CHARACTERS_PER_TOKEN, portions

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


@dataclass(frozen=True)
class Fitted:
    """What became of a row.

    Args:
        tokens: its tokens; None where it is left out.
        shortened: whether its context, or the history of its chat, is shorter.
        cut: whether its response is.
        length: its tokens before anything of its response is cut.
        remarks: what a person should know of how it was rendered.
        bad: why it cannot be rendered; empty where it can.
    """

    tokens: TokenRow | None
    shortened: bool = False
    cut: bool = False
    length: int = 0
    remarks: tuple[str, ...] = ()
    bad: str = ""


# A row's tokens with what is remarkable of its rendering, or why it cannot be rendered.
_Made = tuple[TokenRow, tuple[str, ...]] | str


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: recipe.Data,
    template: Template,
    known: dict[Row, Fitted] | None = None,
) -> Tokenised:
    """Turn rows into token rows of at most ``settings.max_tokens`` tokens.

    A row that is too long loses the end of its context first, or the oldest exchanges of a chat; then
    the end of its response, and with it the end of sequence; a row whose last response keeps no token
    is left out. Of a text, only the first ``CHARACTERS_PER_TOKEN`` characters for each of these tokens are
    tokenised; a row that would fit for want of the others is left out too.

    Args:
        rows: the rows.
        tokenizer: any tokenizer; one without offsets is called for prompt and responses separately,
            so that its tokens never lie across their borders.
        settings: ``max_tokens``, ``loss_on`` and ``skip_bad_rows``.
        template: a template as ``resolve_template`` returns it.
        known: rows that were tokenised before in the same way, which are not tokenised again; gets the others.

    Raises:
        DataError: rows cannot be rendered or write out a special token, and bad rows are not skipped or all are bad;
            or the tokenizer names no end of sequence.
    """
    known = {} if known is None else known
    unknown = [row for row in dict.fromkeys(rows) if row not in known]
    marks = forbidden_marks(tokenizer, template)
    found = {row: Fitted(None, bad=wrong) for row in unknown if (wrong := not_plain(row, marks))}
    new = [row for row in unknown if row not in found]
    encoder = _Encoder(tokenizer, template, settings)
    most = CHARACTERS_PER_TOKEN * settings.max_tokens
    bounded = [_bounded(row, most, settings.max_tokens) for row in new]
    if new:
        advance("tokenising", 0, len(new), "rows")
    for portion in portions([sum(map(len, row_texts(row))) for row in bounded]):
        fitting = zip(new[portion], _fitted(bounded[portion], encoder), strict=True)
        for row, made in fitting:
            if isinstance(made, str):
                found[row] = Fitted(None, bad=made)
            else:
                found[row] = replace(_cut(made[0], row, settings.max_tokens, most), remarks=made[1])
        advance("tokenising", portion.stop, len(new), "rows")
    _check_bad({row: found[row].bad for row in unknown if found[row].bad}, rows, settings)
    known.update(found)
    bad = [(row.place or "row", known[row].bad) for row in rows if known[row].bad]
    fitted = [known[row] for row in rows if not known[row].bad]
    kept = [row.tokens for row in fitted if row.tokens is not None]
    shortened, cut = sum(row.shortened for row in fitted), sum(row.cut for row in fitted)
    remarks = Counter(remark for row in fitted for remark in row.remarks)
    too_long = [row.length for row in fitted if row.cut or row.tokens is None]
    return Tokenised(kept, shortened, len(fitted) - len(kept), cut, too_long, remarks, bad)


def _check_bad(bad: Mapping[Row, str], rows: Sequence[Row], settings: recipe.Data) -> None:
    """Refuse rows that cannot be rendered, unless they are to be skipped and leave others."""
    good = any(row not in bad for row in rows)
    if settings.skip_bad_rows and good:
        return
    problems = Problems()
    for row, wrong in bad.items():
        problems.add(row.place or "row", wrong)
    problems.check(SKIP if good else "")


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


class _Encoder:
    """Rows to token rows, for one tokenizer and template; says nothing about lengths."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, settings: recipe.Data) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.settings = settings
        self.leading_T = leading_ids(tokenizer, template)

    def rows(self, rows: Sequence[Row]) -> list[_Made]:
        """Return token rows, whatever their lengths; those with two answers as one."""
        made = iter(self._single([answer for row in rows for answer in row.answers]))
        return [_joined(row, [next(made) for _ in row.answers]) for row in rows]

    def _single(self, rows: Sequence[Row]) -> list[_Made]:
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


def _joined(row: Row, made: Sequence[_Made]) -> _Made:
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


# Rows that are too long ---------------------------------------------------------------------------


def _texts(row: Row) -> list[str]:
    """Return the texts of a row that cannot be shortened to fit, but for the turns of a chat that can be left out."""
    own = [text for turn in row.turns for text in (turn.text, turn.reasoning)] or [row.instruction, row.response]
    return own if row.rejected is None else [*own, row.rejected.text, row.rejected.reasoning]


def _bounded(row: Row, most: int, turns: int) -> Row:
    """Return a row without what could never be kept of it: the rest of very long texts, the oldest of very many turns.

    Args:
        row: the row.
        most: characters of a text; of one that cannot be shortened one more is there, so that it is known.
        turns: turns of a chat, each of which takes a token at least.
    """
    asked = [number for number, turn in enumerate(row.turns) if turn.role == "user"]
    begin = next((number for number in asked if len(row.turns) - number <= turns + 1), asked[-1] if asked else 0)
    kept = row.turns[: asked[0]] + row.turns[begin:] if asked else ()
    if kept == row.turns and max(len(row.context), *map(len, _texts(row))) <= most:
        return row

    def beginning(turn: Turn) -> Turn:
        return replace(turn, text=turn.text[: most + 1], reasoning=turn.reasoning[: most + 1])

    return replace(
        row,
        instruction=row.instruction[: most + 1],
        context=row.context[:most],
        response=row.response[: most + 1],
        turns=tuple(map(beginning, kept)),
        rejected=None if row.rejected is None else beginning(row.rejected),
    )


def _without_oldest(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return a chat without its oldest exchange, all up to the user's second message; nothing where it has but one."""
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    return turns[: asked[0]] + turns[asked[1] :] if len(asked) > 1 else ()


def _fitted(rows: Sequence[Row], encoder: _Encoder) -> list[_Made]:
    """Return token rows, with remarks, whose contexts and histories are shortened as far as is needed and possible."""
    current = list(rows)
    tokens = encoder.rows(current)
    limit = encoder.settings.max_tokens
    while True:
        excesses = [0 if isinstance(made, str) else made[0].longest - limit for made in tokens]
        long = [number for number, row in enumerate(current) if excesses[number] > 0 and _can_shrink(row)]
        if not long:
            return tokens
        excess = [excesses[number] for number in long]
        smaller = _shrunk([current[number] for number in long], excess, encoder.tokenizer)
        for number, row, token_row in zip(long, smaller, encoder.rows(smaller), strict=True):
            current[number], tokens[number] = row, token_row


def _can_shrink(row: Row) -> bool:
    """Return whether a row has a context, or a chat an exchange before its last one."""
    return bool(row.context or _without_oldest(row.turns))


def _shrunk(rows: Sequence[Row], excess: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return rows with less context, by at least one token, or without the oldest exchange of a chat."""
    contexts = iter(encode([row.context for row in rows if not row.turns], tokenizer))
    smaller = []
    for row, too_many in zip(rows, excess, strict=True):
        if row.turns:
            smaller.append(replace(row, turns=_without_oldest(row.turns)))
        else:
            smaller.append(replace(row, context=_beginning(row.context, next(contexts), too_many)))
    return smaller


def _beginning(text: str, encoded: Encoded, less: int) -> str:
    """Return the beginning of a text with some tokens less."""
    keep = max(0, len(encoded.ids_T) - less)
    if keep == 0:
        return ""
    if encoded.encoding is None:
        # Without offsets, characters stand in for tokens; the caller tries again if it was not enough.
        end = min(len(text) - 1, len(text) * keep // len(encoded.ids_T))
    else:
        end = min(len(text) - 1, int(encoded.offsets_T2[keep, 0]))
    return text[:end].rstrip()


def _cut(tokens: TokenRow, row: Row, limit: int, most: int) -> Fitted:
    """Return a token row cut to a number of tokens, of the row as it was; none without a token of each answer.

    Args:
        tokens: of the row as it was shortened to fit.
        row: the row as it was.
        limit: tokens of a row.
        most: characters of a text that are tokenised; a longer one that fits would fit for want of the others.
    """
    length = tokens.longest
    fits_by_chance = length <= limit and any(len(text) > most for text in _texts(tokens.row))
    empty = any(answer.prompt_length >= min(limit, len(answer)) for answer in tokens.answers)
    if empty or fits_by_chance:
        return Fitted(None, False, False, length)
    shortened = (len(tokens.row.context), len(tokens.row.turns)) != (len(row.context), len(row.turns))
    kept, *rejected = (
        _beginning_of(answer, whole, limit) for answer, whole in zip(tokens.answers, row.answers, strict=True)
    )
    kept = replace(kept, row=row, rejected=next(iter(rejected), None))
    return Fitted(kept, shortened, length > limit, length)


def _beginning_of(tokens: TokenRow, row: Row, limit: int) -> TokenRow:
    """Return the first tokens of a token row with one answer, of the row as it was."""
    return TokenRow(
        tokens.ids_T[:limit], tokens.trained_T[:limit], tokens.response_T[:limit], tokens.prompt_length, row
    )
