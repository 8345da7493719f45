"""The original repositories' HungarianMatcher and SetCriterion, in whichever module they are defined.

Their code is copied rather than installed, so they are recognized by the class's name, its attributes and the signature
of its ``forward``. A class that has the name alone, such as DETR's, is refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmask import modules
from fastmask.integrations._foreign_targets import average_num_masks, mask_term, sizes_of, targets_of_masks
from fastmask.integrations._random_points import PointLoss, PointMatcher
from fastmask.integrations._replacement import Found, Replacement, options_of, original_class
from fastmask.modules import Predictions
from fastmask.modules.criterion import LOSSES
from fastmask.modules.matcher import index_pairs
from fastmask.targets import Targets

TargetList = Sequence[Mapping[str, Tensor]]
MATCHER, CRITERION = "HungarianMatcher", "SetCriterion"
LOSS_METHODS = {"loss_labels", "loss_masks"}
COSTS = frozenset({"cost_class", "cost_mask", "cost_dice"})
SETTINGS = frozenset({"num_classes", "weight_dict", "eos_coef", "losses"})
SAMPLING = frozenset({"num_points", "oversample_ratio", "importance_sample_ratio"})


def replacements(module: nn.Module) -> Iterator[Found]:
    """What to replace for ``module``; see ``fastmask.integrations._known.replacements``."""
    cls = type(module)
    if cls.__name__ not in (MATCHER, CRITERION) or cls.__module__.startswith("fastmask."):
        return
    arguments = list(inspect.signature(cls.forward).parameters)
    if arguments != ["self", "outputs", "targets"]:
        raise TypeError(f"{cls.__name__}.forward takes {', '.join(arguments)}; expected self, outputs, targets")
    if cls.__name__ == MATCHER:
        known = {COSTS: HungarianMatcher, COSTS | {"num_points"}: PointHungarianMatcher}
        yield Found(module, cls, _by_attributes(module, known))
        return
    ours = _by_attributes(module, {SETTINGS: SetCriterion, SETTINGS | SAMPLING: PointSetCriterion})
    matcher, losses = module.get_submodule("matcher"), list(vars(module)["losses"])
    if original_class(matcher).__name__ != MATCHER:
        raise TypeError(f"the matcher of {CRITERION} is a {type(matcher).__name__}; expected a {MATCHER}")
    if hasattr(matcher, "num_points") != (ours is PointSetCriterion):
        raise TypeError(f"one of {CRITERION} and its {MATCHER} samples points, the other does not")
    methods = {name for name in dir(cls) if name.startswith("loss_")}
    if methods != LOSS_METHODS or not set(losses) <= set(LOSSES):
        raise TypeError(
            f"{CRITERION} has {', '.join(sorted(methods))} and losses={losses}; expected "
            f"{', '.join(sorted(LOSS_METHODS))}, and any of {', '.join(LOSSES)}"
        )
    yield Found(module, cls, ours)


def _by_attributes(module: nn.Module, known: Mapping[frozenset[str], type[Replacement]]) -> type[Replacement]:
    """The ``known`` class with the attributes of the module."""
    attributes = {name for name in vars(module) if not name.startswith("_")} - {"training"}
    for expected, cls in known.items():
        if attributes == expected:
            return cls
    raise TypeError(
        f"{type(module).__module__}.{type(module).__name__} has the attributes {', '.join(sorted(attributes))}; "
        f"fastmask knows those that have {' or '.join(', '.join(sorted(expected)) for expected in known)}"
    )


class HungarianMatcher(Replacement, modules.HungarianMatcher):
    """MaskFormer's matcher, by fastmask's kernels."""

    points, backend = None, "auto"
    term = property(lambda self: mask_term(self, "focal"))

    def forward(
        self,
        outputs: Mapping[str, Tensor],
        targets: TargetList | Targets,
        *,
        generator: torch.Generator | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        return super().forward(outputs, _targets(self, outputs, targets), generator=generator)


class SetCriterion(Replacement, modules.SetCriterion):
    """MaskFormer's criterion, by fastmask's kernels."""

    points, backend = None, "auto"
    term = property(lambda self: mask_term(self, "focal"))

    def forward(
        self, outputs: Mapping[str, Any], targets: TargetList | Targets, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses of all layers under their original names."""
        return super().forward(outputs, _targets(self, outputs, targets), generator=generator)

    def normalizers(self, weight: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Those of the original: each process's own queries for classes, the average process's targets for masks."""
        return weight, average_num_masks(targets)


class PointHungarianMatcher(PointMatcher):
    """Mask2Former's matcher, by fastmask's kernels."""

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor], targets: TargetList) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        predictions = Predictions(outputs["pred_logits"][None], outputs["pred_masks"][None])
        padded = _targets(self, outputs, targets)
        return index_pairs(self.match(predictions, padded, [padded.size] * padded.batch_size)[0])


class PointSetCriterion(PointLoss):
    """Mask2Former's criterion, by fastmask's kernels."""

    losses: Sequence[str]

    def forward(self, outputs: Mapping[str, Any], targets: TargetList) -> dict[str, Tensor]:
        """Unweighted losses of all layers under their original names."""
        layers = [
            Predictions(layer["pred_logits"][None], layer["pred_masks"][None])
            for layer in (outputs, *outputs.get("aux_outputs", ()))
        ]
        padded = _targets(self, outputs, targets)
        sizes = [padded.size] * padded.batch_size
        counts = [len(target["labels"]) for target in targets]
        with_masks = "masks" in self.losses
        masks, dices, loss_ce = self.losses_at_points(layers, padded, counts, sizes, with_masks=with_masks)
        num_masks = average_num_masks(padded)
        named: dict[str, Tensor] = {}
        for i, ce in enumerate(loss_ce):
            suffix = f"_{i - 1}" if i > 0 else ""
            if "labels" in self.losses:
                named[f"loss_ce{suffix}"] = ce
            if with_masks:
                named[f"loss_mask{suffix}"] = masks[i] / num_masks
                named[f"loss_dice{suffix}"] = dices[i] / num_masks
        return named


def _targets(module: nn.Module, outputs: Mapping[str, Any], targets: TargetList | Targets) -> Targets:
    """The container of a list of targets.

    Args:
        module: the patched matcher or criterion.
        outputs: the model's.
        targets: for each image "labels" ``(M_b,)`` and "masks" ``(M_b, H, W)``.

    Raises:
        TypeError, ValueError: no list, masks that are not binary, or of different sizes: the original's callers pad
            them to the size of the batch, and for others its losses are undefined.
    """
    if isinstance(targets, Targets):
        raise TypeError("targets must be a list of dicts, as for the original, got Targets")
    masks = [target["masks"] for target in targets]
    if len(set(sizes_of(masks))) > 1:
        raise ValueError(
            f"the masks of targets are of different sizes, {sizes_of(masks)}; expected all padded to one size"
        )
    class_logits = outputs["pred_logits"]
    return targets_of_masks(
        'targets[{}]["masks"]',
        masks,
        [target["labels"] for target in targets],
        num_classes=class_logits.shape[-1] - 1,
        device=class_logits.device,
        ignore_void=options_of(module).ignore_void,
    )
