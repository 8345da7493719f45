import pytest
import torch

from fastmask.models._images import ImageBatch, fit_targets, pad_images
from fastmask.targets import Targets


def image_batch(*sizes, divisibility=32):
    return pad_images([torch.rand(3, *size) for size in sizes], divisibility)


def target(size, labels):
    return {"labels": torch.tensor(labels, dtype=torch.int64), "masks": torch.rand(len(labels), *size) < 0.5}


def test_images_of_different_sizes_stand_in_the_top_left_corner():
    images = [torch.rand(3, 40, 33), torch.rand(3, 64, 20)]
    batch = pad_images(images, 32)
    assert batch.pixels.shape == (2, 3, 64, 64) and batch.padded_size == (64, 64)
    assert batch.sizes == ((40, 33), (64, 20)) and not batch.uniform
    for image, padded in zip(images, batch.pixels, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], image)
        assert padded.sum() == pytest.approx(image.sum().item(), rel=1e-5)


def test_a_batch_that_fits_is_not_copied():
    images = torch.rand(2, 3, 64, 32)
    batch = pad_images(images, 32)
    assert batch.pixels is images and batch.uniform
    assert batch.padding_mask(2, 1) is None


def test_padding_mask_marks_cells_without_any_pixel_of_the_image():
    batch = image_batch((65, 96), (33, 32), (96, 31))
    expected = torch.ones(3, 3, 3, dtype=torch.bool)
    expected[0] = False
    expected[1, :2, :1] = False
    expected[2, :3, :1] = False
    assert torch.equal(batch.padding_mask(3, 3), expected)


def test_images_of_one_size_never_have_a_padding_mask():
    assert image_batch((40, 33), (40, 33)).padding_mask(2, 2) is None


def test_zero_padding_clears_what_lies_outside():
    batch = image_batch((40, 33), (64, 20))
    cleared = batch.zero_padding(torch.ones(2, 3, 64, 64))
    assert cleared.sum((1, 2, 3)).tolist() == [3 * 40 * 33, 3 * 64 * 20]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"images has shape \(3, 8, 8\); expected \(B, 3, H, W\)"),
        (torch.zeros(2, 1, 8, 8), ValueError, r"expected \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "images must be floating point.*uint8"),
        (torch.zeros(0, 3, 8, 8), ValueError, "images is empty"),
        (torch.zeros(2, 3, 0, 8), ValueError, "without any pixel"),
        ([], ValueError, "images is empty"),
        ([torch.zeros(3, 8, 8), torch.zeros(8, 8)], ValueError, r"images\[1\] has shape \(8, 8\)"),
        ([torch.zeros(3, 8, 8, dtype=torch.int64)], TypeError, r"images\[0\] must be floating point"),
        ([[0.0]], TypeError, r"images\[0\] must be a tensor, got list"),
        ("picture.png", TypeError, "got str"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, device="meta")], ValueError, r"images\[1\] is on meta"),
    ],
)
def test_wrong_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        pad_images(images, 32)


def test_listed_targets_are_padded_with_void():
    batch = image_batch((40, 33), (64, 20))
    targets = [target((40, 33), [1, 0, 2]), target((64, 20), [])]
    fitted = fit_targets(targets, batch, 3)
    assert fitted.size == (64, 64) and fitted.counts.tolist() == [3, 0]
    masks = fitted.dense_masks()
    assert torch.equal(masks[0, :, :40, :33], targets[0]["masks"])
    assert masks.sum() == targets[0]["masks"].sum()
    assert fitted.valid_pixels().sum((1, 2)).tolist() == [40 * 33, 64 * 20]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_batched_masks_are_padded_with_void(dtype):
    batch = image_batch((40, 33), (40, 33))
    masks = (torch.rand(2, 2, 40, 33) < 0.5).to(dtype)
    valid = torch.rand(2, 40, 33) < 0.9
    given = Targets(torch.tensor([[1, 2], [0, -1]]), torch.tensor([2, 1]), masks=masks, valid=valid)
    fitted = fit_targets(given, batch, 3)
    assert fitted.size == (64, 64) and fitted.masks.dtype == dtype
    assert torch.equal(fitted.masks[..., :40, :33], masks) and fitted.masks.sum() == masks.sum()
    assert torch.equal(fitted.valid[..., :40, :33], valid) and fitted.valid.sum() == valid.sum()


