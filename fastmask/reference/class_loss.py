"""The classification loss of all queries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.reference._common import check_shape


def class_loss(class_logits: Tensor, labels: Tensor, assignment: Tensor, *, eos_coef: float = 0.1) -> Tensor:
    """Weighted cross-entropy of every query against its target's class, or "no object" (K) for unmatched queries.

    sum_i w_i * (-log softmax(class_logits_i)[y_i]) / sum_i w_i over the B * N queries of a layer, where w_i is
    ``eos_coef`` if y_i = K and 1 otherwise (MaskFormer, arXiv:2107.06278, section 3.2; the weight is that of
    DETR, arXiv:2005.12872, section 3.1).

    Args:
        class_logits: ``(..., B, N, K+1)`` float; differentiable.
        labels: ``(B, M)`` int64 in ``0..K-1``, -1 for padding.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for unmatched targets and padding.
        eos_coef: the weight of "no object".

    Returns:
        ``(...)``, one value for each layer, in the dtype of the logits.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch_size, num_targets = labels.shape
    num_queries, num_classes = class_logits.shape[-2], class_logits.shape[-1] - 1
    check_shape("class_logits", class_logits, (batch_size, num_queries, -1))
    check_shape("assignment", assignment, (*class_logits.shape[:-3], batch_size, num_targets))

    # Targets without a query write to an extra column, which is then cut off.
    columns = torch.where(assignment < 0, num_queries, assignment)
    no_object = torch.full((*class_logits.shape[:-2], num_queries + 1), num_classes, device=class_logits.device)
    classes = no_object.scatter(-1, columns, labels.expand_as(columns))[..., :num_queries]

    nll = -class_logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]  # [..., B, N]
    weights = torch.ones_like(nll).masked_fill(classes == num_classes, eos_coef)
    return (weights * nll).sum((-2, -1)) / weights.sum((-2, -1))
