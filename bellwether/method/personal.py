"""Personalisation: every client serves an adapter of its own, beside what all share.

FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463) averages A alone; B stays at the client that trained it, and
begins with the recipe's first one. The server's adapter has no B of its own, and so is the untuned base.

Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1) trains the shared adapter x as FedAvg does, and after it one of
the client's own, v, on the same rows:

    v ← v - η (∇F(v) + λ (v - x))

with x as the round began with it. v begins with the first x that the client is sent, and is never sent itself. So it is
with plain SGD and without clipping; AdamW and ``clip_norm`` act on the whole bracket.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bellwether.exchange.adapter import Arrays, Tensors, key_a, key_b
from bellwether.exchange.messages import Payload
from bellwether.method.average import fedavg, proximal
from bellwether.method.method import Finished, Known, Method, Pass, State, Trained, whole_adapter


def fedsa_lora() -> Method:
    """Return FedSA-LoRA; clients are weighted by their rows."""
    return replace(fedavg(), give=_wanting_a, passes=(Pass(begin=own_or_sent),), finish=_keep_b, serves=own_or_sent)


def ditto(pull: float = 0.1) -> Method:
    """Return Ditto over FedAvg; clients are weighted by their rows.

    Args:
        pull: λ, how strongly a client's own adapter is drawn to the shared one.
    """
    passes = (Pass(), Pass(begin=own_or_sent, correct=proximal(pull)))
    return replace(fedavg(), passes=passes, finish=_keep_second, serves=own_or_sent)


def own_or_sent(payload: Payload, own: Arrays) -> Tensors:
    """Take the client's own tensors, and those that were sent where it has none."""
    return {key: own.get(key, value) for key, value in payload.adapter.tensors.items()}


def _wanting_a(state: State, client: Known, round: int) -> Payload:
    """Send the adapter, of which A is to come back."""
    returned = tuple(key_a(module) for module in state.adapter.config.modules)
    return replace(whole_adapter(state, client, round), returned=returned)


def _keep_b(trained: Trained) -> Finished:
    """Send A, and keep B."""
    (last,), payload = trained.passes, trained.payload
    own: dict[str, Any] = {key_b(module): last[key_b(module)] for module in payload.adapter.config.modules}
    return Finished({key: last[key] for key in payload.expected}, own=own)


def _keep_second(trained: Trained) -> Finished:
    """Send what the first pass trained, and keep what the second did."""
    shared, personal = trained.passes
    return Finished({key: shared[key] for key in trained.payload.expected}, own=dict(personal))
