"""``patch`` and ``unpatch``: modules of foreign libraries get a faster class in place, and their own class back.

Only the class of a module changes. Its parameters, buffers, hooks, attributes and identity stay, so that state dicts,
optimizers, wrappers and copies know no difference; and unpatching restores exactly what was there.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

logger = logging.getLogger("fastmask")

# The modules with the replacements, by the prefix of the module in which a class is defined.
FAMILIES = {
    "transformers.models.maskformer.": "fastmask.integrations.transformers.maskformer",
    "transformers.models.mask2former.": "fastmask.integrations.transformers.mask2former",
    "transformers.models.oneformer.": "fastmask.integrations.transformers.oneformer",
    "transformers.models.eomt.": "fastmask.integrations.transformers.eomt",
}
DUCK_TYPED = "fastmask.integrations.original"
KNOWN = (
    "transformers' MaskFormerForInstanceSegmentation, Mask2FormerForUniversalSegmentation, "
    "OneFormerForUniversalSegmentation and EomtForUniversalSegmentation, and modules that look like the original "
    "repositories' HungarianMatcher and SetCriterion"
)
STATE = "_fastmask_patch"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Patched:
    """The state of a patched module.

    Args:
        original: its own class.
        fix: whether known defects are corrected.
    """

    original: type[nn.Module]
    fix: bool


def patch(model: Model, *, fix: bool = False) -> Model:
    """Replaces, in place and reversibly, the parts of another library's model that fastmask computes faster.

    It knows the following parts, anywhere inside ``model`` (which may be a wrapper such as DistributedDataParallel):

    - transformers' MaskFormerForInstanceSegmentation: matcher and loss, all decoder layers in one call; only the
      matched queries' masks are carried backward;
    - transformers' Mask2FormerForUniversalSegmentation: matcher, point-sampled loss and masked attention;
    - transformers' OneFormerForUniversalSegmentation and EomtForUniversalSegmentation: matcher and point-sampled loss;
    - any module with the name and attributes of the original repositories' HungarianMatcher or SetCriterion.

    Outputs, losses and gradients stay equal up to rounding. For the same seed this includes random points, which are
    drawn as the model draws them, but not dropout inside masked attention. Mask labels must be binary.
    The state dict keeps its keys, and hooks, ``deepcopy``, ``pickle``, ``save_pretrained`` and wrappers work as before.
    Patching twice does nothing, except that ``fix`` takes its latest value. The logger "fastmask" lists the replaced
    modules at level INFO.

    Args:
        model: the model, or any module that contains it.
        fix: also correct known defects of the model, which are kept by default:

            - under ``accelerate``, transformers' models average ``num_masks`` over the processes and then divide it by
              their number once more, so that mask and dice losses grow with the world size; corrected, they are divided
              by the number of targets of the average process;
            - transformers' MaskFormer with ``use_auxiliary_loss=True`` fails unless hidden states are asked for;
            - transformers' models reject mask labels that are bool or integers.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, contains no known part, or one that has been altered so that fastmask does
            not know what it computes. Nothing has then been changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patched = [module for module in model.modules() if STATE in vars(module)]
    found = [pair for module in model.modules() if STATE not in vars(module) for pair in replacements(module)]
    if not found and not patched:
        raise TypeError(f"fastmask.patch knows nothing inside {type(model).__name__}; it knows {KNOWN}")
    for module in patched:
        vars(module)[STATE] = Patched(vars(module)[STATE].original, fix)
    names = {module: name or "the model" for name, module in model.named_modules()}
    for module, cls in found:
        original = type(module)
        module.__class__ = cls
        vars(module)[STATE] = Patched(original, fix)
        logger.info("patched %s: %s, by %s", names[module], original.__name__, f"{cls.__module__}.{cls.__qualname__}")
    return model


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


def fixes(module: nn.Module) -> bool:
    """Whether the patched ``module`` corrects known defects."""
    state = vars(module).get(STATE)
    return state is not None and state.fix


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has, or had before it was patched."""
    state = vars(module).get(STATE)
    return type(module) if state is None else state.original


def replacements(module: nn.Module) -> Iterable[tuple[nn.Module, type[nn.Module]]]:
    """The modules to replace for ``module``: itself, parts of it, or none; and the class that each gets.

    Raises:
        TypeError: fastmask knows the module, but it has been altered.
    """
    source = type(module).__module__
    family = next((family for prefix, family in FAMILIES.items() if source.startswith(prefix)), DUCK_TYPED)
    return importlib.import_module(family).replacements(module)
