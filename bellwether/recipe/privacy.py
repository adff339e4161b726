"""The recipe's section of differential privacy: whose presence is hidden, how well, and by how much noise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bellwether.recipe.section import Section


class Privacy(Section):
    """Differential privacy of the adapters that rounds give; without epsilon and noise there is none."""

    unit: Literal["client", "example"] = Field(
        "client",
        description="whose presence is hidden: client, a whole client's, by noise of the server on the sum of clipped "
        "updates; or example, a single row's, by noise of each client on the sum of its rows' clipped gradients "
        "(DP-SGD), of batches that rows join by chance, so that training.group_by_length has no effect",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="the budget of the whole run: finds the noise where none is given, and ends the run before a round "
        "that would exceed it",
    )
    delta: float = Field(
        1e-5, gt=0, lt=0.01, description="probability with which epsilon may not hold; far below one over their number"
    )
    noise: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="noise multiplier: the noise's standard deviation over clip_norm; null finds it from epsilon",
    )
    clip_norm: float = Field(
        0.5, gt=0, le=1e4, description="largest norm of a client's update, or of a row's gradient; longer ones are cut"
    )
    amplification: bool = Field(
        False,
        description="whether epsilon counts on nobody's seeing which clients a round asks, which a simulation may "
        "assume and a real federation may not; needs federation.sampler=poisson (client)",
    )
    clip_quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of clients whose update shall stay as it is: clip_norm begins, and follows their norms, "
        "which takes its share of the budget; null keeps clip_norm (client)",
    )
    clip_rate: float = Field(
        0.2, gt=0, le=10, description="how fast clip_norm follows, in its logarithm (clip_quantile)"
    )

    @property
    def on(self) -> bool:
        """Whether anything is protected."""
        return self.epsilon is not None or self.noise is not None

    @property
    def hides_clients(self) -> bool:
        """Whether it is hidden that a client took part."""
        return self.on and self.unit == "client"

    @property
    def hides_rows(self) -> bool:
        """Whether it is hidden that a client holds a row."""
        return self.on and self.unit == "example"
