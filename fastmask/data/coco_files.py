"""Code that COCO's two formats share: where their files are, and the rules of their JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from fastmask.data.image_files import folder_of
from fastmask.data.json_rules import Rule, field_faults, is_integer
from fastmask.files import read_json

ID = Rule(lambda value: is_integer(value) or (isinstance(value, str) and value != ""), "an integer or a string")
INTEGER = Rule(is_integer, "an integer")
TEXT = Rule(lambda value: isinstance(value, str) and value != "", "a string")
FILE = Rule(lambda value: isinstance(value, str) and PurePath(value).name != "", "the name of a file")
SIDE = Rule(lambda value: is_integer(value) and value > 0, "pixels, 1 or more")
FLAG = Rule(lambda value: isinstance(value, int) and value in (0, 1), "0 or 1")
IMAGE = {"id": ID, "file_name": FILE, "height": SIDE, "width": SIDE}
CATEGORY = {"id": INTEGER, "name": TEXT}
NOUNS = {"images": "image", "annotations": "annotation", "categories": "category"}


class CocoFile(NamedTuple):
    """The content of a file.

    Attributes:
        path: the path of the file.
        images: the images without faults, by id.
        rejected: the ids of the other images.
        annotations: the annotations of the file, with unchecked fields.
        categories: the categories by id, in order.
        faults: the faults of the images, each with the file's name.
    """

    path: Path
    images: dict[Any, dict[str, Any]]
    rejected: set[Any]
    annotations: list[Any]
    categories: dict[int, dict[str, Any]]
    faults: list[str]

    @property
    def class_of(self) -> dict[int, int]:
        """The class of each category id: its position among all ids."""
        return {category_id: label for label, category_id in enumerate(self.categories)}

    def image_names(self) -> list[str]:
        """The name of each image: its path in the folder of images, without suffix unless two images share it."""
        paths = [PurePath(image["file_name"]) for image in self.images.values()]
        names = [path.with_suffix("").as_posix() for path in paths]
        return names if len(set(names)) == len(names) else [path.as_posix() for path in paths]


def read_coco(path: Path, category_rules: Mapping[str, Rule] = CATEGORY) -> CocoFile:
    """Reads a file and checks its images and categories.

    Two images that share an id or a file are faults, since it is unclear which of them an annotation means.

    Args:
        path: the path of the file.
        category_rules: the rules for the fields of a category.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, lacks a list, or has faulty categories, without which it cannot be read.
    """
    content = read_json(path)
    for name in NOUNS:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f'{path}: no list "{name}"')
    categories, wrong = _checked(path, "categories", content["categories"], category_rules)
    repeated = _repeated(categories, "id")
    wrong += [f"{path}: {len(same)} categories have the id {key}: {_names(same)}" for key, same in repeated.items()]
    if not wrong and not categories:
        wrong = [f'{path}: "categories" is empty']
    if wrong:
        raise ValueError("\n".join(wrong))
    images, faults = _checked(path, "images", content["images"], IMAGE)
    for image in images:
        image["file_name"] = PurePath(image["file_name"]).as_posix()
    same_id, same_file = _repeated(images, "id"), _repeated(images, "file_name")
    for key, same in same_id.items():
        faults.append(f"{path}: {len(same)} images have the id {key}: {_names(same, 'file_name')}")
    for key, same in same_file.items():
        faults.append(f"{path}: {len(same)} images are of the file {key}: {_names(same, 'id')}")
    sound = [image for image in images if image["id"] not in same_id and image["file_name"] not in same_file]
    by_id = {image["id"]: image for image in sound}
    listed = [image.get("id") for image in content["images"] if isinstance(image, dict)]
    return CocoFile(
        path,
        by_id,
        {key for key in listed if ID.holds(key) and key not in by_id},
        content["annotations"],
        {category["id"]: category for category in sorted(categories, key=lambda category: category["id"])},
        faults,
    )


def entry_name(kind: str, place: int, entry: Any) -> str:
    """The name of an entry in messages: its id, or its position in the list if it has no id."""
    if isinstance(entry, dict) and ID.holds(entry.get("id")):
        return f"{NOUNS[kind]} {entry['id']}"
    return f'"{kind}"[{place}]'


def image_folder(root: Path, split: str) -> Path:
    """The folder of a split's images, at any of the usual places."""
    names = (f"{split}2017", split, f"images/{split}2017", f"images/{split}", "images")
    return folder_of(split, [root / name for name in names])


def _checked(
    path: Path, kind: str, entries: Sequence[Any], rules: Mapping[str, Rule]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries without faults, and the faults of the others."""
    sound, faults = [], []
    for place, entry in enumerate(entries):
        wrong = field_faults(entry, rules)
        faults += [f"{path}: {entry_name(kind, place, entry)}: {fault}" for fault in wrong]
        if not wrong:
            sound.append(entry)
    return sound, faults


def _repeated(entries: Iterable[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """The entries that share a value of the key, by that value."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry[key], []).append(entry)
    return {value: group for value, group in groups.items() if len(group) > 1}


def _names(entries: Sequence[dict[str, Any]], key: str = "name") -> str:
    return ", ".join(str(entry[key]) for entry in entries)
