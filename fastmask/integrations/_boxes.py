"""The class and box costs of matchers in the DETR family, for whole batches."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8  # keeps the logarithms of the class cost finite


def focal_costs(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss (arXiv:1708.02002) of a positive minus that of a negative, of each logit (Deformable DETR,
    arXiv:2010.04159)."""
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + TINY).log()
    return positive - (1 - alpha) * p**gamma * -(1 - p + TINY).log()


def box_costs(boxes: Tensor, wanted: Tensor, names: tuple[str, str] = ("pred_boxes", "boxes")) -> tuple[Tensor, Tensor]:
    """``(..., N, M)`` each: the L1 distance of boxes ``(..., N, 4)`` and ``(..., M, 4)`` as (center_x, center_y, width,
    height), and minus their generalized intersection over union (arXiv:1902.09630).

    Raises:
        ValueError: boxes on the CPU, of the given ``names``, whose size is negative or NaN; on a GPU a device-side
            assertion.
    """
    one, other = _corners(names[0], boxes)[..., :, None, :], _corners(names[1], wanted)[..., None, :, :]
    overlap = (torch.min(one[..., 2:], other[..., 2:]) - torch.max(one[..., :2], other[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.max(one[..., 2:], other[..., 2:]) - torch.min(one[..., :2], other[..., :2])).clamp(min=0).prod(-1)
    areas = [(corners[..., 2:] - corners[..., :2]).prod(-1) for corners in (one, other)]
    union = areas[0] + areas[1] - overlap
    return torch.cdist(boxes, wanted, p=1), (hull - union) / hull - overlap / union


def _corners(name: str, boxes: Tensor) -> Tensor:
    """``(..., 4)`` as (left, top, right, bottom)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    corners = torch.cat([center - size / 2, center + size / 2], -1)
    ordered = (corners[..., 2:] >= corners[..., :2]).all()
    if boxes.device.type != "cpu":
        torch._assert_async(ordered, f"{name} holds a size that is negative or NaN")
    elif not ordered:
        raise ValueError(f"{name} holds a size that is negative or NaN; expected (center_x, center_y, width, height)")
    return corners
