"""The two forms of a row: as text, and as tokens.

Shape legend: T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Turn:
    """One message of a chat.

    Args:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        text: what it says.
        trained: whether it is trained, where it is the assistant's.
        reasoning: the reasoning before it, where it has a field of its own.
        fields: what else of it a chat template can render, such as calls of tools, as a JSON object; or empty.
    """

    role: str
    text: str
    trained: bool = True
    reasoning: str = ""
    fields: str = ""


@dataclass(frozen=True)
class Row:
    """One instruction with its response, or one chat; or one of these with a second answer that is the worse one.

    Args:
        instruction: what is asked; for a chat, its last user message.
        response: the wanted answer; for a chat, its last assistant message.
        context: text that the instruction speaks of; may be empty.
        category: the kind of instruction; empty where the source names none.
        turns: all messages of a chat that ends with the assistant; empty for a plain instruction.
        client: value of the natural client column, or the stem of the file; empty otherwise.
        place: where the row stands, such as ``dolly.jsonl:17``, for messages.
        group: its language or domain; empty where the source names none.
        tools: descriptions of the tools that a chat may call, as JSON; empty where there are none.
        rejected: of a preference row the answer that was rejected, where ``response``, or the last of the ``turns``, is
            the chosen one; None where a row has but one answer.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    turns: tuple[Turn, ...] = ()
    client: str = ""
    place: str = ""
    group: str = ""
    tools: str = ""
    rejected: Turn | None = None

    @property
    def answers(self) -> tuple[Row, ...]:
        """The row with each of its answers alone, the chosen one first."""
        if self.rejected is None:
            return (self,)
        turns = (*self.turns[:-1], self.rejected) if self.turns else ()
        other = replace(self, response=self.rejected.text, turns=turns, rejected=None)
        return replace(self, rejected=None), other


@dataclass(frozen=True)
class TokenRow:
    """One row as tokens, ready for training and scoring.

    Args:
        ids_T: token ids of prompt and response, end-of-sequence token included.
        trained_T: true where the token counts in the training loss.
        response_T: true where the token belongs to a response (equal to ``trained_T`` unless the
            loss is on all tokens); scores are taken there.
        prompt_length: tokens before the last response; what generation starts from.
        row: the row it was made of.
        rejected: of a preference row the prompt, of the same tokens, with the rejected answer; None where a row has but
            one answer.
    """

    ids_T: NDArray[np.int64]
    trained_T: NDArray[np.bool_]
    response_T: NDArray[np.bool_]
    prompt_length: int
    row: Row
    rejected: TokenRow | None = None

    @property
    def answers(self) -> tuple[TokenRow, ...]:
        """The prompt with each answer, the chosen one first; one after the other they run through the base."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return max(map(len, self.answers))

    @property
    def tokens(self) -> int:
        """Tokens that run through the base for it: the prompt counts with each answer."""
        return sum(map(len, self.answers))

    @property
    def category(self) -> str:
        """The row's category."""
        return self.row.category

    @property
    def group(self) -> str:
        """The row's language or domain."""
        return self.row.group

    @property
    def response(self) -> str:
        """The wanted answer."""
        return self.row.response

    @property
    def trained_tokens(self) -> int:
        """How many of its tokens are trained; before the first there is nothing to predict it from."""
        return sum(int(answer.trained_T[1:].sum()) for answer in self.answers)

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True)
class Federated:
    """All rows of a run, dealt out.

    Args:
        clients: training rows by client name, in the order of the clients.
        held_out: rows that a client holds out of its own, by client name; absent where none.
        validation: rows for choosing settings.
        test: rows for the final scores.
        notes: sentences for the log: unused columns, rows held out that stand among those trained as well,
            chosen partition.
        doubled: how many rows of ``test`` and ``validation``, by these names, stand among the training rows as well.
    """

    clients: Mapping[str, Sequence[Row]]
    held_out: Mapping[str, Sequence[Row]]
    validation: Sequence[Row]
    test: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)
    doubled: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenised:
    """The token rows of one list of rows, and what happened to the others.

    Args:
        rows: the rows that can be used.
        shortened: how many of them had their context, or the history of their chat, shortened to fit.
        left_out: how many rows kept no response token, or do not fit at all, and are left out.
        bad: place and sentence of those that cannot be rendered, and are left out since the recipe skips bad rows.
        cut: how many of ``rows`` had their response cut at its end, and so end without end of sequence.
        too_long: tokens of the rows that are cut or left out, their contexts and histories shortened; at least so many.
        remarks: what a person should know of how rows were rendered, as clauses, and of how many rows.
    """

    rows: Sequence[TokenRow]
    shortened: int = 0
    left_out: int = 0
    cut: int = 0
    too_long: Sequence[int] = ()
    remarks: Mapping[str, int] = field(default_factory=dict)
    bad: Sequence[tuple[str, str]] = ()
