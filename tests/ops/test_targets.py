from __future__ import annotations

import pytest
import torch

from fastmask import Targets
from tests.helpers.inputs import SHAPES, random_targets


def test_from_list_pads_targets_and_pixels():
    images = [
        {"labels": torch.tensor([2, 0]), "masks": torch.ones(2, 4, 6)},
        {"labels": torch.tensor([1], dtype=torch.int32), "masks": torch.ones(1, 5, 3, dtype=torch.bool)},
        {"labels": torch.tensor([]), "masks": torch.zeros(0, 5, 6)},
    ]
    targets = Targets.from_list(images, num_classes=3)
    assert targets.labels.tolist() == [[2, 0], [1, -1], [-1, -1]]
    assert targets.counts.tolist() == [2, 1, 0]
    assert targets.masks.shape == (3, 2, 5, 6)
    assert targets.masks[0, :, :4].all()
    assert not targets.masks[0, :, 4:].any()
    assert not targets.masks[1, 1].any()
    assert targets.valid[0, :4].all()
    assert not targets.valid[0, 4:].any()
    assert targets.valid[1, :, :3].all()
    assert not targets.valid[1, :, 3:].any()


def test_from_list_to_a_given_size():
    images = [{"labels": torch.tensor([0]), "masks": torch.ones(1, 2, 3)}]
    assert Targets.from_list(images, size=(4, 4)).size == (4, 4)
    with pytest.raises(ValueError, match="2 x 3 pixels does not fit"):
        Targets.from_list(images, size=(2, 2))


def test_list_round_trip(generator):
    targets = random_targets(SHAPES["usual"], generator, "masks")
    again = Targets.from_list(targets.to_list())
    assert torch.equal(again.labels, targets.labels)
    assert torch.equal(again.dense_masks(), targets.dense_masks())


@pytest.mark.parametrize("max_targets", [None, 4, 2])
def test_from_segmentation(max_targets, generator):
    segmentation = torch.randint(0, 5, (3, 9, 11), generator=generator)
    segmentation[segmentation == 4] = 255
    segmentation[1, segmentation[1] == 2] = 0
    targets = Targets.from_segmentation(segmentation, 6, max_targets=max_targets)
    assert targets.num_targets == (6 if max_targets is None else max_targets)
    masks = targets.dense_masks()
    for b, image in enumerate(segmentation):
        classes = [k for k in range(6) if (image == k).any()][: targets.num_targets]
        assert targets.labels[b].tolist() == classes + [-1] * (targets.num_targets - len(classes))
        assert targets.counts[b] == len(classes)
        for m, k in enumerate(classes):
            assert torch.equal(masks[b, m], image == k)
        assert torch.equal(targets.valid_pixels()[b], image != 255)


def test_from_segmentation_of_many_classes_takes_a_wider_dtype():
    segmentation = torch.arange(400).reshape(1, 20, 20)
    targets = Targets.from_segmentation(segmentation, 400, ignore_index=-1)
    assert targets.segments.dtype == torch.int16
    assert torch.equal(targets.segments[0], segmentation[0].short())


@pytest.mark.parametrize(
    ("dtype", "value", "ignore_index"),
    [
        (torch.uint8, 156, -100),
        (torch.uint8, 4, 260),
        (torch.int8, -1, 255),
        (torch.int16, -1, 2**16 - 1),
        (torch.uint16, 156, -100),
        (torch.int32, 4, 2**32 + 4),
    ],
)
def test_an_ignore_index_beyond_the_dtype_matches_no_class(dtype, value, ignore_index):
    segmentation = torch.full((1, 4, 4), value).to(dtype)
    if value < 0:
        with pytest.raises(ValueError, match=rf"holds class {value}; expected 0\.\.170 or {ignore_index}"):
            Targets.from_segmentation(segmentation, 171, ignore_index=ignore_index)
        return
    targets = Targets.from_segmentation(segmentation, 171, ignore_index=ignore_index)
    assert targets.counts.tolist() == [1] and targets.labels[0, 0] == value
    assert targets.dense_masks()[0, 0].all() and targets.valid_pixels().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_class_out_of_range_is_named_whatever_the_dtype(dtype):
    segmentation = torch.full((1, 4, 4), 255).to(dtype)
    with pytest.raises(ValueError, match=r"segmentation holds class 255; expected 0\.\.9 or -1"):
        Targets.from_segmentation(segmentation, 10, ignore_index=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.complex64, torch.uint64])
