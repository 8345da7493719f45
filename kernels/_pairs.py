"""Code that the losses of matched pairs share: the query of a target, the sums of a pair, and kernel arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    TargetSizes,
    Term,
    ceil_div,
    plane_sizes,
    target_planes,
)
from fastmask.kernels._launch import Launch, kernel
from fastmask.kernels._layout import empty_gradient, with_contiguous_planes


@triton.jit
def _matched_query(assignment_ptr, labels_ptr, pair, B, N, M):
    """The image, target and query of a pair, and whether the target has a query."""
    target = (pair % M).to(tl.int32)
    image = pair // M % B
    query = tl.load(assignment_ptr + pair)
    label = tl.load(labels_ptr + image * M + target)
    return image, target, query, (query >= 0) & (query < N) & (label >= 0)


@triton.jit
def _targets_of_query(assignment_ptr, labels_ptr, first_pair, image, query, M, BLOCK_M: tl.constexpr):
    """Which targets of a layer and image are matched to the query, ``[BLOCK_M]``; and how many."""
    m = tl.arange(0, BLOCK_M)
    queries = tl.load(assignment_ptr + first_pair + m, mask=m < M, other=-1)
    labels = tl.load(labels_ptr + image * M + m, mask=m < M, other=-1)
    of_query = (queries == query) & (labels >= 0)
    return of_query, tl.sum(of_query.to(tl.int32), 0)


@triton.jit
def _next_target(of_query, target, BLOCK_M: tl.constexpr):
    """The query's next target after ``target``."""
    m = tl.arange(0, BLOCK_M)
    return tl.min(tl.where(of_query & (m > target), m, BLOCK_M), 0)


@triton.jit
def _store_part(part_ptr, loss, intersection, prediction, target, weight):
    tl.store(part_ptr, loss)
    tl.store(part_ptr + 1, intersection)
    tl.store(part_ptr + 2, prediction)
    tl.store(part_ptr + 3, target)
    tl.store(part_ptr + 4, weight)


@kernel
def _mask_loss_reduce_kernel(
    assignment_ptr, labels_ptr, parts_ptr, mask_ptr, dice_ptr, sums_ptr, pairs, B, N, M, parts, BLOCK_P: tl.constexpr
):
    """mask = loss / pixels and dice = 1 - (2 sum p t + 1) / (sum p + sum t + 1) (V-Net, arXiv:1606.04797) of each pair,
    from parts added in order; zero for targets without a query.

        parts  (pairs, parts, 5);  mask, dice  (pairs);  sums  (pairs, 4): sum p t, sum p, sum t, counted pixels
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    present = pair < pairs
    query = tl.load(assignment_ptr + pair, mask=present, other=-1)
    label = tl.load(labels_ptr + pair // M % B * M + pair % M, mask=present, other=-1)
    matched = (query >= 0) & (query < N) & (label >= 0)
    loss = tl.zeros([BLOCK_P], dtype=tl.float64)
    intersection = tl.zeros([BLOCK_P], dtype=tl.float64)
    prediction = tl.zeros([BLOCK_P], dtype=tl.float64)
    target = tl.zeros([BLOCK_P], dtype=tl.float64)
    pixels = tl.zeros([BLOCK_P], dtype=tl.float64)
    for part in range(parts):
        part_ptrs = parts_ptr + (pair * parts + part) * 5
        loss += tl.load(part_ptrs, mask=matched, other=0.0)
        intersection += tl.load(part_ptrs + 1, mask=matched, other=0.0)
        prediction += tl.load(part_ptrs + 2, mask=matched, other=0.0)
        target += tl.load(part_ptrs + 3, mask=matched, other=0.0)
        pixels += tl.load(part_ptrs + 4, mask=matched, other=0.0)
    dice = 1.0 - (2.0 * intersection + 1.0) / (prediction + target + 1.0)
    tl.store(mask_ptr + pair, (loss / tl.maximum(pixels, 1.0)).to(tl.float32), mask=present)
    tl.store(dice_ptr + pair, dice.to(tl.float32), mask=present)
    tl.store(sums_ptr + pair * 4, intersection.to(tl.float32), mask=present)
    tl.store(sums_ptr + pair * 4 + 1, prediction.to(tl.float32), mask=present)
    tl.store(sums_ptr + pair * 4 + 2, target.to(tl.float32), mask=present)
    tl.store(sums_ptr + pair * 4 + 3, pixels.to(tl.float32), mask=present)


class PairSizes(NamedTuple):
    """The sizes of a call: of mask logits (L, B, N, h, w) with contiguous planes, and of M targets of each image."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    num_targets: int
    targets: TargetSizes
    term: Term

    @property
    def pairs(self) -> int:
        return self.shape[0] * self.shape[1] * self.num_targets

    def counts(self) -> dict[str, int]:
        """The arguments of all kernels."""
        return {"B": self.shape[1], "N": self.shape[2], "M": self.num_targets}

    def arguments(self, *sizes: int) -> dict[str, Any]:
        """Those of kernels that read logits; for the ``sizes`` see ``plane_sizes``."""
        return {
            **plane_sizes(self.shape, self.strides, (), *sizes),
            **self.targets._asdict(),
            **self.counts(),
            "h": self.shape[-2],
            "w": self.shape[-1],
            **self.term.arguments(),
            **COMPILER_OPTIONS,
        }


