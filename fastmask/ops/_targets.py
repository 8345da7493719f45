"""The six operator arguments that hold the targets of a batch."""

from __future__ import annotations

from torch import Tensor

from fastmask.targets import Targets

TARGETS = "Tensor labels, Tensor? masks, Tensor? segments, Tensor? valid, int void_value, bool ignore_void"


def target_arguments(
    targets: Targets, ignore_void: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, bool]:
    """The values of the arguments that ``TARGETS`` declares."""
    return targets.labels, targets.masks, targets.segments, targets.valid, targets.void, ignore_void
