"""Code that several operators' kernels share: functions of a logit, arguments for targets and planes, tuning.

Arithmetic is float32 whatever the type of the logits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Config = TypeVar("Config")

# Options of every launch: fuse a product and a sum into one instruction, which Triton 3.10 no longer does by default.
COMPILER_OPTIONS = {"enable_fp_fusion": True}

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Elements that a thread loads at a time if planes or rows of logits are multiples of it: 16 bytes of half precision.
UNIT = 8


def unit(*sizes: int) -> int:
    """UNIT if all sizes are multiples of it, else 1.

    Kernels take such sizes in units, and the unit as a constexpr: the compiler then knows that the size is aligned, and
    loads 16 bytes at a time where it can.
    """
    return UNIT if all(size % UNIT == 0 for size in sizes) else 1


def ceil_div(length: int, divisor: int) -> int:
    """``length / divisor`` rounded up. ``triton.cdiv`` takes 4 us, a fifth of a launch."""
    return -(-length // divisor)


@lru_cache
def generation(device: torch.device) -> int | None:
    """The major version of a GPU's compute capability; None in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def pick_config(configs: dict[int | None, Config], device: torch.device) -> Config:
    """The configuration for a device's generation; the key None holds the default.

    Nothing is tuned at run time. Tuning would launch kernels while a CUDA graph is captured, could choose differently
    from run to run and so change the order of sums, and fails in the interpreter.
    """
    return configs.get(generation(device), configs[None])


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``size``, within bounds, so that there are few block shapes."""
    return min(max(1 << (size - 1).bit_length() if size > 1 else 1, least), most)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """``x``, copied unless its last dimension is contiguous."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def plane_sizes(
    shape: tuple[int, ...], strides: tuple[int, ...], grad_strides: tuple[int, ...] = (), *sizes: int
) -> dict[str, int]:
    """The kernel arguments that locate the planes of logits ``(L, B, N, h, w)`` and of their gradient; see ``_plane``.
    The caller passes the ``sizes`` in the same units."""
    in_units = dict(zip(("stride_l", "stride_b", "stride_n"), strides, strict=False))
    in_units |= zip(("grad_stride_l", "grad_stride_b", "grad_stride_n"), grad_strides, strict=False)
    size = unit(shape[-2] * shape[-1], *in_units.values(), *sizes)
    return {name: stride // size for name, stride in in_units.items()} | {"UNIT": size}


class TargetSizes(NamedTuple):
    """What kernels must know of targets but the tensors, by the names of their arguments; see ``_counted``."""

    H: int
    W: int
    void_value: int
    HAS_SEGMENTS: bool
    HAS_VOID: bool


def target_planes(
    masks: Tensor | None, segments: Tensor | None, valid: Tensor | None, void_value: int, ignore_void: bool
) -> tuple[Tensor, Tensor | None, TargetSizes]:
    """The segments or masks of B images as integers, which of their pixels are valid unless that is not asked for, and
    their sizes."""
    plane = (masks if segments is None else segments).contiguous()
    if plane.dtype == torch.bool:
        plane = plane.view(torch.uint8)
    has_void = ignore_void and (segments is not None or valid is not None)
    counted = valid.contiguous().view(torch.uint8) if has_void and valid is not None else None
    return plane, counted, TargetSizes(*plane.shape[-2:], void_value, segments is not None, has_void)


class Term(NamedTuple):
    """The mask term, by the names of an operator's arguments."""

    mask_term: str
    alpha: float
    gamma: float

    def arguments(self) -> dict[str, Any]:
        """Those of a kernel."""
        return {
            "alpha": self.alpha,
            "gamma": self.gamma,
            "FOCAL": self.mask_term == "focal",
            "SQUARE": self.gamma == 2.0,
        }


def check_positions(targets: TargetSizes, *sizes: int) -> None:
    """Raises unless positions among the targets' pixels, and all ``sizes``, fit in 32 bits."""
    if max(targets.H * targets.W, *sizes) >= 1 << 31:
        raise ValueError(f"targets of {targets.H} x {targets.W} pixels are too large for 32-bit positions")


@triton.jit
def _plane(ptr, layer, image, query, stride_l, stride_b, stride_n, UNIT: tl.constexpr):
    """The addresses of planes, from ``plane_sizes``."""
    at = layer.to(tl.int64) * stride_l + image.to(tl.int64) * stride_b + query.to(tl.int64) * stride_n
    return ptr + at * UNIT


@triton.jit
def _special_function(x, NAME: tl.constexpr):
    """An instruction of the special-function unit, which treats numbers below 2^-126 as 0."""
    return tl.inline_asm_elementwise(NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    """1 / x to one unit in the last place, for normal x, in one instruction; a division takes nine."""
    return 1.0 / x if INTERPRETED else _special_function(x, "rcp")


@triton.jit
def _log2(x):
    """log2(x) for x from 1 on, with an error of up to 2^-22 in [1, 2], and of as much of the result above."""
    return tl.log2(x) if INTERPRETED else _special_function(x, "lg2")


@triton.jit
def _exp2(x):
    """2^x in one instruction; results below 2^-126 are 0."""
    return tl.exp2(x) if INTERPRETED else _special_function(x, "ex2")


@triton.jit
def _focal_of_logit(x, gamma, SQUARE: tl.constexpr):
    """Of a logit: p = sigmoid(x) and the focal terms without alpha, divided by log(2): for foreground
    (1-p)^gamma softplus(-x) / log(2), for background p^gamma softplus(x) / log(2).

    For gamma = 2 this takes three special functions and 10 other instructions; with the polynomial of
    ``_sigmoid_of_magnitude``, and selects by sign, it would take two and 20. The errors of the logarithm, 2^-22 of 1 or
    of itself, and of the difference of it and x, 2^-23 x, would dominate a small softplus; here the power scales them
    down.
    """
    a = x * -1.44269502
    e = _exp2(tl.minimum(a, 100.0))  # e and p are normal numbers
    p = _reciprocal(1.0 + e)
    q = e * p
    minus_log_p = tl.maximum(_log2(1.0 + e), a)
    minus_log_q = minus_log_p - a
    if SQUARE:
        return p, minus_log_p * (q * q), minus_log_q * (p * p)
    return p, minus_log_p * tl.exp2(minus_log_q * -gamma), minus_log_q * tl.exp2(minus_log_p * -gamma)


@triton.jit
def _sigmoid_of_magnitude(a, RELATIVE: tl.constexpr):
    """sigmoid(a), sigmoid(-a) and softplus(-a) for a >= 0; softplus(a) is a + softplus(-a).

    The special-function unit computes one exponential e = exp(-a) and one reciprocal: softplus(-a) = log(1 + e) is e
    times a degree-8 minimax polynomial (relative error 3e-8 before rounding, 1.5e-7 after). The unit's logarithm has an
    absolute error, which is too large where the result is small.

    Rounding a / log(2) causes an error of up to a * 2^-24 relative to e, which is harmless in sums with terms near one.
    RELATIVE corrects it in four instructions, for sums whose terms may all be small.
    """
    if RELATIVE:
        a = tl.minimum(a, 200.0, propagate_nan=tl.PropagateNan.ALL)  # e is 0 from 200 on; for infinity, rest is NaN
    exponent = a * -1.44269502
    e = tl.exp2(exponent)
    if RELATIVE:
        rest = tl.fma(a, -1.92596299e-08, tl.fma(a, -1.44269502, -exponent))
        e = tl.fma(e * 0.693147181, rest, e)
    large = _reciprocal(1.0 + e)
    y = e * 0.00536481664 - 0.0300657619
    y = y * e + 0.0792044848
    y = y * e - 0.137537986
    y = y * e + 0.191536531
    y = y * e - 0.248571634
    y = y * e + 0.33321324
    y = y * e - 0.499996483
    return large, e * large, (y * e + 1.0) * e


@triton.jit
def _power(base, minus_log, gamma, SQUARE: tl.constexpr):
    """base^gamma, the weight of the focal loss, for base in (0, 1] given -log(base)."""
    # Bounded, because infinity * 0 would be NaN where gamma is 0.
    return base * base if SQUARE else tl.exp2(tl.minimum(minus_log, 1e30) * (gamma * -1.4426950408889634))


@triton.jit
def _counted(segment_ptrs, valid_ptrs, inside, void_value, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr):
    """Which of the pixels ``inside`` count and, if the targets are a segment map, their segments."""
    counted = inside
    segment = inside
    if HAS_SEGMENTS:
        segment = tl.load(segment_ptrs, mask=inside, other=0).to(tl.int32)
        if HAS_VOID:
            counted = inside & (segment != void_value)
    elif HAS_VOID:
        counted = tl.load(valid_ptrs, mask=inside, other=0) != 0
    return counted, segment
