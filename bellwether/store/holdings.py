"""What each client of a run holds, as its folder keeps it: counts by category."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from bellwether.tools.json_text import KEPT, Amount, Count, Truth, from_json, plain, typed
from bellwether.tools.words import clean

Share = Annotated[Amount, Field(le=1.000001)]  # of sums that may be a little off


@dataclass(frozen=True)
class ClientSummary:
    """What one client holds.

    Args:
        client: its name.
        rows: rows it trains on.
        held_out: rows it holds out and scores itself.
        categories: its training rows by category.
        skew: total variation distance between its categories and those of all clients, 0..1.
        median_tokens: median length of its rows in tokens, as trained; None where not tokenised.
        longest_tokens: length of its longest row in tokens; None where not tokenised.
        shortened: rows whose context or history was shortened to fit.
        cut: rows whose response was cut at its end.
        left_out: rows that kept no response token, or cannot be rendered.
        groups: its training rows by group (language or domain).
    """

    __pydantic_config__ = KEPT

    client: str
    rows: Count
    held_out: Count
    categories: Mapping[str, Count]
    skew: Share
    median_tokens: Amount | None = None
    longest_tokens: Count | None = None
    shortened: Count = 0
    cut: Count = 0
    left_out: Count = 0
    groups: Mapping[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """What all clients hold, and what is held out of them.

    Args:
        clients: one summary per client.
        categories: training rows of all clients by category, the largest first.
        validation: validation rows.
        test: test rows.
        tokenised: whether lengths in tokens are known.
        notes: what reading and dealing the rows had to say.
        doubled: how many rows of ``test`` and ``validation``, by these names, stand among the training rows as well.
    """

    __pydantic_config__ = KEPT

    clients: Annotated[Sequence[ClientSummary], Field(min_length=1)]
    categories: Mapping[str, Count]
    validation: Count
    test: Count
    tokenised: Truth
    notes: Sequence[str] = ()
    doubled: Mapping[str, Count] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Training rows of all clients."""
        return sum(client.rows for client in self.clients)

    @property
    def skew(self) -> float:
        """The clients' label skew, weighted by their rows."""
        return sum(client.skew * client.rows for client in self.clients) / max(1, self.rows)


def dump_description(description: Description) -> bytes:
    """Return a description as JSON, in UTF-8."""
    return (json.dumps(plain(description), indent=1) + "\n").encode()


def load_description(data: bytes) -> Description:
    """Return the description behind the JSON of ``dump_description``.

    Raises:
        ValueError: it is none.
    """
    found: Description = typed(from_json(data), Description)
    names = [client.client for client in found.clients]
    if len(set(names)) < len(names):
        raise ValueError("two clients have one name")
    for client in found.clients:
        if sum(client.categories.values()) != client.rows or client.left_out > client.rows:
            raise ValueError(f"the counts of {clean(client.client):.40} do not add up")
    return found
