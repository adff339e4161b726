"""The recipe's section of secure aggregation: the server learns the sum of the clients' updates, and none of them."""

from __future__ import annotations

from pydantic import Field

from bellwether.recipe.section import Section

LEAST_COHORT = 3  # clients: of a sum of two, each of both would know the other's part


class SecureAggregation(Section):
    """Whether updates are masked so that the server sees their weighted sum alone."""

    enabled: bool = Field(
        False,
        description="whether clients mask their updates, so that the server learns their weighted sum alone; needs the "
        "extra federation, at least 3 clients in a cohort, and a method that works on the mean of updates",
    )
    threshold: float = Field(
        0.6,
        gt=0.5,
        le=1,
        description="share of the cohort whose updates a sum holds, and whose help opens it, at least; more than half "
        "of the cohort whatever is given; a round with fewer fails",
    )
    range: float = Field(
        64.0,
        gt=0,
        le=1e6,
        description="largest absolute value of a change, and of an array beside it, that can be masked; a client with "
        "a larger one is left out",
    )
