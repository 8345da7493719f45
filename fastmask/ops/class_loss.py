"""The classification loss of all queries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops._checks import check_assignment, check_class_logits, computing_dtype
from fastmask.targets import Targets


def class_loss(
    class_logits: Tensor,
    targets: Targets,
    assignment: Tensor,
    *,
    eos_coef: float = 0.1,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Weighted cross-entropy of every query against its target's class, or "no object" for unmatched queries.

    sum_n w[y_n] (-log softmax(class_logits_n)[y_n]) / sum_n w[y_n] over all queries of a layer (DETR, arXiv:2005.12872,
    section 3; MaskFormer, arXiv:2107.06278, equation 2).

    Args:
        class_logits: ``(..., B, N, K+1)`` floating point; any leading dimensions, usually L decoder layers, or none.
        targets: the targets of the B images.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for padding and unmatched targets.
        eos_coef: the weight w of "no object"; all other classes have weight 1.
        class_weights: ``(K+1,)``, the weight w of every class; replaces ``eos_coef``.

    Returns:
        ``(...)`` float32 (float64 for float64 logits), one value per layer.

    Raises:
        ValueError: shapes, devices or labels that do not fit.
        TypeError: logits that are not floating point, or an assignment that is not int64.
    """
    loss, weight = class_loss_terms(class_logits, targets, assignment, eos_coef=eos_coef, class_weights=class_weights)
    return loss / weight


def class_loss_terms(
    class_logits: Tensor, targets: Targets, assignment: Tensor, *, class_weights: Tensor | None, eos_coef: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The numerator and the denominator of :func:`class_loss`, ``(...)`` each, to be summed over processes before the
    division. Arguments and errors are the same."""
    check_class_logits(class_logits, targets)
    num_queries, num_classes = class_logits.shape[-2], class_logits.shape[-1] - 1
    check_assignment(assignment, tuple(class_logits.shape[:-3]), num_queries, targets)
    dtype = computing_dtype(class_logits)
    if class_weights is None:
        class_weights = class_logits.new_ones(num_classes + 1, dtype=dtype)
        class_weights[num_classes] = eos_coef
    elif tuple(class_weights.shape) != (num_classes + 1,):
        raise ValueError(f"class_weights has shape {tuple(class_weights.shape)}; expected ({num_classes + 1},)")

    classes = query_classes(targets.labels, assignment, num_queries, num_classes)
    nll = -class_logits.to(dtype).log_softmax(-1).gather(-1, classes[..., None]).squeeze(-1)
    weights = class_weights.to(dtype)[classes]
    return (weights * nll).sum((-2, -1)), weights.sum((-2, -1))


def query_classes(labels: Tensor, assignment: Tensor, num_queries: int, num_classes: int) -> Tensor:
    """``(..., B, N)`` int64: the class of each query's target, ``num_classes`` for unmatched queries."""
    # Unmatched targets write to an extra slot after the queries, which is then cut off.
    slots = torch.where(assignment < 0, num_queries, assignment)
    classes = labels.new_full((*assignment.shape[:-1], num_queries + 1), num_classes)
    return classes.scatter(-1, slots, labels.expand(assignment.shape))[..., :num_queries]
