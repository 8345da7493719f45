"""Code that kernels at points share: bilinear samples, the targets around a point, a point's loss, random points."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmask.kernels._common import _power, _sigmoid_of_magnitude

# Below this, a point's weight is a rounding error and counts as 0.
MIN_WEIGHT = tl.constexpr(1e-6)


@triton.jit
def _point_taps(position, size):
    """The first, in -1..size-1, of the two pixels around a position in 0..1, and the weight of the second. A position
    off the map, or NaN, counts as one beyond its border."""
    at = tl.fma(position, tl.cast(size, tl.float32), -0.5)
    at = tl.where(at > -1.0, at, -1.0)
    at = tl.where(at < size, at, tl.cast(size, tl.float32))
    first = tl.minimum(tl.floor(at).to(tl.int32), size - 1)
    return first, at - first.to(tl.float32)


@triton.jit
def _four_pixels(x, y, h, w, inside):
    """The four pixels around each point of an h x w map: the index of the upper left one; which of their columns and
    rows lie on the map and have a nonzero weight (0 * inf is NaN); and the weights of the right and the lower ones."""
    column, right = _point_taps(x, w)
    row, lower = _point_taps(y, h)
    on_left, on_right = (column >= 0) & (right < 1.0), (column + 1 < w) & (right > 0.0)
    on_upper, on_lower = (row >= 0) & (lower < 1.0), (row + 1 < h) & (lower > 0.0)
    return row * w + column, on_left, on_right, inside & on_upper, inside & on_lower, right, lower


@triton.jit
def _between(upper_left, upper_right, lower_left, lower_right, right, lower):
    upper = tl.fma(upper_right, right, upper_left * (1.0 - right))
    lower_row = tl.fma(lower_right, right, lower_left * (1.0 - right))
    return tl.fma(lower_row, lower, upper * (1.0 - lower))


@triton.jit
def _load_points(points_ptr, i, inside):
    """x and y of the points i; lanes without a point get one off the map."""
    x = tl.load(points_ptr + i * 2, mask=inside, other=-1.0)
    y = tl.load(points_ptr + i * 2 + 1, mask=inside, other=-1.0)
    return x, y


@triton.jit
def _sample(plane_ptr, x, y, h, w, inside):
    """Bilinear samples of a map of logits at points (x, y); the map is 0 beyond its border."""
    at, on_left, on_right, on_upper, on_lower, right, lower = _four_pixels(x, y, h, w, inside)
    a = tl.load(plane_ptr + at, mask=on_upper & on_left, other=0.0).to(tl.float32)
    b = tl.load(plane_ptr + at + 1, mask=on_upper & on_right, other=0.0).to(tl.float32)
    c = tl.load(plane_ptr + at + w, mask=on_lower & on_left, other=0.0).to(tl.float32)
    d = tl.load(plane_ptr + at + w + 1, mask=on_lower & on_right, other=0.0).to(tl.float32)
    return _between(a, b, c, d, right, lower)


@triton.jit
def _pixel_share(target_ptrs, valid_ptrs, on, of_target, target, void_value, HAS_SEGMENTS: tl.constexpr,
                 HAS_VOID: tl.constexpr):  # fmt: skip
    """Whether a pixel that is ``on`` the map belongs to the target, and whether it is void: 1 or 0, float32. Pixels
    that are not ``of_target`` do not belong to it, and their masks are not read."""
    value = tl.load(target_ptrs, mask=of_target, other=0).to(tl.int32)
    counts = on
    if HAS_VOID:
        counts = on & ((value != void_value) if HAS_SEGMENTS else (tl.load(valid_ptrs, mask=on, other=0) != 0))
    belongs = counts & of_target & ((value == target) if HAS_SEGMENTS else (value != 0))
    return tl.where(belongs, 1.0, 0.0), tl.where(on & (counts == 0), 1.0, 0.0)


@triton.jit
def _weight(void_share, inside, HAS_VOID: tl.constexpr):
    """The weight of points, 1 - their share of void pixels; 0 where that is a rounding error."""
    v = tl.where(inside, 1.0, 0.0)
    if HAS_VOID:
        v -= tl.where(inside, void_share, 0.0)
        v = tl.where(v >= MIN_WEIGHT, v, 0.0)
    return v


@triton.jit
def _target_at(x, y, inside, image, target, target_ptr, valid_ptr, void_value, M, H, W, HAS_SEGMENTS: tl.constexpr,
               HAS_VOID: tl.constexpr):  # fmt: skip
    """The target's bilinear share t of each point, and the point's weight v."""
    at, on_left, on_right, on_upper, on_lower, right, lower = _four_pixels(x, y, H, W, inside)
    plane = tl.cast(H, tl.int64) * W
    pixels = target_ptr + (image if HAS_SEGMENTS else image * M + target) * plane + at
    valid = pixels
    if HAS_VOID and not HAS_SEGMENTS:
        valid = valid_ptr + image * plane + at
    a, b, c, d = on_upper & on_left, on_upper & on_right, on_lower & on_left, on_lower & on_right
    ta, va = _pixel_share(pixels, valid, a, a, target, void_value, HAS_SEGMENTS, HAS_VOID)
    tb, vb = _pixel_share(pixels + 1, valid + 1, b, b, target, void_value, HAS_SEGMENTS, HAS_VOID)
    tc, vc = _pixel_share(pixels + W, valid + W, c, c, target, void_value, HAS_SEGMENTS, HAS_VOID)
    td, vd = _pixel_share(pixels + W + 1, valid + W + 1, d, d, target, void_value, HAS_SEGMENTS, HAS_VOID)
    t = _between(ta, tb, tc, td, right, lower)
    v = _weight(_between(va, vb, vc, vd, right, lower), inside, HAS_VOID)
    return tl.where(v > 0.0, t, 0.0) if HAS_VOID else t, v


@triton.jit
def _point_terms(x, alpha, gamma, FOCAL: tl.constexpr, SQUARE: tl.constexpr):
    """p = sigmoid(x), 1 - p, F+ and F- of logits, and the magnitudes of their derivatives, -dF+/dx and dF-/dx."""
    magnitude = tl.abs(x)
    large, small, softplus = _sigmoid_of_magnitude(magnitude, RELATIVE=True)
    positive = x >= 0.0
    p = tl.where(positive, large, small)
    q = tl.where(positive, small, large)
    minus_log_p = tl.where(positive, 0.0, magnitude) + softplus
    minus_log_q = tl.where(positive, magnitude, 0.0) + softplus
    foreground, background, foreground_slope, background_slope = minus_log_p, minus_log_q, q, p
    if FOCAL:
        of_foreground = alpha * _power(q, minus_log_q, gamma, SQUARE)
        of_background = (1.0 - alpha) * _power(p, minus_log_p, gamma, SQUARE)
        foreground = of_foreground * minus_log_p
        background = of_background * minus_log_q
        foreground_slope = of_foreground * tl.fma(gamma * p, minus_log_p, q)
        background_slope = of_background * tl.fma(gamma * q, minus_log_q, p)
    return p, q, foreground, background, foreground_slope, background_slope