def test_masks_beyond_a_smaller_image_are_cleared():
    batch = image_batch((40, 33), (64, 20))
    given = Targets(
        torch.zeros(2, 1, dtype=torch.int64),
        torch.ones(2, dtype=torch.int64),
        masks=torch.ones(2, 1, 64, 33, dtype=torch.uint8),
    )
    fitted = fit_targets(given, batch, 3)
    assert fitted.masks.sum((1, 2, 3)).tolist() == [40 * 33, 64 * 20]
    assert fitted.valid.sum((1, 2)).tolist() == [40 * 33, 64 * 20]


@pytest.mark.parametrize(("dtype", "void"), [(torch.uint8, 255), (torch.int16, -1), (torch.int32, -7)])
def test_segment_maps_are_padded_with_void(dtype, void):
    batch = image_batch((40, 33), (64, 20))
    segments = torch.randint(0, 2, (2, 64, 33)).to(dtype)
    given = Targets.from_segments(segments, [torch.tensor([1, 2]), torch.tensor([0, 0])], void=void)
    fitted = fit_targets(given, batch, 3)
    assert fitted.segments.dtype == dtype and fitted.size == (64, 64)
    assert torch.equal(fitted.segments[0, :40, :33], segments[0, :40, :33])
    assert torch.equal(fitted.segments[1, :64, :20], segments[1, :64, :20])
    assert (fitted.segments != void).sum((1, 2)).tolist() == [40 * 33, 64 * 20]


def test_targets_that_fit_are_passed_on():
    batch = image_batch((64, 64), (64, 64))
    given = Targets.from_segments(torch.zeros(2, 64, 64, dtype=torch.uint8), [torch.tensor([0])] * 2)
    assert fit_targets(given, batch, 3) is given


def test_a_list_gives_the_same_as_its_container():
    batch = image_batch((40, 33), (64, 20))
    targets = [target((40, 33), [1, 0, 2]), target((64, 20), [2])]
    one, other = fit_targets(targets, batch, 3), fit_targets(Targets.from_list(targets), batch, 3)
    for name in ("labels", "counts", "masks", "valid"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def container(batch_size, size, labels=(0,)):
    segments = torch.zeros(batch_size, *size, dtype=torch.uint8)
    return Targets.from_segments(segments, [torch.tensor(labels)] * batch_size)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], ValueError, "targets has 0 images; the model got 2"),
        ([target((40, 33), [0])], ValueError, "targets has 1 images; the model got 2"),
        (container(3, (40, 33)), ValueError, "targets has 3 images; the model got 2"),
        (
            [target((40, 33), [0]), target((33, 40), [0])],
            ValueError,
            r'targets\[1\]\["masks"\] is 33 x 40 pixels; its image is 40 x 33',
        ),
        (container(2, (33, 40)), ValueError, "masks of targets are 33 x 40 pixels; the images are 40 x 33"),
        ([target((40, 33), [0]), target((40, 33), [3])], ValueError, r"targets\[1\].*holds 3; expected 0..2"),
        (container(2, (40, 33), (3,)), ValueError, "targets.labels holds 3; expected 0..2"),
        (container(2, (40, 33), (-2,)), ValueError, "targets.labels holds -2"),
        ([target((40, 33), [0]), {"labels": torch.tensor([0])}], ValueError, r'targets\[1\] has no "masks"'),
        (torch.zeros(2), TypeError, "targets must be Targets or a list of dicts, got Tensor"),
    ],
)
def test_wrong_targets_are_named(targets, error, message):
    with pytest.raises(error, match=message):
        fit_targets(targets, image_batch((40, 33), (40, 33)), 3)


def test_a_batch_knows_whether_its_images_share_a_size():
    pixels = torch.zeros(2, 3, 32, 32)
    assert ImageBatch(pixels, ((20, 32), (20, 32))).uniform
    assert not ImageBatch(pixels, ((20, 32), (32, 20))).uniform
