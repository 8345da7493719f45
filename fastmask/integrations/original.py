"""The original repositories' HungarianMatcher and SetCriterion, known by their looks.

They live in research code that is copied rather than installed, so neither can be told by where it was defined: what
counts is the class's name, its attributes and the signature of its ``forward``. A module that has the name but not the
looks (DETR's, for one) is refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from fastmask import modules
from fastmask.integrations._labels import check_binary
from fastmask.integrations._patching import original_class
from fastmask.targets import Targets

MATCHER, CRITERION = "HungarianMatcher", "SetCriterion"
COSTS = {"cost_class", "cost_mask", "cost_dice"}
SETTINGS = {"num_classes", "weight_dict", "eos_coef", "losses"}


def replacements(module: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Which modules get which class; see ``fastmask.integrations._patching``."""
    cls = type(module)
    if cls.__name__ not in (MATCHER, CRITERION) or cls.__module__.startswith("fastmask."):
        return
    arguments = list(inspect.signature(cls.forward).parameters)
    if arguments != ["self", "outputs", "targets"]:
        raise TypeError(f"{cls.__name__}.forward takes {', '.join(arguments)}; expected self, outputs, targets")
    settings = {name for name in vars(module) if not name.startswith("_")} - {"training"}
    if cls.__name__ == MATCHER:
        _check_settings(cls, settings, COSTS)
        yield module, HungarianMatcher
        return
    _check_settings(cls, settings, SETTINGS)
    if original_class(module.matcher).__name__ != MATCHER:
        raise TypeError(f"the matcher of {CRITERION} is a {type(module.matcher).__name__}; expected a {MATCHER}")
    losses = {name for name in dir(cls) if name.startswith("loss_")}
    if losses != {"loss_labels", "loss_masks"} or not set(module.losses) <= set(modules.criterion.LOSSES):
        raise TypeError(
            f"{CRITERION} has {', '.join(sorted(losses))} and losses={list(module.losses)}; expected loss_labels and "
            f"loss_masks, and any of {', '.join(modules.criterion.LOSSES)}"
        )
    yield module, SetCriterion


def _check_settings(cls: type[nn.Module], settings: set[str], expected: set[str]) -> None:
    if settings != expected:
        raise TypeError(
            f"{cls.__module__}.{cls.__name__} has the attributes {', '.join(sorted(settings))}; fastmask knows the one "
            f"that has {', '.join(sorted(expected))}"
        )


class HungarianMatcher(modules.HungarianMatcher):
    """MaskFormer's matcher, by fastmask's kernels."""

    mask_term, alpha, gamma = "focal", 0.25, 2.0
    ignore_void = False
    backend = "auto"

    def forward(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]] | Targets
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        _check_targets(targets)
        return super().forward(outputs, targets)


class SetCriterion(modules.SetCriterion):
    """MaskFormer's criterion, by fastmask's kernels."""

    backend = "auto"

    def forward(
        self, outputs: Mapping[str, object], targets: Sequence[Mapping[str, Tensor]] | Targets
    ) -> dict[str, Tensor]:
        """Unweighted losses of all layers under their original names."""
        _check_targets(targets)
        return super().forward(outputs, targets)


def _check_targets(targets: Sequence[Mapping[str, Tensor]] | Targets) -> None:
    """The original pads masks to the size of the batch before it calls; what it would do with others is undefined."""
    if isinstance(targets, Targets):
        return
    for b, target in enumerate(targets):
        check_binary(f'targets[{b}]["masks"]', target["masks"])
        if target["masks"].shape[-2:] != targets[0]["masks"].shape[-2:]:
            sizes = [tuple(target["masks"].shape[-2:]) for target in targets]
            raise ValueError(f"the masks of targets are of different sizes, {sizes}; expected all padded to one size")
