"""One registered operator for each hot path: schema, fake kernel and autograd in Python, kernels elsewhere.

An operator's implementations are the C++ and CUDA of ``csrc`` (loaded as a library) and the Triton kernels of
``fastmask.kernels`` (imported when first used).
"""

from fastmask.ops import assign, instance, mask_cost, mask_loss, masked_attention, panoptic, semantic

OPERATORS = {
    module.OPERATOR.name: module.OPERATOR
    for module in (mask_cost, assign, mask_loss, masked_attention, semantic, panoptic, instance)
}

__all__ = ["OPERATORS"]
