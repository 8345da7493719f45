"""The original repositories' HungarianMatcher and SetCriterion, known by their looks.

They live in research code that is copied rather than installed, so neither can be told by where it was defined: what
counts is the class's name, its attributes and the signature of its ``forward``. A module that has the name but not the
looks (DETR's, for one) is refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmask import modules
from fastmask.integrations._foreign_targets import average_num_masks, sizes_of
from fastmask.integrations._patching import original_class
from fastmask.integrations._random_points import PointLoss, PointMatcher
from fastmask.mask_term import FOCAL
from fastmask.modules.criterion import LOSSES
from fastmask.modules.matcher import index_pairs
from fastmask.targets import Targets, check_binary

MATCHER, CRITERION = "HungarianMatcher", "SetCriterion"
LOSS_METHODS = {"loss_labels", "loss_masks"}
COSTS = frozenset({"cost_class", "cost_mask", "cost_dice"})
SETTINGS = frozenset({"num_classes", "weight_dict", "eos_coef", "losses"})
SAMPLING = frozenset({"num_points", "oversample_ratio", "importance_sample_ratio"})


def replacements(module: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Which modules get which class; see ``fastmask.integrations._patching``."""
    cls = type(module)
    if cls.__name__ not in (MATCHER, CRITERION) or cls.__module__.startswith("fastmask."):
        return
    arguments = list(inspect.signature(cls.forward).parameters)
    if arguments != ["self", "outputs", "targets"]:
        raise TypeError(f"{cls.__name__}.forward takes {', '.join(arguments)}; expected self, outputs, targets")
    if cls.__name__ == MATCHER:
        yield module, _by_attributes(module, {COSTS: HungarianMatcher, COSTS | {"num_points"}: PointHungarianMatcher})
        return
    ours = _by_attributes(module, {SETTINGS: SetCriterion, SETTINGS | SAMPLING: PointSetCriterion})
    if original_class(module.matcher).__name__ != MATCHER:
        raise TypeError(f"the matcher of {CRITERION} is a {type(module.matcher).__name__}; expected a {MATCHER}")
    if hasattr(module.matcher, "num_points") != (ours is PointSetCriterion):
        raise TypeError(f"one of {CRITERION} and its {MATCHER} samples points, the other does not")
    methods = {name for name in dir(cls) if name.startswith("loss_")}
    if methods != LOSS_METHODS or not set(module.losses) <= set(LOSSES):
        raise TypeError(
            f"{CRITERION} has {', '.join(sorted(methods))} and losses={list(module.losses)}; expected "
            f"{', '.join(sorted(LOSS_METHODS))}, and any of {', '.join(LOSSES)}"
        )
    yield module, ours


def _by_attributes(module: nn.Module, known: Mapping[frozenset[str], type[nn.Module]]) -> type[nn.Module]:
    """Which of the ``known`` classes, given by their attributes, the module's own class looks like."""
    attributes = {name for name in vars(module) if not name.startswith("_")} - {"training"}
    for expected, cls in known.items():
        if attributes == expected:
            return cls
    raise TypeError(
        f"{type(module).__module__}.{type(module).__name__} has the attributes {', '.join(sorted(attributes))}; "
        f"fastmask knows those that have {' or '.join(', '.join(sorted(expected)) for expected in known)}"
    )


class HungarianMatcher(modules.HungarianMatcher):
    """MaskFormer's matcher, by fastmask's kernels."""

    term, points, backend = FOCAL, None, "auto"

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        _check_targets(targets)
        return super().forward(outputs, targets)


class SetCriterion(modules.SetCriterion):
    """MaskFormer's criterion, by fastmask's kernels."""

    term, points, backend = FOCAL, None, "auto"

    def forward(self, outputs: Mapping[str, object], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Unweighted losses of all layers under their original names."""
        _check_targets(targets)
        return super().forward(outputs, targets)

    def normalizers(self, weight: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """As the original has them: classes by the queries of each process, masks by the average process's targets."""
        return weight, average_num_masks(targets)


class PointHungarianMatcher(PointMatcher, nn.Module):
    """Mask2Former's matcher, by fastmask's kernels."""

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        class_logits, mask_logits = outputs["pred_logits"], outputs["pred_masks"]
        sizes = _check_targets(targets)
        padded = Targets.from_list(targets, num_classes=class_logits.shape[-1] - 1, device=class_logits.device)
        return index_pairs(self.match_layer(class_logits, mask_logits, padded, sizes))


class PointSetCriterion(PointLoss, nn.Module):
    """Mask2Former's criterion, by fastmask's kernels."""

    def forward(self, outputs: Mapping[str, object], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Unweighted losses of all layers under their original names."""
        sizes = _check_targets(targets)
        layers = [(layer["pred_logits"], layer["pred_masks"]) for layer in (outputs, *outputs.get("aux_outputs", ()))]
        padded = Targets.from_list(targets, num_classes=self.num_classes, device=layers[0][0].device)
        counts = [len(target["labels"]) for target in targets]
        masks, dices, loss_ce = self.losses_at_points(layers, padded, counts, sizes, with_masks="masks" in self.losses)
        num_masks = average_num_masks(padded)
        named = {}
        for i, ce in enumerate(loss_ce):
            suffix = f"_{i - 1}" if i > 0 else ""
            if "labels" in self.losses:
                named[f"loss_ce{suffix}"] = ce
            if "masks" in self.losses:
                named[f"loss_mask{suffix}"] = masks[i] / num_masks
                named[f"loss_dice{suffix}"] = dices[i] / num_masks
        return named


def _check_targets(targets: Sequence[Mapping[str, Tensor]]) -> list[tuple[int, int]]:
    """(H, W) of each image's masks. The original pads them to the size of the batch before it calls; what it would do
    with others is undefined."""
    for b, target in enumerate(targets):
        check_binary(f'targets[{b}]["masks"]', target["masks"])
    sizes = sizes_of([target["masks"] for target in targets])
    if len(set(sizes)) > 1:
        raise ValueError(f"the masks of targets are of different sizes, {sizes}; expected all padded to one size")
    return sizes
