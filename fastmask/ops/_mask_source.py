"""What semantic, panoptic and instance inference share: checks, and mask logits by bands of the result's rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.ops._checks import check_floating, computing_dtype
from fastmask.ops._geometry import Geometry, Size
from fastmask.ops._registry import Operator, choose_backend
from fastmask.ops._tracing import as_size
from fastmask.ops.embeddings import mask_products

# Mask logits that one band holds at most when they come from embeddings.
BAND_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}


class Band(NamedTuple):
    """Rows of a result, and the rows of mask logits that they read.

    Args:
        mask_logits: ``(B, N, rows, w)``.
        rows: of the result.
        repeated: how many of its first rows of mask logits the band before has had too.
        geometry: the operators' last arguments.
    """

    mask_logits: Tensor
    rows: slice
    repeated: int
    geometry: tuple[object, ...]

    def repeated_nan_logits(self) -> Tensor:
        """``(B, N)`` int32: how many logits of each query the band before has counted as NaN too."""
        return self.mask_logits[:, :, : self.repeated].isnan().sum((-2, -1), dtype=torch.int32)


@dataclass(frozen=True)
class MaskSource:
    """Mask logits ``(B, N, h, w)``, or ``mask_embed (B, N, C)`` and ``pixel_embed (B, C, h, w)`` whose product they
    are, and how they become the pixels of a result."""

    mask_logits: Tensor | None
    mask_embed: Tensor | None
    pixel_embed: Tensor | None
    geometry: Geometry

    @property
    def tensor(self) -> Tensor:
        """One of the tensors, for its device and dtype."""
        return self.mask_embed if self.mask_logits is None else self.mask_logits

    def of_used_queries(self, used: Tensor) -> tuple[MaskSource, Tensor]:
        """The masks of queries that are ``used (B, N)`` bool, where leaving out the others spares work, and ``(B, U)``
        int64: which queries they are, those used first, as they come.

        Only embeddings on a CPU leave out any: elsewhere the host would have to wait for their number.
        """
        if self.mask_embed is None or used.device.type != "cpu":
            return self, torch.arange(used.shape[1], device=used.device).expand_as(used)
        count = max(int(used.sum(1).max()), 1) if used.numel() > 0 else used.shape[1]
        queries = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        mask_embed = self.mask_embed.gather(1, queries[..., None].expand(-1, -1, self.mask_embed.shape[2]))
        return replace(self, mask_embed=mask_embed), queries

    def bands(self) -> Iterator[Band]:
        """All of the result in one band, or from embeddings in as many as keep the mask logits small."""
        height = self.geometry.size[0]
        if self.mask_logits is not None:
            yield Band(self.mask_logits, slice(0, height), 0, self.geometry.arguments())
            return
        grid_rows, w = self.geometry.grid
        row_bytes = self.mask_embed.shape[0] * self.mask_embed.shape[1] * w * self.mask_embed.element_size()
        most_rows = BAND_BYTES.get(self.tensor.device.type, BAND_BYTES["cuda"]) // max(row_bytes, 1)
        count = -(-grid_rows // max(most_rows - 2, 2))
        tops = [height * band // min(count, height) for band in range(min(count, height) + 1)]
        seen = 0
        for top, end in pairwise(tops):
            first, last = self.geometry.input_rows(top, end - top)
            yield Band(
                self.logits_of_rows(first, last),
                slice(top, end),
                max(seen - first, 0),
                self.geometry.arguments(first, top, end - top),
            )
            seen = last

    def logits_of_rows(self, first: int, end: int) -> Tensor:
        """``(B, N, end - first, w)``."""
        if self.mask_logits is not None:
            return self.mask_logits[:, :, first:end]
        return mask_products(self.mask_embed, self.pixel_embed[:, :, first:end])

    def full_logits(self, dtype: torch.dtype) -> Tensor:
        """``(B, N, h, w)`` of a dtype, which embeddings are converted to before their product: for the reference."""
        if self.mask_logits is not None:
            return self.mask_logits.to(dtype)
        return mask_products(self.mask_embed.to(dtype), self.pixel_embed.to(dtype))


def belong_to(labels: Tensor, classes: Collection[int]) -> Tensor:
    """Whether each label is one of ``classes``. Nothing waits for the device, as ``torch.isin`` and copies may."""
    chosen = torch.tensor(sorted(classes), dtype=labels.dtype, pin_memory=labels.device.type == "cuda")
    return (labels[..., None] == chosen.to(labels.device, non_blocking=True)).any(-1)


def prepare(
    operator: Operator,
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
    size: Size,
    padded_size: Size | None,
    valid_size: Size | None,
    backend: str,
) -> tuple[MaskSource, str, torch.dtype]:
    """The masks, the backend that will run, and the dtype that the reference computes in; all arguments checked."""
    check_floating("class_logits", class_logits, 3, "(B, N, K+1)")
    if class_logits.dim() != 3 or class_logits.shape[-1] < 2:
        raise ValueError(f"class_logits has shape {tuple(class_logits.shape)}; expected (B, N, K+1), K at least 1")
    if isinstance(mask_logits, Tensor):
        source, tensors = _from_logits(class_logits, mask_logits), (mask_logits,)
    else:
        source, tensors = _from_embeddings(class_logits, mask_logits), tuple(mask_logits)
    grid, mask_embed, pixel_embed = source
    for tensor in tensors:
        if tensor.device != class_logits.device:
            raise ValueError(f"class_logits is on {class_logits.device}, the masks are on {tensor.device}")
    geometry = _geometry(grid, size, padded_size, valid_size)
    masks = MaskSource(mask_logits if mask_embed is None else None, mask_embed, pixel_embed, geometry)
    dtype = computing_dtype(class_logits, *tensors)
    probe = next((tensor for tensor in (class_logits, *tensors) if tensor.dtype == dtype), masks.tensor)
    return masks, choose_backend(operator, backend, probe if dtype == torch.float64 else masks.tensor), dtype


def _from_logits(class_logits: Tensor, mask_logits: Tensor) -> tuple[Size, None, None]:
    check_floating("mask_logits", mask_logits, 4, "(B, N, h, w)")
    if mask_logits.dim() != 4 or mask_logits.shape[:2] != class_logits.shape[:2]:
        raise ValueError(
            f"class_logits has shape {tuple(class_logits.shape)} and mask_logits {tuple(mask_logits.shape)}; "
            "expected (B, N, K+1) and (B, N, h, w)"
        )
    if 0 in mask_logits.shape[2:]:
        raise ValueError(f"mask_logits has shape {tuple(mask_logits.shape)}; expected at least one pixel")
    return tuple(mask_logits.shape[2:]), None, None


def _from_embeddings(class_logits: Tensor, embeddings: tuple[Tensor, Tensor]) -> tuple[Size, Tensor, Tensor]:
    if not isinstance(embeddings, tuple | list) or len(embeddings) != 2:
        raise TypeError(
            "mask_logits must be a tensor (B, N, h, w) or a pair (mask_embed, pixel_embed), "
            f"got {type(embeddings).__name__}"
        )
    mask_embed, pixel_embed = embeddings
    check_floating("mask_embed", mask_embed, 3, "(B, N, C)")
    check_floating("pixel_embed", pixel_embed, 4, "(B, C, h, w)")
    fits = (
        mask_embed.dim() == 3
        and pixel_embed.dim() == 4
        and mask_embed.shape[:2] == class_logits.shape[:2]
        and pixel_embed.shape[:2] == (mask_embed.shape[0], mask_embed.shape[2])
    )
    if not fits:
        raise ValueError(
            f"class_logits has shape {tuple(class_logits.shape)}, mask_embed {tuple(mask_embed.shape)} and pixel_embed "
            f"{tuple(pixel_embed.shape)}; expected (B, N, K+1), (B, N, C) and (B, C, h, w)"
        )
    if 0 in pixel_embed.shape[2:]:
        raise ValueError(f"pixel_embed has shape {tuple(pixel_embed.shape)}; expected at least one pixel")
    if mask_embed.dtype != pixel_embed.dtype:
        raise TypeError(f"mask_embed is {mask_embed.dtype}, pixel_embed {pixel_embed.dtype}; expected one dtype")
    return tuple(pixel_embed.shape[2:]), mask_embed, pixel_embed


def _geometry(grid: Size, size: Size, padded_size: Size | None, valid_size: Size | None) -> Geometry:
    for name, value in (("size", size), ("padded_size", padded_size), ("valid_size", valid_size)):
        if value is None and name != "size":
            continue
        if len(value) != 2 or min(value) < 1:
            raise ValueError(f"{name} must be (height, width), both at least 1, got {tuple(value)}")
    padded = grid if padded_size is None else padded_size
    if valid_size is not None and (valid_size[0] > padded[0] or valid_size[1] > padded[1]):
        raise ValueError(f"valid_size={tuple(valid_size)} does not lie within the {tuple(padded)} map")
    return Geometry(grid, *(None if value is None else as_size(value) for value in (padded_size, valid_size, size)))
