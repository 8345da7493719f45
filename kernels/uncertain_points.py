"""Random points of each matched pair, most of them where its query's mask is least certain.

A program draws all candidates of a pair at once, and stores few of them. The first of them, a random sample, bound the
largest uncertainty that is chosen from both sides; candidates below the bounds are chosen as they are drawn, and those
between, one in eleven, are kept until all are drawn. Then bisection finds which of them are chosen. At B=16, L=10,
M=20 and 37,632 candidates per pair there are 120 M candidates; their keys would take 482 MB, and a general top-k more.

Logits are read from a copy of the plane that holds each pixel beside the one below, with a border of zeros: two loads
per candidate instead of four, without masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, _plane, pick_config, plane_sizes
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._taps import _halves, _pair

# Keys are the bits of |x|, and of -1 for NaN.
OF_NAN = tl.constexpr(-0x40800000)
LEAST = tl.constexpr(-0x80000000)
MOST = tl.constexpr(0x7FFFFFFF)
# Bits of a sampled bound that are not searched for: a relative distance of 2^-8.
UNSEARCHED = tl.constexpr(15)


@dataclass(frozen=True)
class UncertainPointsConfig:
    """Tuning.

    Args:
        lanes: counters of the random stream, four candidates each, of one draw.
        programs: the number of programs, each of which takes several pairs in turn, and has memory of its own: two for
            each multiprocessor, whose first-level cache then holds both of their planes.
        chunk: kept candidates that a program holds in registers; more are read again at each step.
        deviations: how many standard deviations the bounds are apart from what is expected.
        registers: at most so many for each thread.
    """

    lanes: int = 512
    programs: int = 264
    chunk: int = 4096
    deviations: float = 4.5
    num_warps: int = 8
    registers: int = 128


_CONFIG = UncertainPointsConfig()
CONFIGS = {8: replace(_CONFIG, programs=216), 10: replace(_CONFIG, programs=296), None: _CONFIG}


@triton.jit
def _philox(seed, counter, row):
    """Four words of Philox-4x32-7 (Salmon et al., SC 2011) for counters (counter, row, 0, 0), as uint32: points of the
    random stream."""
    word_0 = counter.to(tl.uint32)
    word_1 = (counter * 0 + row).to(tl.uint32)
    word_2 = (counter * 0).to(tl.uint32)
    word_3 = word_2
    key_0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        # One instruction makes both halves of a product; the high one alone would take another.
        product_0 = word_0.to(tl.uint64) * tl.full([], 0xD2511F53, tl.uint64)
        product_1 = word_2.to(tl.uint64) * tl.full([], 0xCD9E8D57, tl.uint64)
        word_0 = (product_1 >> 32).to(tl.uint32) ^ word_1 ^ key_0
        word_1 = product_1.to(tl.uint32)
        word_2 = (product_0 >> 32).to(tl.uint32) ^ word_3 ^ key_1
        word_3 = product_0.to(tl.uint32)
        key_0 += tl.full([], 0x9E3779B9, tl.uint32)
        key_1 += tl.full([], 0xBB67AE85, tl.uint32)
    return word_0, word_1, word_2, word_3


@triton.jit
def _x_and_y(word):
    """The point of a word, in units of 2^-32: the middles of the intervals that its halves count."""
    return (word & 0xFFFF0000) | 0x8000, (word << 16) | 0x8000


@triton.jit
def _point(word):
    """The point of a word, as a pair of float32."""
    x, y = _x_and_y(word)
    return _pair(x.to(tl.float32) * 2.3283064365386963e-10, y.to(tl.float32) * 2.3283064365386963e-10)


@triton.jit
def _copy_plane(plane_ptr, columns_ptr, h, w, LANES: tl.constexpr):
    """Writes words of a pixel and the one below, ``(h + 1, w + 2)``, of the map with a border of zeros."""
    lane = tl.arange(0, LANES)
    width = w + 2
    row, column = lane // width, lane % width
    rows, columns = LANES // width, LANES % width
    for start in range(0, (h + 1) * width, LANES):
        inside = (column > 0) & (column <= w) & (row <= h)
        at = (row - 1) * w + column - 1
        upper = tl.load(plane_ptr + at, mask=inside & (row > 0), other=0.0)
        lower = tl.load(plane_ptr + at + w, mask=inside & (row < h), other=0.0)
        if plane_ptr.dtype.element_ty.primitive_bitwidth == 32:
            word = _pair(upper, lower)
        else:
            upper, lower = upper.to(tl.uint16, bitcast=True), lower.to(tl.uint16, bitcast=True)
            word = (upper.to(tl.uint32) | (lower.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
        tl.store(columns_ptr + start + lane, word, mask=row <= h)
        column += columns
        row += rows + tl.where(column >= width, 1, 0)
        column = tl.where(column >= width, column - width, column)


@triton.jit
def _two_logits(word, TYPE: tl.constexpr):
    """The pixel and the one below."""
    if TYPE.primitive_bitwidth == 32:
        return _halves(word)
    if TYPE.is_bf16():
        return (word << 16).to(tl.float32, bitcast=True), (word & -0x10000).to(tl.float32, bitcast=True)
    upper, lower = word.to(tl.int16), (word >> 16).to(tl.int16)
    return upper.to(tl.float16, bitcast=True).to(tl.float32), lower.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _cell(x, size):
    """The first of the two pixels around a position, counted from the border, and the weight of the second."""
    at = x.to(tl.uint64) * tl.cast(size, tl.uint64) + 0x80000000
    weight = ((at.to(tl.uint32) >> 9) + 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    return (at >> 32).to(tl.int32), weight


@triton.jit
def _key(columns_ptr, word, h, w, TYPE: tl.constexpr):
    """The key of the logit at the point of a word."""
    x, y = _x_and_y(word)
    column, right = _cell(x, w)
    row, lower = _cell(y, h)
    at = row * (w + 2) + column
    a, c = _two_logits(tl.load(columns_ptr + at), TYPE)
    b, d = _two_logits(tl.load(columns_ptr + at + 1), TYPE)
    b, d = tl.where(right > 0.0, b, 0.0), tl.where(right > 0.0, d, 0.0)  # 0 * inf is NaN
    upper_row = tl.fma(b, right, a * (1.0 - right))
    lower_row = tl.where(lower > 0.0, tl.fma(d, right, c * (1.0 - right)), 0.0)
    logit = tl.fma(lower_row, lower, upper_row * (1.0 - lower))
    return tl.maximum(tl.abs(logit), -1.0).to(tl.int32, bitcast=True)


@triton.jit
def _draw(columns_ptr, seed, pair, start, candidates, h, w, TYPE: tl.constexpr, LANES: tl.constexpr):
    """Words and keys ``[LANES]`` of candidates from ``start`` on, of the four that each counter of the stream gives;
    those that do not exist have no key below MOST."""
    counter = start // 4 + tl.arange(0, LANES)
    first = counter + counter // 16 * 48
    word_0, word_1, word_2, word_3 = _philox(seed, counter, pair)
    key_0 = tl.where(first < candidates, _key(columns_ptr, word_0, h, w, TYPE), MOST)
    key_1 = tl.where(first + 16 < candidates, _key(columns_ptr, word_1, h, w, TYPE), MOST)
    key_2 = tl.where(first + 32 < candidates, _key(columns_ptr, word_2, h, w, TYPE), MOST)
    key_3 = tl.where(first + 48 < candidates, _key(columns_ptr, word_3, h, w, TYPE), MOST)
    return (word_0, word_1, word_2, word_3), (key_0, key_1, key_2, key_3)


@triton.jit
def _below(keys, bound, unit):
    """How many of the keys of each lane are below a bound, in units."""
    count_0 = tl.where(keys[0] < bound, unit, 0) + tl.where(keys[1] < bound, unit, 0)
    return count_0 + tl.where(keys[2] < bound, unit, 0) + tl.where(keys[3] < bound, unit, 0)


@triton.jit
def _bounds(keys, least, most):
    """The largest bounds, in steps, that at most ``least`` and ``most`` of the keys are below."""
    low = tl.where(tl.sum(_below(keys, 0, 1), 0) <= least, 0, LEAST)
    high = 0
    for step in range(31 - UNSEARCHED):
        bit = 0x40000000 >> step
        below = tl.sum(_below(keys, low | bit, 1) + _below(keys, high | bit, 65536), 0)
        low = tl.where((low >= 0) & ((below & 0xFFFF) <= least), low | bit, low)
        high = tl.where((below >> 16) <= most, high | bit, high)
    return low, high


@triton.jit
def _store(word, key, before, low, high, chosen, kept, uncertain, points_ptr, kept_keys_ptr, kept_words_ptr):
    """Stores the points that are chosen, and those that are kept with their keys."""
    chosen_at, kept_at = chosen + (before & 0xFFFF), kept + (before >> 16)
    is_kept = (key >= low) & (key < high)
    tl.store(points_ptr + chosen_at, _point(word), mask=(key < low) & (chosen_at < uncertain))
    tl.store(kept_keys_ptr + kept_at, key, mask=is_kept)
    tl.store(kept_words_ptr + kept_at, word.to(tl.int32, bitcast=True), mask=is_kept)


@triton.jit
def _counts(key, low, high):
    """1 for chosen candidates, and 1 in the upper 16 bits for kept ones."""
    return tl.where(key < high, tl.where(key < low, 1, 65536), 0)


@triton.jit
def _collect(columns_ptr, seed, pair, candidates, uncertain, h, w, low, high, points_ptr, kept_keys_ptr,
             kept_words_ptr, TYPE: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Draws all candidates, chooses those with keys below ``low``, and keeps those below ``high``; returns how many."""
    chosen, kept = 0, 0
    for start in range(0, candidates, 4 * LANES):
        words, keys = _draw(columns_ptr, seed, pair, start, candidates, h, w, TYPE, LANES)
        counts = _counts(keys[0], low, high) + _counts(keys[1], low, high)
        counts += _counts(keys[2], low, high) + _counts(keys[3], low, high)
        before = tl.cumsum(counts, 0) - counts
        for i in tl.static_range(4):
            _store(words[i], keys[i], before, low, high, chosen, kept, uncertain, points_ptr, kept_keys_ptr,
                   kept_words_ptr)  # fmt: skip
            before += _counts(keys[i], low, high)
        total = tl.sum(counts, 0)
        chosen += total & 0xFFFF
        kept += total >> 16
    return chosen, kept


