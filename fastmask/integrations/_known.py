"""Which classes of other libraries are replaced, and by which class of fastmask."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from torch import nn

from fastmask.integrations._replacement import Found, Replacement, is_patched

HERE = "fastmask.integrations"
CRITERIA, DETR = f"{HERE}.transformers._criteria", f"{HERE}.transformers.detr"
DEFORMABLE = f"{HERE}.transformers.deformable_attention"
MASKFORMER, MASK2FORMER = f"{HERE}.transformers.maskformer", f"{HERE}.transformers.mask2former"

# The models of transformers with the deformable attention of Deformable DETR, each in a class of its own.
DEFORMABLE_DETRS = (
    "deformable_detr grounding_dino lw_detr mm_grounding_dino omdet_turbo pp_doclayout_v2 pp_doclayout_v3 "
    "pp_doclayout_v4 rf_detr rt_detr"
).split()

# The module of each class, its name, and the replacement of it and of its subclasses. Nothing is imported before a
# model of the class is handed in. Where a class and its base are both here, the class decides.
KNOWN = {
    "transformers.models.maskformer.modeling_maskformer": {
        "MaskFormerHungarianMatcher": f"{MASKFORMER}.MaskFormerHungarianMatcher",
        "MaskFormerLoss": f"{MASKFORMER}.MaskFormerLoss",
        "MaskFormerForInstanceSegmentation": f"{MASKFORMER}.MaskFormerForInstanceSegmentation",
    },
    "transformers.models.mask2former.modeling_mask2former": {
        "Mask2FormerHungarianMatcher": f"{CRITERIA}.PointMatcher",
        "Mask2FormerLoss": f"{CRITERIA}.PointLoss",
        "Mask2FormerMaskedAttentionDecoder": f"{MASK2FORMER}.Mask2FormerMaskedAttentionDecoder",
        "Mask2FormerForUniversalSegmentation": f"{MASK2FORMER}.Mask2FormerForUniversalSegmentation",
        "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention": f"{DEFORMABLE}.EncoderAttention",
    },
    "transformers.models.oneformer.modeling_oneformer": {
        "OneFormerHungarianMatcher": f"{CRITERIA}.PointMatcher",
        "OneFormerLoss": f"{HERE}.transformers.oneformer.OneFormerLoss",
        "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention": f"{DEFORMABLE}.EncoderAttention",
    },
    "transformers.models.eomt.modeling_eomt": {
        "EomtHungarianMatcher": f"{CRITERIA}.PointMatcher",
        "EomtLoss": f"{CRITERIA}.PointLoss",
    },
    "transformers.models.eomt_dinov3.modeling_eomt_dinov3": {
        "EomtDinov3HungarianMatcher": f"{CRITERIA}.PointMatcher",
        "EomtDinov3Loss": f"{CRITERIA}.PointLoss",
    },
    "transformers.models.videomt.modeling_videomt": {
        "VideomtHungarianMatcher": f"{CRITERIA}.PointMatcher",
        "VideomtLoss": f"{CRITERIA}.PointLoss",
    },
    **{
        f"transformers.models.{name}.modeling_{name}": {
            "MultiScaleDeformableAttention": f"{DEFORMABLE}.MultiScaleDeformableAttention"
        }
        for name in DEFORMABLE_DETRS
    },
    "transformers.modeling_utils": {"PreTrainedModel": f"{DETR}.LossFunctionModel"},
    "transformers.loss.loss_for_object_detection": {
        "HungarianMatcher": f"{DETR}.BoxMatcher",
        "ImageLoss": f"{DETR}.BoxCriterion",
    },
    "transformers.loss.loss_deformable_detr": {
        "DeformableDetrHungarianMatcher": f"{DETR}.FocalMatcher",
        "DeformableDetrImageLoss": f"{DETR}.BoxCriterion",
    },
    "transformers.loss.loss_grounding_dino": {
        "GroundingDinoHungarianMatcher": f"{DETR}.GroundedMatcher",
        "GroundingDinoImageLoss": f"{DETR}.BoxCriterion",
    },
    "transformers.loss.loss_lw_detr": {
        "LwDetrHungarianMatcher": f"{DETR}.FocalMatcher",
        "LwDetrImageLoss": f"{DETR}.BoxCriterion",
    },
    "transformers.loss.loss_rt_detr": {
        "RTDetrHungarianMatcher": f"{DETR}.FocalMatcher",
        "RTDetrLoss": f"{DETR}.BoxCriterion",
    },
    "transformers.loss.loss_d_fine": {"DFineLoss": f"{DETR}.BoxCriterion"},
    "transformers.loss.loss_deimv2": {"Deimv2Loss": f"{DETR}.BoxCriterion"},
    "transformers.loss.loss_rf_detr": {
        "RfDetrHungarianMatcher": f"{HERE}.transformers.rf_detr.RfDetrMatcher",
        "RfDetrImageLoss": f"{HERE}.transformers.rf_detr.RfDetrCriterion",
    },
}


def parts(model: nn.Module) -> list[Found]:
    """What to replace in ``model``, and what is already replaced.

    Raises:
        TypeError: fastmask knows a part, but it has been altered.
    """
    return [
        found
        for module in model.modules()
        for found in ([Found.of_patched(module)] if is_patched(module) else replacements(module))
    ]


def replacements(module: nn.Module) -> Iterator[Found]:
    """What to replace for ``module``: itself, parts of it, or nothing.

    Raises:
        TypeError: fastmask knows the module, but it has been altered.
    """
    found = replacement_of(type(module))
    if found is not None:
        known, replacement = found
        if replacement.matcher_class is not None:
            _check_matcher(module, known, replacement.matcher_class)
        yield from replacement.replacements(module, known)
    else:
        yield from importlib.import_module(f"{HERE}.original").replacements(module)


def find(module: nn.Module) -> Found | None:
    """What takes or took the place of ``module`` itself; None if nothing does."""
    if is_patched(module):
        return Found.of_patched(module)
    return next((found for found in replacements(module) if found.module is module), None)


def replacement_of(cls: type[nn.Module]) -> tuple[type[nn.Module], type[Replacement]] | None:
    """The known class that ``cls`` is or derives from, and its replacement."""
    for known in cls.__mro__:
        path = KNOWN.get(known.__module__, {}).get(known.__qualname__)
        if path is not None:
            module, _, name = path.rpartition(".")
            return known, getattr(importlib.import_module(module), name)
    return None


def _check_matcher(criterion: nn.Module, known: type[nn.Module], expected: type[Replacement]) -> None:
    """Refuses a criterion whose matcher fastmask does not know.

    Args:
        criterion: of the class ``known`` or a subclass.
        expected: what the replacement of the matcher must derive from.

    Raises:
        TypeError: it does not.
    """
    matcher = getattr(criterion, "matcher", None)
    found = find(matcher) if isinstance(matcher, nn.Module) else None
    if found is None or not issubclass(found.replacement, expected):
        raise TypeError(
            f"the matcher of {type(criterion).__name__} is a {type(matcher).__name__}, whose costs fastmask does not "
            f"know; expected the matcher of {known.__name__} or a subclass of it"
        )
