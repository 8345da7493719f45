"""The repeated parts of a network: what is sharded and recomputed as a unit."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastmask.models.efficientnet import InvertedResidual
from fastmask.modules.masked_predictor import MaskedDecoderLayer
from fastmask.modules.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from fastmask.modules.vit import Block

LAYERS = (TransformerEncoderLayer, TransformerDecoderLayer, MaskedDecoderLayer, Block, InvertedResidual)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of our transformers and backbones and the blocks of other libraries' backbones, none inside another.

    Another library's blocks are the entries of the outermost ``nn.ModuleList`` of its backbone, or, where these are
    stages that hold lists of equal layers themselves, those layers: so ``transformers`` keeps them. Stages of a ResNet
    are whole.
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
    """What has weights in the outermost lists of a module; with ``alike``, in lists of one class alone."""
    found = []
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            found += _entries(child, alike=alike)
        elif not alike or len({type(entry) for entry in child}) == 1:
            found += [entry for entry in child if any(True for _ in entry.parameters())]
    return found
