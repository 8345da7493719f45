"""``patch(model, ignore_void=True)``: pixels and points that the labels mark as void count nowhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss
from transformers.loss.loss_rf_detr import RfDetrHungarianMatcher, RfDetrImageLoss

import fastmask
from tests.helpers.detection_models import tiny_detector
from tests.helpers.foreign_models import NUM_CLASSES, random_batch, tiny_eomt, tiny_maskformer, train_step
from tests.helpers.original_criteria import NUM_CLASSES as ORIGINAL_CLASSES
from tests.helpers.original_criteria import make_criterion
from tests.helpers.subclassed_criteria import MaskClassificationLoss

VOID = 255
HEIGHT, WIDTH = 24, 32
EDGE = WIDTH // 2  # void begins here, and wrong predictions 8 pixels behind it
SURE = 30.0


def scene():
    """Masks of two targets, the first of which fills what is not void; and mask logits of four queries: two are right
    for a target each in all that counts, and wrong elsewhere; two are half wrong in what counts."""
    masks = torch.zeros(2, HEIGHT, WIDTH)
    masks[0, :, :EDGE] = 1
    masks[:, :, EDGE:] = VOID
    logits = torch.full((4, HEIGHT, WIDTH), -SURE)
    logits[0, :, : EDGE + 8] = logits[1, :, EDGE + 8 :] = SURE
    logits[2, :, : EDGE // 2] = logits[3, :, EDGE // 2 :] = SURE
    return masks, logits


def plain(masks):
    return torch.where(masks == VOID, 0.0, masks)


def of_transformers(criterion, masks, logits, labels):
    classes = torch.zeros(1, 4, NUM_CLASSES + 1)
    return criterion(logits[None], classes, masks if masks.dtype == torch.uint8 else [masks], [labels])


def of_the_originals(criterion, masks, logits, labels):
    outputs = {"pred_logits": torch.zeros(1, 4, ORIGINAL_CLASSES + 1), "pred_masks": logits[None]}
    return criterion(outputs, [{"labels": labels, "masks": masks}])


def of_eomts_authors(criterion, masks, logits, labels):
    targets = [{"labels": labels, "masks": masks}]
    return criterion(logits[None], targets, torch.zeros(1, 4, NUM_CLASSES + 1))


def of_detectors(criterion, masks, logits, labels):
    """Boxes decide here too, and speak for the right queries."""
    boxes = torch.tensor([[0.3, 0.3, 0.1, 0.1], [0.6, 0.6, 0.1, 0.1], [0.3, 0.3, 0.3, 0.3], [0.6, 0.6, 0.3, 0.3]])
    classes = torch.zeros(1, 4, NUM_CLASSES)
    outputs = {"logits": classes, "pred_boxes": boxes[None], "pred_masks": logits[None]}
    return criterion(outputs, [{"class_labels": labels, "boxes": boxes[:2], "masks": masks}])


def rf_detr():
    matcher = RfDetrHungarianMatcher(1, 1, 1, 1, 20, 20)
    return RfDetrImageLoss(matcher, NUM_CLASSES, 0.25, ["labels", "boxes", "masks"], 1, 1)


CRITERIA = {
    "MaskFormer": (lambda: tiny_maskformer("resnet").criterion, of_transformers),
    "EoMT": (lambda: tiny_eomt().criterion, of_transformers),
    "the original MaskFormer": (make_criterion, of_the_originals),
    "the original Mask2Former": (lambda: make_criterion(num_points=80), of_the_originals),
    "the EoMT authors'": (MaskClassificationLoss, of_eomts_authors),
    "DETR's mask head": (lambda: ImageLoss(HungarianMatcher(), NUM_CLASSES, 0.1, ["boxes", "masks"]), of_detectors),
    "RF-DETR": (rf_detr, of_detectors),
}


def mask_losses(name, masks, logits, **options):
    make, call = CRITERIA[name]
    criterion = fastmask.patch(make(), **options)
    if hasattr(criterion, "importance_sample_ratio"):
        criterion.importance_sample_ratio = 0.0  # points that lie anywhere are the same for all logits
    torch.manual_seed(0)
    losses = call(criterion, masks, logits, torch.tensor([1, 2]))
    return torch.stack([loss.sum() for key, loss in losses.items() if "mask" in key or "dice" in key])


@pytest.mark.parametrize("name", CRITERIA)
def test_errors_at_void_cost_nothing(name):
    """Points at the edge of the image cost a little, as the map ends between the pixels that they are read from."""
    masks, logits = scene()
    right = torch.where(torch.arange(WIDTH) < EDGE + 8, logits, -logits)
    losses = mask_losses(name, masks, logits, ignore_void=True)
    torch.testing.assert_close(losses, mask_losses(name, masks, right, ignore_void=True), rtol=1e-5, atol=1e-5)
    assert (losses < 0.5 * mask_losses(name, plain(masks), logits)).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_void_has_no_gradient_and_other_errors_cost(name):
    masks, logits = scene()
    logits[:, :, : EDGE // 2] = 0
    logits.requires_grad_()
    losses = mask_losses(name, masks, logits, ignore_void=True)
    losses.sum().backward()
    assert losses.min() > 0.02
    assert not logits.grad[..., EDGE + 1 :].any() and logits.grad.any()


@pytest.mark.parametrize("name", CRITERIA)
def test_labels_without_void_cost_as_before(name):
    masks, logits = scene()
    generator = torch.Generator().manual_seed(0)
    masks, logits = plain(masks), torch.randn(logits.shape, generator=generator)
    expected = mask_losses(name, masks, logits)
    torch.testing.assert_close(mask_losses(name, masks, logits, ignore_void=True), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CRITERIA)
def test_nothing_but_void(name):
    masks, logits = scene()
    logits.requires_grad_()
    losses = mask_losses(name, torch.full_like(masks, VOID), logits, ignore_void=True)
    losses.sum().backward()
    assert losses.isfinite().all() and not logits.grad.any()


@pytest.mark.parametrize("name", CRITERIA)
def test_void_must_be_asked_for(name):
    masks, logits = scene()
    with pytest.raises(ValueError, match=r"holds 255.0; expected binary masks, 0 and 1 only"):
        mask_losses(name, masks, logits)
    masks[0, 0, 0] = 254
    with pytest.raises(ValueError, match=r"holds 254.0; expected binary masks"):
        mask_losses(name, masks, logits, ignore_void=True)


@pytest.mark.parametrize("name", ["MaskFormer", "EoMT"])
def test_segment_maps(name):
    masks, logits = scene()
    segments = torch.where(masks[0] == VOID, VOID, 254 * (1 - plain(masks)[0])).to(torch.uint8)[None]
    for labels, options in ((masks, {"ignore_void": True}), (plain(masks), {})):
        expected = mask_losses(name, labels, logits, **options)
        torch.testing.assert_close(mask_losses(name, segments, logits, **options), expected)


@pytest.mark.parametrize("name", ["MaskFormer", "EoMT"])
def test_padding_is_void(name):
    """Images of a batch that are smaller than others are padded for the losses, which then ask nothing there."""
    logits = torch.full((2, 4, HEIGHT, WIDTH), SURE)
    masks = [torch.ones(2, HEIGHT, EDGE), torch.zeros(0, HEIGHT, WIDTH)]
    classes, labels = torch.zeros(2, 4, NUM_CLASSES + 1), [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)]
    found = []
    for ignore_void in (False, True):
        criterion = fastmask.patch(CRITERIA[name][0](), ignore_void=ignore_void)
        torch.manual_seed(0)
        found.append(criterion(logits, classes, masks, labels)["loss_mask"].item())
    assert found[1] < 0.2 * found[0]


def test_the_weights_of_points():
    """v = 1 - the bilinear share of void, for one query and one target, at the points that transformers draws."""
    criterion, generator = tiny_eomt().criterion, torch.Generator().manual_seed(1)
    criterion.importance_sample_ratio = 0.0
    logits = torch.randn(1, 1, 8, 8, generator=generator)
    masks = (torch.rand(1, 16, 16, generator=generator) < 0.5).float()
    masks[0, 4:9, 3:12] = VOID
    torch.manual_seed(2)
    torch.rand(1, criterion.num_points, 2)
    torch.rand(1, int(criterion.num_points * criterion.oversample_ratio), 2)
    points = torch.rand(1, criterion.num_points, 2)
    x, t, share = (
        grid_sample(plane.view(1, 1, *plane.shape[-2:]), 2 * points[:, :, None] - 1, align_corners=False).flatten()
        for plane in (logits, plain(masks), (masks == VOID).float())
    )
    v, p = 1 - share, x.sigmoid()
    mask = (t * binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")).sum()
    mask += ((v - t) * binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")).sum()
    dice = 1 - (2 * (p * t).sum() + 1) / ((v * p).sum() + t.sum() + 1)
    torch.manual_seed(2)
    classes = torch.zeros(1, 1, NUM_CLASSES + 1)
    losses = fastmask.patch(criterion, ignore_void=True)(logits, classes, [masks], [torch.tensor([0])])
    torch.testing.assert_close(losses["loss_mask"], mask / v.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["loss_dice"], dice, rtol=1e-5, atol=0)


def test_whole_models():
    """The latest option counts, and a model that compares no masks is refused unchanged."""
    model, batch = tiny_eomt(), random_batch(1)
    plainly = train_step(fastmask.patch(model), batch)[0].loss
    batch["mask_labels"][0][1, 10:20] = VOID
    assert train_step(fastmask.patch(model, ignore_void=True), batch)[0].loss != plainly
    with pytest.raises(ValueError, match=r"mask_labels\[0\] holds 255.0"):
        fastmask.patch(model)(**batch)
    detector = tiny_detector("DetrForObjectDetection")
    with pytest.raises(TypeError, match="ignore_void has no effect on DetrForObjectDetection"):
        fastmask.patch(detector, ignore_void=True)
    assert type(detector) is type(tiny_detector("DetrForObjectDetection"))
