"""The largest of each pixel's scores, and the lowest class that has it.

The scores of a pixel meet in a tournament, which keeps the lower one of each pair: their maxima take an instruction per
score. On the way back from the winner, a comparison tells which half of the classes it comes from, and the half is
selected: again about one instruction per score, where comparing each score with the winner takes three.

Classes are numbered as 8 j + r. A product of the tensor cores leaves all classes of equal r in one thread, so that only
the winners of eight tournaments per pixel are exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(x, NEIGHBORS: tl.constexpr):
    """Both halves of the middle axis of ``[P, J, 8]``: the even and the odd ones, or the lower and the upper ones."""
    P: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if NEIGHBORS:
        pairs = tl.permute(tl.reshape(x, [P, HALF, 2, 8]), (0, 1, 3, 2))
    else:
        pairs = tl.permute(tl.reshape(x, [P, 2, HALF, 8]), (0, 2, 3, 1))
    return tl.split(pairs)


@triton.jit
def _tournament(scores, CLASSES: tl.constexpr):
    """Of ``[P, CLASSES]``, a power of two: the largest scores ``[P, 1, 8]`` of equal r, and the even scores of each
    round."""
    x = tl.reshape(scores, [scores.shape[0], CLASSES // 8, 8])
    even = ()
    for _ in tl.static_range(CLASSES.bit_length() - 4):
        low, high = _halves(x, True)
        even = even + (low,)  # noqa: RUF005 (Triton has no stars)
        x = tl.maximum(low, high)
    return x, even


@triton.jit
def _winning_places(even, winner, CLASSES: tl.constexpr):
    """The lowest j ``[P, 1, 8]`` of the ``winner``, where it is among the scores of that r."""
    ROUNDS: tl.constexpr = CLASSES.bit_length() - 4
    place = tl.zeros([winner.shape[0], 1, 8], dtype=tl.int32)
    upper = ()
    for i in tl.static_range(ROUNDS):
        x = even[ROUNDS - 1 - i]
        for k in tl.static_range(i):
            low, high = _halves(x, False)
            x = tl.where(upper[k], high, low)
        odd = x != winner[:, None, None]  # [P, 1, 8]
        upper = upper + (odd,)  # noqa: RUF005
        place = place * 2 + odd.to(tl.int32)
    return place


@triton.jit
def _best_class(scores_a, scores_b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of scores ``[P, BLOCK_A]`` and, unless BLOCK_B is 0, ``[P, BLOCK_B]`` of further classes: the largest, and the
    lowest class that has it, or BLOCK_A + BLOCK_B if all are NaN."""
    P: tl.constexpr = scores_a.shape[0]
    best_a, even_a = _tournament(scores_a, BLOCK_A)
    best = best_a
    if BLOCK_B:
        best_b, even_b = _tournament(scores_b, BLOCK_B)
        best = tl.maximum(best_a, best_b)
    winner = tl.max(tl.reshape(best, [P, 8]), 1)
    r = tl.arange(0, 8)[None, None, :]
    place = tl.full([P, 1, 8], BLOCK_A + BLOCK_B, dtype=tl.int32)
    if BLOCK_B:
        place_b = BLOCK_A + 8 * _winning_places(even_b, winner, BLOCK_B) + r
        place = tl.where(best_b == winner[:, None, None], place_b, place)
    place_a = 8 * _winning_places(even_a, winner, BLOCK_A) + r
    place = tl.where(best_a == winner[:, None, None], place_a, place)
    return winner, tl.min(tl.reshape(place, [P, 8]), 1)
