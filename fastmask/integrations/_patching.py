"""``patch`` and ``unpatch``: modules of foreign libraries get a faster class in place, and their own class back.

Only the class of a module changes. Its parameters, buffers, hooks, attributes and identity stay, so that state dicts,
optimizers, wrappers and copies know no difference; and unpatching restores exactly what was there.
"""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from fastmask.integrations._known import parts
from fastmask.integrations._replacement import STATE, Found, Options, is_patched, original_class, replace

logger = logging.getLogger("fastmask")

KNOWN = (
    "transformers' MaskFormer, Mask2Former, OneFormer, EoMT, EoMT-DINOv3, VidEoMT, RF-DETR and the other models of the "
    "DETR family, their matchers, losses and deformable attention and subclasses of these, and modules that look like "
    "the original repositories' HungarianMatcher and SetCriterion of MaskFormer, Mask2Former and MaskDINO"
)

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, *, fix: bool = False, ignore_void: bool = False) -> Model:
    """Replaces, in place and reversibly, the parts of another library's model that fastmask computes faster.

    It knows the following parts, anywhere inside ``model`` (which may be a wrapper such as DistributedDataParallel):

    - transformers' MaskFormerForInstanceSegmentation: matcher and loss, all decoder layers in one call; only the
      matched queries' masks are carried backward;
    - transformers' Mask2FormerForUniversalSegmentation: matcher, point-sampled loss, masked attention and multi-scale
      deformable attention;
    - transformers' OneFormer-, Eomt-, EomtDinov3- and VideomtForUniversalSegmentation: matcher and point-sampled loss;
      of OneFormer also deformable attention;
    - the multi-scale deformable attention of transformers' Deformable DETR, RT-DETR, Grounding DINO, MM Grounding DINO,
      LW-DETR, RF-DETR, OmDet-Turbo and PP-DocLayout (V2 to V4);
    - transformers' DETR family, whose models have a loss function: one assignment on the device for all layers and
      groups of queries, and the mask losses of DetrForSegmentation, ConditionalDetrForSegmentation and
      RfDetrForInstanceSegmentation (of the last also the mask costs);
    - any module with the name and attributes of a HungarianMatcher or SetCriterion in the repositories of MaskFormer,
      Mask2Former or MaskDINO (of the last without its box losses).

    A subclass of a matcher, loss or model keeps the methods that it overrides; the others are replaced, also where it
    calls them by ``super()``. Outputs, losses and gradients stay equal up to rounding. For the same seed this includes
    random points, which are drawn as the model draws them, but not dropout inside masked attention. Mask labels must be
    binary; in place of ``(M, H, W)`` masks, transformers' models take segment maps, which
    ``fastmask.integrations.transformers.segmentation_targets`` makes.
    The state dict keeps its keys, and hooks, ``deepcopy``, ``pickle``, ``save_pretrained`` and wrappers work as before.
    Patching twice does nothing, except that options take their latest values. The logger "fastmask" lists the replaced
    modules at level INFO, and what their classes override.

    Args:
        model: the model, or any module that contains it.
        fix: also correct known defects of the model, which are kept by default:

            - under ``accelerate``, transformers' models average ``num_masks`` over the processes and then divide it by
              their number once more, so that mask and dice losses grow with the world size; corrected, they are divided
              by the number of targets of the average process;
            - transformers' MaskFormer with ``use_auxiliary_loss=True`` fails unless hidden states are asked for;
            - transformers' models reject mask labels that are bool or integers;
            - the loss of transformers' RfDetrForInstanceSegmentation is an empty tensor if no image has a target.
        ignore_void: pixels and points that the labels mark as void count in no cost and no loss. Void is 255 in the
            masks of an image (in one of them is enough) and in one-byte segment maps, -1 in wider ones. Where images
            of a batch differ in size, padding is void too.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, contains no known part, or one that has been altered so that fastmask does
            not know what it computes; or ``ignore_void`` for a model that compares no masks. Nothing has then been
            changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = parts(model)
    if not found:
        raise TypeError(f"fastmask.patch knows nothing inside {type(model).__name__}; it knows {KNOWN}")
    if ignore_void and not any(one.replacement.compares_masks(one.module) for one in found):
        raise TypeError(f"ignore_void has no effect on {type(model).__name__}, in which nothing compares masks")
    names = {module: name or "the model" for name, module in model.named_modules()}
    for one in found:
        if not is_patched(one.module):
            _log(names[one.module], one)
        replace(one, Options(fix=fix, ignore_void=ignore_void))
    return model


def _log(name: str, found: Found) -> None:
    """Says what became of the module ``name``, and which methods of its class stay."""
    ours = f"{found.replacement.__module__}.{found.replacement.__qualname__}"
    own = ", ".join(found.overridden())
    left = f"; its own {own} stay, as the class overrides those of {found.known.__name__}" if own else ""
    logger.info("patched %s: %s, by %s%s", name, original_class(found.module).__name__, ours, left)


def unpatch(model: Model) -> Model:
    """Undoes ``patch``: every module gets its own class back. A model that is not patched stays as it is.

    Returns:
        ``model``.
    """
    for name, module in model.named_modules():
        state = vars(module).pop(STATE, None)
        if state is not None:
            module.__class__ = state.original
            logger.info("unpatched %s: %s", name or "the model", state.original.__name__)
    return model
