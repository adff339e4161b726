"""The low-rank parts of LoRA for tokens that belong to different adapters: ``lora.low_rank_update``, but faster.

The parts of several slots run side by side in one product, in which the columns of other slots than a token's own are
set to zero; slots whose columns together would be wider than that pays for are taken in turn.

Shape legend: K slots, U slots of a group of tokens, R rank, C columns of a group (U · R), I inputs, O outputs,
M tokens of all rows, G tokens of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bellwether.errors import ModelError
from bellwether.model.dropout import DropoutMasks

# The low-rank parts of slots run side by side up to so many columns.
_COLUMNS = 128


@dataclass(frozen=True)
class Group:
    """Tokens that stand together, and the slots that their rows belong to.

    Args:
        tokens: which of M.
        slots: numbers of the slots, U of them.
        member_MU: one where a token belongs to a slot, else zero; None where there is one slot only.
    """

    tokens: slice
    slots: list[int]
    member_MU: torch.Tensor | None


@dataclass(frozen=True)
class Routing:
    """Which slot each row belongs to, and what is dropped.

    Args:
        slots: the slot of each row; None puts all rows into slot 0.
        masks: dropout masks for the tokens; None drops nothing.
        lengths: tokens of each row; None where all rows have equally many.
    """

    slots: Sequence[int] | None
    masks: DropoutMasks | None
    lengths: Sequence[int] | None
    _found: dict[int, list[Group]] = field(default_factory=dict)

    def groups(self, x_MI: torch.Tensor, rank: int, path: str) -> list[Group]:
        """Return the groups of the tokens that a module sees.

        Args:
            x_MI: what it sees.
            rank: of the adapters.
            path: the module's, for a message.

        Raises:
            ModelError: a module does not see the batch's tokens in their order (a mixture of experts).
        """
        if len(x_MI) not in self._found:
            self._found[len(x_MI)] = self._grouped(x_MI, rank, path)
        return self._found[len(x_MI)]

    def _grouped(self, x_MI: torch.Tensor, rank: int, path: str) -> list[Group]:
        tokens = len(x_MI)
        known = None if self.masks is None else len(self.masks.word_M)
        rows = None if self.slots is None else len(self.slots)
        whole = sum(self.lengths) if self.lengths is not None else known
        if (whole is not None and whole != tokens) or (rows and tokens % rows and self.lengths is None):
            raise ModelError(
                f"{path} sees {tokens} tokens, but the batch has {whole or f'{rows} rows'}, so its rows cannot be told "
                "apart; leave it out of lora.target_modules."
            )
        if self.slots is None or len(set(self.slots)) == 1:
            return [Group(slice(0, tokens), [self.slots[0] if self.slots else 0], None)]
        lengths = self.lengths or [tokens // len(self.slots)] * len(self.slots)
        return list(_groups(self.slots, lengths, max(1, _COLUMNS // rank), x_MI))


def _groups(slots: Sequence[int], lengths: Sequence[int], most: int, like: torch.Tensor) -> Iterator[Group]:
    """Yield neighbouring rows in groups of at most so many slots."""
    start, end, members, rows = 0, 0, dict[int, int](), list[tuple[int, int]]()
    for slot, length in zip(slots, lengths, strict=True):
        if slot not in members and len(members) == most:
            yield _group(start, end, members, rows, like)
            start, members, rows = end, {}, []
        rows.append((members.setdefault(slot, len(members)), length))
        end += length
    yield _group(start, end, members, rows, like)


def _group(
    start: int, end: int, members: Mapping[int, int], rows: Sequence[tuple[int, int]], like: torch.Tensor
) -> Group:
    """Return a group of rows, each given by its slot's number in the group and its tokens."""
    member_MU = None
    if len(members) > 1:
        numbers = np.repeat([number for number, _ in rows], [length for _, length in rows])
        member_MU = torch.nn.functional.one_hot(torch.from_numpy(numbers).to(like.device), len(members)).to(like)
    return Group(slice(start, end), list(members), member_MU)


