"""Argument checks of semantic, panoptic and instance inference, and mask logits in bands of the result's rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.ops._checks import check_floating, computing_dtype
from fastmask.ops._geometry import Geometry, GeometryArguments, Size
from fastmask.ops._registry import Operator, choose_backend
from fastmask.ops._tracing import as_size
from fastmask.ops.embeddings import mask_products

# The most bytes that the mask logits of one band take when they are computed from embeddings.
BAND_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}


class Band(NamedTuple):
    """A band of a result's rows, with the rows of mask logits that it reads.

    Args:
        mask_logits: ``(B, N, rows, w)``.
        rows: the result's rows in this band.
        repeated: how many of the first rows of ``mask_logits`` the previous band has read, too.
        geometry: the operators' last arguments.
    """

    mask_logits: Tensor
    rows: slice
    repeated: int
    geometry: GeometryArguments

    def repeated_nan_logits(self) -> Tensor:
        """``(B, N)`` int32: how many of each query's NaN logits the previous band has counted, too."""
        return self.mask_logits[:, :, : self.repeated].isnan().sum((-2, -1), dtype=torch.int32)


@dataclass(frozen=True)
class MaskSource:
    """Where mask logits come from, and how they become the pixels of a result.

    Args:
        masks: mask logits ``(B, N, h, w)``, or a pair ``mask_embed (B, N, C)`` and ``pixel_embed (B, C, h, w)`` to
            multiply over C.
        geometry: how the grid of the mask logits maps to the pixels of the result.
    """

    masks: Tensor | tuple[Tensor, Tensor]
    geometry: Geometry

    @property
    def tensor(self) -> Tensor:
        """One of the tensors; all have the same device and dtype."""
        return self.masks if isinstance(self.masks, Tensor) else self.masks[0]

    def keep_used(self, used: Tensor) -> tuple[MaskSource, Tensor]:
        """Drops queries that are not ``used (B, N)``, if that saves work. Also returns the indices of the remaining
        queries, ``(B, U)`` int64, in ascending order with the used ones first.

        Only embeddings on a CPU drop queries: elsewhere the host would have to wait for U.
        """
        if isinstance(self.masks, Tensor) or used.device.type != "cpu":
            return self, torch.arange(used.shape[1], device=used.device).expand_as(used)
        count = max(int(used.sum(1).max()), 1) if used.numel() > 0 else used.shape[1]
        queries = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        mask_embed, pixel_embed = self.masks
        mask_embed = mask_embed.gather(1, queries[..., None].expand(-1, -1, mask_embed.shape[2]))
        return replace(self, masks=(mask_embed, pixel_embed)), queries

    def bands(self) -> Iterator[Band]:
        """Yields the whole result as one band or, with embeddings, as enough bands to keep the mask logits small."""
        height = self.geometry.size[0]
        if isinstance(self.masks, Tensor):
            yield Band(self.masks, slice(0, height), 0, self.geometry.arguments())
            return
        mask_embed, _ = self.masks
        grid_rows, w = self.geometry.grid
        row_bytes = mask_embed.shape[0] * mask_embed.shape[1] * w * mask_embed.element_size()
        most_rows = BAND_BYTES.get(mask_embed.device.type, BAND_BYTES["cuda"]) // max(row_bytes, 1)
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
        """The mask logits ``(B, N, end - first, w)`` of the grid's rows [first, end)."""
        if isinstance(self.masks, Tensor):
            return self.masks[:, :, first:end]
        mask_embed, pixel_embed = self.masks
        return mask_products(mask_embed, pixel_embed[:, :, first:end])

    def full_logits(self, dtype: torch.dtype) -> Tensor:
        """All mask logits ``(B, N, h, w)``, for the reference; embeddings become ``dtype`` before their product."""
        if isinstance(self.masks, Tensor):
            return self.masks.to(dtype)
        mask_embed, pixel_embed = self.masks
        return mask_products(mask_embed.to(dtype), pixel_embed.to(dtype))


def belong_to(labels: Tensor, classes: Collection[int]) -> Tensor:
    """Whether each label is one of ``classes``. Unlike ``torch.isin``, this never makes the host wait."""
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
    """Checks all arguments; returns the masks, the backend that will run, and the dtype for the reference."""
    check_floating("class_logits", class_logits, 3, "(B, N, K+1)")
    if class_logits.dim() != 3 or class_logits.shape[-1] < 2:
        raise ValueError(f"class_logits has shape {tuple(class_logits.shape)}; expected (B, N, K+1), K at least 1")
    if isinstance(mask_logits, Tensor):
        _check_logits(class_logits, mask_logits)
        tensors = [mask_logits]
    else:
        _check_embeddings(class_logits, mask_logits)
        mask_embed, pixel_embed = tensors = [*mask_logits]
        mask_logits = mask_embed, pixel_embed
    for tensor in tensors:
        if tensor.device != class_logits.device:
            raise ValueError(f"class_logits is on {class_logits.device}, the masks are on {tensor.device}")
    height, width = tensors[-1].shape[2:]
    masks = MaskSource(mask_logits, _geometry((height, width), size, padded_size, valid_size))
    dtype = computing_dtype(class_logits, *tensors)
    probe = next((tensor for tensor in (class_logits, *tensors) if tensor.dtype == dtype), masks.tensor)
    return masks, choose_backend(operator, backend, probe if dtype == torch.float64 else masks.tensor), dtype


def _check_logits(class_logits: Tensor, mask_logits: Tensor) -> None:
    check_floating("mask_logits", mask_logits, 4, "(B, N, h, w)")
    if mask_logits.dim() != 4 or mask_logits.shape[:2] != class_logits.shape[:2]:
        raise ValueError(
            f"class_logits has shape {tuple(class_logits.shape)} and mask_logits {tuple(mask_logits.shape)}; "
            "expected (B, N, K+1) and (B, N, h, w)"
        )
    if 0 in mask_logits.shape[2:]:
        raise ValueError(f"mask_logits has shape {tuple(mask_logits.shape)}; expected at least one pixel")


def _check_embeddings(class_logits: Tensor, embeddings: tuple[Tensor, Tensor]) -> None:
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


def _geometry(grid: Size, size: Size, padded_size: Size | None, valid_size: Size | None) -> Geometry:
    given = {"size": size} | ({} if padded_size is None else {"padded_size": padded_size})
    given |= {} if valid_size is None else {"valid_size": valid_size}
    for name, value in given.items():
        if len(value) != 2 or min(value) < 1:
            raise ValueError(f"{name} must be (height, width), both at least 1, got {tuple(value)}")
    padded = grid if padded_size is None else padded_size
    if valid_size is not None and (valid_size[0] > padded[0] or valid_size[1] > padded[1]):
        raise ValueError(f"valid_size={tuple(valid_size)} does not lie within the {tuple(padded)} map")
    padded_size, valid_size = (None if side is None else as_size(side) for side in (padded_size, valid_size))
    return Geometry(grid, padded_size, valid_size, as_size(size))
