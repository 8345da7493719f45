"""One registered operator for each hot path: schema, fake kernel and autograd in Python, kernels elsewhere.

An operator's implementations are the C++ and CUDA of ``csrc`` (loaded as a library) and the Triton kernels of
``fastmask.kernels`` (imported when first used).
"""

from fastmask.ops import (
    assign,
    instance,
    mask_cost,
    mask_loss,
    masked_attention,
    panoptic,
    point_mask_cost,
    point_mask_loss,
    semantic,
    uncertain_points,
)

_TRAINING = (mask_cost, assign, mask_loss, point_mask_cost, uncertain_points, point_mask_loss)
_INFERENCE = (masked_attention, semantic, panoptic, instance)

OPERATORS = {module.OPERATOR.name: module.OPERATOR for module in (*_TRAINING, *_INFERENCE)}

__all__ = ["OPERATORS"]
