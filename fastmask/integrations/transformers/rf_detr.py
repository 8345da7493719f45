"""RF-DETR's segmentation in transformers: assignment of all layers and groups at once, and masks at random points.

Every random number is drawn as transformers draws it. The masks of targets are read at the pixel nearest to a point,
which leaves one row of logits and one of labels for each mask: these are compared as masks of one row of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.functional import mask_cost
from fastmask.integrations._foreign_targets import Pairs, TargetList, mask_term, pair_losses, sizes_of
from fastmask.integrations._known import find
from fastmask.integrations._random_points import most_uncertain, sample
from fastmask.integrations._replacement import options_of
from fastmask.integrations.transformers.detr import BoxCriterion, FocalMatcher, Layer, mask_targets
from fastmask.targets import Targets

OVERSAMPLE_RATIO, IMPORTANCE_SAMPLE_RATIO = 3, 0.75  # constants of transformers
DRAWN = "drawn"  # the key under which a layer has its random numbers


class Drawn(NamedTuple):
    """The random numbers of one layer: the matcher's points ``(1, P, 2)``, and for the T matched pairs the candidates
    ``(T, C, 2)`` and the points ``(T, R, 2)`` that lie anywhere."""

    shared: Tensor
    candidates: Tensor
    others: Tensor


class RfDetrMatcher(FocalMatcher):
    """The matcher: Deformable DETR's costs, and those of masks by fastmask's kernels."""

    reads_masks = True
    mask_point_sample_ratio: int
    cost_mask_class: float
    cost_mask_dice: float

    def cost(self, layers: Sequence[Layer], targets: TargetList) -> Tensor:
        """``(L, B, N, M)``: the matching cost; anything in the columns of padding."""
        cost = super().cost(layers, targets)
        num_layers, batch_size, num_queries, _ = cost.shape
        points = torch.cat(
            [layer[DRAWN].shared if DRAWN in layer else self.draw(layer) for layer in layers]
        )  # [L, P, 2]
        mask_logits = torch.stack([layer["pred_masks"] for layer in layers]).flatten(0, 1)
        logits = sample(mask_logits, points.repeat_interleave(batch_size, 0))  # [L B, N, P]
        of_images = one_size(self, targets, cost.device)
        index, inside = nearest_pixels(points, of_images.size)  # [L, P]

        def rows(maps: Tensor) -> Tensor:
            """Maps ``(B, ..., H, W)`` at the points, ``(L B, ..., 1, P)``."""
            return (maps.flatten(-2)[..., index] & inside).movedim(-2, 0).flatten(0, 1).unsqueeze(-2)

        rows_of_targets = Targets(
            of_images.labels.repeat(num_layers, 1),
            of_images.counts.repeat(num_layers),
            masks=rows(of_images.dense_masks()),
            valid=None if of_images.valid is None else rows(of_images.valid),
        )
        mask_costs = mask_cost(
            logits.new_zeros(*logits.shape[:2], 2),
            logits[:, :, None],
            rows_of_targets,
            cost_class=0.0,
            cost_mask=self.cost_mask_class,
            cost_dice=self.cost_mask_dice,
            term=mask_term(self, "bce"),
        )
        return cost + mask_costs.view(num_layers, batch_size, num_queries, -1)

    def draw(self, layer: Layer) -> Tensor:
        """``(1, P, 2)``: the points of all images; transformers takes their number from the shape of the boxes."""
        size = layer["pred_boxes"].numel() // self.mask_point_sample_ratio
        return torch.rand(1, size, 2, device=layer["pred_masks"].device)


class RfDetrCriterion(BoxCriterion):
    """The criterion: all layers are matched at once, and so are their masks compared."""

    mask_point_sample_ratio: int
    matcher: RfDetrMatcher

    def match_ahead(self, layers: Sequence[Layer], targets: TargetList, num_groups: int) -> None:
        """Matches the layers, and computes their mask losses."""
        found = find(self)
        if found is None or "loss_masks" in found.overridden():
            return  # the numbers that it draws come between those of the matcher
        size = layers[0]["logits"].shape[1] // num_groups
        num_pairs = num_groups * sum(min(len(target["class_labels"]), size) for target in targets)
        drawn = [{**layer, DRAWN: Drawn(self.matcher.draw(layer), *self.draw(layer, num_pairs))} for layer in layers]
        matched = self.matcher.match(drawn, targets, num_groups)
        self.remember(layers, matched)
        if num_pairs > 0:
            sums = self.mask_sums(drawn, targets, matched)
            vars(self)["mask_losses"] = {id(layer["pred_masks"]): one for layer, one in zip(layers, sums, strict=True)}

    def draw(self, layer: Layer, num_pairs: int) -> tuple[Tensor, Tensor]:
        """The candidates and the other points of :class:`Drawn`; transformers draws none for no pairs."""
        height, width = layer["pred_masks"].shape[-2:]
        num_points, device = max(height, height * width // self.mask_point_sample_ratio), layer["pred_masks"].device
        num_others = num_points - int(IMPORTANCE_SAMPLE_RATIO * num_points)
        candidates = torch.rand(num_pairs, num_points * OVERSAMPLE_RATIO, 2, device=device)
        return candidates, torch.rand(num_pairs, num_others, 2, device=device)

    def mask_sums(
        self, layers: Sequence[Layer], targets: TargetList, matched: Sequence[Pairs]
    ) -> list[tuple[Tensor, Tensor]]:
        """Mask and dice losses of each layer, summed over its pairs; all layers have masks of one size."""
        planes = [layer["pred_masks"] for layer in layers]
        pairs = [self._get_source_permutation_idx(indices) for indices in matched]
        mask_logits = torch.cat([plane[index] for plane, index in zip(planes, pairs, strict=True)])  # [L T, h, w]
        images = torch.cat([images for images, _ in pairs])
        slots = torch.cat([slots for indices in matched for _, slots in indices])
        candidates = torch.cat([layer[DRAWN].candidates for layer in layers])
        others = torch.cat([layer[DRAWN].others for layer in layers])
        with torch.no_grad():
            num_uncertain = candidates.shape[1] // OVERSAMPLE_RATIO - others.shape[1]
            points = torch.cat([most_uncertain(mask_logits, candidates, num_uncertain), others], 1)
            of_images = one_size(self, targets, mask_logits.device)
            index, inside = nearest_pixels(points, of_images.size)  # [L T, P]
            num_pixels = of_images.size[0] * of_images.size[1]
            rows = (images * of_images.num_targets + slots)[:, None] * num_pixels + index
            labels = of_images.dense_masks().take(rows) & inside
            valid = None
            if of_images.valid is not None:
                valid = (of_images.valid.take(images[:, None] * num_pixels + index) & inside)[:, None]
        logits = sample(mask_logits[:, None], points)
        losses = pair_losses(logits, labels[:, None], term=mask_term(self, "bce"), valid=valid)
        mask, dice = (loss.view(len(layers), -1).sum(1) for loss in losses)
        return list(zip(mask, dice, strict=True))

    def loss_masks(
        self, outputs: Layer, targets: TargetList, indices: Pairs, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Cross-entropy and dice losses of the matched queries at points."""
        mask_logits, num_pairs = outputs["pred_masks"], sum(len(queries) for queries, _ in indices)
        if num_pairs == 0:
            # transformers' losses are then empty, and so is the sum of all.
            nothing = mask_logits.sum() * 0 if options_of(self).fix else mask_logits[:0, 0]
            return {"loss_mask_ce": nothing, "loss_mask_dice": nothing}
        sums = vars(self).get("mask_losses", {}).get(id(mask_logits))
        if sums is None:
            candidates, others = self.draw(outputs, num_pairs)
            layer = {**outputs, DRAWN: Drawn(others[:1], candidates, others)}
            (sums,) = self.mask_sums([layer], targets, [indices])
        return {"loss_mask_ce": sums[0] / num_boxes, "loss_mask_dice": sums[1] / num_boxes}


def one_size(module: RfDetrMatcher | RfDetrCriterion, targets: TargetList, device: torch.device) -> Targets:
    """The container of the targets' masks.

    Raises:
        ValueError: masks of different sizes, which transformers does not take either.
    """
    sizes = sizes_of([target["masks"] for target in targets])
    if len(set(sizes)) > 1:
        raise ValueError(f"the masks of labels are of different sizes, {sizes}; expected all padded to one size")
    return mask_targets(module, targets, device)


def nearest_pixels(points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which of H * W pixels is the nearest to each point ``(..., 2)``, as ``grid_sample`` computes it, int64; and
    whether there is one."""
    height, width = size
    grid = 2 * points - 1 + 1
    columns, rows = (((grid[..., axis] * length - 1) / 2).round().long() for axis, length in ((0, width), (1, height)))
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    return torch.where(inside, rows * width + columns, 0), inside