def test_from_segmentation_takes_integers_only(dtype):
    with pytest.raises(TypeError, match=f"segmentation must hold integer classes, got {dtype}"):
        Targets.from_segmentation(torch.zeros(1, 4, 4, dtype=dtype), 3)
    with pytest.raises(TypeError, match="segmentation must be a tensor"):
        Targets.from_segmentation([[[0]]], 3)


MASK_VALUES = {
    torch.bool: (0, 1),
    torch.uint8: (0, 1, 2, 128, 255),
    torch.int8: (0, 1, -1, -128),
    torch.int16: (0, 1, 256, -1, -256),
    torch.uint16: (0, 1, 256, 2**16 - 256),
    torch.int32: (0, 1, 256, 2**16, -1),
    torch.int64: (0, 1, 256, 2**32, -(2**32)),
    torch.float16: (0.0, -0.0, 1.0),
    torch.float32: (0.0, -0.0, 1.0),
    torch.float64: (0.0, -0.0, 1.0),
}


@pytest.mark.parametrize("dtype", MASK_VALUES)
def test_any_integer_but_zero_is_foreground(dtype):
    values = MASK_VALUES[dtype]
    masks = torch.tensor(values).to(dtype).expand(2, 3, -1)
    targets = Targets.from_list([{"labels": torch.tensor([0, 1]), "masks": masks}])
    expected = torch.tensor([value != 0 for value in values]).expand(2, 3, -1)
    assert torch.equal(targets.masks[0].bool(), expected)
    assert torch.equal(targets.masks[0], expected.byte())


@pytest.mark.parametrize("value", [0.999, 0.5, 1e-30, 2.0, 255.0, -1.0, float("nan"), float("inf")])
def test_masks_between_the_two_are_refused(value):
    masks = torch.tensor([[[0.0, 1.0, value]]], dtype=torch.float64)
    images = [
        {"labels": torch.tensor([0]), "masks": masks.round()[..., :2]},
        {"labels": torch.tensor([0]), "masks": masks},
    ]
    with pytest.raises(ValueError, match=rf'targets\[1\]\["masks"\] holds {value}; expected binary masks'):
        Targets.from_list(images)


def test_masks_of_complex_numbers_are_refused():
    images = [{"labels": torch.tensor([0]), "masks": torch.ones(1, 2, 2, dtype=torch.complex64)}]
    with pytest.raises(TypeError, match=r'targets\[0\]\["masks"\] must hold 0 and 1, got torch.complex64'):
        Targets.from_list(images)


def test_from_segments():
    segments = torch.tensor([[[0, 1], [255, 254]]], dtype=torch.uint8)
    targets = Targets.from_segments(segments, [torch.tensor([7, 8])])
    assert targets.dense_masks()[0].int().tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]]]
    assert targets.valid_pixels()[0].tolist() == [[True, True], [False, True]]


def test_all_void_is_legitimate():
    targets = Targets.from_segmentation(torch.full((2, 4, 4), 255), 3)
    assert targets.counts.tolist() == [0, 0]
    assert not targets.valid_pixels().any()


def test_to_moves_every_tensor(generator):
    targets = random_targets(SHAPES["usual"], generator, "masks+valid").to("meta")
    assert {targets.labels.device, targets.counts.device, targets.masks.device, targets.valid.device} == {
        torch.device("meta")
    }


