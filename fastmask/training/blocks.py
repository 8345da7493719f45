"""The repeated blocks of a network, the units of sharding and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastmask.models.efficientnet import InvertedResidual
from fastmask.modules.dino import ScaledBlock
from fastmask.modules.transformer import PostNormLayer
from fastmask.modules.vit import Block

LAYERS = (PostNormLayer, Block, ScaledBlock, InvertedResidual)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of fastmask's transformers and backbones, and the blocks of other backbones, none inside another.

    The blocks of another library's backbone are the entries of its outermost ``nn.ModuleList``; if these are stages
    with lists of equal layers, as in ``transformers``, the blocks are those layers. A stage of a ResNet is one block.
    """
    if isinstance(model, LAYERS):
        yield model
    elif _ours(model):
        for child in model.children():
            yield from blocks(child)
    else:
        for stage in _entries(model, alike=False):
            yield from _entries(stage, alike=True) or [stage]


def _ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("fastmask.", "torch.nn."))


def _entries(module: nn.Module, *, alike: bool) -> list[nn.Module]:
    """The entries with weights in a module's outermost lists; with ``alike``, only in lists of a single class."""
    found = []
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            found += _entries(child, alike=alike)
        elif not alike or len({type(entry) for entry in child}) == 1:
            found += [entry for entry in child if any(True for _ in entry.parameters())]
    return found
