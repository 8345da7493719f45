"""How masks are compared with targets."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("focal", "bce")


@dataclass(frozen=True)
class MaskTerm:
    """The mask term of the matching cost and of the loss; see ``fastmask.mask_loss`` for its formula.

    Args:
        kind: "focal" (MaskFormer, arXiv:2107.06278) or "bce", cross-entropy (Mask2Former, arXiv:2112.01527).
        alpha: weight of foreground in the focal loss, 0..1.
        gamma: focusing parameter of the focal loss, >= 0.
        ignore_void: leave void pixels out of all sums and means, including those of the dice term; otherwise they are
            background.

    Raises:
        ValueError: an unknown kind, alpha outside 0..1, or a negative gamma.
    """

    kind: str = "focal"
    alpha: float = 0.25
    gamma: float = 2.0
    ignore_void: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, got {self.alpha}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")


FOCAL = MaskTerm()