LABELS, COUNTS = torch.zeros(2, 3, dtype=torch.int64), torch.full((2,), 3)
MASKS, SEGMENTS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("shape", ["usual", "more targets than queries", "no targets"])
@pytest.mark.parametrize("form", ["segments", "masks", "masks+valid"])
def test_merging_by_class_unites_the_masks_of_each_class(shape, form, generator):
    targets = random_targets(SHAPES[shape], generator, form)
    merged = targets.merged_by_class()
    assert merged.labels.shape == targets.labels.shape and merged.size == targets.size
    assert torch.equal(merged.valid_pixels(), targets.valid_pixels())
    for image, image_merged in zip(targets.to_list(), merged.to_list(), strict=True):
        classes = list(dict.fromkeys(image["labels"].tolist()))
        assert image_merged["labels"].tolist() == classes
        for label, mask in zip(classes, image_merged["masks"], strict=True):
            assert torch.equal(mask, image["masks"][image["labels"] == label].any(0))


BAD = {
    "neither form": (dict(labels=LABELS, counts=COUNTS), ValueError, "exactly one of masks and segments"),
    "both forms": (dict(labels=LABELS, counts=COUNTS, masks=MASKS, segments=SEGMENTS), ValueError, "exactly one"),
    "int32 labels": (dict(labels=LABELS.int(), counts=COUNTS, masks=MASKS), TypeError, "labels must have dtype int64"),
    "float masks": (dict(labels=LABELS, counts=COUNTS, masks=MASKS.float()), TypeError, "masks must have dtype"),
    "counts of another batch": (dict(labels=LABELS, counts=COUNTS[:1], masks=MASKS), ValueError, "counts has shape"),
    "masks of other targets": (dict(labels=LABELS, counts=COUNTS, masks=MASKS[:, :2]), ValueError, "masks has shape"),
    "int64 segments": (dict(labels=LABELS, counts=COUNTS, segments=SEGMENTS.long()), TypeError, "segments must have"),
    "valid of another size": (
        dict(labels=LABELS, counts=COUNTS, masks=MASKS, valid=torch.ones(2, 4, 5, dtype=torch.bool)),
        ValueError,
        "valid has shape",
    ),
    "void is a target": (dict(labels=LABELS, counts=COUNTS, segments=SEGMENTS, void=2), ValueError, "void=2 is also"),
    "masks on another device": (
        dict(labels=LABELS, counts=COUNTS, masks=MASKS.to("meta")),
        ValueError,
        "masks is on meta",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_tensors(arguments, error, message):
    with pytest.raises(error, match=message):
        Targets(**arguments)


def test_bad_lists_and_maps():
    with pytest.raises(ValueError, match="empty list"):
        Targets.from_list([])
    with pytest.raises(ValueError, match='no "masks"'):
        Targets.from_list([{"labels": torch.tensor([1])}])
    with pytest.raises(ValueError, match=r"\(2, H, W\)"):
        Targets.from_list([{"labels": torch.tensor([1, 2]), "masks": torch.zeros(3, 2, 2)}])
    with pytest.raises(ValueError, match="holds 3; expected 0..2"):
        Targets.from_list([{"labels": torch.tensor([1, 3]), "masks": torch.zeros(2, 2, 2)}], num_classes=3)
    with pytest.raises(ValueError, match="holds -1"):
        Targets.from_list([{"labels": torch.tensor([-1])} | {"masks": torch.zeros(1, 2, 2)}], num_classes=3)
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        Targets.from_segmentation(torch.zeros(4, 4, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="holds class 7"):
        Targets.from_segmentation(torch.full((1, 2, 2), 7), 3)
    with pytest.raises(ValueError, match="labels has 2 images"):
        Targets.from_segments(torch.zeros(1, 2, 2, dtype=torch.uint8), [torch.tensor([0])] * 2)
