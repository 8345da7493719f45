"""Stages mask logits for the inference kernels, and counts those that are NaN.

The logits are staged (copied) one band of rows at a time, with the queries innermost: a thread then reads 16 bytes of
queries for each tap of its pixel, whereas planes of queries would take a load for each query. Staging also clamps the
logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, _exp2, _reciprocal, ceil_div, unit
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._resample import (
    BLOCK_N,
    MIN_NORMAL,
    NO_TABLES,
    Resampling,
    TapsPlan,
    _table_pitch,
    _within_bounds,
    plan_taps,
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


@cached_plan
def plan_nan_count(device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...]) -> Launch:
    batch, queries, rows, w = shape
    in_units = strides_in_units(strides, rows * w)
    return _nan_count_kernel.plan(
        (batch * queries, ceil_div(rows * w, 4096)),
        **in_units,
        N=queries,
        pixels=rows * w // in_units["UNIT"],
        BLOCK=4096,
        num_warps=4,
        **COMPILER_OPTIONS,
    )


def count_nans(mask_logits: Tensor, count: Tensor | None = None) -> Tensor:
    """How many logits of each query are NaN, ``(B, N)`` int32, for ``(B, N, rows, w)`` with contiguous planes; added to
    ``count``."""
    device, shape = mask_logits.device, mask_logits.shape
    if count is None:
        count = torch.zeros(shape[:2], dtype=torch.int32, device=device)
    if mask_logits.numel():
        plan_nan_count(device, shape, mask_logits.stride())(logits_ptr=mask_logits, count_ptr=count)
    return count


def strides_in_units(strides: tuple[int, ...], *sizes: int) -> dict[str, int]:
    """The strides of images and queries, in units; see ``unit``."""
    stride_b, stride_n, *_ = strides
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
class Band:
    """A band of the result's rows: how its logits or probabilities are staged, and what kernels must know that read the
    stage.

    Args:
        uncounted: ranges of the rows of logits whose NaN the launch of the stage does not count.
        inner: the taps of the first step, with which probabilities are staged.
        stage: the launch that writes the stage ``(B, cells, padded_n)``, whose cells form rows of ``columns``.
        taps: those in the stage for the result's rows and columns.
        cells, columns, padded_n: the size of the stage: all cells, cells per row, and places of queries per cell.
        top, count: the first row of the result in this band, relative to ``out_top``, and the number of rows.
        alike: how many neighboring rows of the result read the same rows of the stage; see ``Axis.alike``.
        lead: how many rows before the band the first group of them begins.
    """

    uncounted: tuple[tuple[int, int], ...]
    inner: TapsPlan | None
    stage: Launch
    taps: TapsPlan
    cells: int
    columns: int
    padded_n: int
    top: int
    count: int
    alike: int
    lead: int

    def reader(
        self, batch: int, size: tuple[int, int], tile_rows: int, tile_columns: int, lead: int = 0
    ) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid of programs, one for each tile of a result of this (height, width), and arguments for its kernel.
        The first tiles begin ``lead`` rows before the band."""
        height, width = size
        tiles_x = ceil_div(width, tile_columns)
        return (ceil_div(self.count + lead, tile_rows) * tiles_x, batch), {
            **self.taps.arguments,
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


class Bands(NamedTuple):
    """The bands of a result, which share their memory, and the sizes of the memory for stage and peaks."""

    bands: tuple[Band, ...]
    stage: int
    stage_dtype: torch.dtype
    peaks: int


def padded_queries(count: int) -> int:
    return ceil_div(count, BLOCK_N.value) * BLOCK_N.value


def unread_rows(reads: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges of the rows from ``begin`` to ``end`` that none of the ranges ``reads``, in order, holds."""
    for first, last in reads:
        if first > begin:
            yield begin, first
        begin = max(begin, last)
    if begin < end:
        yield begin, end


def plan_bands(
    device: torch.device, stage_bytes: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
    probabilities: bool, keep_nan: bool, peaks: bool, counts: bool, resampling: Resampling, tile_rows: int,
) -> Bands:  # fmt: skip
    """The result in bands of whole rows of tiles, enough of them to keep each stage within ``stage_bytes``.

    Args:
        shape, strides, dtype: those of the mask logits ``(B, N, rows, w)``, planes contiguous.
        probabilities: stage the sigmoid of the valid grid, so that the taps cover the second step only.
        keep_nan: stage NaN as NaN, rather than as a logit that never wins.
        peaks: compute the peaks.
        counts: count the NaN logits of each query.
        tile_rows: the rows of a tile of the result; bands hold a multiple of them.
    """
    batch, queries, in_rows, in_width = shape
    rows, columns = resampling.axes()
    *_, in_top, out_top, out_rows = resampling
    padded_n = padded_queries(queries)
    stage_dtype = torch.bfloat16 if dtype == torch.bfloat16 and not probabilities else torch.float32
    source, source_columns = resampling.staged_axes(probabilities)
    width = source_columns.grid
    bounds = (0, source.grid) if probabilities else (in_top, in_top + in_rows)
    first, end = source.reads(out_top, out_top + out_rows)
    tiles = ceil_div(out_rows, tile_rows)
    whole = (end - first) * batch * width * padded_n * stage_dtype.itemsize
    count = max(1, min(tiles, ceil_div(whole, stage_bytes)))
    cuts = [min(tiles * band // count * tile_rows, out_rows) for band in range(count)] + [out_rows]
    reads = [source.reads(out_top + top, out_top + below) for top, below in pairwise(cuts)]
    reads = [(max(first, bounds[0]), min(end, bounds[1])) for first, end in reads]
    most = max(end - first for first, end in reads)
    # Taps are read one at a time, so with probabilities the width of the stage need not be a multiple of the unit.
    in_units = strides_in_units(strides, 1 if probabilities else width)
    counted = counts and not probabilities
    uncounted = tuple(unread_rows(reads if counted else [], in_top, in_top + in_rows)) if counts else ()
    bands = []
    read = in_top
    for (top, below), (first, end) in zip(pairwise(cuts), reads, strict=True):
        inner = None
        if probabilities:
            steps = rows.first_step(), columns.first_step()
            inner = plan_taps(*steps, first, end - first, in_top, in_rows, width)
        stage = _stage_kernel.plan(
            (ceil_div((end - first) * width, 64), batch),
            **in_units,
            **({"TAPS_Y": 0, "TAPS_X": 0} if inner is None else inner.arguments),
            N=queries,
            blocks=padded_n // BLOCK_N.value,
            w=in_width,
            first=first - in_top,
            counted=max(read - first, 0),
            rows=end - first,
            columns=width // in_units["UNIT"],
            PROBABILITIES=probabilities,
            PEAKS=peaks,
            COUNTS=counted,
            KEEP_NAN=keep_nan,
            BLOCK_C=64,
            num_warps=4,
            **COMPILER_OPTIONS,
        )
        read = max(read, end)
        taps = plan_taps(source, source_columns, out_top + top, below - top, first, end - first, source_columns.size)
        alike, begin = source.alike()
        lead = (out_top + top - begin) % alike
        cells = (end - first) * width
        own = tuple((begin - in_top, end - in_top) for begin, end in uncounted) if not bands else ()
        bands.append(Band(own, inner, stage, taps, cells, width, padded_n, top, below - top, alike, lead))
    return Bands(tuple(bands), batch * most * width * padded_n, stage_dtype, batch * most * width if peaks else 0)


def staged_bands(
    plan: Bands, mask_logits: Tensor, order: Tensor, weight: Tensor | None = None, nan_logits: Tensor | None = None
) -> Iterator[dict[str, Tensor | None]]:
    """Stages one band after another, and yields the tensors of each by the names of the arguments of the kernels that
    read them.

    All bands share their memory: launch the kernels that read a band, on the same stream, before taking the next band.

    Args:
        mask_logits: ``(B, N, rows, w)``, planes contiguous.
        order: ``(B, N)`` int64, the query at each place of the stage.
        weight: ``(B, padded_n)`` float32, the queries' weights in the peaks; None computes no peaks.
        nan_logits: ``(B, N)`` int32, to which the number of NaN logits of each query is added.
    """
    device = mask_logits.device
    stage = torch.empty(plan.stage, dtype=plan.stage_dtype, device=device)
    peaks = None if weight is None else torch.empty(plan.peaks, dtype=torch.float32, device=device)
    for band in plan.bands:
        for begin, end in band.uncounted:
            count_nans(mask_logits[:, :, begin:end], nan_logits)
        band.stage(
            logits_ptr=mask_logits,
            order_ptr=order,
            weight_ptr=weight,
            **(NO_TABLES if band.inner is None else band.inner.tables(device)),
            stage_ptr=stage,
            peak_ptr=peaks,
            count_ptr=nan_logits if band.stage.arguments["COUNTS"] else None,
        )
        tensors = {"stage_ptr": stage, **band.taps.tables(device)}
        yield tensors if peaks is None else tensors | {"peak_ptr": peaks}
