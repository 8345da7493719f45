"""The optimizer, the schedule and the gradient clipping of a recipe."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from fastmask.training.recipe import Recipe

# Names of learned queries, tokens and positions that are parameters outside an nn.Embedding, in the vision transformers
# of fastmask and ``transformers`` and in the authors' code.
_EMBEDDING = re.compile(r"pos_embed|position_embedding|position_bias|(^|_)tokens?$|cls_emb|query_embed|level_embed")
_NORM = re.compile(r"Norm(\dd)?$")
# Parts of parameter names that torch.compile and activation checkpointing insert.
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups the trainable parameters by learning rate and weight decay, each once.

    The rule is that of the authors of MaskFormer and Mask2Former (``train_net.py``, ``build_optimizer``): the backbone
    has its own learning rate; normalization layers, and embeddings of queries, tokens and positions, have their own
    weight decay; biases decay like weights.

    Args:
        model: the attribute ``backbone_weights`` of fastmask's networks says which weights form the backbone; in other
            modules it is the submodules with "backbone" in their name.
        recipe: gives the learning rate and the weight decays.

    Returns:
        Up to six groups for an optimizer, "backbone" before "head", each of "weights", "norms" and "embeddings", in the
        order of the model's parameters: "params"; "name", such as "backbone/norms"; "multiplier", the group's share of
        the learning rate; "lr"; "weight_decay".

    Raises:
        ValueError: the model has no trainable parameters.
    """
    parts = {"backbone": recipe.backbone_multiplier, "head": 1.0}
    decays = {
        "weights": recipe.weight_decay,
        "norms": recipe.norm_weight_decay,
        "embeddings": recipe.embed_weight_decay,
    }
    groups: dict[str, dict[str, Any]] = {
        f"{part}/{kind}": {
            "params": [],
            "name": f"{part}/{kind}",
            "multiplier": multiplier,
            "lr": multiplier * recipe.learning_rate,
            "weight_decay": decay,
        }
        for part, multiplier in parts.items()
        for kind, decay in decays.items()
    }
    if isinstance(model, DistributedDataParallel):
        model = model.module
    prefixes = getattr(model, "backbone_weights", None)
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            path = _WRAPPERS.sub("", f"{module_name}.{name}".removeprefix("."))
            in_backbone = "backbone" in module_name if prefixes is None else path.startswith(prefixes)
            groups[f"{'backbone' if in_backbone else 'head'}/{_kind(module, name)}"]["params"].append(parameter)
    if not seen:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    return [group for group in groups.values() if group["params"]]


def _kind(module: nn.Module, name: str) -> str:
    """The kind of a parameter, by its module and name."""
    if any(_NORM.search(base.__name__) for base in type(module).__mro__):
        return "norms"
    if isinstance(module, nn.Embedding) or _EMBEDDING.search(name):
        return "embeddings"
    return "weights"


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over :func:`parameter_groups`."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """The factor of the learning rate at a step.

    With m = ``min_learning_rate / learning_rate``, "poly" is m + (1 - m) (1 - step / steps) ** power; "steps" is
    gamma ** (number of milestones passed); "constant" is 1. During warm-up, the factor is multiplied by a line from
    ``warmup_factor`` to 1, as in detectron2.

    PyTorch's PolynomialLR has no m, and its LinearLR cannot start at 0; both multiply the last value, so that rounding
    errors accumulate, whereas this formula is exact at every step.

    Args:
        recipe: gives the schedule.
        step: the number of steps taken before, at least 0; after ``steps``, the factor is constant.
    """
    factor = 1.0
    if recipe.schedule == "poly":
        least = recipe.min_learning_rate / recipe.learning_rate
        factor = least + (1 - least) * max(0.0, 1 - step / recipe.steps) ** recipe.power
    elif recipe.schedule == "steps":
        factor = recipe.gamma ** bisect_right([round(share * recipe.steps) for share in recipe.milestones], step)
    if step < recipe.warmup_steps:
        risen = step / recipe.warmup_steps
        factor *= recipe.warmup_factor * (1 - risen) + risen
    return factor


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> LambdaLR:
    """The recipe's schedule; call its ``step`` once after each step of the optimizer."""
    return LambdaLR(optimizer, partial(learning_rate_factor, recipe))


@torch.no_grad()
def clip_gradients(model: nn.Module | Iterable[Tensor], clip_norm: float) -> Tensor:
    """Limits the norm of the gradient over all parameters, in place, without waiting for the device.

    Args:
        model: a module or its parameters, which may be sharded (``DTensor``).
        clip_norm: the largest Euclidean norm; 0 for no limit.

    Returns:
        The norm before clipping, a scalar tensor; not finite if a gradient is not finite.
    """
    parameters = [p for p in _parameters(model) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # of a DTensor: the norm over all shards
        norm = norm.full_tensor()
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def _parameters(model: nn.Module | Iterable[Tensor]) -> Iterator[Tensor]:
    return model.parameters() if isinstance(model, nn.Module) else iter(model)
