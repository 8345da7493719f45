"""The papers' augmentations, with Pillow, which the papers' code uses for resizing and data sets need anyway.

Among the augmentation libraries, albumentations has been unmaintained since June 2025 (its successor's license, AGPL,
is incompatible with ours), and kornia takes five times as long to resize an image on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmask.data.sample import Sample

Transform = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class Compose:
    """Applies several transforms in order."""

    transforms: tuple[Transform, ...]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample


@dataclass(frozen=True)
class Sometimes:
    """Applies a transform with some probability.

    Args:
        transform: the transform to apply.
        probability: the probability, 0..1.
    """

    transform: Transform
    probability: float = 0.5

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self.transform(sample, rng) if rng.random() < self.probability else sample


@dataclass(frozen=True)
class ResizeShortSide:
    """Resizes the shorter side to a random length; the longer side follows, up to a limit.

    Args:
        sides: the lengths to choose from, in pixels.
        max_side: the limit of the longer side, in pixels; None for no limit.
    """

    sides: tuple[int, ...]
    max_side: int | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return resized(sample, self._new_size(sample.size, self.sides[rng.integers(len(self.sides))]))

    def of_image(self, image: Tensor) -> Tensor:
        """Resizes an image ``(3, H, W)`` uint8 without truth to the first of ``sides``."""
        return resized_image(image, self._new_size(image.shape[1:], self.sides[0]))

    def _new_size(self, size: Sequence[int], side: int) -> tuple[int, int]:
        scale = side / min(size)
        if self.max_side is not None:
            scale = min(scale, self.max_side / max(size))
        height, width = size
        return _rounded(height * scale), _rounded(width * scale)


@dataclass(frozen=True)
class ResizeJitter:
    """Resizes the image to fit into a frame scaled by a random factor: the first half of large-scale jitter.

    Simple Copy-Paste (Ghiasi et al. 2021, arXiv:2012.07177), section 3. A crop to the frame is the other half. Images
    that become smaller than the frame are not padded here, because batches are padded later.

    Args:
        size: (height, width) of the frame.
        scales: the smallest and the largest factor.
    """

    size: tuple[int, int]
    scales: tuple[float, float] = (0.1, 2.0)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.size
        scale = rng.uniform(*self.scales) * min(self.size[0] / height, self.size[1] / width)
        return resized(sample, (_rounded(height * scale), _rounded(width * scale)))


@dataclass(frozen=True)
class RandomCrop:
    """Crops a random part; a side that is smaller than that of the crop keeps its length.

    With a limit, the crop is drawn again, at most ten times, while it has only one class or while a class exceeds the
    limit among its labeled pixels.

    Args:
        size: (height, width) of the crop.
        max_category_share: the limit, 0..1; 1 for no limit. It applies only to segment maps.
    """

    size: tuple[int, int]
    max_category_share: float = 1.0
    tries: int = 10

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = (min(pair) for pair in zip(self.size, sample.size, strict=True))
        segments = sample.segments if self.max_category_share < 1 else None
        for _ in range(1 if segments is None else self.tries):
            top = int(rng.integers(sample.size[0] - height + 1))
            left = int(rng.integers(sample.size[1] - width + 1))
            window = slice(top, top + height), slice(left, left + width)
            if segments is None or self._is_mixed(sample._replace(segments=segments[window])):
                break
        rows, columns = window
        return _mapped(sample, lambda plane: plane[..., rows, columns].contiguous())

    def _is_mixed(self, sample: Sample) -> bool:
        by_class = torch.bincount(sample.labels, weights=sample.pixels_of_segments().double())
        return int((by_class > 0).sum()) > 1 and bool(by_class.max() < self.max_category_share * by_class.sum())


@dataclass(frozen=True)
class RandomSizeCrop:
    """Crops a random part of a random size; a side that is smaller than ``least`` keeps its length.

    Args:
        least: the smallest height and width, in pixels.
        greatest: the largest height and width, in pixels.
    """

    least: int
    greatest: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = (int(rng.integers(min(side, self.least), min(side, self.greatest) + 1)) for side in sample.size)
        return RandomCrop((height, width))(sample, rng)


@dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right with a given probability."""

    probability: float = 0.5

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.probability:
            return sample
        areas = sample.areas
        return _mapped(sample, lambda plane: plane.flip(-1))._replace(areas=areas)


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue at random, each half of the time.

    SSD (Liu et al. 2016, arXiv:1512.02325), section 3.6: contrast changes before or after the color.

    Args:
        brightness: the largest change, on a scale of 255.
        contrast: the smallest and the largest factor.
        saturation: the smallest and the largest factor.
        hue: the largest change, in degrees.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 36.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        # Unused numbers are drawn, too, so that each number has a fixed place in the sequence.
        use_brightness, contrast_first, use_contrast, use_saturation, use_hue = rng.random(5) < 0.5
        shift = rng.uniform(-self.brightness, self.brightness)
        factor, saturation = rng.uniform(*self.contrast), rng.uniform(*self.saturation)
        turn = round(rng.uniform(-self.hue, self.hue) / 360 * 256)
        before, after = (factor, 1.0) if contrast_first else (1.0, factor)
        if not use_contrast:
            before = after = 1.0
        levels = np.arange(256.0)
        picture = Image.fromarray(np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy()))
        picture = _by_table(picture, _bytes(_bytes(levels + shift * use_brightness) * before), 3)
        if use_saturation or use_hue:
            hues, saturations, values = picture.convert("HSV").split()
            if use_hue:
                hues = _by_table(hues, (np.arange(256) + turn) % 256, 1)
            if use_saturation:
                saturations = _by_table(saturations, _bytes(levels * saturation), 1)
            picture = Image.merge("HSV", (hues, saturations, values)).convert("RGB")
        picture = _by_table(picture, _bytes(levels * after), 3)
        return sample._replace(image=torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy()))