def pairs_of(
    mask_logits: Tensor, assignment: Tensor, labels: Tensor, masks: Tensor | None, segments: Tensor | None,
    valid: Tensor | None, void_value: int, ignore_void: bool, mask_term: str, alpha: float, gamma: float,
) -> tuple[dict[str, Tensor | None], PairSizes]:  # fmt: skip
    """The tensors that the forward and backward kernels share, by the names of their arguments, and the sizes.
    ``mask_logits`` have contiguous planes."""
    target, counted, sizes = target_planes(masks, segments, valid, void_value, ignore_void)
    tensors = {
        "logits_ptr": mask_logits,
        "assignment_ptr": assignment.contiguous(),
        "labels_ptr": labels.contiguous(),
        "target_ptr": target,
        "valid_ptr": counted,
    }
    term = Term(mask_term, alpha, gamma)
    return tensors, PairSizes(mask_logits.shape, mask_logits.stride(), labels.shape[1], sizes, term)


def plan_reduction(sizes: PairSizes, parts: int) -> Launch:
    """The launch of ``add_parts``."""
    return _mask_loss_reduce_kernel.plan(
        (ceil_div(sizes.pairs, 32),),
        **sizes.counts(),
        pairs=sizes.pairs,
        parts=parts,
        BLOCK_P=32,
        num_warps=1,
        **COMPILER_OPTIONS,
    )


def add_parts(reduction: Launch, assignment: Tensor, labels: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the parts of all pairs; returns both losses (L, B, M) and the sums (L, B, M, 4)."""
    mask = parts.new_empty(assignment.shape)
    dice, sums = torch.empty_like(mask), parts.new_empty((*assignment.shape, 4))
    if parts.shape[0] > 0:
        reduction(
            assignment_ptr=assignment, labels_ptr=labels, parts_ptr=parts, mask_ptr=mask, dice_ptr=dice, sums_ptr=sums
        )
    return mask, dice, sums


def gradient_of_pairs(launch: Callable[..., None]) -> Callable[..., Tensor]:
    """The backward operator of a mask loss, which returns the gradient of the logits; see ``empty_gradient`` for its
    layout.

    Args:
        launch: writes the gradient; called only if there are logits and pairs, with the gradient, the tensors of the
            pairs' sums and incoming gradients by the names of the kernels' arguments, the slopes that forward kept, the
            logits with contiguous planes, the assignment and the operator's other inputs.
    """

    def backward(
        grad_mask: Tensor, grad_dice: Tensor, sums: Tensor, slopes: Tensor, mask_logits: Tensor, assignment: Tensor,
        *inputs: Any,
    ) -> Tensor:  # fmt: skip
        mask_logits = with_contiguous_planes(mask_logits)
        grad = empty_gradient(mask_logits)
        if grad.numel() == 0 or assignment.numel() == 0:
            return grad.zero_()
        of_pairs = {
            "grad_mask_ptr": grad_mask.contiguous(),
            "grad_dice_ptr": grad_dice.contiguous(),
            "sums_ptr": sums.contiguous(),
        }
        launch(grad, of_pairs, slopes, mask_logits, assignment, *inputs)
        return grad

    return backward
