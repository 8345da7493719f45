"""transformers' EoMT: matcher and losses at random points."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.models.eomt import modeling_eomt as hf

from fastmask.integrations.transformers._criteria import PointLoss, PointMatcher, criterion_replacements


def replacements(module: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules to replace and the class that each gets; see ``fastmask.integrations._patching``."""
    matchers = {hf.EomtHungarianMatcher: EomtHungarianMatcher}
    yield from criterion_replacements(module, matchers, {hf.EomtLoss: EomtLoss})


class EomtHungarianMatcher(PointMatcher, hf.EomtHungarianMatcher):
    """The matcher, by fastmask's kernels."""


class EomtLoss(PointLoss, hf.EomtLoss):
    """The losses, by fastmask's kernels."""

    forward = PointLoss.named_losses