def add_low_rank(
    output_MO: torch.Tensor,
    x_MI: torch.Tensor,
    a_KRI: torch.Tensor,
    b_KOR: torch.Tensor,
    scaling: float,
    mask_MI: torch.Tensor | None,
    groups: list[Group],
) -> torch.Tensor:
    """Return the output of a module plus scaling · (x · mask) A^T B^T, with each token's own A and B.

    Equals ``output + lora.low_rank_update(x · mask, A, B, scaling)`` for the tokens of each slot, and so do its
    gradients; but the sum is the product's own, nothing is kept for the backward pass but x and the R values of each
    token, and slots share products.

    Args:
        output_MO: what the frozen module gives.
        x_MI: what it gets.
        a_KRI: A of every slot.
        b_KOR: B of every slot.
        scaling: alpha / rank, or alpha / sqrt(rank).
        mask_MI: dropout's mask, scaled; None drops nothing.
        groups: which tokens belong to which slots, all tokens in order.
    """
    result: torch.Tensor = _AddLowRank.apply(output_MO, x_MI, a_KRI, b_KOR, scaling, mask_MI, groups)  # type: ignore[no-untyped-call]
    return result


class _AddLowRank(torch.autograd.Function):
    """The output of a module plus the low-rank parts of all tokens' slots."""

    @staticmethod
    def forward(
        ctx: Any,
        output_MO: torch.Tensor,
        x_MI: torch.Tensor,
        a_KRI: torch.Tensor,
        b_KOR: torch.Tensor,
        scaling: float,
        mask_MI: torch.Tensor | None,
        groups: list[Group],
    ) -> torch.Tensor:
        if mask_MI is not None:
            x_MI = x_MI * mask_MI
        summed_MO = torch.empty_like(output_MO)
        lows = []
        for group in groups:
            low_MC = _kept(x_MI[group.tokens] @ _side_by_side(a_KRI, group).T, group)
            b_CO = _side_by_side(b_KOR.transpose(1, 2), group)
            torch.addmm(output_MO[group.tokens], low_MC, b_CO, alpha=scaling, out=summed_MO[group.tokens])
            lows.append(low_MC)
        ctx.save_for_backward(x_MI, a_KRI, b_KOR, mask_MI, *lows)
        ctx.scaling, ctx.groups = scaling, groups
        return summed_MO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MI, a_KRI, b_KOR, mask_MI, *lows = ctx.saved_tensors
        rank = a_KRI.shape[1]
        grad_a, grad_b = torch.zeros_like(a_KRI), torch.zeros_like(b_KOR)
        grad_x_MI = torch.empty_like(x_MI) if ctx.needs_input_grad[1] else None
        for group, low_MC in zip(ctx.groups, lows, strict=True):
            grad_GO = grad_MO[group.tokens]
            b_CO = _side_by_side(b_KOR.transpose(1, 2), group)
            grad_low_MC = _kept((grad_GO @ b_CO.T).mul_(ctx.scaling), group)
            grad_a_URI = (grad_low_MC.T @ x_MI[group.tokens]).view(-1, *a_KRI.shape[1:])
            grad_b_UOR = (low_MC.T @ grad_GO).mul_(ctx.scaling).view(-1, rank, b_KOR.shape[1]).transpose(1, 2)
            for number, slot in enumerate(group.slots):
                grad_a[slot] += grad_a_URI[number]
                grad_b[slot] += grad_b_UOR[number]
            if grad_x_MI is not None:
                torch.mm(grad_low_MC, _side_by_side(a_KRI, group), out=grad_x_MI[group.tokens])
        if grad_x_MI is not None and mask_MI is not None:
            grad_x_MI.mul_(mask_MI)
        return grad_MO, grad_x_MI, grad_a, grad_b, None, None, None


def _side_by_side(stacked_KRI: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the matrices of a group's slots below each other, as one of U·R rows."""
    first = group.slots[0]
    if len(group.slots) == 1:
        return stacked_KRI[first]
    return stacked_KRI[group.slots].reshape(-1, stacked_KRI.shape[2])


def _kept(low_MC: torch.Tensor, group: Group) -> torch.Tensor:
    """Set the columns of other slots than a token's own to zero, in place."""
    if group.member_MU is not None:
        low_MC.view(len(low_MC), len(group.slots), -1).mul_(group.member_MU[..., None])
    return low_MC
