"""ADE20K SceneParsing: the folders ``images`` and ``annotations``, each with ``training`` and ``validation``.

The panoptic form also has the files ``ade20k_panoptic_train.json`` and ``ade20k_panoptic_val.json``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastmask.data.coco_panoptic import PanopticDataset
from fastmask.data.image_files import LabelMapDataset, file_of, folder_of, list_files, only_semantic, paired
from fastmask.data.palette import distinct_colors
from fastmask.data.sample import DatasetInfo

FOLDERS = {"train": "training", "val": "validation"}
# The first name that objectInfo150.txt gives to each class.
NAMES = """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth; door;
table; mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug; field;
armchair; seat; fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard;
chest of drawers; counter; sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway;
case; pool table; pillow; screen door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower;
book; hill; bench; countertop; stove; palm; kitchen island; computer; swivel chair; boat; bar; arcade machine;
hovel; bus; towel; light; truck; tower; chandelier; awning; streetlight; booth; television; airplane; dirt
track; apparel; pole; land; bannister; escalator; ottoman; bottle; buffet; poster; stage; van; ship; fountain;
conveyer belt; canopy; washer; plaything; swimming pool; stool; barrel; basket; waterfall; tent; bag; minibike;
cradle; oven; ball; food; step; tank; trade name; microwave; pot; animal; bicycle; lake; dishwasher; screen;
blanket; sculpture; hood; sconce; vase; traffic light; tray; ashcan; fan; pier; crt screen; plate; monitor;
bulletin board; shower; radiator; glass; clock; flag
"""
CLASS_NAMES = tuple(name.strip() for name in NAMES.replace("\n", " ").split(";"))
INFO = DatasetInfo(
    CLASS_NAMES,
    "semantic",
    palette=distinct_colors(len(CLASS_NAMES)),
    category_ids=tuple(range(1, len(CLASS_NAMES) + 1)),
)


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return any((root / "annotations" / folder).is_dir() for folder in FOLDERS.values())


def open_ade20k(root: Path, split: str, task: str | None = None) -> LabelMapDataset:
    """The 150 classes of the SceneParsing challenge: 0 in a label map is void, 1..150 are the classes 0..149.

    Args:
        root: the folder ``ADEChallengeData2016``.
        split: "train" or "val".
        task: "semantic".
    """
    only_semantic(task, "ADE20K SceneParsing")
    folder = FOLDERS.get(split, split)
    images = list_files(folder_of(split, [root / "images" / folder]), (".jpg",))
    truths = list_files(folder_of(split, [root / "annotations" / folder]), (".png",))
    dataset = LabelMapDataset(split, *paired(images, truths), np.arange(-1, len(CLASS_NAMES)))
    dataset.info = INFO
    return dataset


def matches_panoptic(root: Path) -> bool:
    """Whether the folder has the panoptic layout."""
    return next(root.glob("ade20k_panoptic_*.json"), None) is not None


def open_ade20k_panoptic(root: Path, split: str, task: str | None = None) -> PanopticDataset:
    """The same 150 classes, 100 of them things: ``ade20k_panoptic_SPLIT.json`` and a folder of the same name, which
    ``prepare_ade20k_pan_seg.py`` of MaskFormer and Mask2Former makes from the challenge's label maps and instances.

    Args:
        root: the folder ``ADEChallengeData2016``.
        split: "train" or "val".
        task: "panoptic" by default, "semantic" or "instance".
    """
    path = file_of(split, [root / f"ade20k_panoptic_{split}.json"])
    images = folder_of(split, [root / "images" / FOLDERS.get(split, split)])
    return PanopticDataset(split, path, images, folder_of(split, [path.with_suffix("")]), task)
