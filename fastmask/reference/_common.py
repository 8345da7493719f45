"""Code that several references share: argument checks, resampling, and the two element-wise mask terms."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_TERMS = ("focal", "bce")

# Mask logits are clamped to this magnitude, so that infinite ones lead to no NaN.
LOGIT_BOUND = 1e30

# Smaller than every positive weight of a resized map, and larger than the rounding errors of zero weights in float64.
MIN_SHARE = 1e-12


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless the last dimensions of ``tensor`` are ``expected`` (-1 allows any size)."""
    shape = tuple(tensor.shape)
    tail = shape[len(shape) - len(expected) :]
    if len(shape) < len(expected) or any(e not in (-1, s) for s, e in zip(tail, expected, strict=True)):
        wanted = ", ".join("?" if e == -1 else str(e) for e in expected)
        raise ValueError(f"{name} has shape {shape}; expected (..., {wanted})")


def check_focal(alpha: float, gamma: float) -> None:
    """Raises ValueError unless 0 <= alpha <= 1 and gamma >= 0."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0..1, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")


def resize_bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """``(..., h, w)`` to ``(..., H, W)``, bilinear with align_corners=False and no antialiasing."""
    return _resize(maps, size, "bilinear", align_corners=False)


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """``(..., h, w)`` to ``(..., H, W)`` by PyTorch's "nearest" rule: output i reads input floor(i * h / H)."""
    return _resize(maps.float(), size, "nearest").to(maps.dtype)


def _resize(maps: Tensor, size: tuple[int, int], mode: str, align_corners: bool | None = None) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    planes = maps.reshape(-1, 1, *maps.shape[-2:])
    resized = F.interpolate(planes, size=tuple(size), mode=mode, align_corners=align_corners)
    return resized.reshape(*maps.shape[:-2], *size)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """``resize_bilinear`` for logits that may be infinite or NaN; see ``skip_zero_weights``."""
    return skip_zero_weights(lambda maps: resize_bilinear(maps, size), logits, MIN_SHARE)


def skip_zero_weights(resample: Callable[[Tensor], Tensor], logits: Tensor, tolerance: float = 0.0) -> Tensor:
    """Applies ``resample``, a weighted mean, to logits that may be infinite or NaN, without reading those of weight 0.

    PyTorch's own functions multiply them by 0, which gives NaN, for instance where a pixel falls exactly on a logit.

    Args:
        tolerance: float64 weights up to this count as 0.
    """
    if not torch.compiler.is_compiling() and logits.isfinite().all():
        return resample(logits)
    result = resample(logits.nan_to_num(nan=0, posinf=0, neginf=0))
    for value, found in ((torch.inf, logits.isposinf()), (-torch.inf, logits.isneginf()), (torch.nan, logits.isnan())):
        result = torch.where(resample(found.double()) > tolerance, result + value, result)
    return result


def mask_terms(logits: Tensor, mask_term: str, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """The loss of each logit x if its pixel is foreground, and if it is background.

    "focal": alpha (1 - p)^gamma softplus(-x) and (1 - alpha) p^gamma softplus(x), p = sigmoid(x)
    (RetinaNet, arXiv:1708.02002, equation 5). "bce": softplus(-x) and softplus(x).

    Except for alpha, each equals the other at -x.
    """
    return foreground_term(logits, mask_term, alpha, gamma), foreground_term(-logits, mask_term, 1 - alpha, gamma)


def foreground_term(logits: Tensor, mask_term: str, alpha: float | Tensor, gamma: float) -> Tensor:
    """alpha (1 - p)^gamma softplus(-x) for "focal", softplus(-x) for "bce".

    softplus(x) is written -logsigmoid(-x) and 1 - p is sigmoid(-x): both keep their relative precision in the tails,
    which ``F.softplus`` (linear beyond 20) and the subtraction do not.
    """
    cross_entropy = -F.logsigmoid(logits)
    if mask_term == "bce":
        return cross_entropy
    # Clamped above 0, where a power below 1 has an infinite derivative; the cross-entropy is 0 there anyway.
    opposite = torch.sigmoid(-logits).clamp(min=torch.finfo(logits.dtype).tiny)
    return alpha * opposite**gamma * cross_entropy


def image_logits(
    mask_logits: Tensor, padded_size: tuple[int, int] | None, valid_size: tuple[int, int] | None
) -> Tensor:
    """Mask logits of the image without padding: upsampled to the padded network input, then cropped to ``valid_size``.

    None skips either step. Infinite logits count as -1e30 and 1e30, and NaN as -1e30, so that a query never wins where
    it reads a NaN, and pixels that read no such logit are unaffected.
    """
    bound = min(LOGIT_BOUND, torch.finfo(mask_logits.dtype).max)
    mask_logits = mask_logits.clamp(-bound, bound).nan_to_num(nan=-bound)
    if padded_size is not None:
        mask_logits = resize_bilinear(mask_logits, padded_size)
    if valid_size is None:
        return mask_logits
    height, width = valid_size
    if not (0 < height <= mask_logits.shape[-2] and 0 < width <= mask_logits.shape[-1]):
        raise ValueError(f"valid_size={tuple(valid_size)} does not lie within the {tuple(mask_logits.shape[-2:])} map")
    return mask_logits[..., :height, :width]


def reads_nan(
    mask_logits: Tensor,
    padded_size: tuple[int, int] | None,
    valid_size: tuple[int, int] | None,
    size: tuple[int, int],
) -> Tensor:
    """``(..., H, W)`` bool: whether a pixel of the resized image reads a NaN."""
    nan = mask_logits.isnan()
    if not nan.any():
        return nan.new_zeros(()).expand(*nan.shape[:-2], *size)
    # In float64, where zero weights are exactly 0.
    return resize_bilinear(image_logits(nan.double(), padded_size, valid_size), size) > 0


def as_batch(class_logits: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Adds B to the logits of a single image; checks that the shapes match: ``(B, N, K+1)`` and ``(B, N, h, w)``."""
    if class_logits.dim() == 2 and mask_logits.dim() == 3:
        class_logits, mask_logits = class_logits[None], mask_logits[None]
    if class_logits.dim() != 3 or mask_logits.dim() != 4 or class_logits.shape[:2] != mask_logits.shape[:2]:
        raise ValueError(
            f"class_logits has shape {tuple(class_logits.shape)} and mask_logits {tuple(mask_logits.shape)}; "
            "expected (B, N, K+1) and (B, N, h, w)"
        )
    return class_logits, mask_logits
