"""Batched optimal assignment of queries to targets.

``fastmask::assign`` returns the query of each target, and how many pairs of each problem have a cost that is not
finite; ``fastmask::assign_duals`` also returns the duals, which prove that the result is optimal.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from fastmask.ops._checks import check_choice, check_floating
from fastmask.ops._extension import add_op_namespace_prefix, ops
from fastmask.ops._registry import Operator, choose_backend

POLICIES = ("last", "raise")


@overload
def assign(cost: Tensor, counts: Tensor | None = None, *, policy: str = "last", backend: str = "auto") -> Tensor: ...
@overload
def assign(
    cost: Tensor, counts: Tensor | None = None, *, return_duals: bool = False, return_status: bool = False,
    policy: str = "last", backend: str = "auto",
) -> Tensor | tuple[Tensor | tuple[Tensor, ...], ...]: ...  # fmt: skip
def assign(
    cost: Tensor,
    counts: Tensor | None = None,
    *,
    return_duals: bool = False,
    return_status: bool = False,
    policy: str = "last",
    backend: str = "auto",
) -> Tensor | tuple[Tensor | tuple[Tensor, ...], ...]:
    """Assigns a query to each target so that the total cost of the pairs is minimal, for a batch of problems at once.

    min over injective a of sum_m cost[a(m), m] (MaskFormer, arXiv:2107.06278, section 3.2), by an auction (Bertsekas,
    Annals of Operations Research 14, 1988) that shortest augmenting paths finish (Jonker and Volgenant, Computing 38,
    1987). With fewer queries than targets, the N best pairs are taken and the other targets stay unmatched. The total
    provably exceeds the minimum by at most 1e-6 (float64: 1e-12) of the sum of |cost| over the pairs. The same input
    gives the same bits on any processor, with any number of threads; a fixed rule breaks ties.

    Pairs whose cost is NaN or infinite (of either sign) are taken last: among the complete matchings with the fewest
    such pairs, the result has the smallest total of finite costs.

    Args:
        cost: ``(..., N, M)`` floating point, any strides; on a GPU, at most 1000 queries and 1000 targets per problem.
        counts: broadcastable to ``(...)``, int64: only the first ``counts`` targets of a problem exist; M by default.
            On a GPU, counts are clamped to ``0..M``.
        return_duals: also return the duals, which prove that the result is optimal.
        return_status: also return how many pairs of each matching have a cost that is not finite.
        policy: "last" takes such pairs last; "raise" raises SciPy's errors about them, and needs a CPU tensor.
        backend: "auto", "reference" or "native". The reference returns no duals.

    Returns:
        ``(..., M)`` int64 on the device of ``cost``: the query of each target, -1 for unmatched targets and padding.
        With ``return_duals``, next a pair of float64 tensors ``(..., N)`` and ``(..., M)``: u and v with
        cost[n, m] >= u[n] + v[m], equal for matched pairs, so that sum u + sum v is the minimal total. The duals of the
        longer side are at most 0, and 0 where unmatched; those of padding are 0; NaN where a pair is not finite.
        With ``return_status``, next the number of such pairs, ``(...)`` int32. Nothing carries a gradient.

    Raises:
        ValueError: shapes or counts that do not fit; an unknown policy, or "raise" for a tensor that is not on the CPU;
            with "raise", NaN or -inf anywhere, or no complete matching without +inf.
        TypeError: a cost that is not floating point, or counts that are not int64.
        RuntimeError: the requested backend cannot run.
    """
    check_floating("cost", cost, 2, "(..., N, M)")
    if policy != "last":
        check_choice("policy", policy, POLICIES)
        if cost.device.type != "cpu":
            raise ValueError(f"policy='raise' reads the result on the host; expected a CPU tensor, got {cost.device}")
    if cost.requires_grad:
        cost = cost.detach()
    if counts is not None:
        counts = _check_counts(cost, counts)
    # A sum is finite only if all terms are, which is by far the most frequent case.
    may_raise = policy == "raise" and not math.isfinite(cost.sum().item())
    if may_raise:
        _raise_on_invalid(cost, counts)
    outputs: tuple[Tensor, ...]
    if choose_backend(ASSIGN, backend, cost) == "reference":
        outputs = _reference(cost, counts, return_duals)
    elif return_duals:
        outputs = ops.assign_duals(cost, counts)
    else:
        outputs = ops.assign(cost, counts)
    assignment, status, *duals = outputs
    if may_raise and bool((status > 0).any()):
        raise ValueError("cost matrix is infeasible")
    if not return_duals and not return_status:
        return assignment
    return (assignment, *([tuple(duals)] if return_duals else []), *([status] if return_status else []))


def _check_counts(cost: Tensor, counts: Tensor) -> Tensor:
    """``counts`` with the leading dimensions of ``cost``."""
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
        raise TypeError(f"counts must be an int64 tensor, got {getattr(counts, 'dtype', type(counts).__name__)}")
    if counts.device != cost.device:
        raise ValueError(f"counts is on {counts.device}, cost on {cost.device}")
    leading = cost.shape[:-2]
    try:
        expanded = counts.expand(leading)
    except RuntimeError:
        raise ValueError(
            f"counts has shape {tuple(counts.shape)}; expected one that broadcasts to {tuple(leading)}"
        ) from None
    # Reading values from a GPU would make the host wait.
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and counts.numel() > 0:
        low, high = (int(bound) for bound in counts.aminmax())
        if low < 0 or high > cost.shape[-1]:
            raise ValueError(f"counts must lie in 0..{cost.shape[-1]}, got {low}..{high}")
    return expanded


def _raise_on_invalid(cost: Tensor, counts: Tensor | None) -> None:
    invalid = cost.isnan() | cost.isneginf()
    if counts is not None:
        invalid &= torch.arange(cost.shape[-1]) < counts[..., None, None]
    if invalid.any():
        raise ValueError("matrix contains invalid numeric entries")


def _reference(cost: Tensor, counts: Tensor | None, return_duals: bool) -> tuple[Tensor, Tensor]:
    if return_duals:
        raise RuntimeError("backend='reference' cannot run assign: it computes no duals")
    from fastmask import reference

    assignment = reference.assign(cost, counts)
    if cost.shape[-2] == 0:
        return assignment, cost.new_zeros(cost.shape[:-2], dtype=torch.int32)
    chosen = cost.gather(-2, assignment.clamp(min=0).unsqueeze(-2)).squeeze(-2)
    return assignment, (~chosen.isfinite() & (assignment >= 0)).sum(-1, dtype=torch.int32)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _fake(cost: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    leading = cost.shape[:-2]
    return cost.new_empty((*leading, cost.shape[-1]), dtype=torch.int64), cost.new_empty(leading, dtype=torch.int32)


def _fake_duals(cost: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *leading, num_queries, num_targets = cost.shape
    return (
        *_fake(cost, counts),
        cost.new_empty((*leading, num_queries), dtype=torch.float64),
        cost.new_empty((*leading, num_targets), dtype=torch.float64),
    )


ASSIGN = Operator(
    "assign", "(Tensor cost, Tensor? counts) -> (Tensor, Tensor)", _fake, native=("cpu", "cuda"), dtypes=_DTYPES
)
ASSIGN_DUALS = Operator(
    "assign_duals",
    "(Tensor cost, Tensor? counts) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_duals,
    native=("cpu", "cuda"),
    dtypes=_DTYPES,
)
# The CUDA kernel's algorithm on one CPU thread, for tests. The seed permutes the steps that a block runs in parallel.
torch.library.define(
    add_op_namespace_prefix("_assign_serial"),
    "(Tensor cost, Tensor? counts, int seed) -> (Tensor, Tensor, Tensor, Tensor)",
)
