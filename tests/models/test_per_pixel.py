"""Class maps as targets, their loss, and results at the size asked for."""

import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from fastmask.models._images import pad_images
from fastmask.models._pixels import fit_class_map, per_pixel_loss, pixel_results
from fastmask.targets import Targets
from tests.helpers.inputs import SHAPES, random_targets

CLASSES, IGNORED = 3, 255


def image_batch(*sizes):
    return pad_images([torch.rand(3, *size) for size in sizes], 32)


def class_map(*size):
    classes = torch.randint(0, CLASSES + 1, size)
    return classes.masked_fill(classes == CLASSES, IGNORED)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("segments", torch.uint8), ("segments", torch.int16), ("masks", torch.uint8), ("masks+valid", torch.bool)],
)
def test_the_class_map_of_targets_equals_a_loop(generator, form, dtype):
    targets = random_targets(SHAPES["more targets than queries"], generator, form, dtype=dtype)
    expected = torch.full((targets.batch_size, *targets.size), -7)
    for b, target in enumerate(targets.to_list()):
        for label, mask in zip(target["labels"], target["masks"], strict=True):
            expected[b][mask] = label
    expected[~targets.valid_pixels()] = -7
    result = targets.class_map(-7)
    assert result.dtype == torch.int64 and torch.equal(result, expected)
    assert set(targets.class_map().unique().tolist()) == {255, *expected.unique().tolist()} - {-7}


@pytest.mark.parametrize("form", ["segments", "masks"])
def test_the_class_map_without_targets_is_ignored(generator, form):
    targets = random_targets(SHAPES["no targets"], generator, form)
    assert (targets.class_map(9) == 9).all()


def test_the_class_map_of_a_segmentation_is_the_segmentation():
    segmentation = class_map(2, 9, 11)
    assert torch.equal(Targets.from_segmentation(segmentation, CLASSES).class_map(), segmentation)


def test_class_maps_are_padded_with_the_ignored_class():
    batch = image_batch((40, 33), (64, 20))
    largest = class_map(2, 64, 33)
    one = fit_class_map(largest, batch, CLASSES, IGNORED)
    assert one.shape == (2, 64, 64) and one.dtype == torch.int64
    expected = torch.full((2, 64, 64), IGNORED)
    expected[0, :40, :33], expected[1, :, :20] = largest[0, :40, :33], largest[1, :, :20]
    assert torch.equal(one, expected)
    listed = [largest[0, :40, :33].to(torch.uint8), largest[1, :, :20].to(torch.int16)]
    assert torch.equal(fit_class_map(listed, batch, CLASSES, IGNORED), expected)
    assert torch.equal(fit_class_map(tuple(listed), batch, CLASSES, IGNORED), expected)
    padded = class_map(2, 64, 64)
    expected = padded.masked_fill(batch.outside(), IGNORED)
    assert torch.equal(fit_class_map(padded, batch, CLASSES, IGNORED), expected)


