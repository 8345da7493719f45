"""Drop-in ``nn.Module``s."""

from fastmask.modules.criterion import LayerLosses, SetCriterion
from fastmask.modules.matcher import HungarianMatcher

__all__ = ["HungarianMatcher", "LayerLosses", "SetCriterion"]
