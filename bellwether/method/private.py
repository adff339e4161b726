"""Differential privacy of whole clients: their updates are clipped, and the server adds noise to the sum.

DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963, algorithm 1, flat clipping): with Δ_i = y_i - x, what client i sends
less what it was sent,

    Δ̃ = (Σ_i Δ_i · min(1, C / ‖Δ_i‖) + N(0, (z C)² I)) / m

where C is the clipping norm, z the noise multiplier, and m the number of clients that a round asks in the mean: q N
where each of N is asked with probability q, else the size of a cohort. m is a number of the recipe and never counts
what came back, whose number would tell who was there. ‖·‖ is over all tensors that come back together. All
clients count alike, whatever their rows. The method that stands inside closes the round with x + Δ̃ for the mean, so
that FedAdam and its kind step by it; whatever it does is post-processing, and spends nothing more.

The clipping norm can follow the clients' own norms (Andrew et al. 2021, arXiv 1905.03871, algorithm 1): each client
also tells whether its update was short enough to stay as it is, as b_i - ½ = ±½, and

    b̃ = ½ + (Σ_i (b_i - ½) + N(0, σ_b²)) / m        C ← C · exp(-η (b̃ - γ))

with γ the wanted share. Together with the updates that is one Gaussian mechanism of the multiplier z, where the updates
have z_Δ = (z⁻² - (2 σ_b)⁻²)^(-½) and σ_b = m / 20. Deviations: σ_b is at least z, so that few clients do not leave the
updates without a share; b̃ is cut to what a share can be. Like all noise in floating point, this is not exactly
normal (Mironov 2012, "On significance of the least significant bits for differential privacy"), and nothing guards
against that.

Shape legend: P parameters of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import RecipeError
from bellwether.exchange.adapter import Tensors
from bellwether.exchange.messages import Payload
from bellwether.method.method import Closing, Finished, Known, Mean, Method, State, Trained, alike
from bellwether.recipe.privacy import Privacy
from bellwether.tools.randomness import secret_normals

CLIP = "clip norm"  # what clients are sent, and the server remembers
UNCLIPPED = "unclipped"  # what clients send beside their tensors: ½ where their update stayed as it is, else -½

# An update's values are rounded to float32, after which it can be a little longer than it was cut to.
SLACK = 1e-5


@dataclass(frozen=True)
class Noise:
    """What the server adds to the sums of a run.

    Args:
        multiplier: z, of updates and counts together.
        expected: m, the clients that a round asks in the mean.
        secret: from a round that is being closed to bytes that nobody else knows, and never the same ones twice.
    """

    multiplier: float
    expected: float
    secret: Callable[[Closing], bytes]

    @property
    def count(self) -> float:
        """The standard deviation of the noise on the count of unclipped updates, σ_b."""
        return max(self.expected / 20, self.multiplier)

    def of_updates(self, adaptive: bool) -> float:
        """Return the multiplier of the noise on the sum of updates, z_Δ."""
        return (self.multiplier**-2 - (2 * self.count) ** -2) ** -0.5 if adaptive else self.multiplier


def known_noise(closing: Closing) -> bytes:
    """Return a secret that is none: whoever knows the seed of a simulation knows it, and can take the noise off."""
    return closing.randomness.seed_for("privacy noise", round=closing.round).to_bytes(8, "big")


def client_level(method: Method, privacy: Privacy, noise: Noise | None = None) -> Method:
    """Return a method that hides whether a client took part at all.

    Args:
        method: linear, and nothing comes back beside its tensors.
        privacy: the recipe's section.
        noise: what the server adds; None at clients, which close no round.
    """
    adaptive = privacy.clip_quantile is not None

    def begin(adapter: Any) -> State:
        return _with_clip(method.begin(adapter), privacy.clip_norm)

    def give(state: State, client: Known, round: int) -> Payload:
        clip, plain = np.array([_clip_of(state)], np.float32), _without_clip(state)
        payload = method.give(plain, client, round)
        if client.client:
            _check_alike(payload.expected, _sent_to_all(method, plain, round))
        return replace(payload, arrays={**payload.arrays, CLIP: clip})

    def finish(trained: Trained) -> Finished:
        finished = method.finish(trained)
        # A norm that does not follow is the recipe's, whatever the server says.
        norm = float(trained.payload.arrays[CLIP][0]) if adaptive else privacy.clip_norm
        tensors, short = clipped(finished.tensors, trained.payload.expected, norm)
        told = {UNCLIPPED: np.array([0.5 if short else -0.5])} if adaptive else {}
        return replace(finished, tensors=tensors, arrays={**finished.arrays, **told})

    def returns(payload: Payload) -> Mapping[str, tuple[int, ...]]:
        return {**method.returns(payload), UNCLIPPED: (1,)} if adaptive else method.returns(payload)

    def close(closing: Closing) -> State:
        if noise is None:
            raise ValueError("clients close no round")
        state, clip = _without_clip(closing.state), _clip_of(closing.state)
        # Who was drawn, and how many came, would tell who was there.
        inside = replace(closing, state=state, cohort=())
        if closing.failure is not None:
            return _with_clip(method.close(inside), clip)
        sent = _sent_to_all(method, state, closing.round)
        secret = noise.secret(closing)
        mean = _noised(closing.mean, sent, noise.of_updates(adaptive) * clip * (1 + SLACK), noise.expected, secret)
        after = method.close(replace(inside, mean=mean))
        return _with_clip(after, _next_clip(closing.mean, clip, privacy, noise, secret) if adaptive else clip)

    last = method.last
    if last is not None:  # nothing comes back in it, so there is nothing to hide
        last = _as_if_without(last)
    return replace(
        method,
        close=close,
        weigh=alike,
        begin=begin,
        give=give,
        finish=finish,
        returns=returns,
        bound=lambda payload: float(payload.arrays[CLIP][0]) * (1 + SLACK),
        last=last,
    )


def clipped(tensors: Tensors, sent: Tensors, norm: float) -> tuple[Tensors, bool]:
    """Return tensors whose change has at most a norm, and whether it had so before.

    Args:
        tensors: what a client would send.
        sent: what it was sent, under the same keys.
        norm: the largest norm of the change of all of them together.
    """
    changes = {key: tensors[key].astype(np.float64) - value for key, value in sent.items()}
    length = _length(changes.values())
    if length <= norm:
        return tensors, True
    # Rounding to the precision of the tensors can make it longer again, and where the norm is tiny beside their values,
    # by much: then it is cut a little shorter.
    for share in (1.0, 0.99, 0.95, 0.8, 0.5, 0.0):
        cut = {
            key: (value + changes[key] * (share * norm / length)).astype(tensors[key].dtype)
            for key, value in sent.items()
        }
        if _length(cut[key].astype(np.float64) - value for key, value in sent.items()) <= norm * (1 + SLACK):
            return cut, False
    return {key: value.astype(tensors[key].dtype) for key, value in sent.items()}, False


def _length(changes: Iterable[NDArray[np.float64]]) -> float:
    return math.sqrt(sum(float(np.square(change).sum()) for change in changes))


def _sent_to_all(method: Method, state: State, round: int) -> Tensors:
    """Return the tensors that come back as every client is sent them, whoever it is."""
    return method.give(state, Known("", state.adapter.config.rank), round).expected


def _check_alike(own: Tensors, others: Tensors) -> None:
    """Refuse a method that sends clients unlike tensors, since the change of their sum would not be what they cut.

    Raises:
        RecipeError: it does.
    """
    alike = own.keys() == others.keys() and all(
        value is others[key] or np.array_equal(value, others[key]) for key, value in own.items()
    )
    if not alike:
        raise RecipeError(
            "privacy.unit is client, but the method sends clients unlike tensors to train, of whose changes there is "
            "no one sum to hide them in; set privacy.unit=example, or take another method."
        )


def _noised(mean: Mean | None, sent: Tensors, deviation: float, expected: float, secret: bytes) -> Mean:
    """Return the sum of changes with noise over the expected number, as a mean; of no update it is noise alone."""
    tensors: dict[str, Any] = {}
    for key, value in sent.items():
        start = value.astype(np.float64)
        total = (mean.tensors[key] - start) * mean.count if mean is not None else np.zeros(value.shape)
        noise = secret_normals(secret, f"update {key}".encode(), value.size).reshape(value.shape)
        tensors[key] = start + (total + deviation * noise) / expected
    return Mean(tensors, {}, expected, round(expected))


def _next_clip(mean: Mean | None, clip: float, privacy: Privacy, noise: Noise, secret: bytes) -> float:
    """Return the clipping norm of the next round."""
    total = float(mean.arrays[UNCLIPPED][0]) * mean.count if mean is not None else 0.0
    noisy = total + noise.count * float(secret_normals(secret, b"count", 1)[0])
    share = min(1.0, max(0.0, 0.5 + noisy / noise.expected))
    assert privacy.clip_quantile is not None
    return clip * math.exp(-privacy.clip_rate * (share - privacy.clip_quantile))


def _clip_of(state: State) -> float:
    return float(state.arrays[CLIP])


def _with_clip(state: State, clip: float) -> State:
    """Return a state that remembers the clipping norm, as precisely as clients are sent it."""
    return replace(state, arrays={**state.arrays, CLIP: float(np.float32(clip))})


def _without_clip(state: State) -> State:
    return replace(state, arrays={name: value for name, value in state.arrays.items() if name != CLIP})


def _as_if_without(method: Method) -> Method:
    """Return a method that sees the state as if it remembered no clipping norm."""

    def close(closing: Closing) -> State:
        state = method.close(replace(closing, state=_without_clip(closing.state)))
        return _with_clip(state, _clip_of(closing.state))

    return replace(
        method, close=close, give=lambda state, client, round: method.give(_without_clip(state), client, round)
    )
