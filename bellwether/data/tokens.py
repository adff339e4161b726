"""From rows to token rows of at most so many tokens: what is too long is shortened, cut or left out.

Shape legend: T tokens of one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bellwether.data.encoding import Encoded, Made, RowEncoder, encode
from bellwether.data.prompts import Template, forbidden_marks, not_plain, row_texts
from bellwether.data.records import SKIP, Problems
from bellwether.data.rows import Row, Tokenised, TokenRow, Turn
from bellwether.recipe import recipe
from bellwether.tools.progress import advance
from bellwether.tools.texts import CHARACTERS_PER_TOKEN, portions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    encoder = RowEncoder(tokenizer, template, settings)
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


def _fitted(rows: Sequence[Row], encoder: RowEncoder) -> list[Made]:
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
