"""Small data sets on disk, each in exactly the layout in which the real one is published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((20, 30), (24, 18))


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Writes a random picture and returns its pixels as they will be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    with Image.open(path) as image:
        return np.asarray(image).transpose(2, 0, 1)


def write_labels(path: Path, values: np.ndarray, dtype: type = np.uint8) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(dtype)).save(path)
    return values


def blocks(values: list[int], size: tuple[int, int]) -> np.ndarray:
    """A label map of upright stripes."""
    return np.broadcast_to(np.array(values)[np.arange(size[1]) * len(values) // size[1]], size).copy()


def write_ids(path: Path, ids: np.ndarray) -> None:
    """COCO's pictures of ids, R + 256 G + 65536 B."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def folder_tree(root: Path, values: tuple = ([0, 1, 11], [2, 2, 0])) -> Path:
    for i, (size, stripes) in enumerate(zip(SIZES, values, strict=True)):
        write_image(root / f"images/train/seq{i}_{i:05d}.jpg", size, i)
        write_labels(root / f"annotations/train/seq{i}_{i:05d}.png", blocks(stripes, size))
    write_json(root / "classes.json", {"classes": ["sky", "road", "car"], "void": 11, "stuff": ["sky", "road"]})
    return root


def ade20k_tree(root: Path) -> Path:
    for i, size in enumerate(SIZES):
        write_image(root / f"images/training/ADE_train_{i:08d}.jpg", size, i)
        write_labels(root / f"annotations/training/ADE_train_{i:08d}.png", blocks([0, 1, 150, 13 + i], size))
    write_image(root / "images/validation/ADE_val_00000001.jpg", SIZES[0])
    write_labels(root / "annotations/validation/ADE_val_00000001.png", blocks([3], SIZES[0]))
    return root


def ade20k_panoptic_tree(root: Path) -> Path:
    """The first image has two persons, a wall and void, and a sky that the persons cover; the second a wall alone."""
    categories = [
        {"name": "wall", "id": 0, "isthing": 0, "color": [120, 120, 120]},
        {"name": "sky", "id": 2, "isthing": 0, "color": [6, 230, 230]},
        {"name": "person", "id": 12, "isthing": 1, "color": [150, 5, 61]},
    ]
    ids = [blocks([600, 700, 0, 9], SIZES[0]), blocks([9], SIZES[1])]
    listed = [{9: 0, 800: 2, 600: 12, 700: 12}, {9: 0}]
    images, annotations = [], []
    for i, size in enumerate(SIZES):
        name = f"ADE_val_{i + 1:08d}"
        write_image(root / f"images/validation/{name}.jpg", size, i)
        write_ids(root / f"ade20k_panoptic_val/{name}.png", ids[i])
        images.append({"id": name, "file_name": f"{name}.jpg", "width": size[1], "height": size[0]})
        segments = [{"id": k, "category_id": c, "iscrowd": 0, "area": 1, "bbox": []} for k, c in listed[i].items()]
        annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "ade20k_panoptic_val.json", content)
    return root


def cityscapes_tree(root: Path) -> Path:
    for city, frame, label_ids, instance_ids in (
        ("aachen", "aachen_000000_000019", [7, 26, 26, 4, 29, 24], [7, 26000, 26001, 4, 29000, 24]),
        ("bochum", "bochum_000000_000313", [23, 33, 0, 11], [23, 33012, 0, 11]),
    ):
        write_image(root / f"leftImg8bit/train/{city}/{frame}_leftImg8bit.png", (16, 24))
        stem = root / f"gtFine/train/{city}/{frame}_gtFine_"
        write_labels(Path(f"{stem}labelIds.png"), blocks(label_ids, (16, 24)))
        write_labels(Path(f"{stem}instanceIds.png"), blocks(instance_ids, (16, 24)), np.uint16)
        write_labels(Path(f"{stem}color.png"), np.zeros((16, 24, 3)))
        write_json(Path(f"{stem}polygons.json"), {"imgHeight": 16, "imgWidth": 24, "objects": []})
    return root


CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 200, "name": "rug", "isthing": 0},
]


