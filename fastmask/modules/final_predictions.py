"""What a model of any origin predicts for a batch, ready for inference image by image at any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import interpolate

from fastmask.functional import (
    SemanticView,
    instance_inference,
    labels_of_scores,
    merge_views,
    panoptic_inference,
    semantic_inference,
)

Size = tuple[int, int]

MASK2FORMER_SIZE = (384, 384)  # a constant of transformers' image processor
STRIDE = 4  # of EoMT's mask logits


class Rule(NamedTuple):
    """How a code base infers: the ``order`` of ``semantic_inference``, and the rules of ``panoptic_inference`` and
    ``instance_inference``; None for what it does not have."""

    semantic: str | None
    panoptic: str | None
    instance: str


RULES = {
    "maskformer": Rule("masks", "maskformer", "mask2former"),
    "mask2former": Rule("masks", "mask2former", "mask2former"),
    "huggingface": Rule("scores", "huggingface", "huggingface"),
    "oneformer": Rule("scores", "huggingface", "mask2former"),
    "eomt": Rule("scores", "eomt", "mask2former"),
    "rf_detr": Rule(None, None, "rf_detr"),
}
# The rules of transformers' models, by the beginning of the name of their outputs.
FAMILIES = {"OneFormer": "oneformer", "Eomt": "eomt", "RfDetr": "rf_detr"}


@dataclass(frozen=True)
class FinalPredictions:
    """Classes and masks of the last layer for B images, and how to infer from them.

    Args:
        class_logits: ``(B, N, K+1)``, or ``(B, N, K)`` for the rule "rf_detr".
        masks: mask logits ``(B, N, h, w)``, or ``mask_embed (B, N, C)`` and ``pixel_embed (B, C, h, w)``.
        rule: a key of ``RULES``.
        padded_size: (height, width) of the padded network input, to which the logits are upsampled first; None skips
            this step.
        valid_sizes: (height, width) of each image within it, to which they are then cropped. None skips this step,
            except that by the rule "eomt" an image fills the input as far as its aspect ratio allows.
        windows: (image, start, end) of each of the B windows into which EoMT's image processor has split the images
            along their longer side; None if there are B images.

    Raises:
        ValueError: an unknown rule, or a number of ``valid_sizes`` that is not B.
    """

    class_logits: Tensor
    masks: Tensor | tuple[Tensor, Tensor]
    rule: str
    padded_size: Size | None = None
    valid_sizes: Sequence[Size] | None = None
    windows: Sequence[tuple[int, int, int]] | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.valid_sizes is not None and len(self.valid_sizes) != len(self.class_logits):
            raise ValueError(f"valid_sizes has {len(self.valid_sizes)} entries for {len(self.class_logits)} images")

    @staticmethod
    def from_outputs(
        outputs: Any,
        *,
        rule: str | None = None,
        padded_size: Size | None = None,
        valid_sizes: Sequence[Size] | None = None,
    ) -> FinalPredictions:
        """The predictions in a model's outputs, without gradient.

        Args:
            outputs: the outputs of transformers' MaskFormer, Mask2Former, OneFormer, EoMT or RF-DETR, or any object
                with the two logits under the same names; or a mapping with "pred_logits" and "pred_masks", or with
                "class_logits", "mask_embed" and "pixel_embed", as the original repositories' and fastmask's models
                return them.
            rule: a key of ``RULES``; by default that of the outputs' image processor in transformers, and "maskformer"
                for a mapping.
            padded_size, valid_sizes: as for the class; by default as the image processor has them.

        Raises:
            TypeError: outputs without class and mask logits.
            ValueError: an unknown rule, or a mapping with boxes and without ``rule``.
        """
        name = type(outputs).__name__
        family = next((rule for prefix, rule in FAMILIES.items() if name.startswith(prefix)), "huggingface")
        masks: Tensor | tuple[Tensor, Tensor]
        if _has(outputs, "class_queries_logits", "masks_queries_logits"):
            class_logits = _of(outputs, "class_queries_logits")
            masks = mask_logits = _of(outputs, "masks_queries_logits")
            if family == "eomt" and padded_size is None:
                padded_size = STRIDE * mask_logits.shape[-2], STRIDE * mask_logits.shape[-1]
            elif name.startswith("Mask2Former") and rule in (None, "huggingface") and padded_size is None:
                padded_size = MASK2FORMER_SIZE
        elif family == "rf_detr" and _has(outputs, "logits", "pred_masks"):
            class_logits, masks = _of(outputs, "logits"), _of(outputs, "pred_masks")
        elif _has(outputs, "class_logits", "mask_embed", "pixel_embed"):
            class_logits, family = _of(outputs, "class_logits")[-1], "maskformer"
            masks = _of(outputs, "mask_embed")[-1], _of(outputs, "pixel_embed")
        elif _has(outputs, "pred_logits", "pred_masks"):
            class_logits, masks, family = _of(outputs, "pred_logits"), _of(outputs, "pred_masks"), "maskformer"
            if rule is None and _has(outputs, "pred_boxes"):
                raise ValueError("outputs has boxes, which models of several rules predict; name the rule")
        else:
            names = sorted(outputs) if isinstance(outputs, Mapping) else name
            raise TypeError(f"outputs must hold class logits and mask logits, got {names}")
        masks = masks.detach() if isinstance(masks, Tensor) else (masks[0].detach(), masks[1].detach())
        offsets = getattr(outputs, "patch_offsets", None)
        windows = None
        if offsets is not None and len(offsets) > 0:
            windows = [(int(image), int(start), int(end)) for image, start, end in offsets]
        return FinalPredictions(class_logits.detach(), masks, rule or family, padded_size, valid_sizes, windows)

    @property
    def num_images(self) -> int:
        """B, or the number of images that the windows belong to."""
        if self.windows is None:
            return self.class_logits.shape[0]
        return 1 + max(image for image, _, _ in self.windows)

    def of_image(self, image: int) -> FinalPredictions:
        """The predictions for one image."""
        if self.windows is None:
            return self.of(slice(image, image + 1))
        own = [window for window, (owner, _, _) in enumerate(self.windows) if owner == image]
        parts = self.of(slice(own[0], own[-1] + 1))  # the image processor keeps the order of images
        return replace(parts, windows=[(0, *self.windows[window][1:]) for window in own])

    def of(self, rows: slice) -> FinalPredictions:
        """The predictions in some rows of the batch."""
        masks = self.masks[rows] if isinstance(self.masks, Tensor) else (self.masks[0][rows], self.masks[1][rows])
        sizes = None if self.valid_sizes is None else self.valid_sizes[rows]
        return replace(self, class_logits=self.class_logits[rows], masks=masks, valid_sizes=sizes)

    def semantic(self, size: Size, output: str = "labels") -> Tensor:
        """The result of ``semantic_inference`` for images that share a size; windows must belong to one image."""
        order = self._rule("semantic")
        if self.windows is not None:
            return self._merge_windows(size, output)
        return self._infer(semantic_inference, size, self._valid_size(None), order=order, output=output)

    def panoptic(self, size: Size, **options: Any) -> Any:
        """The result of ``panoptic_inference`` for images that share a size."""
        options = {"rule": self._rule("panoptic")} | options
        return self._infer(panoptic_inference, size, self._valid_size(size), **options)

    def instances(self, size: Size, **options: Any) -> Any:
        """The result of ``instance_inference`` for images that share a size."""
        return self._infer(instance_inference, size, self._valid_size(size), rule=self._rule("instance"), **options)

    def _rule(self, task: str) -> str:
        rule = getattr(RULES[self.rule], task)
        if rule is None:
            raise ValueError(f"rule {self.rule!r} has no {task} inference")
        if self.windows is not None and task != "semantic":
            raise ValueError(f"outputs holds windows of images, which {task} inference cannot merge")
        return rule

    def _valid_size(self, size: Size | None) -> Size | None:
        """The part of the padded input that an image takes which is shown at ``size``."""
        if self.valid_sizes is not None:
            return self.valid_sizes[0]
        if self.rule != "eomt" or self.padded_size is None or size is None:
            return None
        height, width = _fitted(size, self.padded_size)
        return min(height, self.padded_size[0]), min(width, self.padded_size[1])

    def _infer(self, function: Any, size: Size, valid_size: Size | None, **options: Any) -> Any:
        return function(
            self.class_logits, self.masks, size, padded_size=self.padded_size, valid_size=valid_size, **options
        )

    def _merge_windows(self, size: Size, output: str) -> Tensor:
        """Semantic inference that averages scores where windows overlap, before it resizes them."""
        assert self.windows is not None and isinstance(self.masks, Tensor) and self.padded_size is not None
        upright = size[0] > size[1]
        views = [
            SemanticView(classes, masks, start if upright else 0, 0 if upright else start, self.padded_size)
            for classes, masks, (_, start, _) in zip(self.class_logits, self.masks, self.windows, strict=True)
        ]
        scores = merge_views(views, _fitted(size, self.padded_size, inside=False), output="scores")
        if output == "labels":
            return labels_of_scores(scores, size)[None]
        return interpolate(scores[None], size, mode="bilinear", align_corners=False)


def _fitted(size: Size, padded_size: Size, inside: bool = True) -> Size:
    """The size to which transformers resizes an image of ``size`` for EoMT: within the padded input, or, for windows,
    with the shorter side of the input."""
    from transformers.image_transforms import get_size_with_aspect_ratio

    height, width = get_size_with_aspect_ratio(size, padded_size[0], padded_size[1] if inside else None)
    return height, width


def _has(outputs: Any, *names: str) -> bool:
    if isinstance(outputs, Mapping):
        return all(name in outputs for name in names)
    return all(hasattr(outputs, name) for name in names)


def _of(outputs: Any, name: str) -> Any:
    return outputs[name] if isinstance(outputs, Mapping) else getattr(outputs, name)