@triton.jit
def _kept_below(first_keys, keys_ptr, count, bound, CHUNK: tl.constexpr):
    """How many keys are below a bound, of the first CHUNK and of the rest in memory."""
    counts = tl.where(first_keys < bound, 1, 0)
    for start in range(CHUNK, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        counts += tl.where(tl.load(keys_ptr + i, mask=i < count, other=MOST) < bound, 1, 0)
    return tl.sum(counts, 0)


@triton.jit
def _choose(points_ptr, keys_ptr, kept_words_ptr, count, wanted, low, high, CHUNK: tl.constexpr):
    """Chooses the ``wanted`` kept candidates with the smallest keys, and of equals the earlier. Keys are at least
    ``low``, and below ``high``."""
    lane = tl.arange(0, CHUNK)
    keys = tl.load(keys_ptr + lane, mask=lane < count, other=MOST)
    below = _kept_below(keys, keys_ptr, count, 0, CHUNK)  # how many keys are below the bound
    bound = tl.where(below < wanted, 0, OF_NAN)
    below = tl.where(below < wanted, below, 0)
    for step in range(31):
        higher = bound | (0x40000000 >> step)
        if (bound >= 0) & (higher < high):
            found = 0
            if higher > low:
                found = _kept_below(keys, keys_ptr, count, higher, CHUNK)
            if found < wanted:
                bound, below = higher, found
    STEP: tl.constexpr = CHUNK // 2  # fewer registers
    less, equal = 0, 0
    for start in range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        key = tl.load(keys_ptr + i, mask=i < count, other=MOST)
        counts = tl.where(key < bound, 1, tl.where(key == bound, 65536, 0))
        before = tl.cumsum(counts, 0) - counts
        at = tl.where(key < bound, less + (before & 0xFFFF), below + equal + (before >> 16))
        is_chosen = (key <= bound) & (at < wanted)
        word = tl.load(kept_words_ptr + i, mask=is_chosen, other=0).to(tl.uint32, bitcast=True)
        tl.store(points_ptr + at, _point(word), mask=is_chosen)
        total = tl.sum(counts, 0)
        less += total & 0xFFFF
        equal += total >> 16


@kernel
def _uncertain_points_kernel(
    logits_ptr, stride_l, stride_b, stride_n, assignment_ptr, seed_ptr,
    columns_ptr, kept_keys_ptr, kept_words_ptr, points_ptr,
    pairs, B, N, M, P, h, w, candidates, uncertain, deviations,
    UNIT: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The uncertain candidates of each pair, followed by points of the random stream after the candidates.

        logits       (L, B, N, h, w), assignment (L, B, M)
        points       (L * B * M, P), pairs of float32 as words of 64 bits; 0 for targets without a query
        columns      (programs, h + 1, w + 2), see ``_copy_plane``
        kept_keys, kept_words  (programs, candidates)

    Let n of C candidates be chosen. Of S sampled ones, S n / C are expected to be, with a standard deviation of
    s = sqrt(S n / C (1 - n / C)); the bounds are ``deviations`` s and a candidate apart from that. If they prove wrong,
    for 4.5 s in one of 10^5 pairs, all candidates are drawn again without the bound that did not hold.
    """
    program = tl.program_id(0).to(tl.int64)
    columns_ptr += program * (h + 1) * (w + 2)
    kept_keys_ptr += program * candidates
    kept_words_ptr += program * candidates
    lane = tl.arange(0, LANES)  # [LANES]
    TYPE: tl.constexpr = logits_ptr.dtype.element_ty
    sampled = tl.minimum(tl.cast(candidates, tl.float32), 4.0 * LANES)
    share = tl.cast(uncertain, tl.float32) / tl.maximum(tl.cast(candidates, tl.float32), 1.0)
    apart = tl.cast(deviations, tl.float32) * tl.sqrt(sampled * share * (1.0 - share)) + 1.0
    least = tl.floor(sampled * share - apart).to(tl.int32)
    most = tl.ceil(sampled * share + apart).to(tl.int32)
    for pair_number in range(tl.program_id(0), pairs, tl.num_programs(0)):
        pair = tl.cast(pair_number, tl.int64)
        of_pair_ptr = points_ptr + pair * P
        query = tl.load(assignment_ptr + pair)
        seed = tl.load(seed_ptr)
        if (query >= 0) & (query < N):
            if uncertain > 0:
                plane_ptr = _plane(logits_ptr, pair // M // B, pair // M % B, query, stride_l, stride_b, stride_n, UNIT)
                tl.debug_barrier()
                _copy_plane(plane_ptr, columns_ptr, h, w, LANES)
                tl.debug_barrier()
                _, keys = _draw(columns_ptr, seed, pair, 0, candidates, h, w, TYPE, LANES)
                low, high = _bounds(keys, least, most)
                searching = True
                chosen, kept = 0, 0
                while searching:
                    chosen, kept = _collect(
                        columns_ptr, seed, pair, candidates, uncertain, h, w, low, high, of_pair_ptr, kept_keys_ptr,
                        kept_words_ptr, TYPE, LANES,
                    )  # fmt: skip
                    tl.debug_barrier()
                    searching = (chosen > uncertain) | (chosen + kept < uncertain)
                    low = tl.where(chosen > uncertain, LEAST, low)
                    high = tl.where(chosen + kept < uncertain, MOST, high)
                if chosen < uncertain:
                    _choose(of_pair_ptr + chosen, kept_keys_ptr, kept_words_ptr, kept, uncertain - chosen, low, high,
                            CHUNK)  # fmt: skip
            counters = candidates // 64 * 16
            for start in range(0, (P - uncertain) // 4 + 32, LANES):
                counter = counters + start + lane
                words = _philox(seed, counter, pair)
                first = counter + counter // 16 * 48 - candidates
                for i in tl.static_range(4):
                    j = first + 16 * i
                    tl.store(of_pair_ptr + uncertain + j, _point(words[i]), mask=(j >= 0) & (j < P - uncertain))
        else:
            for start in range(0, P, LANES):
                zero = tl.zeros([LANES], dtype=tl.int64)
                tl.store(of_pair_ptr + start + lane, zero, mask=start + lane < P)


@cached_plan
def plan(
    device: torch.device, config: UncertainPointsConfig, shape: tuple[int, ...], strides: tuple[int, ...],
    num_targets: int, num_points: int, num_candidates: int, num_uncertain: int,
) -> Launch:  # fmt: skip
    layers, batch, queries, h, w = shape
    pairs = layers * batch * num_targets
    return _uncertain_points_kernel.plan(
        (min(pairs, config.programs),),
        **plane_sizes(shape, strides),
        pairs=pairs,
        B=batch,
        N=queries,
        M=num_targets,
        P=num_points,
        h=h,
        w=w,
        candidates=num_candidates,
        uncertain=num_uncertain,
        deviations=config.deviations,
        LANES=config.lanes,
        CHUNK=config.chunk,
        num_warps=config.num_warps,
        maxnreg=config.registers,
        **COMPILER_OPTIONS,
    )


def uncertain_points(
    mask_logits: Tensor, assignment: Tensor, seed: Tensor, num_points: int, num_candidates: int, num_uncertain: int
) -> Tensor:
    """``fastmask::uncertain_points``, (L, B, M, P, 2) float32; launches only, so it can be captured in a CUDA graph."""
    device = mask_logits.device
    points = torch.empty((*assignment.shape, num_points, 2), dtype=torch.float32, device=device)
    if points.numel() == 0:
        return points
    config = pick_config(CONFIGS, device)
    mask_logits = with_contiguous_planes(mask_logits)
    shape = mask_logits.shape
    launch = plan(
        device, config, shape, mask_logits.stride(), assignment.shape[2], num_points, num_candidates, num_uncertain
    )
    programs = launch.grid[0]
    word = torch.int64 if mask_logits.dtype == torch.float32 else torch.int32
    kept = (programs, num_candidates if num_uncertain > 0 else 0)
    launch(
        logits_ptr=mask_logits,
        assignment_ptr=assignment.contiguous(),
        seed_ptr=seed.contiguous(),
        columns_ptr=torch.empty((programs, shape[3] + 1, shape[4] + 2), dtype=word, device=device),
        kept_keys_ptr=torch.empty(kept, dtype=torch.int32, device=device),
        kept_words_ptr=torch.empty(kept, dtype=torch.int32, device=device),
        points_ptr=points.view(torch.int64),
    )
    return points
