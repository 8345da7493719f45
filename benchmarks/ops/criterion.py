"""The whole criterion with auxiliary layers, matching and losses, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.harness.agreement import ErrorBudget
from benchmarks.harness.graphs import captured
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import require_backend
from benchmarks.harness.registry import Case, Operation, Provider
from benchmarks.ops import mask_cost, mask_loss
from benchmarks.ops.inputs import GPU_TRAINING, QUICK, TRAINING, Inputs, as_lists, judged, judged_layers, make_inputs
from fastmask import HungarianMatcher, SetCriterion, assign, class_loss

EOS_COEF = 0.1
WEIGHTS = {"loss_ce": 1.0, "loss_mask": mask_loss.WEIGHT_MASK, "loss_dice": mask_loss.WEIGHT_DICE}
CASES = (
    Case("quick", QUICK, ("quick",)),
    Case("B2 L7 M20, segment map", TRAINING, ("cpu",)),
    Case("B2 L6 M20, segment map", TRAINING | {"layers": 6}, ("cpu",), ("bfloat16",)),
    Case("B16 L6 M20, segment map", GPU_TRAINING, ("gpu",), ("bfloat16", "float32")),
)
Leaves = tuple[list[Tensor], list[Tensor]]  # class and mask logits
Losses = tuple[dict[str, Tensor], tuple[Tensor, ...]]


def backward(losses: Mapping[str, Tensor], leaves: Leaves, weights: Mapping[str, float] = WEIGHTS) -> Losses:
    """``losses`` are named as SetCriterion names them; the gradients are those of the class logits, then the masks."""
    total = sum(weights[name.rstrip("_0123456789")] * loss for name, loss in losses.items())
    return dict(losses), torch.autograd.grad(total, [*leaves[0], *leaves[1]])


def named(raw: Losses, inputs: Inputs) -> dict[str, Tensor]:
    """Losses and gradients of the judged layers; the last layer's losses have no suffix."""
    losses, grads = raw
    suffixes = [*(f"_{i}" for i in range(inputs.mask_logits.shape[0] - 1)), ""]
    result = {name: torch.stack([losses[name + suffix] for suffix in suffixes]) for name in WEIGHTS}
    half = len(grads) // 2
    result["grad_class"] = torch.stack(grads[:half]).view_as(inputs.class_logits)
    result["grad_mask"] = torch.stack(grads[half:]).view_as(inputs.mask_logits)
    return {name: value[judged_layers(inputs)] for name, value in result.items()}


