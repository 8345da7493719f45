"""The original repositories' HungarianMatcher and SetCriterion, in whichever module they are defined.

Their code is copied rather than installed, so they are recognized by the class's name, its attributes and the signature
of its ``forward``. A class that has the name alone, such as DETR's, is refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastmask import modules
from fastmask.integrations._foreign_targets import TargetList, average_num_masks, mask_term, targets_of_list
from fastmask.integrations._known import find
from fastmask.integrations._random_points import PointLoss, PointMatcher
from fastmask.integrations._replacement import Found, Replacement, original_class
from fastmask.integrations.maskdino import MaskDinoCriterion, MaskDinoMatcher
from fastmask.modules import Predictions
from fastmask.modules.criterion import LOSSES
from fastmask.modules.matcher import index_pairs
from fastmask.targets import Targets

COSTS = frozenset({"cost_class", "cost_mask", "cost_dice"})
SETTINGS = frozenset({"num_classes", "weight_dict", "eos_coef", "losses"})
SAMPLING = frozenset({"num_points", "oversample_ratio", "importance_sample_ratio"})
BOXES = frozenset({"num_points", "cost_box", "cost_giou", "panoptic_on"})
DENOISING = frozenset({"dn", "dn_losses", "focal_alpha", "panoptic_on", "semantic_ce_loss"})


@dataclass(frozen=True)
class Form:
    """How one repository writes its matcher or its criterion.

    Args:
        replacement: what takes its place.
        attributes: of the module.
        arguments: of its ``forward``.
        matcher: the replacement of a criterion's matcher.
        losses: the values of a criterion's ``losses``; each has a method ``loss_...``.
        other_losses: its further methods of such names.
    """

    replacement: type[Replacement]
    attributes: frozenset[str]
    arguments: tuple[str, ...] = ("outputs", "targets")
    matcher: type[Replacement] | None = None
    losses: tuple[str, ...] = LOSSES
    other_losses: tuple[str, ...] = ()


def replacements(module: nn.Module) -> Iterator[Found]:
    """What to replace for ``module``; see ``fastmask.integrations._known.replacements``."""
    own: Any = type(module)
    classes = (cls for cls in own.__mro__ if not cls.__module__.startswith("fastmask."))
    cls = next((cls for cls in classes if cls.__name__ in FORMS), None)
    if cls is None:
        return
    forms, attributes = FORMS[cls.__name__], _attributes(module)
    # A subclass may have further ones.
    fitting = [
        form for form in forms if form.attributes == attributes or (form.attributes < attributes and cls is not own)
    ]
    form = max(fitting, key=lambda form: len(form.attributes), default=None)
    if form is None:
        raise TypeError(
            f"{cls.__module__}.{cls.__name__} has the attributes {', '.join(sorted(attributes))}; fastmask knows those "
            f"that have {' or '.join(', '.join(sorted(form.attributes)) for form in forms)}"
        )
    arguments = tuple(inspect.signature(cls.forward).parameters)[1:]
    if arguments != form.arguments:
        raise TypeError(f"{cls.__name__}.forward takes {', '.join(arguments)}; expected {', '.join(form.arguments)}")
    if form.matcher is not None:
        _check_criterion(module, cls, form)
    yield Found(module, cls, form.replacement)


def _attributes(module: nn.Module) -> set[str]:
    """The names of a module's settings."""
    return {name for name in vars(module) if not name.startswith("_")} - {"training"}


def _check_criterion(module: nn.Module, cls: type[nn.Module], form: Form) -> None:
    name, matcher, losses = cls.__name__, module.get_submodule("matcher"), list(vars(module)["losses"])
    found = find(matcher)
    if found is None or found.replacement is not form.matcher:
        expected = next(one for one in FORMS["HungarianMatcher"] if one.replacement is form.matcher)
        raise TypeError(
            f"the matcher of {name} is a {original_class(matcher).__name__} with "
            f"{', '.join(sorted(_attributes(matcher))) or 'no attributes'}; expected a HungarianMatcher with "
            f"{', '.join(sorted(expected.attributes))}"
        )
    methods = {method for method in dir(cls) if method.startswith("loss_")}
    known = {f"loss_{loss}" for loss in (*form.losses, *form.other_losses)}
    if methods != known or not set(losses) <= set(form.losses):
        raise TypeError(
            f"{name} has {', '.join(sorted(methods))} and losses={losses}; expected {', '.join(sorted(known))}, and "
            f"any of {', '.join(form.losses)}"
        )


def unless_overridden(method: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` that gives way to the original's, which calls its parts, where a subclass overrides one of them."""

    @wraps(method)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found, matcher = find(self), find(getattr(self, "matcher", self))
        assert found is not None and matcher is not None
        own = {name for name in found.overridden() if name != "forward"}
        if matcher.module is not self:
            own.update(matcher.overridden())
        return found.known.forward(self, *args, **kwargs) if own else method(self, *args, **kwargs)

    return forward


class HungarianMatcher(Replacement, modules.HungarianMatcher):
    """MaskFormer's matcher, by fastmask's kernels."""

    points, backend = None, "auto"
    term = property(lambda self: mask_term(self, "focal"))

    @unless_overridden
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

    @unless_overridden
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

    @unless_overridden
    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor], targets: TargetList) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        predictions = Predictions(outputs["pred_logits"][None], outputs["pred_masks"][None])
        padded = _targets(self, outputs, targets)
        return index_pairs(self.match(predictions, padded, [padded.size] * padded.batch_size)[0])


class PointSetCriterion(PointLoss):
    """Mask2Former's criterion, by fastmask's kernels."""

    losses: Sequence[str]

    @unless_overridden
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
    """The container of a list of targets, for the model's outputs.

    Raises:
        TypeError: Targets, which the original does not take.
    """
    if isinstance(targets, Targets):
        raise TypeError("targets must be a list of dicts, as for the original, got Targets")
    class_logits = outputs["pred_logits"]
    return targets_of_list(module, targets, num_classes=class_logits.shape[-1] - 1, device=class_logits.device)


# By the class's name.
FORMS = {
    "HungarianMatcher": (
        Form(HungarianMatcher, COSTS),
        Form(PointHungarianMatcher, COSTS | {"num_points"}),
        Form(MaskDinoMatcher, COSTS | BOXES, ("outputs", "targets", "cost")),
    ),
    "SetCriterion": (
        Form(SetCriterion, SETTINGS, matcher=HungarianMatcher),
        Form(PointSetCriterion, SETTINGS | SAMPLING, matcher=PointHungarianMatcher),
        Form(
            MaskDinoCriterion,
            SETTINGS | SAMPLING | DENOISING,
            ("outputs", "targets", "mask_dict"),
            matcher=MaskDinoMatcher,
            losses=(*LOSSES, "boxes"),
            other_losses=("labels_ce", "boxes_panoptic"),
        ),
    ),
}