def semantic_augmentation(
    crop: tuple[int, int] = (512, 512),
    *,
    short_side: int = 512,
    max_side: int = 2048,
    scales: tuple[float, float] = (0.5, 2.0),
    max_category_share: float = 1.0,
) -> Compose:
    """The augmentation of MaskFormer and Segmenter for semantic segmentation.

    The shorter side is resized to ``scales`` times ``short_side`` in steps of 0.1, followed by crop, color jitter and
    flip. The defaults are MaskFormer's for ADE20K; for Cityscapes it uses (512, 1024), 1024 and 4096. Segmenter limits
    a class to 0.75 of the crop.
    """
    least, greatest = (round(10 * scale) for scale in scales)
    sides = tuple(short_side * tenths // 10 for tenths in range(least, greatest + 1))
    crop_step = RandomCrop(crop, max_category_share)
    return Compose((ResizeShortSide(sides, max_side), crop_step, ColorJitter(), RandomFlip()))


def jitter_augmentation(
    size: tuple[int, int] = (1024, 1024), scales: tuple[float, float] = (0.1, 2.0), *, colors: bool = False
) -> Compose:
    """Large-scale jitter, the augmentation of Mask2Former for panoptic and instance segmentation: flip, scale, crop.
    With ``colors`` also color jitter, as EoMT has it for ADE20K and Cityscapes.
    """
    steps = (RandomFlip(), ResizeJitter(size, scales), RandomCrop(size))
    return Compose((*steps, ColorJitter()) if colors else steps)


def detr_augmentation(
    *, short_side: int = 800, max_side: int = 1333, scales: tuple[float, float] = (0.6, 1.0)
) -> Compose:
    """The augmentation of DETR (Carion et al. 2020, arXiv:2005.12872, appendix A.4) and MaskFormer for COCO.

    The image is flipped; half of the time it is resized to a shorter side of 400, 500 or 600 and cropped to sides of
    384 to 600 pixels; then it is resized to a shorter side of ``scales`` times ``short_side`` in steps of 32 pixels.
    """
    least, greatest = (round(scale * short_side) for scale in scales)
    crop = Compose((ResizeShortSide((400, 500, 600)), RandomSizeCrop(384, 600)))
    sides = tuple(range(least, greatest + 1, 32))
    return Compose((RandomFlip(), Sometimes(crop), ResizeShortSide(sides, max_side)))


def resized(sample: Sample, size: Sequence[int]) -> Sample:
    """Resizes a sample: the image bilinearly, with antialiasing, and its truth by the nearest pixel.

    Args:
        sample: the sample to resize.
        size: (height, width).
    """
    height, width = (max(1, side) for side in size)
    if (height, width) == sample.size:
        return sample
    rows, columns = (_nearest(*sides) for sides in zip(sample.size, (height, width), strict=True))
    image = resized_image(sample.image, (height, width))
    return _mapped(sample, lambda plane: plane[..., rows[:, None], columns], image)


def resized_image(image: Tensor, size: Sequence[int]) -> Tensor:
    """The image of :func:`resized`, ``(3, H, W)`` uint8."""
    height, width = (max(1, side) for side in size)
    if (height, width) == tuple(image.shape[1:]):
        return image
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in image.numpy()]
    return torch.from_numpy(np.stack([np.array(plane) for plane in planes]))


def _nearest(length: int, new_length: int) -> Tensor:
    """The pixel that contains the center of each new pixel."""
    return ((2 * torch.arange(new_length) + 1) * length).div(2 * new_length, rounding_mode="floor")


def _mapped(sample: Sample, change: Callable[[Tensor], Tensor], image: Tensor | None = None) -> Sample:
    """The sample with changed planes, without segments that have no pixels left."""
    segments, masks = (None if planes is None else change(planes) for planes in (sample.segments, sample.masks))
    image = change(sample.image) if image is None else image
    return sample._replace(image=image, segments=segments, masks=masks, areas=None).without_empty()


def _rounded(length: float) -> int:
    return int(length + 0.5)


def _bytes(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(levels), 0, 255)


def _by_table(picture: Image.Image, table: np.ndarray, bands: int) -> Image.Image:
    return picture.point(table.astype(int).tolist() * bands)