def reference(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the reference in ``dtype``, pieces at a time."""
    assignment = assign(mask_cost.cost_by_layer(inputs, dtype), inputs.targets.counts, backend="reference")
    matched = Inputs(inputs.class_logits, inputs.mask_logits, inputs.targets, assignment)
    masks = mask_loss.reference(matched, dtype)
    x = inputs.class_logits.to(dtype).requires_grad_()
    loss_ce = class_loss(x, inputs.targets, assignment, eos_coef=EOS_COEF)
    (grad,) = torch.autograd.grad(WEIGHTS["loss_ce"] * loss_ce.sum(), x)
    return {
        "loss_ce": loss_ce.detach(),
        "loss_mask": masks["loss_mask"],
        "loss_dice": masks["loss_dice"],
        "grad_class": grad if dtype == torch.float64 else grad.to(inputs.class_logits.dtype),
        "grad_mask": masks["grad"],
    }


def oracle(inputs: Inputs) -> ErrorBudget:
    inputs = judged(inputs)
    return ErrorBudget(reference(inputs, torch.float64), reference(inputs, torch.float32))


def work(inputs: Inputs) -> Work:
    """Matching cost and mask losses; reading the class logits and writing their gradient. The solver counts nothing."""
    return mask_cost.work(inputs) + mask_loss.work(inputs) + Work(bytes=2 * inputs.class_logits.nbytes)


def make_criterion(inputs: Inputs, backend: str) -> SetCriterion:
    matcher = HungarianMatcher(**mask_cost.WEIGHTS, backend=backend)
    criterion = SetCriterion(inputs.num_classes, matcher, WEIGHTS, EOS_COEF, backend=backend)
    return criterion.to(inputs.mask_logits.device)


def layer_leaves(inputs: Inputs) -> Leaves:
    return tuple([x.detach().requires_grad_() for x in logits] for logits in (inputs.class_logits, inputs.mask_logits))


def stacked_call(inputs: Inputs, criterion: SetCriterion) -> Callable[[], Losses]:
    """As fastmask's models call it: layers stacked, targets in a container."""
    class_logits, mask_logits = (x.detach().requires_grad_() for x in (inputs.class_logits, inputs.mask_logits))
    outputs = {"class_logits": class_logits, "mask_logits": mask_logits}
    leaves = [class_logits], [mask_logits]
    return lambda: backward(criterion(outputs, inputs.targets), leaves, criterion.weight_dict)


def drop_in_call(inputs: Inputs, criterion: SetCriterion) -> Callable[[], Losses]:
    """In the place of the original repository's criterion: a dict a layer, a list of targets with binary masks."""
    leaves = layer_leaves(inputs)
    outputs, targets = as_outputs(leaves), inputs.targets.to_list()
    return lambda: backward(criterion(outputs, targets), leaves, criterion.weight_dict)


def reference_call(inputs: Inputs, criterion: SetCriterion) -> Callable[[], Losses]:
    """A dict a layer, targets in a container."""
    leaves = layer_leaves(inputs)
    outputs = as_outputs(leaves)
    return lambda: backward(criterion(outputs, inputs.targets), leaves, criterion.weight_dict)


def require_kernels(operator: str, inputs: Inputs) -> None:
    """The device's own kernels of an operator, or an error that says why there are none."""
    require_backend(operator, "triton" if inputs.mask_logits.is_cuda else "native", inputs.mask_logits)


def prepare_fastmask(inputs: Inputs) -> Callable[[], Losses]:
    require_kernels("mask_loss", inputs)
    return stacked_call(inputs, make_criterion(inputs, "auto"))


def prepare_graph(inputs: Inputs) -> Callable[[], Losses]:
    """Nothing in it waits for the host, so that a graph takes all of it, the matching included."""
    return captured(prepare_fastmask(inputs), inputs.mask_logits.device)


def prepare_drop_in(inputs: Inputs) -> Callable[[], Losses]:
    require_kernels("mask_loss", inputs)
    return drop_in_call(inputs, make_criterion(inputs, "auto"))


def prepare_reference(inputs: Inputs) -> Callable[[], Losses]:
    return reference_call(inputs, make_criterion(inputs, "reference"))


def as_outputs(leaves: Leaves) -> dict[str, object]:
    layers = [{"pred_logits": c, "pred_masks": m} for c, m in zip(*leaves, strict=True)]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def transformers_losses(
    judge: nn.Module, class_logits: Iterable[Tensor], mask_logits: Iterable[Tensor], masks: list, labels: list
) -> dict[str, Tensor]:
    """As transformers' models call their losses, under our names. Logits in float32, as their arithmetic in bfloat16
    would miss the error budget."""
    layers = [
        {"class_queries_logits": c.float(), "masks_queries_logits": m.float()}
        for c, m in zip(class_logits, mask_logits, strict=True)
    ]
    losses = judge(**layers[-1], mask_labels=masks, class_labels=labels, auxiliary_predictions=layers[:-1])
    return {name.replace("cross_entropy", "ce"): loss for name, loss in losses.items()}


def transformers_call(inputs: Inputs, judge: nn.Module, weights: Mapping[str, float]) -> Callable[[], Losses]:
    judge.to(inputs.mask_logits.device)
    masks, labels = as_lists(inputs)
    leaves = layer_leaves(inputs)
    return lambda: backward(transformers_losses(judge, *leaves, masks, labels), leaves, weights)


def make_transformers_loss(num_classes: int) -> nn.Module:
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

    return MaskFormerLoss(num_classes, MaskFormerHungarianMatcher(**mask_cost.WEIGHTS), WEIGHTS, EOS_COEF)


def prepare_transformers(inputs: Inputs) -> Callable[[], Losses]:
    return transformers_call(inputs, make_transformers_loss(inputs.num_classes), WEIGHTS)


OPERATION = Operation(
    title="Whole criterion (matching, class, mask and dice losses), forward and backward, all layers",
    cases=CASES,
    providers=(
        Provider("fastmask", prepare_fastmask, named),
        Provider("fastmask, CUDA graph", prepare_graph, named, keeps_memory=True),
        Provider("fastmask, drop-in form", prepare_drop_in, named),
        Provider("transformers", prepare_transformers, named, error_factor=20.0),
        Provider("PyTorch reference", prepare_reference, named),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=oracle,
    work=work,
)