def test_targets_that_mark_no_class_are_ignored():
    batch = image_batch((40, 33), (64, 20))
    masks = torch.zeros(2, 40, 33, dtype=torch.bool)
    masks[0, :20], masks[1, 10:30] = True, True
    targets = [
        {"labels": torch.tensor([2, 0]), "masks": masks},
        {"labels": torch.tensor([], dtype=torch.int64), "masks": torch.zeros(0, 64, 20)},
    ]
    expected = torch.full((2, 64, 64), IGNORED)
    expected[0, :20, :33], expected[0, 10:30, :33] = 2, 0
    assert torch.equal(fit_class_map(targets, batch, CLASSES, IGNORED), expected)
    assert torch.equal(fit_class_map(Targets.from_list(targets), batch, CLASSES, IGNORED), expected)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.zeros(3, 40, 33, dtype=torch.int64), ValueError, "targets has 3 images; the model got 2"),
        (torch.zeros(2, 33, 40, dtype=torch.int64), ValueError, "targets is 33 x 40 pixels; the images are 40 x 33"),
        (torch.zeros(40, 33, dtype=torch.int64), ValueError, r"targets has shape \(40, 33\); expected \(B, H, W\)"),
        (torch.zeros(2, 40, 33), TypeError, "targets must hold integer classes, got torch.float32"),
        (torch.zeros(2, 40, 33, dtype=torch.bool), TypeError, "targets must hold integer classes, got torch.bool"),
        (torch.full((2, 40, 33), 3), ValueError, "targets holds class 3; expected 0..2 or 255"),
        (torch.full((2, 40, 33), -1), ValueError, "targets holds class -1"),
        ([torch.zeros(40, 33).long()], ValueError, "targets has 1 images; the model got 2"),
        ([torch.zeros(40, 33).long(), torch.zeros(33, 40).long()], ValueError, r"targets\[1\] is 33 x 40 pixels"),
        ([torch.zeros(40, 33).long(), torch.zeros(40, 33)], TypeError, r"targets\[1\] must hold integer classes"),
        ([torch.zeros(40, 33).long(), torch.full((40, 33), 7)], ValueError, r"targets\[1\] holds class 7"),
        ([torch.zeros(40, 33).long(), None], TypeError, r"targets\[1\] must be a tensor of shape \(H, W\), got None"),
        ([{"labels": torch.tensor([0])}] * 2, ValueError, r'targets\[0\] has no "masks"'),
        ([], ValueError, "targets has 0 images; the model got 2"),
        ("map.png", TypeError, "targets must be class maps, Targets or a list of dicts, got str"),
    ],
)
def test_wrong_class_maps_are_named(targets, error, message):
    with pytest.raises(error, match=message):
        fit_class_map(targets, image_batch((40, 33), (40, 33)), CLASSES, IGNORED)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_an_ignore_index_beyond_the_dtype_matches_no_class(dtype, listed):
    batch = image_batch((40, 33), (40, 33))
    ignore_index = -100 if dtype == torch.uint8 else 156 - 2**16
    targets = torch.full((2, 40, 33), 156, dtype=dtype)
    targets = list(targets) if listed else targets
    classes = fit_class_map(targets, batch, 171, ignore_index)
    assert (classes[:, :40, :33] == 156).all()
    assert (classes[:, 40:] == ignore_index).all() and (classes[..., 33:] == ignore_index).all()
    with pytest.raises(ValueError, match=r"holds class 156; expected 0\.\.2 or -100"):
        fit_class_map(targets, batch, 3, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_is_the_mean_over_pixels_that_count(dtype):
    logits, classes = torch.randn(2, CLASSES, 5, 7, dtype=dtype), class_map(2, 20, 28)
    loss = per_pixel_loss(logits, classes, IGNORED)
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == computing
    upsampled = interpolate(logits.to(computing), size=(20, 28), mode="bilinear", align_corners=False)
    chosen = upsampled.log_softmax(1).gather(1, classes.clamp(max=CLASSES - 1)[:, None])[:, 0]
    torch.testing.assert_close(loss, -chosen[classes != IGNORED].mean())
    torch.testing.assert_close(loss, cross_entropy(upsampled, classes, ignore_index=IGNORED))


def test_the_loss_without_any_pixel_is_zero():
    logits = torch.randn(1, CLASSES, 5, 7, requires_grad=True)
    loss = per_pixel_loss(logits, torch.full((1, 20, 28), IGNORED), IGNORED)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (40000, torch.int32)]
)
def test_labels_are_as_small_as_the_classes_allow(num_classes, dtype):
    logits = torch.zeros(1, num_classes, 2, 2)
    logits[:, -1] = 1
    labels = pixel_results(logits, (3, 5), "labels")
    assert labels.dtype == dtype and labels.shape == (1, 3, 5) and (labels == num_classes - 1).all()


def test_scores_are_probabilities_of_resized_logits():
    logits = torch.randn(2, CLASSES, 6, 8)
    expected = interpolate(logits, size=(9, 5), mode="bilinear", align_corners=False).softmax(1)
    torch.testing.assert_close(pixel_results(logits, (9, 5), "scores"), expected)
    torch.testing.assert_close(pixel_results(logits, (6, 8), "scores"), logits.softmax(1))