def panoptic_tree(root: Path) -> Path:
    """The first image has two cars, a crowd of persons, a rug and void; the second a rug alone."""
    ids = [blocks([70000, 300, 0, 5, 16_000_000], SIZES[0]), blocks([7], SIZES[1])]
    segments = [
        [
            {"id": 300, "category_id": 3, "iscrowd": 0, "area": 120, "bbox": [6, 0, 6, 20]},
            {"id": 70000, "category_id": 3, "iscrowd": 0, "area": 120, "bbox": [0, 0, 6, 20]},
            {"id": 16_000_000, "category_id": 200, "iscrowd": 0, "area": 120, "bbox": [24, 0, 6, 20]},
            {"id": 5, "category_id": 1, "iscrowd": 1, "area": 120, "bbox": [18, 0, 6, 20]},
        ],
        [{"id": 7, "category_id": 200, "iscrowd": 0, "area": 432, "bbox": [0, 0, 18, 24]}],
    ]
    images, annotations = [], []
    for i, size in enumerate(SIZES):
        name = f"{i + 139:012d}"
        write_image(root / f"val2017/{name}.jpg", size, i)
        write_ids(root / f"annotations/panoptic_val2017/{name}.png", ids[i])
        images.append({"id": i + 139, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]})
        annotations.append({"image_id": i + 139, "file_name": f"{name}.png", "segments_info": segments[i]})
    content = {"info": {}, "images": images, "annotations": annotations[::-1], "categories": CATEGORIES[::-1]}
    write_json(root / "annotations/panoptic_val2017.json", content)
    return root


def instance_annotations(size: tuple[int, int]) -> list[dict]:
    """A polygon, two polygons, run lengths, and run lengths as a string."""
    height, width = size
    square = [2.0, 3.0, 12.0, 3.0, 12.0, 10.0, 2.0, 10.0]
    triangle = [15, 1, 20, 1, 20, 9]
    # Columns 4 and 5 from the third row on.
    counts = [4 * height + 2, height - 2, 2, height - 2, height * (width - 6)]
    return [
        {"segmentation": [square], "category_id": 3, "iscrowd": 0, "area": 70.0},
        {"segmentation": [square, triangle], "category_id": 1, "iscrowd": 0, "area": 90.0},
        {"segmentation": {"size": [height, width], "counts": counts}, "category_id": 1, "iscrowd": 1, "area": 36},
    ]


def instance_tree(root: Path) -> Path:
    """The first image has four instances, one of them a crowd; the second none."""
    from pycocotools import mask as coder

    disc = np.hypot(*(np.indices(SIZES[0]) - np.array([[[8]], [[20]]]))) < 6
    encoded = coder.encode(np.asfortranarray(disc.astype(np.uint8)))
    compressed = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    annotations = [
        *instance_annotations(SIZES[0]),
        {"segmentation": compressed, "category_id": 3, "iscrowd": 0, "area": int(disc.sum())},
    ]
    images = []
    for i, size in enumerate(SIZES):
        write_image(root / f"train2017/{i + 9:012d}.jpg", size, i)
        images.append({"id": i + 9, "file_name": f"{i + 9:012d}.jpg", "height": size[0], "width": size[1]})
    content = {
        "images": images,
        "annotations": [{**a, "id": k + 1, "image_id": 9, "bbox": []} for k, a in enumerate(annotations)],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}],
    }
    write_json(root / "annotations/instances_train2017.json", content)
    return root


def stuff_tree(root: Path, form: str) -> Path:
    """COCO-Stuff in one of its forms; the same truth in each: person, wood, the class 10 and void."""
    image, label, values = {
        "raw": ("train2017/{}.jpg", "stuffthingmaps/train2017/{}.png", [0, 181, 10, 255]),
        "raw-annotations": ("images/train2017/{}.jpg", "annotations/train2017/{}.png", [0, 181, 10, 255]),
        "train-ids": ("images/train2017/{}.jpg", "annotations/train2017/{}_labelTrainIds.png", [0, 170, 10, 255]),
        "10k": ("images/train2014/{}.jpg", "annotations/train2014/{}_labelTrainIds.png", [1, 171, 11, 0]),
        "10k-detectron2": ("images_detectron2/train/{}.jpg", "annotations_detectron2/train/{}.png", [0, 170, 10, 255]),
    }[form]
    for i, size in enumerate(SIZES):
        write_image(root / image.format(f"COCO_{i:012d}"), size, i)
        write_labels(root / label.format(f"COCO_{i:012d}"), blocks(values, size))
    return root
