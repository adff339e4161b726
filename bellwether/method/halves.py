"""One half of the adapter at a time, so that the mean of the factors is the mean of the products.

The mean of A times the mean of B is not the mean of B A. Where all clients have the same A it is: Σ p_i B_i A = B̄ A.

FFA-LoRA (Sun et al. 2024, arXiv 2403.12313) never trains A, which stays as it was drawn at first. RoLoRA (Chen et al.
2025, arXiv 2502.01755) trains B in odd rounds and A in even ones, the other half being the server's. Clients send the
half that they trained. Down both halves travel, since a client may have missed a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bellwether.exchange.adapter import key_a, key_b
from bellwether.exchange.messages import Payload
from bellwether.method.method import Known, Method, State, by_rows, take_mean, whole_adapter


def ffa_lora() -> Method:
    """Return FFA-LoRA; clients are weighted by their rows."""
    return _training(lambda round: key_b)


def rolora() -> Method:
    """Return RoLoRA; clients are weighted by their rows."""
    return _training(lambda round: key_b if round % 2 else key_a)


def _training(half: Callable[[int], Callable[[str], str]]) -> Method:
    """Return FedAvg of the half that is trained in a round: the key of a module's A or B."""

    def give(state: State, client: Known, round: int) -> Payload:
        key = half(round)
        trained = tuple(key(module) for module in state.adapter.config.modules)
        return replace(whole_adapter(state, client, round), trained=trained)

    return Method(take_mean, weigh=by_rows, give=give)
