"""Rows as a model sees them, with what is trained of each: for the terminal, in colour or with marks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from bellwether.data.rows import Tokenised, TokenRow
from bellwether.tools.words import clean, clean_lines, counted

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

# Where colours cannot be shown, what is trained stands between these.
MARKS, ASCII_MARKS = ("⟦", "⟧"), ("[[", "]]")


def trained_runs(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield the text of a token row in runs that are trained, or not, in turn.

    Args:
        row: a row.
        tokenizer: of the base model; special tokens are shown by their texts.
    """
    for trained, places in itertools.groupby(range(len(row)), key=lambda place: bool(row.trained_T[place])):
        ids = row.ids_T[np.fromiter(places, int)].tolist()
        yield str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)), trained


def shown_rows(
    clients: Mapping[str, Tokenised], tokenizer: PreTrainedTokenizerBase, count: int, *, marks: tuple[str, str] | None
) -> Iterator[Text]:
    """Yield training rows as text, the first of each client in turn, then the second of each.

    Args:
        clients: training rows by client.
        tokenizer: of the base model.
        count: how many rows.
        marks: what stands around what is trained; None shows it in colour.
    """
    from rich.text import Text

    turns = itertools.zip_longest(*([(client, row) for row in part.rows] for client, part in clients.items()))
    named = (one for turn in turns for one in turn if one is not None)
    for client, row in itertools.islice(named, count):
        about = [
            row.row.place,
            client,
            row.category,
            f"{counted(row.tokens, 'token')}, {row.trained_tokens} of them trained",
        ]
        text = Text(clean(" · ".join(filter(None, about))), style="bold")
        text.append("\n")
        for answer in row.answers:
            text.append("" if answer is row else "rejected, behind the same prompt:\n")
            for piece, trained in trained_runs(answer, tokenizer):
                if answer is not row and not trained:
                    continue
                said = clean_lines(piece)
                if marks is not None:
                    text.append(f"{marks[0]}{said}{marks[1]}" if trained else said, style="not bold")
                else:
                    text.append(said, style="not bold black on green" if trained else "not bold")
            text.append("\n")
        yield text
