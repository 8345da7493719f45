"""Mask2Former's criterion: matching and losses at random points, with auxiliary layers, forward and backward.

Every provider draws points of its own, so results agree up to chance. They are judged by a few numbers for each layer
against what the reference gives with other points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.machine import Work
from benchmarks.harness.registry import Case, Operation, Provider
from benchmarks.ops.criterion import (
    Losses,
    as_outputs,
    backward,
    drop_in_call,
    layer_leaves,
    reference_call,
    require_kernels,
    stacked_call,
    transformers_call,
)
from benchmarks.ops.inputs import GPU_TRAINING, QUICK, TRAINING, Inputs, judged, judged_layers, make_inputs
from fastmask import HungarianMatcher, MaskTerm, PointSampling, SetCriterion

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
COSTS = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0}
EOS_COEF = 0.1
SAMPLING = PointSampling()
CASES = (
    Case("quick", QUICK, ("quick",)),
    Case("B2 L10 M20, segment map", TRAINING | {"layers": 10}, ("cpu",)),
    Case("B2 L10 M20, masks", TRAINING | {"layers": 10, "form": "masks"}, ("cpu",)),
    Case("B16 L10 M20, segment map", GPU_TRAINING | {"layers": 10}, ("gpu",), ("bfloat16", "float32")),
)
DRAWS = 3  # of the reference

# What chance may change besides: other points may match a pair or two of a near tie otherwise.
SLACK = {"loss": 0.05, "slope": 0.2}


def named(raw: Losses, inputs: Inputs) -> dict[str, Tensor]:
    """Losses of the judged layers, and the slopes of the total along the class and the mask logits themselves."""
    losses, grads = raw
    suffixes = [*(f"_{i}" for i in range(inputs.mask_logits.shape[0] - 1)), ""]
    result = {name: torch.stack([losses[name + suffix].detach() for suffix in suffixes]) for name in WEIGHTS}
    half = len(grads) // 2
    for name, parts, logits in (
        ("slope_class", grads[:half], inputs.class_logits),
        ("slope_mask", grads[half:], inputs.mask_logits),
    ):
        result[name] = (torch.stack(parts).view_as(logits).double() * logits).flatten(1).sum(1)
    return {name: value[judged_layers(inputs)] for name, value in result.items()}


@dataclass(frozen=True)
class ChanceBudget:
    """Results agree when each number is within chance of the reference's: as far from the mean of its draws as eight of
    their standard deviations and ``SLACK`` times the number. A loss with a wrong term, weight or divisor is not."""

    draws: Mapping[str, Tensor]  # (DRAWS, layers)

    def disagreement(self, result: Mapping[str, Tensor], error_factor: float) -> str | None:
        if set(result) != set(self.draws):
            return f"gives {', '.join(sorted(result))}; expected {', '.join(sorted(self.draws))}"
        for name, value in result.items():
            expected, deviation = self.draws[name].mean(0), self.draws[name].std(0)
            off = (value.double() - expected).abs()
            budget = 8 * deviation + SLACK[name.split("_")[0]] * expected.abs()
            if not (off <= budget).all():  # so that NaN fails
                return f"{name} is off by {float(off.max()):.2e}; chance allows {float(budget.min()):.2e}"
        return None


def oracle(inputs: Inputs) -> ChanceBudget:
    few = judged(inputs)
    few = replace(few, class_logits=few.class_logits.double(), mask_logits=few.mask_logits.double())
    criterion = make_criterion(few, "reference")
    leaves = layer_leaves(few)
    draws = []
    for seed in range(DRAWS):
        generator = torch.Generator(few.mask_logits.device).manual_seed(seed)
        losses = criterion(as_outputs(leaves), few.targets, generator=generator)
        draws.append(named(backward(losses, leaves, WEIGHTS), few))
    return ChanceBudget({name: torch.stack([draw[name] for draw in draws]) for name in draws[0]})


def work(inputs: Inputs) -> Work:
    """Every logit and target read once, and every logit's gradient written; exp, log and reciprocal for each query and
    point of the cost, and for each pair and point of the losses, on a GPU both ways. A CPU counts 44 operations for a
    logit at a point in the cost (interpolation 6, functions 26, losses and sums 12), and 85 in the losses and their
    slopes (positions 10, targets 16, slopes to four logits 15 more). Random numbers, the choice among candidates and
    the solver count nothing."""
    targets, logits = inputs.targets, inputs.mask_logits
    planes = targets.segments if targets.masks is None else targets.masks
    rows, pairs = logits[..., 0, 0].numel(), int((inputs.assignment >= 0).sum())
    read = Work(bytes=2 * (logits.nbytes + inputs.class_logits.nbytes) + planes.nbytes)
    if logits.is_cuda:
        return read + Work(0, specials=3 * SAMPLING.num_points * (rows + 2 * pairs))
    return read + Work(0, operations=SAMPLING.num_points * (44 * rows + 85 * pairs))


def make_criterion(inputs: Inputs, backend: str) -> SetCriterion:
    compared = {"term": MaskTerm("bce"), "points": SAMPLING, "backend": backend}
    matcher = HungarianMatcher(**COSTS, **compared)
    criterion = SetCriterion(inputs.num_classes, matcher, WEIGHTS, EOS_COEF, **compared)
    return criterion.to(inputs.mask_logits.device)


def prepare_fastmask(inputs: Inputs) -> Callable[[], Losses]:
    require_kernels("point_mask_loss", inputs)
    return stacked_call(inputs, make_criterion(inputs, "auto"))


def prepare_drop_in(inputs: Inputs) -> Callable[[], Losses]:
    require_kernels("point_mask_loss", inputs)
    return drop_in_call(inputs, make_criterion(inputs, "auto"))


def prepare_reference(inputs: Inputs) -> Callable[[], Losses]:
    return reference_call(inputs, make_criterion(inputs, "reference"))


def prepare_transformers(inputs: Inputs) -> Callable[[], Losses]:
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(
        num_labels=inputs.num_classes,
        no_object_weight=EOS_COEF,
        class_weight=COSTS["cost_class"],
        mask_weight=COSTS["cost_mask"],
        dice_weight=COSTS["cost_dice"],
        train_num_points=SAMPLING.num_points,
        oversample_ratio=SAMPLING.oversample_ratio,
        importance_sample_ratio=SAMPLING.importance_sample_ratio,
    )
    return transformers_call(inputs, Mask2FormerLoss(config, WEIGHTS), WEIGHTS)


OPERATION = Operation(
    title="Mask2Former's criterion at 12,544 points (matching, class, mask and dice losses), forward and backward",
    cases=CASES,
    providers=(
        Provider("fastmask", prepare_fastmask, named),
        Provider("fastmask, drop-in form", prepare_drop_in, named),
        Provider("transformers", prepare_transformers, named),
        Provider("PyTorch reference", prepare_reference, named),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=oracle,
    work=work,
)
