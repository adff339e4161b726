"""Personalisation: every client serves an adapter of its own, beside what all share.

FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463) averages A alone; B stays at the client that trained it, and
begins with the recipe's first one. The server's adapter has no B of its own, and so is the untuned base.

Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1) trains the shared adapter x as FedAvg does, and after it one of
the client's own, v, on the same rows:

    v ← v - η (∇F(v) + λ (v - x))

with x as the round began with it. v begins with the first x that the client is sent, and is never sent itself. So it is
with plain SGD and without clipping; AdamW and ``clip_norm`` act on the whole bracket.

FedDPA (Yang et al. 2024, arXiv 2403.19211) serves a mix of the shared adapter and a local one, m of the local:

    W + (1 - m) s B A + m s B_i A_i

which is one adapter of twice the rank. In FedDPA-T every round trains both, in FedDPA-F the local one is trained after
the federation. Deviations: m is fixed, where the paper has also a weight for each input, by how alike it is to the
client's rows; each adapter is trained alone over the base; the local one begins with the shared one, in FedDPA-T with
the first that the client is sent.

Fine-tuning after the federation (``fine_tuned``): in a last round all clients train what they served before it, each on
its own rows, keep it, and serve it; nothing comes back. It is FedAvg with local fine-tuning over whichever method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from bellwether.exchange.adapter import Adapter, Arrays, Tensors, key_a, key_b, stacked
from bellwether.exchange.messages import Payload
from bellwether.method.average import fedavg, proximal
from bellwether.method.method import (
    Closing,
    Finished,
    Known,
    Method,
    Pass,
    State,
    Trained,
    alike,
    whole_adapter,
)

# What a client keeps of its fine-tuning stands under the adapter's keys with this before them.
TUNED = "tuned "


def fedsa_lora() -> Method:
    """Return FedSA-LoRA; clients are weighted by their rows."""
    return replace(fedavg(), give=_wanting_a, passes=(Pass(begin=own_or_sent),), finish=_keep_b, serves=serve_own)


def ditto(pull: float = 0.1) -> Method:
    """Return Ditto over FedAvg; clients are weighted by their rows.

    Args:
        pull: λ, how strongly a client's own adapter is drawn to the shared one.
    """
    passes = (Pass(), Pass(begin=own_or_sent, correct=proximal(pull)))
    return replace(fedavg(), passes=passes, finish=_keep_second, serves=serve_own)


def feddpa(mix: float = 0.5, variant: Literal["F", "T"] = "T") -> Method:
    """Return FedDPA over FedAvg; clients are weighted by their rows.

    Args:
        mix: m, the share of the local adapter in what a client serves.
        variant: ``T`` trains the local adapter in every round, ``F`` in the last one only.
    """

    def mixed(payload: Payload, local: Adapter) -> Adapter:
        return stacked([_weighted(payload.adapter, 1 - mix), _weighted(local, mix)])

    if variant == "F":
        return fine_tuned(fedavg(), mixed)

    def serves(payload: Payload, own: Arrays) -> Adapter:
        return mixed(payload, serve_own(payload, own)) if own else payload.adapter

    passes = (Pass(), Pass(begin=own_or_sent))
    return replace(fedavg(), passes=passes, finish=_keep_second, serves=serves)


def fine_tuned(method: Method, combined: Callable[[Payload, Adapter], Adapter] = lambda sent, tuned: tuned) -> Method:
    """Return a method after whose rounds, in a last one, clients fine-tune what they serve and keep it.

    Args:
        method: of the rounds before; what its clients serve has the rank of what they are sent.
        combined: from what a client is sent and what it tuned to what it serves.
    """

    def give(state: State, client: Known, round: int) -> Payload:
        return replace(method.give(state, client, round), trained=None, returned=())

    def keep(trained: Trained) -> Finished:
        return Finished({}, own={f"{TUNED}{key}": value for key, value in trained.passes[-1].items()})

    def finish(trained: Trained) -> Finished:
        # Not the method's own, so that a client that keeps nothing leaves an empty file, which is no lost one.
        return method.finish(trained)

    def serves(payload: Payload, own: Arrays) -> Adapter:
        tuned = {key: own[f"{TUNED}{key}"] for key in payload.adapter.tensors if f"{TUNED}{key}" in own}
        return combined(payload, payload.adapter.with_tensors(tuned)) if tuned else method.serves(payload, own)

    begin = Pass(begin=lambda payload, own: method.serves(payload, own).tensors)
    last = Method(_unchanged, weigh=alike, give=give, passes=(begin,), finish=keep, folds=method.folds)
    return replace(method, finish=finish, serves=serves, last=last)


def own_or_sent(payload: Payload, own: Arrays) -> Tensors:
    """Take the client's own tensors, and those that were sent where it has none."""
    return {key: own.get(key, value) for key, value in payload.adapter.tensors.items()}


def serve_own(payload: Payload, own: Arrays) -> Adapter:
    """Serve the client's own tensors, and those that were sent where it has none."""
    return payload.adapter.with_tensors(own_or_sent(payload, own))


def _weighted(adapter: Adapter, weight: float) -> Adapter:
    """Return an adapter whose product is multiplied by a weight, which its B takes up."""
    scaled = {key_b(module): weight * adapter.tensors[key_b(module)] for module in adapter.config.modules}
    return adapter.with_tensors({**adapter.tensors, **scaled})


def _unchanged(closing: Closing) -> State:
    """Close a round in which nothing comes back."""
    return closing.state


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
