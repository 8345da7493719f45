"""Stages mask logits for the inference kernels, and counts those that are NaN.

The logits are staged (copied) one band of rows at a time, with the queries innermost: a thread then reads 16 bytes of
queries for each tap of its pixel, whereas planes of queries would take a load for each query. Staging also clamps the
logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, _exp2, _reciprocal, kernel, unit
from fastmask.kernels._resample import (
    BLOCK_N,
    MIN_NORMAL,
    NO_TAPS,
    Resampling,
    Taps,
    _table_pitch,
    _within_bounds,
    make_taps,
)

# The bytes of a band's staged logits, most of which are still in the L2 cache (50 MB on Hopper) when they are read.
STAGE_BYTES = 32 << 20


@kernel
def _nan_count_kernel(logits_ptr, stride_b, stride_n, count_ptr, N, pixels, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to count (B, N) how many of each query's logits are NaN; strides and pixels are in units."""
    plane = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    plane_ptr = logits_ptr + (plane // N * stride_b + plane % N * stride_n) * UNIT
    x = tl.load(plane_ptr + c, mask=c < pixels * UNIT, other=0.0)
    count = tl.sum((x != x).to(tl.int32), 0)
    if count > 0:
        tl.atomic_add(count_ptr + plane, count)


def count_nans(mask_logits: Tensor, count: Tensor | None = None) -> Tensor:
    """How many logits of each query are NaN, ``(B, N)`` int32, for ``(B, N, rows, w)`` with contiguous planes; added to
    ``count``."""
    batch, queries, rows, w = mask_logits.shape
    if count is None:
        count = torch.zeros((batch, queries), dtype=torch.int32, device=mask_logits.device)
    if mask_logits.numel():
        strides = strides_in_units(mask_logits, rows * w)
        _nan_count_kernel[(batch * queries, triton.cdiv(rows * w, 4096))](
            logits_ptr=mask_logits,
            **strides,
            count_ptr=count,
            N=queries,
            pixels=rows * w // strides["UNIT"],
            BLOCK=4096,
            num_warps=4,
            **COMPILER_OPTIONS,
        )
    return count


def strides_in_units(mask_logits: Tensor, *sizes: int) -> dict[str, int]:
    """The strides of images and queries, in units; see ``unit``."""
    stride_b, stride_n = mask_logits.stride()[:2]
    size = unit(stride_b, stride_n, *sizes)
    return {"stride_b": stride_b // size, "stride_n": stride_n // size, "UNIT": size}


@kernel
def _stage_kernel(
    logits_ptr, stride_b, stride_n, order_ptr, weight_ptr,
    row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, stage_ptr, peak_ptr, count_ptr,
    N, blocks, w, first, counted, rows, columns,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PROBABILITIES: tl.constexpr, PEAKS: tl.constexpr,
    COUNTS: tl.constexpr, KEEP_NAN: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copies the logits to the stage, clamped, with the queries innermost in the given order. With PROBABILITIES it
    stages the sigmoids of logits after the first bilinear step, which the given taps describe.

        logits  (B, N, h, w), planes contiguous, strides and columns in units; without taps the rows from ``first`` on
        order   (B, N), the query at each place; weight (B, padded_n), its factor, padded_n = blocks * BLOCK_N
        stage   (B, rows * columns, padded_n); places beyond N hold arbitrary queries
        peak    (B, rows * columns), an upper bound of log2(weight * sigmoid(x)) over the queries
        count   (B, N), to which the numbers of NaN in the rows from ``counted`` on are added
    """
    image = tl.program_id(1).to(tl.int64)
    padded_n = blocks * BLOCK_N
    columns = columns * UNIT
    cells = rows * columns
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = c < cells
    peak = tl.full([BLOCK_N, BLOCK_C], float("-inf"), dtype=tl.float32)
    broken = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.int1)
    for block in range(0, padded_n, BLOCK_N):
        n = block + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        query = tl.load(order_ptr + image * N + n, mask=n < N, other=0)
        query_ptrs = (logits_ptr + (image * stride_b + query * stride_n) * UNIT)[:, None]  # [BLOCK_N, 1]
        if PROBABILITIES:
            row = c // columns
            column = c % columns
            x = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
            for ty in tl.static_range(TAPS_Y):
                y = tl.load(row_index_ptr + ty * _table_pitch(rows) + row, mask=inside, other=0).to(tl.int64) * w
                line = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
                for tx in tl.static_range(TAPS_X):
                    at = y + tl.load(column_index_ptr + tx * _table_pitch(columns) + column)
                    value = _within_bounds(tl.load(query_ptrs + at[None, :]), KEEP_NAN)
                    weight = tl.load(column_weight_ptr + tx * _table_pitch(columns) + column)
                    line = tl.fma(value, weight[None, :], line)
                weight = tl.load(row_weight_ptr + ty * _table_pitch(rows) + row, mask=inside, other=0.0)
                x = tl.fma(line, weight[None, :], x)
            x = _reciprocal(1.0 + _exp2(x * -1.44269504))
            level = tl.log2(tl.maximum(x, MIN_NORMAL))
        else:
            at = tl.cast(first, tl.int64) * columns + c
            x = tl.load(query_ptrs + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            if COUNTS:
                broken = broken | (x != x)
            x = _within_bounds(x, KEEP_NAN)
            level = tl.minimum(x * 1.44269504, 0.0)  # sigmoid(x) <= exp(min(x, 0))
        if PEAKS:
            weight = tl.load(weight_ptr + image * padded_n + n)  # 0 where there is no query
            peak = tl.maximum(peak, level + tl.log2(tl.maximum(weight, MIN_NORMAL))[:, None])
        stage_ptrs = stage_ptr + image * cells * padded_n + c[:, None] * padded_n + n[None, :]
        tl.store(stage_ptrs, tl.trans(x).to(stage_ptr.dtype.element_ty), mask=inside[:, None])
    if PEAKS:
        tl.store(peak_ptr + image * cells + c, tl.max(peak, 0), mask=inside)
    if COUNTS:  # noqa: SIM102 (a constant, unlike what follows)
        if tl.max(broken.to(tl.int32)) > 0:
            at = tl.cast(first, tl.int64) * columns + c
            inside = inside & (c >= counted * columns)
            for block in range(0, padded_n, BLOCK_N):
                n = block + tl.arange(0, BLOCK_N)
                query = tl.load(order_ptr + image * N + n, mask=n < N, other=0)
                query_ptrs = (logits_ptr + (image * stride_b + query * stride_n) * UNIT)[:, None]
                x = tl.load(query_ptrs + at[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
                count = tl.sum((x != x).to(tl.int32), 1)
                tl.atomic_add(count_ptr + image * N + query, count, mask=(n < N) & (count > 0), sem="relaxed")


@dataclass(frozen=True)
class StagedBand:
    """Staged logits or probabilities, and the rows of the result that are computed from them.

    Args:
        stage: memory that begins with the stage ``(B, cells, padded_n)``; its cells form rows of ``columns``.
        peaks: memory that begins with ``(B, cells)`` float32 upper bounds; see ``_stage_kernel``.
        taps: the taps in the stage for the result's rows and columns.
        cells, columns, padded_n: the size of the stage: all cells, cells per row, and places of queries per cell.
        top, count: the first row of the result in this band, relative to ``out_top``, and the number of rows.
        alike: how many neighboring rows of the result read the same rows of the stage; see ``Axis.alike``.
        lead: how many rows before the band the first group of them begins.
    """

    stage: Tensor
    peaks: Tensor | None
    taps: Taps
    cells: int
    columns: int
    padded_n: int
    top: int
    count: int
    alike: int
    lead: int

    def launch(
        self, result: Tensor, tile_rows: int, tile_columns: int, lead: int = 0
    ) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid of programs, one for each tile of the ``result (B, ..., H, W)``, and arguments for its kernel. The
        first tiles begin ``lead`` rows before the band."""
        height, width = result.shape[-2:]
        tiles_x = triton.cdiv(width, tile_columns)
        return (triton.cdiv(self.count + lead, tile_rows) * tiles_x, result.shape[0]), {
            "stage_ptr": self.stage,
            **self.taps.arguments(),
            "blocks": self.padded_n // BLOCK_N.value,
            "cells": self.cells,
            "columns": self.columns,
            "top": self.top,
            "count": self.count,
            "H": height,
            "W": width,
            "tiles_x": tiles_x,
            "TILE_Y": tile_rows,
            "TILE_X": tile_columns,
            "num_stages": 1,
            **COMPILER_OPTIONS,
        }


def padded_queries(count: int) -> int:
    return triton.cdiv(count, BLOCK_N.value) * BLOCK_N.value


def unread_rows(reads: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges of the rows from ``begin`` to ``end`` that none of the ranges ``reads``, in order, holds."""
    for first, last in reads:
        if first > begin:
            yield begin, first
        begin = max(begin, last)
    if begin < end:
        yield begin, end


def staged_bands(
    mask_logits: Tensor,
    order: Tensor,
    weight: Tensor | None,
    probabilities: bool,
    keep_nan: bool,
    resampling: Resampling,
    tile_rows: int,
    nan_logits: Tensor | None = None,
) -> Iterator[StagedBand]:
    """Yields the result in bands of whole rows of tiles, enough of them to keep each stage within ``STAGE_BYTES``.

    All bands share their memory: launch the kernels that read a band, on the same stream, before taking the next band.

    Args:
        mask_logits: ``(B, N, rows, w)``, planes contiguous.
        order: ``(B, N)`` int64, the query at each place of the stage.
        weight: ``(B, padded_n)`` float32, the queries' weights in the peaks; None computes no peaks.
        probabilities: stage the sigmoid of the valid grid, so that the taps cover the second step only.
        keep_nan: stage NaN as NaN, rather than as a logit that never wins.
        tile_rows: the rows of a tile of the result; bands hold a multiple of them.
        nan_logits: ``(B, N)`` int32, to which the number of NaN logits of each query is added.
    """
    batch, queries, in_rows, in_width = mask_logits.shape
    device = mask_logits.device
    rows, columns = resampling.axes()
    *_, in_top, out_top, out_rows = resampling
    padded_n = padded_queries(queries)
    dtype = torch.bfloat16 if mask_logits.dtype == torch.bfloat16 and not probabilities else torch.float32
    source, source_columns = resampling.staged_axes(probabilities)
    width = source_columns.grid
    bounds = (0, source.grid) if probabilities else (in_top, in_top + in_rows)
    first, end = source.reads(out_top, out_top + out_rows)
    tiles = triton.cdiv(out_rows, tile_rows)
    whole = (end - first) * batch * width * padded_n * dtype.itemsize
    count = max(1, min(tiles, triton.cdiv(whole, STAGE_BYTES)))
    cuts = [min(tiles * band // count * tile_rows, out_rows) for band in range(count)] + [out_rows]
    reads = [source.reads(out_top + top, out_top + below) for top, below in pairwise(cuts)]
    reads = [(max(first, bounds[0]), min(end, bounds[1])) for first, end in reads]
    most = max(end - first for first, end in reads)
    stage = torch.empty(batch * most * width * padded_n, dtype=dtype, device=device)
    # Taps are read one at a time, so with probabilities the width of the stage need not be a multiple of the unit.
    strides = strides_in_units(mask_logits, 1 if probabilities else width)
    peaks = None if weight is None else torch.empty(batch * most * width, dtype=torch.float32, device=device)
    counts = nan_logits is not None and not probabilities
    if nan_logits is not None:
        for begin, end in unread_rows(reads if counts else [], in_top, in_top + in_rows):
            count_nans(mask_logits[:, :, begin - in_top : end - in_top], nan_logits)
    read = in_top
    for (top, below), (first, end) in zip(pairwise(cuts), reads, strict=True):
        inner = NO_TAPS
        if probabilities:
            steps = rows.first_step(), columns.first_step()
            inner = make_taps(*steps, first, end - first, in_top, in_rows, width, device).arguments()
        _stage_kernel[(triton.cdiv((end - first) * width, 64), batch)](
            logits_ptr=mask_logits,
            **strides,
            order_ptr=order,
            weight_ptr=weight,
            **inner,
            stage_ptr=stage,
            peak_ptr=peaks,
            count_ptr=nan_logits if counts else None,
            N=queries,
            blocks=padded_n // BLOCK_N.value,
            w=in_width,
            first=first - in_top,
            counted=max(read - first, 0),
            rows=end - first,
            columns=width // strides["UNIT"],
            PROBABILITIES=probabilities,
            PEAKS=weight is not None,
            COUNTS=counts,
            KEEP_NAN=keep_nan,
            BLOCK_C=64,
            num_warps=4,
            **COMPILER_OPTIONS,
        )
        read = max(read, end)
        cells = (end - first) * width
        taps = make_taps(
            source, source_columns, out_top + top, below - top, first, end - first, source_columns.size, device
        )
        alike, begin = source.alike()
        lead = (out_top + top - begin) % alike
        yield StagedBand(stage, peaks, taps, cells, width, padded_n, top, below - top, alike, lead)
