"""Each file defines one operator: its public function, schema, fake kernel, gradient and kernels.

The C++ and CUDA kernels come from ``csrc``, loaded as a shared library, the Triton kernels from ``fastmask.kernels``,
imported on first use. ``fastmask.functional`` exports the public functions.
"""

from fastmask.ops.assign import ASSIGN
from fastmask.ops.deformable_attention import DEFORMABLE_ATTENTION
from fastmask.ops.instance import INSTANCE_MASKS
from fastmask.ops.mask_cost import MASK_COST, POINT_MASK_COST
from fastmask.ops.mask_loss import MASK_LOSS, POINT_MASK_LOSS
from fastmask.ops.masked_attention import MASKED_ATTENTION
from fastmask.ops.panoptic import PANOPTIC_WINNERS
from fastmask.ops.semantic import SEMANTIC_INFERENCE
from fastmask.ops.uncertain_points import UNCERTAIN_POINTS

_TRAINING = (MASK_COST, ASSIGN, MASK_LOSS, POINT_MASK_COST, UNCERTAIN_POINTS, POINT_MASK_LOSS)
_INFERENCE = (MASKED_ATTENTION, DEFORMABLE_ATTENTION, SEMANTIC_INFERENCE, PANOPTIC_WINNERS, INSTANCE_MASKS)

OPERATORS = {operator.name: operator for operator in (*_TRAINING, *_INFERENCE)}

__all__ = ["OPERATORS"]
