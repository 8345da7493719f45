"""Points as in Mask2Former's criterion: sampling maps at points, drawing random points and choosing uncertain ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask.reference._common import check_shape, skip_zero_weights

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 7
LOW_32_BITS = 0xFFFFFFFF

# A point's weight, 1 - its share of void pixels, counts as 0 below this, where it is a rounding error.
MIN_WEIGHT = 1e-6


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Samples maps between their pixels, as PointRend does (arXiv:1912.08193, section 3.1).

    In the grid of pixel centers, the point (x, y) lies at column x w - 1/2 and row y h - 1/2. Its value is the bilinear
    mean of the four pixels around it; pixels beyond the map are 0, so that a point on the border takes half of the
    pixel beside it (``grid_sample`` with align_corners=False and padding_mode="zeros"). Pixels of weight 0 are not
    read, whereas ``grid_sample`` would multiply infinity and NaN by 0.

    Args:
        maps: ``(..., h, w)`` float.
        points: ``(..., P, 2)`` float, (x, y) in 0..1 from the left and the top; leading dimensions as in ``maps``.

    Returns:
        ``(..., P)`` in the dtype of the maps.
    """
    return skip_zero_weights(lambda planes: _grid_sample(planes, points), maps)


def _grid_sample(maps: Tensor, points: Tensor) -> Tensor:
    planes = maps.reshape(-1, 1, *maps.shape[-2:])
    grid = 2 * points.to(maps.dtype).reshape(-1, 1, points.shape[-2], 2) - 1
    return F.grid_sample(planes, grid, align_corners=False).reshape(*maps.shape[:-2], points.shape[-2])


def random_points(seed: Tensor, count: int, num_points: int) -> Tensor:
    """``(count, num_points, 2)`` float32 uniform in (0, 1), the same on every device and backend.

    Point i of row r is a word of Philox-4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
    with 7 rounds it passes all tests of BigCrush) with counter (16 (i // 64) + i % 16, r, 0, 0) and the seed as key:
    word i // 16 % 4. So a vector of 16 counters gives 64 consecutive points. The upper 16 bits of a word give x, the
    lower 16 bits y, as the number of one of 65,536 equal intervals, whose middle is taken.

    Args:
        seed: an int64 tensor of one element.
        count: the number of rows.
    """
    step = torch.arange(16 * -(-num_points // 64), device=seed.device)
    row = torch.arange(count, device=seed.device)[:, None]
    words = [step.expand(count, -1), row.expand(-1, len(step)), torch.zeros_like(step + row)]
    words.append(words[2])
    key = [seed.reshape(()) & LOW_32_BITS, (seed.reshape(()) >> 32) & LOW_32_BITS]
    for _ in range(PHILOX_ROUNDS):
        high_0, low_0 = _multiply(words[0], PHILOX_MULTIPLIERS[0])
        high_1, low_1 = _multiply(words[2], PHILOX_MULTIPLIERS[1])
        words = [high_1 ^ words[1] ^ key[0], low_1, high_0 ^ words[3] ^ key[1], low_0]
        key = [(k + s) & LOW_32_BITS for k, s in zip(key, PHILOX_KEY_STEPS, strict=True)]
    stream = torch.stack(words, -1).view(count, len(step) // 16, 16, 4).transpose(2, 3).flatten(1)[:, :num_points]
    return (torch.stack([stream >> 16, stream & 0xFFFF], -1).float() + 0.5) * 2**-16


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a product of 32-bit numbers, without int64 overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uncertain_points(mask_logits: Tensor, assignment: Tensor, candidates: Tensor, num_uncertain: int) -> Tensor:
    """Chooses each matched pair's candidates where its query's mask logit x is least certain, that is, closest to 0
    (Mask2Former, arXiv:2112.01527, section 3.3; PointRend, arXiv:1912.08193, section 4.1).

    Args:
        mask_logits: ``(..., B, N, h, w)`` float.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for unmatched targets and padding.
        candidates: ``(..., B, M, C, 2)`` float, (x, y) in 0..1.
        num_uncertain: how many to choose. NaN is the most uncertain; among equals the earlier are taken.

    Returns:
        ``(..., B, M, num_uncertain, 2)``, in the order of the candidates; 0 where ``assignment`` is -1.
    """
    x = sample_points(matched_logits(mask_logits, assignment), candidates)
    certainty = x.abs().nan_to_num(nan=-1, posinf=torch.inf)
    chosen = certainty.argsort(stable=True, dim=-1)[..., :num_uncertain].sort(-1).values
    points = torch.take_along_dim(candidates, chosen[..., None], dim=-2)
    return points.masked_fill((assignment < 0)[..., None, None], 0)


def sampled_targets(masks: Tensor, valid: Tensor | None, points: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Targets ``(..., B, M, P)`` at points ``(..., B, M or 1, P, 2)``, and the points' weights, in their shape."""
    maps = masks.bool()
    weights = torch.ones(points.shape[:-1], dtype=dtype, device=points.device)
    if valid is not None:
        check_shape("valid", valid, (masks.shape[0], *masks.shape[-2:]))
        maps = maps & valid[:, None]
        void = (~valid).to(dtype)[:, None].expand(*points.shape[:-2], *masks.shape[-2:])
        weights = 1 - sample_points(void, points)
        weights = weights.masked_fill(weights < MIN_WEIGHT, 0)
    shape = (*points.shape[:-4], *masks.shape[:2])
    points = points.expand(*shape, *points.shape[-2:])
    shares = sample_points(maps.to(dtype).expand(*shape, *masks.shape[-2:]), points)
    return shares.masked_fill(weights == 0, 0), weights


def matched_logits(mask_logits: Tensor, assignment: Tensor) -> Tensor:
    """``(..., B, M, h, w)``: the logits of each target's query, 0 for unmatched targets.

    These are filled first: a NaN of query 0, which index -1 is clamped to, must not reach a gradient.
    """
    matched = torch.take_along_dim(mask_logits, assignment.clamp(min=0)[..., None, None], dim=-3)
    return matched.masked_fill((assignment < 0)[..., None, None], 0)
