"""What a model does when it is tried: which of its linear modules it calls, and whether it looks ahead."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from bellwether.errors import ModelError, first_line
from bellwether.model.folder import quiet_transformers

_TOKENS = 8
# What counts as moved: in float32 more than so many roundings of the largest logit. With fewer bits, where an expert
# may sum its tokens in another order, a share of what the token moves at its own place.
_ROUNDINGS, _SHARE = 16, 0.02


def called_modules(model: Any) -> set[str] | None:
    """Return the paths of the modules that a forward pass calls; None where the model cannot be tried so.

    Some models use a module's weight without calling it (Mamba's ``out_proj``), so that LoRA beside it would have no
    effect.

    Args:
        model: a model on the meta device, on which nothing is computed.
    """
    called: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            hook = module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
            hooks.callback(hook.remove)
        try:
            with torch.no_grad(), quiet_transformers():
                model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"), use_cache=False)
        except Exception:  # what a model does with values that are not there, such as choosing experts by them
            return None
    return called


@torch.no_grad()
def check_causal(model: Any, name: str, vocabulary: int) -> None:
    """Refuse a model whose earlier logits a later token moves, or whose logits are not finite.

    Args:
        model: a model with its weights.
        name: how messages call it.
        vocabulary: how many tokens it knows.

    Raises:
        ModelError: it fails, looks ahead, as encoders do, or computes values that are not finite.
    """
    device = model.get_input_embeddings().weight.device
    ids_T = torch.arange(3, 3 + _TOKENS, device=device).remainder(vocabulary)
    other_T = torch.cat([ids_T[:-1], (ids_T[-1:] + 1) % vocabulary])
    # One after the other, so that all that stands before the token that differs is computed alike.
    try:
        logits_TV, others_TV = (
            model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False).logits[0]
            for ids in (ids_T, other_T)
        )
    except Exception as error:  # whatever a configuration that fits no weights makes of it
        raise ModelError(f"{name} fails on ordinary tokens ({first_line(error)}); check its config.json.") from error
    if not torch.isfinite(logits_TV).all():
        raise ModelError(f"{name} computes values that are not finite for ordinary tokens; its weights cannot be used.")
    moved_T = (logits_TV.float() - others_TV.float()).abs().amax(dim=-1)
    rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * logits_TV.abs().max()
    if moved_T[:-1].max() > (rounding if logits_TV.dtype == torch.float32 else _SHARE * moved_T[-1]):
        raise ModelError(
            f"{name} looks ahead: a later token changes what it says of earlier ones, so it is no causal language "
            "model; give one that is."
        )
