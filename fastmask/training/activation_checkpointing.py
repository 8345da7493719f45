"""Activation checkpointing: backward recomputes the activations inside a network's blocks to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastmask.training.blocks import blocks

Model = TypeVar("Model", bound=nn.Module)


def checkpoint_activations(model: Model) -> Model:
    """Makes each transformer layer, ViT block and backbone block keep only its inputs for backward (Chen et al.,
    arXiv:1604.06174), in place. A step takes about one more forward pass, and its peak memory holds the activations of
    one block instead of all.

    Losses and gradients do not change: dropout and stochastic depth draw the same random numbers again, and the running
    statistics of batch norm are updated once. Names of weights, and calls without gradients, do not change, either.
    Call it before :func:`fastmask.training.distributed.wrap`.

    Args:
        model: a network of fastmask, or any module that contains its transformers or a backbone with lists of blocks.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no such block.
    """
    found = [block for block in blocks(model) if not _recomputes(block)]
    for block in found:
        inner = vars(block).get("forward") or partial(type(block).forward, block)
        # A partial, not a closure, so that a copy of the model calls its own block.
        block.forward = partial(_recomputed, block, inner)
    if not found and not any(map(_recomputes, blocks(model))):
        raise ValueError(f"{type(model).__name__} has no transformer layers and no backbone with lists of blocks")
    return model


def _recomputes(block: nn.Module) -> bool:
    forward = vars(block).get("forward")
    return isinstance(forward, partial) and forward.func is _recomputed


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    options: dict[str, Any] = {}
    if norms := [module for module in block.modules() if isinstance(module, _BatchNorm)]:
        options["context_fn"] = partial(_contexts, norms)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the forward pass and of its repetition."""
    return nullcontext(), _still(norms)


@contextmanager
def _still(norms: list[_BatchNorm]) -> Iterator[None]:
    """A context in which batch norms normalize as before, but do not update their running statistics."""
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches
