"""The DETR family of transformers: one assignment for all layers and groups of queries, and mask losses.

Its models have no criterion of their own: a function makes one in each step. The patched model calls a copy of that
function whose criteria are patched as they are made; transformers' function itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from inspect import getattr_static
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastmask.functional import assign
from fastmask.integrations._boxes import box_costs, focal_costs
from fastmask.integrations._foreign_targets import (
    Pairs,
    TargetList,
    check_labels,
    device_pairs,
    mask_term,
    matched_masks,
    pair_losses,
    targets_of_masks,
)
from fastmask.integrations._known import find, parts, replacement_of
from fastmask.integrations._replacement import Found, Options, Replacement, options_of, replace
from fastmask.targets import Targets

Layer = Mapping[str, Any]  # "logits" (B, N, K), "pred_boxes" (B, N, 4) and others, of one decoder layer


class BoxMatcher(Replacement, nn.Module):
    """DETR's matcher; class, box and GIoU costs are transformers' own."""

    reads_masks = False
    class_cost: float
    bbox_cost: float
    giou_cost: float

    @torch.no_grad()
    def forward(self, outputs: Layer, targets: TargetList, group_detr: int = 1) -> Pairs:
        """For each image (queries, targets), int64 on the device of the logits: group by group, by ascending query."""
        known = vars(self).get("matched", {}).get(id(outputs["logits"]))
        return self.match([outputs], targets, group_detr)[0] if known is None else known

    @torch.no_grad()
    def match(self, layers: Sequence[Layer], targets: TargetList, num_groups: int) -> list[Pairs]:
        """What ``forward`` returns, of each layer; by one assignment if the layers have one shape."""
        if len({layer["logits"].shape for layer in layers}) > 1:
            return [self.match([layer], targets, num_groups)[0] for layer in layers]
        cost = self.cost(layers, targets)
        num_layers, batch_size, num_queries, _ = cost.shape
        size = num_queries // num_groups
        counts = [len(target["class_labels"]) for target in targets]
        groups = cost[:, :, : size * num_groups].unflatten(2, (num_groups, size))  # [L, B, G, N/G, M]
        present = pad_sequence([torch.ones_like(target["class_labels"]) for target in targets], batch_first=True)
        assignment = assign(groups, present.sum(1, keepdim=True).to(cost.device))
        flat = device_pairs(
            assignment.flatten(0, 2), [count for count in counts for _ in range(num_groups)] * num_layers, size
        )
        pairs = []
        for first in range(0, len(flat), num_groups):
            of_groups = flat[first : first + num_groups]
            queries = torch.cat([queries + size * group for group, (queries, _) in enumerate(of_groups)])
            pairs.append((queries, torch.cat([slots for _, slots in of_groups])))
        return [pairs[first : first + batch_size] for first in range(0, len(pairs), batch_size)]

    def cost(self, layers: Sequence[Layer], targets: TargetList) -> Tensor:
        """``(L, B, N, M)``: the matching cost; anything in the columns of padding."""
        class_cost = self.label_costs(layers, targets)
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).to(class_cost.dtype)
        wanted = pad_sequence([target["boxes"] for target in targets], batch_first=True).to(boxes)
        distance, giou = box_costs(boxes, wanted)
        return self.bbox_cost * distance + self.class_cost * class_cost + self.giou_cost * giou

    def label_costs(self, layers: Sequence[Layer], targets: TargetList) -> Tensor:
        """``(L, B, N, M)``: the class cost without its weight, -softmax(logits)[label] in DETR."""
        return -self.label_logits(layers, targets, lambda logits: logits.softmax(-1))

    def label_logits(self, layers: Sequence[Layer], targets: TargetList, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``(L, B, N, M)``: each query's logit of each target's class, after a ``change`` of all logits."""
        logits = torch.stack([layer["logits"] for layer in layers])
        for b, target in enumerate(targets):
            check_labels(f'labels[{b}]["class_labels"]', target["class_labels"], logits.shape[-1])
        labels = pad_sequence([target["class_labels"] for target in targets], batch_first=True).to(logits.device)
        scores = change(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return scores.gather(-1, labels[None, :, None].expand(*scores.shape[:-1], -1))


class FocalMatcher(BoxMatcher):
    """The matcher of Deformable DETR and its descendants: what a target adds to the focal loss of its logit."""

    alpha = 0.25
    gamma = 2.0
    use_focal_loss: bool = True

    def label_costs(self, layers: Sequence[Layer], targets: TargetList) -> Tensor:
        """See :meth:`BoxMatcher.label_costs`."""
        if not self.use_focal_loss:
            return super().label_costs(layers, targets)
        return focal_costs(self.label_logits(layers, targets, lambda logits: logits), self.alpha, self.gamma)


class GroundedMatcher(FocalMatcher):
    """Grounding DINO's matcher: the mean cost over the tokens of the target's class."""

    def label_costs(self, layers: Sequence[Layer], targets: TargetList) -> Tensor:
        """See :meth:`BoxMatcher.label_costs`."""
        logits = torch.stack([layer["logits"] for layer in layers])
        tokens = []
        for b, (of_classes, target) in enumerate(zip(layers[0]["label_maps"], targets, strict=True)):
            check_labels(f'labels[{b}]["class_labels"]', target["class_labels"], len(of_classes))
            of_targets = of_classes[target["class_labels"]]
            tokens.append(of_targets / of_targets.sum(-1, keepdim=True))
        costs = focal_costs(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.alpha, self.gamma)
        return costs @ pad_sequence(tokens, batch_first=True).to(costs).transpose(1, 2)


class BoxCriterion(Replacement, nn.Module):
    """The criterion: all layers are matched at once; mask losses come from fastmask's kernels, others from PyTorch."""

    matcher_class = BoxMatcher
    matcher: BoxMatcher
    losses: Sequence[str]
    _get_source_permutation_idx: Callable[[Pairs], tuple[Tensor, Tensor]]

    @classmethod
    def compares_masks(cls, module: nn.Module) -> bool:
        return "masks" in vars(module)["losses"]

    def forward(self, outputs: Mapping[str, Any], targets: TargetList) -> dict[str, Tensor]:
        """Unweighted losses under transformers' names, of all layers."""
        found = find(self.matcher)
        if found is None or "forward" in found.overridden():
            return super().forward(outputs, targets)
        encoder = [outputs["enc_outputs"]] if "enc_outputs" in outputs else []
        num_groups = getattr(self, "group_detr", 1) if self.training else 1
        try:
            self.match_ahead([outputs, *outputs.get("auxiliary_outputs", ()), *encoder], targets, num_groups)
            return super().forward(outputs, targets)
        finally:
            vars(self.matcher).pop("matched", None)
            vars(self).pop("mask_losses", None)

    def match_ahead(self, layers: Sequence[Layer], targets: TargetList, num_groups: int) -> None:
        """Matches the layers in the order in which transformers would."""
        self.remember(layers, self.matcher.match(layers, targets, num_groups))

    def remember(self, layers: Sequence[Layer], matched: Sequence[Pairs]) -> None:
        """Lets the matcher answer with ``matched`` when it is asked for one of the layers."""
        pairs = zip(layers, matched, strict=True)
        vars(self.matcher)["matched"] = {id(layer["logits"]): of_layer for layer, of_layer in pairs}

    def loss_masks(
        self, outputs: Layer, targets: TargetList, indices: Pairs, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Focal and dice losses of the matched queries at all pixels."""
        mask_logits = outputs["pred_masks"]
        masks, valid = matched_masks(mask_targets(self, targets, mask_logits.device), indices)
        matched = mask_logits[self._get_source_permutation_idx(indices)]
        loss_mask, loss_dice = pair_losses(matched, masks, term=mask_term(self, "focal"), valid=valid)
        return {"loss_mask": loss_mask.sum() / num_boxes, "loss_dice": loss_dice.sum() / num_boxes}


def mask_targets(module: nn.Module, targets: TargetList, device: torch.device) -> Targets:
    """The container of the targets' masks; it has no classes."""
    return targets_of_masks(
        'labels[{}]["masks"]',
        [target["masks"] for target in targets],
        [torch.zeros_like(target["class_labels"]) for target in targets],
        num_classes=1,
        device=device,
        ignore_void=options_of(module).ignore_void,
    )


class LossFunctionModel(Replacement, nn.Module):
    """A model whose loss function makes its criterion anew in each step; the function's criteria are patched."""

    @classmethod
    def replacements(cls, module: nn.Module, known: type[nn.Module]) -> Iterator[Found]:
        """The model, if it has a loss function of transformers that makes a known criterion."""
        function, own = _own_loss_function(module), type(module)
        chooses_itself = getattr_static(own, "loss_function") is not getattr_static(known, "loss_function")
        if function is not None and _criteria_of(function) and not chooses_itself:
            yield Found(module, own, cls)

    @classmethod
    def compares_masks(cls, module: nn.Module) -> bool:
        function = _own_loss_function(module)
        return function is not None and "pred_masks" in function.__code__.co_varnames

    @property
    def loss_function(self) -> Callable[..., Any]:
        """transformers' function, or one that was set, with patched criteria."""
        function = super().loss_function  # type: ignore[misc]
        return _with_patched_criteria(function, options_of(self)) if _is_transformers(function) else function

    @loss_function.setter
    def loss_function(self, value: Callable[..., Any]) -> None:
        self._loss_function = value


def _own_loss_function(model: nn.Module) -> FunctionType | None:
    """The loss function of a model, patched or not, if it is one of transformers'."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    by_default = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    function = vars(model).get("_loss_function", by_default)
    return function if _is_transformers(function) else None


def _is_transformers(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__module__.startswith("transformers.loss.")


@cache
def _criteria_of(function: FunctionType) -> dict[str, type[nn.Module]]:
    """The known criteria that a function makes, by the names under which it finds them."""
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    classes = {name: cls for name, cls in named.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}
    ours = {name: replacement_of(cls) for name, cls in classes.items()}
    return {
        name: classes[name] for name, found in ours.items() if found is not None and issubclass(found[1], BoxCriterion)
    }


@cache
def _with_patched_criteria(function: FunctionType, options: Options) -> FunctionType:
    """A copy of the function that makes patched criteria."""
    made = {name: partial(_make, cls, options) for name, cls in _criteria_of(function).items()}
    names = {**function.__globals__, **made}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _make(cls: type[nn.Module], options: Options, *args: Any, **kwargs: Any) -> nn.Module:
    criterion = cls(*args, **kwargs)
    for found in parts(criterion):
        replace(found, options)
    return criterion
