"""Random points of the matched pairs, most of them where the predicted mask is uncertain.

``fastmask::uncertain_points`` takes them from the random stream of the seed, an int64 tensor of one element (see
``fastmask.reference.random_points``). It stores only the chosen points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops._checks import check_assigned_queries, check_mask_planes, check_point_sampling, stack_layers
from fastmask.ops._registry import Operator, choose_backend


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor,
    assignment: Tensor,
    num_points: int = 12544,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Points for ``mask_loss``: importance sampling of PointRend (arXiv:1912.08193, section 4.1) as Mask2Former
    (arXiv:2112.01527, section 3.3) uses it.

    For each pair, ``oversample_ratio * num_points`` uniformly random candidates are drawn. Of these, the
    ``importance_sample_ratio * num_points`` are chosen where the sampled logit of the target's query is closest to 0
    (NaN counts as closest). The rest of ``num_points`` are random points. Both products are rounded down.

    ``generator`` gives one seed; from it Philox-4x32-7, a counter-based generator, draws the same points on every
    device, and candidates that are not chosen are never stored. Nothing is read back from the device, and a captured
    CUDA graph draws new points at each replay.

    Args:
        mask_logits: ``(..., B, N, h, w)`` floating point; any leading dimensions, usually L decoder layers, or none.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for padding and unmatched targets.
        num_points: P, the number of points per pair.
        oversample_ratio: random candidates per point, at least 1.
        importance_sample_ratio: the share of points, 0..1, that are chosen as uncertain.
        generator: a generator on the device of ``mask_logits``; None takes that device's default generator.
        backend: "auto", "reference", "native" or "triton". The same seed gives the same points, up to their order and
            to candidates that are equally uncertain in float32.

    Returns:
        ``(..., B, M, P, 2)`` float32, (x, y) in (0, 1) from the left and the top, each the middle of one of 65,536
        equal intervals; 0 for unmatched targets. Carries no gradient.

    Raises:
        ValueError: shapes, devices, indices or options that do not fit.
        TypeError: logits that are not floating point, or an assignment that is not int64.
        RuntimeError: the requested backend cannot run.
    """
    check_mask_planes(mask_logits)
    leading = (*mask_logits.shape[:-3], assignment.shape[-1] if assignment.dim() > 0 else 0)
    check_assigned_queries(assignment, leading, mask_logits.shape[-3], "mask_logits", mask_logits.device)
    check_point_sampling(num_points, oversample_ratio, importance_sample_ratio)
    num_candidates = int(oversample_ratio * num_points)
    num_uncertain = int(importance_sample_ratio * num_points)
    backend = choose_backend(UNCERTAIN_POINTS, backend, mask_logits)
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=mask_logits.device)
    if backend == "reference":
        from fastmask import reference

        num_drawn = num_candidates + num_points - num_uncertain
        drawn = reference.random_points(seed, assignment.numel(), num_drawn).view(*assignment.shape, num_drawn, 2)
        candidates, others = drawn.split([num_candidates, num_points - num_uncertain], dim=-2)
        chosen = reference.uncertain_points(mask_logits, assignment, candidates, num_uncertain)
        return torch.cat([chosen, others.masked_fill((assignment < 0)[..., None, None], 0)], -2)
    points = UNCERTAIN_POINTS(
        backend,
        stack_layers(mask_logits, 4),
        stack_layers(assignment, 2),
        seed,
        num_points,
        num_candidates,
        num_uncertain,
    )
    return points if assignment.dim() == 3 else points.view(*assignment.shape, num_points, 2)


def _fake(mask_logits: Tensor, assignment: Tensor, seed: Tensor, num_points: int, *_: object) -> Tensor:
    return mask_logits.new_empty((*assignment.shape, num_points, 2), dtype=torch.float32)


UNCERTAIN_POINTS = Operator(
    "uncertain_points",
    "(Tensor mask_logits, Tensor assignment, Tensor seed, int num_points, int num_candidates, int num_uncertain) "
    "-> Tensor",
    _fake,
    native=("cpu",),
    triton="uncertain_points",
)
