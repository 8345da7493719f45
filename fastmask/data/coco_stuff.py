"""COCO-Stuff 164k and 10k, with label maps in PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastmask.data.image_files import (
    INVALID,
    LabelMapDataset,
    files_below,
    folder_of,
    list_files,
    only_semantic,
    paired,
)
from fastmask.data.palette import distinct_colors
from fastmask.data.sample import DatasetInfo

NUM_THINGS = 80
NUM_IDS = 182
# The category ids among 1..182 that do not occur in COCO-Stuff's label maps.
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
CATEGORY_IDS = tuple(i for i in range(1, NUM_IDS + 1) if i not in UNUSED_IDS)
VOID_VALUE = 255
TRAIN_IDS = "_labelTrainIds"
# In order of category id; things come first.
NAMES = """
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant; stop sign;
parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack; umbrella;
handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball glove; skateboard;
surfboard; tennis racket; bottle; wine glass; cup; fork; knife; spoon; bowl; banana; apple; sandwich; orange;
broccoli; carrot; hot dog; pizza; donut; cake; chair; couch; potted plant; bed; dining table; toilet; tv;
laptop; mouse; remote; keyboard; cell phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase;
scissors; teddy bear; hair drier; toothbrush; banner; blanket; branch; bridge; building-other; bush; cabinet;
cage; cardboard; carpet; ceiling-other; ceiling-tile; cloth; clothes; clouds; counter; cupboard; curtain;
desk-stuff; dirt; door-stuff; fence; floor-marble; floor-other; floor-stone; floor-tile; floor-wood; flower;
fog; food-other; fruit; furniture-other; grass; gravel; ground-other; hill; house; leaves; light; mat; metal;
mirror-stuff; moss; mountain; mud; napkin; net; paper; pavement; pillow; plant-other; plastic; platform;
playingfield; railing; railroad; river; road; rock; roof; rug; salad; sand; sea; shelf; sky-other; skyscraper;
snow; solid-other; stairs; stone; straw; structural-other; table; tent; textile-other; towel; tree; vegetable;
wall-brick; wall-concrete; wall-other; wall-panel; wall-stone; wall-tile; wall-wood; water-other; waterdrops;
window-blind; window-other; wood
"""
CLASS_NAMES = tuple(name.strip() for name in NAMES.replace("\n", " ").split(";"))
INFO = DatasetInfo(
    CLASS_NAMES,
    "semantic",
    tuple(range(NUM_THINGS, len(CLASS_NAMES))),
    distinct_colors(len(CLASS_NAMES)),
    category_ids=CATEGORY_IDS,
)


def matches(root: Path) -> bool:
    """Whether the folder has one of these layouts."""
    if (root / "annotations_detectron2").is_dir() and (root / "images_detectron2").is_dir():
        return True
    folders = [
        root / "stuffthingmaps",
        *(root / "annotations" / f"{s}{y}" for s in ("train", "val", "test") for y in (2017, 2014)),
    ]
    return any(next(files_below(folder, (".png",)), None) for folder in folders)


def open_coco_stuff(root: Path, split: str, task: str | None = None) -> LabelMapDataset:
    """COCO-Stuff in any of the usual forms of its label maps.

    - 164k as published: ``stuffthingmaps/SPLIT2017`` (or ``annotations/SPLIT2017``); values are category ids minus one.
    - 164k with train ids: ``annotations/SPLIT2017/*_labelTrainIds.png``, values 0..170.
    - 10k as MMSegmentation converts it: ``annotations/SPLIT2014/*_labelTrainIds.png``, values 1..171 and 0 for void.
    - 10k as Detectron2's users convert it: ``annotations_detectron2/SPLIT`` with ``images_detectron2/SPLIT``, 0..170.

    The images are in ``images/SPLIT2017`` or ``SPLIT2017``, or the same with 2014. 255 is void. The classes are the 171
    that occur, 80 things and 91 stuff.

    Args:
        root: the folder of one of these forms.
        split: "train" or "val"; the "val" of 10k is its "test".
        task: "semantic".
    """
    only_semantic(task, "COCO-Stuff")
    small = "test" if split == "val" else split
    forms = [
        (root / "stuffthingmaps" / f"{split}2017", f"{split}2017", "", _raw_values()),
        (root / "annotations" / f"{split}2017", f"{split}2017", TRAIN_IDS, _train_ids(0)),
        (root / "annotations" / f"{split}2017", f"{split}2017", "", _raw_values()),
        (root / "annotations" / f"{small}2014", f"{small}2014", TRAIN_IDS, _train_ids(1)),
        (root / "annotations_detectron2" / small, None, "", _train_ids(0)),
    ]
    form = next((form for form in forms if form[0].is_dir() and list_files(form[0], (".png",), form[2])), None)
    if form is None:
        tried = ", ".join(str(form[0]) for form in forms)
        raise FileNotFoundError(f"split {split!r} has no label maps in any of {tried}")
    folder, images_name, ending, classes = form
    truths = list_files(folder, (".png",), ending)
    if images_name is None:
        candidates = [root / "images_detectron2" / small]
    else:
        candidates = [root / "images" / images_name, root / images_name]
    images = list_files(folder_of(split, candidates), (".jpg",))
    dataset = LabelMapDataset(split, *paired(images, truths), classes)
    dataset.info = INFO
    return dataset


def _raw_values() -> np.ndarray:
    """The class of each value, which is a category id minus one."""
    table = np.full(VOID_VALUE + 1, INVALID, np.int64)
    table[np.array(CATEGORY_IDS) - 1] = np.arange(len(CATEGORY_IDS))
    table[VOID_VALUE] = -1
    return table


def _train_ids(first: int) -> np.ndarray:
    """The class of each value if classes begin at ``first``; lower values are void."""
    table = np.full(VOID_VALUE + 1, INVALID, np.int64)
    table[:first] = table[VOID_VALUE] = -1
    table[first : first + len(CATEGORY_IDS)] = np.arange(len(CATEGORY_IDS))
    return table
