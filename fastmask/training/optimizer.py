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
    weight decay; biases decay like weights. With ``layer_decay`` the blocks of the backbone have rates of their own, as
    in EoMT: what precedes them learns like the first, what follows them like the last.

    Args:
        model: the attribute ``backbone_weights`` of fastmask's networks says which weights form the backbone; in other
            modules it is the submodules with "backbone" in their name. The attribute ``backbone_blocks`` says which of
            them belong to its equal blocks.
        recipe: gives the learning rate and the weight decays.

    Returns:
        Up to six groups for an optimizer, "backbone" before "head", each of "weights", "norms" and "embeddings", in the
        order of the model's parameters: "params"; "name", such as "backbone/norms"; "multiplier", the group's share of
        the learning rate; "lr"; "weight_decay". With ``layer_decay`` there are groups for each block, such as
        "backbone/0/norms", before them.

    Raises:
        ValueError: the model has no trainable parameters, or with ``layer_decay`` no backbone of equal blocks.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    shares = _shares_of_blocks(model, recipe)
    parts = {f"backbone/{i}": share * recipe.backbone_multiplier for i, share in enumerate(shares)}
    parts |= {"backbone": recipe.backbone_multiplier, "head": 1.0}
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
    prefixes = getattr(model, "backbone_weights", None)
    seen = set()
    outside = "backbone/0" if shares else "backbone"  # the part of weights outside of blocks: at first, before them
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            path = _WRAPPERS.sub("", f"{module_name}.{name}".removeprefix("."))
            in_backbone = "backbone" in module_name if prefixes is None else path.startswith(prefixes)
            part = "head"
            if in_backbone:
                number = _block_number(model, path) if shares else None
                part = outside if number is None else f"backbone/{number}"
                outside = outside if number is None else "backbone"
            groups[f"{part}/{_kind(module, name)}"]["params"].append(parameter)
    if not seen:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    return [group for group in groups.values() if group["params"]]


def _shares_of_blocks(model: nn.Module, recipe: Recipe) -> list[float]:
    """The shares of the backbone's learning rate that its blocks have; empty without ``layer_decay``."""
    if recipe.layer_decay == 1:
        return []
    paths = (_WRAPPERS.sub("", name) for name, _ in model.named_parameters())
    numbers = [number for path in paths if (number := _block_number(model, path)) is not None]
    if not numbers:
        name = type(model).__name__
        raise ValueError(
            f"layer_decay is {recipe.layer_decay}; a {name} has no backbone of equal blocks, so expected 1"
        )
    last = max(numbers)
    exempt = 0 if recipe.decay_query_blocks else getattr(getattr(model, "config", None), "query_blocks", 0)
    return [1.0 if i > last - exempt else recipe.layer_decay ** (last - i) for i in range(last + 1)]


def _block_number(model: nn.Module, path: str) -> int | None:
    """The block of the backbone to which a parameter belongs."""
    match = re.match(getattr(model, "backbone_blocks", "") or r"(?!)", path)
    return None if match is None else int(match[1])


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


def learning_rate_factor(recipe: Recipe, step: int, *, backbone: bool = False) -> float:
    """The factor of the learning rate at a step.

    With m = ``min_learning_rate / learning_rate``, "poly" is m + (1 - m) (1 - step / steps) ** power; "steps" is
    gamma ** (number of milestones passed); "constant" is 1. During warm-up, the factor is multiplied by a line from
    ``warmup_factor`` to 1, as in detectron2.

    "two-stage-poly" is EoMT's (arXiv:2503.19108): the factor rises from 0 to 1 in ``warmup_steps``, that of the
    backbone in the ``backbone_warmup_steps`` after them, and is (1 - s / S) ** power from then on, s being the steps
    since its rise and S all steps after it.

    PyTorch's PolynomialLR has no m, and its LinearLR cannot start at 0; both multiply the last value, so that rounding
    errors accumulate, whereas this formula is exact at every step.

    Args:
        recipe: gives the schedule.
        step: the number of steps taken before, at least 0; after ``steps``, the factor is constant.
        backbone: whether the learning rate is the backbone's, which matters for "two-stage-poly" only.
    """
    if recipe.schedule == "two-stage-poly":
        begin, rise = (recipe.warmup_steps, recipe.backbone_warmup_steps) if backbone else (0, recipe.warmup_steps)
        since = step - begin - rise
        if since < 0:
            return max(0.0, (step - begin) / rise)
        return max(0.0, 1 - since / (recipe.steps - begin - rise)) ** recipe.power
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
    of_backbone = [group["name"].startswith("backbone") for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(learning_rate_factor, recipe, backbone=flag) for flag in of_backbone])


def mask_probabilities(recipe: Recipe, step: int) -> tuple[float, ...]:
    """The probabilities of masked attention in an EoMT's blocks with queries, at a step (EoMT, arXiv:2503.19108).

    Each is 1 until its entry of ``anneal_starts``, 0 from its entry of ``anneal_ends``, and (1 - p) ** power between,
    where p grows linearly from 0 to 1.

    Args:
        recipe: gives the annealing; without any, the result is empty.
        step: the number of steps taken before, at least 0.
    """
    probabilities = []
    for start, end in zip(recipe.anneal_starts, recipe.anneal_ends, strict=True):
        begin, stop = (round(share * recipe.steps) for share in (start, end))
        progress = 1.0 if step >= stop else max(0.0, (step - begin) / (stop - begin))
        probabilities.append((1 - progress) ** recipe.power)
    return tuple(probabilities)


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
