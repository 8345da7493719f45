"""Makes the sprite sheets and textures in ``fastmask/data/assets`` from their sources.

    sudo apt-get install dataset-fashion-mnist
    pip install scikit-image
    python -m fastmask.data.composed.prepare_assets

Garments of the train split come from Fashion-MNIST's training file, those of the val split from its test file. Each
texture is scaled to 384 x 384; its left half is the train split's, its right half the val split's. The same sources
give the same pixels, whatever the machine.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from fastmask.data.composed.classes import STUFF_CLASSES, THING_CLASSES
from fastmask.data.composed.library import (
    ASSET_DIRECTORY,
    GARMENTS_PER_CLASS,
    SPRITE_SIZE,
    TEXTURE_SIZE,
    garment_file,
    make_sheet,
    texture_file,
)

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SOURCE_FILES = {"train": "train", "val": "t10k"}
# Fashion-MNIST's background is 0 with a fringe of small values around dark garments.
FOREGROUND = 16
MAX_HOLE = 10
MIN_AREA = 90
MIN_BRIGHTNESS = 60
MAX_DARK_SHARE = 0.06
MAX_FRINGE_SHARE = 0.10
# Dark stripes and spots leave notches in an outline. The gaps between trouser legs and straps look alike but are real.
MAX_NOTCH_SHARE = 0.03
GAPPED_CLASSES = ("trousers", "sandal")
# Two sprites with a smaller root mean square difference count as pictures of the same garment.
MIN_DISTANCE = 20


def read_fashion_mnist(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The ``(n, 28, 28)`` uint8 pictures and ``(n,)`` uint8 labels of a split.

    Raises:
        FileNotFoundError: the gzipped IDX files are not in ``directory``.
    """
    name = SOURCE_FILES[split]
    for kind in ("images-idx3", "labels-idx1"):
        if not (directory / f"{name}-{kind}-ubyte.gz").is_file():
            raise FileNotFoundError(
                f"{directory / f'{name}-{kind}-ubyte.gz'} is missing; install the Debian package dataset-fashion-mnist"
            )
    images = gzip.decompress((directory / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((directory / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, SPRITE_SIZE, SPRITE_SIZE)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def cut_out(picture: np.ndarray, has_gaps: bool) -> np.ndarray | None:
    """The garment of one ``(28, 28)`` uint8 picture: 0 outside the garment, at least 1 inside; None if it is unclear.

    The garment is where the picture is not black, without specks and with small holes filled, so that dark buttons and
    prints belong to it, but the opening under a bag's handle does not. A picture is unclear if its garment is in
    several pieces, partly black, or hard to tell from the background, or if its outline is notched and the garment
    does not have gaps (``has_gaps``).
    """
    from scipy import ndimage

    bright = picture >= FOREGROUND
    parts, _ = ndimage.label(bright, np.ones((3, 3), bool))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    garment = parts == sizes.argmax()
    holes, _ = ndimage.label(~garment)
    is_small = np.bincount(holes.ravel()) <= MAX_HOLE
    is_small[holes[[0, -1]]] = False
    is_small[holes[:, [0, -1]]] = False
    is_small[0] = False
    garment |= is_small[holes]
    area = garment.sum()
    closed = ndimage.binary_closing(np.pad(garment, 1), np.ones((3, 3), bool))[1:-1, 1:-1]
    if (
        area < MIN_AREA
        or sizes.sum() - sizes.max() > 0
        or picture[garment].mean() < MIN_BRIGHTNESS
        or (garment & ~bright).sum() > MAX_DARK_SHARE * area
        or (~garment & (picture > 0)).sum() > MAX_FRINGE_SHARE * area
        or (not has_gaps and (closed & ~garment).sum() > MAX_NOTCH_SHARE * area)
    ):
        return None
    return np.where(garment, np.maximum(picture, 1), 0).astype(np.uint8)


def select_garments(pictures: np.ndarray, labels: np.ndarray, per_class: int, others: np.ndarray) -> np.ndarray:
    """The first ``per_class`` clear garments of each class that differ from each other and from ``others``.

    Returns:
        ``(10, per_class, 28, 28)`` uint8.
    """
    chosen = []
    for label, name in enumerate(THING_CLASSES):
        seen = [*others.reshape(-1, SPRITE_SIZE, SPRITE_SIZE).astype(np.int32)]
        of_class: list[np.ndarray] = []
        for picture in pictures[labels == label]:
            sprite = cut_out(picture, name in GAPPED_CLASSES)
            if sprite is None:
                continue
            pixels = sprite.astype(np.int32)
            distances = np.square(np.asarray(seen) - pixels).sum((1, 2)) if seen else np.array([])
            if np.any(distances < SPRITE_SIZE**2 * MIN_DISTANCE**2):
                continue
            seen.append(pixels)
            of_class.append(sprite)
            if len(of_class) == per_class:
                break
        chosen.append(np.stack(of_class))
    return np.stack(chosen)


def texture_halves() -> dict[str, np.ndarray]:
    """Each split's halves of brick, grass and gravel, one above the other: ``(3 * 384, 192)`` uint8."""
    import skimage.data

    halves: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for name in STUFF_CLASSES:
        picture = Image.fromarray(getattr(skimage.data, name)())
        pixels = np.asarray(picture.resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.LANCZOS))
        halves["train"].append(pixels[:, : TEXTURE_SIZE // 2])
        halves["val"].append(pixels[:, TEXTURE_SIZE // 2 :])
    return {split: np.concatenate(parts) for split, parts in halves.items()}


def prepare(source: Path = FASHION_MNIST) -> dict[str, np.ndarray]:
    """The pixels of every asset, by file name."""
    assets = {}
    others = np.empty((0, SPRITE_SIZE, SPRITE_SIZE), np.uint8)
    for split in ("train", "val"):
        pictures, labels = read_fashion_mnist(source, split)
        garments = select_garments(pictures, labels, GARMENTS_PER_CLASS[split], others)
        assets[garment_file(split)] = make_sheet(garments.reshape(-1, SPRITE_SIZE, SPRITE_SIZE))
        others = garments
    for split, pixels in texture_halves().items():
        assets[texture_file(split)] = pixels
    return assets


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures in fastmask/data/assets from their sources.")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST, help="folder of the gzipped IDX files")
    parser.add_argument("--output", type=Path, default=ASSET_DIRECTORY, help="folder to write")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, pixels in prepare(options.fashion_mnist).items():
        path = options.output / name
        Image.fromarray(pixels).save(path, optimize=True)
        print(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
