"""A plain folder: ``images/SPLIT``, ``annotations/SPLIT`` and ``classes.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastmask.data.image_files import (
    IMAGE_SUFFIXES,
    INVALID,
    MAX_LABEL,
    LabelMapDataset,
    folder_of,
    list_files,
    only_semantic,
    paired,
)
from fastmask.data.palette import distinct_colors
from fastmask.data.sample import DatasetInfo
from fastmask.files import read_json

CLASSES_FILE = "classes.json"
VOID_VALUE = 255


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return (root / CLASSES_FILE).is_file()


def open_folder(root: Path, split: str, task: str | None = None) -> LabelMapDataset:
    """Images and label maps with the same names, and a list of classes; CamVid comes in this form.

    ``classes.json`` is a list of class names, or {"classes": [...], "void": a value or a list of values, "stuff":
    [names], "palette": [[r, g, b], ...]}, where only "classes" is required. A label map is a PNG of one channel, whose
    pixels hold the index of a class or a void value: by default 255, or 65535 with more than 255 classes. Subfolders
    may have any names.

    Args:
        root: the folder with ``images``, ``annotations`` and ``classes.json``.
        split: the name of a folder in ``images`` and ``annotations``.
        task: "semantic".
    """
    only_semantic(task, "a plain folder")
    info, classes = parse_classes(read_json(root / CLASSES_FILE), str(root / CLASSES_FILE))
    images = list_files(folder_of(split, [root / "images" / split]), IMAGE_SUFFIXES)
    truths = list_files(folder_of(split, [root / "annotations" / split]), (".png",))
    dataset = LabelMapDataset(split, *paired(images, truths), classes)
    dataset.info = info
    return dataset


def void_label(num_classes: int) -> int:
    """The label of void pixels: 255, or 65535 if 255 is a class and label maps have 16 bits.

    Raises:
        ValueError: there are too many classes for 16 bits.
    """
    if num_classes > MAX_LABEL:
        raise ValueError(f"{num_classes} classes; label maps hold at most {MAX_LABEL}")
    return VOID_VALUE if num_classes <= VOID_VALUE else MAX_LABEL


def classes_content(info: DatasetInfo) -> dict[str, Any]:
    """The content of ``classes.json`` for label maps that mark void pixels by :func:`void_label`."""
    return {
        "classes": info.class_names,
        "void": void_label(info.num_classes),
        "stuff": [info.class_names[k] for k in info.stuff_classes],
        "palette": info.palette,
    }


def parse_classes(content: Any, path: str) -> tuple[DatasetInfo, np.ndarray]:
    """The classes, and the class of each value of a label map, from the content of ``classes.json``.

    Raises:
        ValueError: the content is invalid; the message begins with ``path``.
    """
    content = {"classes": content} if isinstance(content, list) else content
    names = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: expected a list of class names, or a dict with "classes"')
    unknown = set(content) - {"classes", "void", "stuff", "palette"}
    if unknown:
        raise ValueError(f'{path}: unknown key {sorted(unknown)[0]!r}; expected "classes", "void", "stuff", "palette"')
    ignore_index = void_label(len(names))
    void = content.get("void", ignore_index)
    void = void if isinstance(void, list) else [void]
    if not all(isinstance(value, int) and len(names) <= value <= MAX_LABEL for value in void):
        raise ValueError(f'{path}: "void" is {void}; expected values in {len(names)}..{MAX_LABEL}, not classes')
    stuff = content.get("stuff", [])
    if not isinstance(stuff, list) or not all(name in names for name in stuff):
        raise ValueError(f'{path}: "stuff" is {stuff}; expected names of classes')
    palette = content.get("palette")
    try:
        colors = (
            distinct_colors(len(names)) if palette is None else tuple((int(r), int(g), int(b)) for r, g, b in palette)
        )
        stuff_classes = tuple(map(names.index, stuff))
        info = DatasetInfo(tuple(names), "semantic", stuff_classes, colors, ignore_index)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    table = np.full(max([len(names), *(value + 1 for value in void)]), INVALID, np.int64)
    table[: len(names)] = np.arange(len(names))
    table[void] = -1
    return info, table
