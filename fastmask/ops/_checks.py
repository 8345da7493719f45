"""Argument checks of the public functions: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmask.mask_term import MaskTerm
from fastmask.targets import Targets


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_mask_term(term: MaskTerm) -> None:
    if not isinstance(term, MaskTerm):
        raise TypeError(f"term must be a fastmask.MaskTerm, got {type(term).__name__}")


def check_floating(name: str, tensor: Tensor, min_dim: int, shape: str) -> None:
    """Raises unless ``tensor`` is floating point with at least ``min_dim`` dimensions; messages quote ``shape``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.dim() < min_dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def check_is_targets(targets: Targets) -> None:
    if not isinstance(targets, Targets):
        raise TypeError(f"targets must be a fastmask.Targets, got {type(targets).__name__}")


def check_targets(targets: Targets, name: str, logits: Tensor, batch_size: int) -> None:
    """Raises unless ``targets`` has ``batch_size`` images on the device of ``logits``, the argument ``name``."""
    if targets.batch_size != batch_size:
        raise ValueError(f"targets has {targets.batch_size} images, but {name} {batch_size}: {tuple(logits.shape)}")
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device}, {name} on {logits.device}")


def check_mask_planes(mask_logits: Tensor) -> None:
    check_floating("mask_logits", mask_logits, 4, "(..., B, N, h, w)")
    if mask_logits.shape[-1] == 0 or mask_logits.shape[-2] == 0:
        raise ValueError(f"mask_logits has shape {tuple(mask_logits.shape)}; expected at least one pixel")


def check_mask_logits(mask_logits: Tensor, targets: Targets) -> None:
    check_is_targets(targets)
    check_mask_planes(mask_logits)
    if 0 in targets.size:
        raise ValueError(f"targets has masks of {targets.size[0]} x {targets.size[1]}; expected at least one pixel")
    check_targets(targets, "mask_logits", mask_logits, mask_logits.shape[-4])


def check_class_logits(class_logits: Tensor, targets: Targets) -> None:
    check_is_targets(targets)
    check_floating("class_logits", class_logits, 3, "(..., B, N, K+1)")
    if class_logits.shape[-1] < 2:
        raise ValueError(
            f"class_logits has shape {tuple(class_logits.shape)}; expected at least one class and no-object"
        )
    check_targets(targets, "class_logits", class_logits, class_logits.shape[-3])
    # Reading values from a GPU would make the host wait; the kernels never read out of bounds.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        num_classes = class_logits.shape[-1] - 1
        if targets.labels.numel() > 0 and (highest := int(targets.labels.max())) >= num_classes:
            raise ValueError(f"targets.labels holds {highest}; class_logits has classes 0..{num_classes - 1}")


def check_pair_of_logits(class_logits: Tensor, mask_logits: Tensor) -> None:
    if class_logits.shape[:-1] != mask_logits.shape[:-2]:
        raise ValueError(
            f"class_logits has shape {tuple(class_logits.shape)} and mask_logits {tuple(mask_logits.shape)}; "
            "expected (..., B, N, K+1) and (..., B, N, h, w) with equal (..., B, N)"
        )


def check_assignment(assignment: Tensor, leading: tuple[int, ...], num_queries: int, targets: Targets) -> None:
    expected = (*leading, targets.batch_size, targets.num_targets)
    check_assigned_queries(assignment, expected, num_queries, "targets", targets.device)


def check_assigned_queries(
    assignment: Tensor, expected: tuple[int, ...], num_queries: int, other: str, device: torch.device
) -> None:
    """Raises unless ``assignment`` has the ``expected`` shape, ``other``'s ``device`` and queries below N."""
    if assignment.dtype != torch.int64:
        raise TypeError(f"assignment must have dtype int64, got {assignment.dtype}")
    if tuple(assignment.shape) != expected:
        raise ValueError(f"assignment has shape {tuple(assignment.shape)}; expected {expected}")
    if assignment.device != device:
        raise ValueError(f"assignment is on {assignment.device}, {other} on {device}")
    if assignment.device.type == "cpu" and not torch.compiler.is_compiling() and assignment.numel() > 0:
        low, high = int(assignment.min()), int(assignment.max())
        if low < -1 or high >= num_queries:
            raise ValueError(f"assignment holds {low if low < -1 else high}; expected -1..{num_queries - 1}")


def check_points(points: Tensor, leading: tuple[int, ...], shape: str, targets: Targets) -> None:
    """Raises unless ``points`` is float32 or float64 of shape ``(*leading, P, 2)``; messages quote ``shape``."""
    if not isinstance(points, Tensor):
        raise TypeError(f"points must be a tensor of shape {shape}, got {type(points).__name__}")
    if points.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"points must be float32 or float64, got {points.dtype}")
    if tuple(points.shape) != (*leading, *points.shape[-2:-1], 2):
        expected = ", ".join(map(str, leading))
        raise ValueError(f"points has shape {tuple(points.shape)}; expected {shape} = ({expected}, P, 2)")
    if points.shape[-2] == 0:
        raise ValueError(f"points has shape {tuple(points.shape)}; expected at least one point")
    if points.device != targets.device:
        raise ValueError(f"points is on {points.device}, targets on {targets.device}")


def check_point_sampling(num_points: int, oversample_ratio: float, importance_sample_ratio: float) -> None:
    if num_points < 1:
        raise ValueError(f"num_points must be at least 1, got {num_points}")
    if not oversample_ratio >= 1:
        raise ValueError(f"oversample_ratio must be at least 1, got {oversample_ratio}")
    if not 0 <= importance_sample_ratio <= 1:
        raise ValueError(f"importance_sample_ratio must lie in 0..1, got {importance_sample_ratio}")


def stack_layers(tensor: Tensor, dim: int) -> Tensor:
    """Flattens all but the last ``dim`` dimensions into one, L, as the operators expect."""
    if tensor.dim() == dim + 1:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-dim]), *tensor.shape[-dim:])


def computing_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that the reference backend computes in: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
