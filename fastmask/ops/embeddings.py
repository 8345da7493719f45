"""Mask logits from mask and pixel embeddings, for all queries or for the matched ones only."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops._checks import check_assignment, check_floating, check_targets, stack_layers
from fastmask.targets import Targets


def mask_products(mask_embed: Tensor, pixel_embed: Tensor) -> Tensor:
    """``(..., B, N, C)`` times ``(B, C, h, w)``, summed over the C channels: mask logits ``(..., B, N, h, w)``.

    One matrix product covers all layers of an image. So images come before layers in memory: each (h, w) plane is
    contiguous, and layers are strided.
    """
    return torch.einsum("...bnc,bchw->...bnhw", mask_embed, pixel_embed)


def matched_mask_logits(
    mask_embed: Tensor, pixel_embed: Tensor, targets: Targets, assignment: Tensor
) -> tuple[Tensor, Tensor]:
    """Mask logits of the matched queries, sum_c mask_embed[n, c] pixel_embed[c, y, x] (MaskFormer, arXiv:2107.06278,
    section 3.3), for ``fastmask.mask_loss``.

    Unmatched queries get no gradient from the mask losses, so backward allocates nothing as large as all mask logits.

    Args:
        mask_embed: ``(..., B, N, C)`` floating point; any leading dimensions, usually L decoder layers, or none.
        pixel_embed: ``(B, C, h, w)``.
        targets: the targets of the B images.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for padding and unmatched targets.

    Returns:
        ``(..., B, R, h, w)`` mask logits in the dtype of the product, differentiable, and ``(..., B, M)`` int64, the
        row ``0..R-1`` of each target, -1 where ``assignment`` is -1. R is min(M, N); on the CPU, where the host can
        read the counts, the largest count replaces M. Rows without a target get no gradient.

    Raises:
        ValueError: shapes, devices or indices that do not fit.
        TypeError: embeddings that are not floating point, or an assignment that is not int64.
    """
    check_floating("mask_embed", mask_embed, 3, "(..., B, N, C)")
    check_floating("pixel_embed", pixel_embed, 4, "(B, C, h, w)")
    *leading, batch_size, num_queries, channels = mask_embed.shape
    if pixel_embed.dim() != 4 or tuple(pixel_embed.shape[:2]) != (batch_size, channels):
        raise ValueError(
            f"pixel_embed has shape {tuple(pixel_embed.shape)}; expected ({batch_size}, {channels}, h, w) for "
            f"mask_embed of shape {tuple(mask_embed.shape)}"
        )
    check_targets(targets, "mask_embed", mask_embed, batch_size)
    check_assignment(assignment, tuple(leading), num_queries, targets)

    num_rows = _most_targets(targets)
    if num_rows >= num_queries:
        return mask_products(mask_embed, pixel_embed), assignment
    matched = assignment >= 0
    # An image's matched targets take its rows in turn; the others write to an extra row, which is then cut off.
    rows = (matched.cumsum(-1) - 1).masked_fill(~matched, num_rows)
    queries = assignment.new_zeros(*leading, batch_size, num_rows + 1).scatter(-1, rows, assignment)[..., :num_rows]
    # On a GPU the backward of indexing is deterministic; that of torch.gather is not.
    stacked = stack_layers(mask_embed, 2)
    images = torch.arange(stacked.shape[0], device=queries.device)[:, None]
    matched_embed = stacked[images, stack_layers(queries, 1)].view(*leading, batch_size, num_rows, channels)
    return mask_products(matched_embed, pixel_embed), rows.masked_fill(~matched, -1)


def _most_targets(targets: Targets) -> int:
    """The largest number of targets if the host can read it without waiting, else M."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or targets.batch_size == 0:
        return targets.num_targets
    return int(targets.counts.max())
