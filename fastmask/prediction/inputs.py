"""The images to predict, and the names of their results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastmask.data.image_files import IMAGE_SUFFIXES, files_below

RESULT_FOLDERS = ("labels", "overlays", "panoptic")


class ImageFile(NamedTuple):
    """An image to predict.

    Attributes:
        path: the path of its file.
        name: the unique name of its results, a path with forward slashes and without a suffix.
        file_name: the name with the suffix.
        image_id: its number in COCO's files.
    """

    path: Path
    name: str
    file_name: str
    image_id: int


def find_images(images: str | Path | Iterable[str | Path], output: str | Path | None = None) -> list[ImageFile]:
    """The images of files and folders in the given order, those of a folder sorted, each file once.

    A result has the name of its file, or the file's path within the given folder. If two results would share a name,
    all are named by their paths from the folder common to all; if names are still shared (``a.jpg`` beside ``a.png``),
    suffixes are kept. The number of an image is its name if all names are different numbers, as COCO's are, and
    otherwise its place, counted from 1.

    Args:
        images: a file, a folder or several. A folder stands for its files with known suffixes at any depth, except
            hidden ones. A file given by name may have any suffix.
        output: a folder whose files are left out; if it is one of the given folders or contains them, only the files in
            its ``RESULT_FOLDERS`` are.

    Raises:
        FileNotFoundError: a missing file or folder, or no image.
    """
    given = [images] if isinstance(images, str | Path) else list(images)
    excluded = set() if output is None else {Path(output, name).resolve() for name in ("", *RESULT_FOLDERS)}
    # By absolute paths, which have no "..": names must not lead out of the output folder.
    found: dict[str, tuple[Path, str]] = {}
    for path in map(Path, given):
        if path.is_dir():
            for file in sorted(files_below(path, IMAGE_SUFFIXES, excluded)):
                found.setdefault(os.path.abspath(file), (file, file.relative_to(path).as_posix()))
        elif path.exists():
            found.setdefault(os.path.abspath(path), (path, path.name))
        else:
            raise FileNotFoundError(f"no image or folder {path}")
    if not found:
        raise FileNotFoundError(
            f"no image in {', '.join(map(str, given)) or 'an empty list'}; "
            f"expected files that end with {', '.join(IMAGE_SUFFIXES)}"
        )
    files, short = zip(*found.values(), strict=True)
    names, file_names = _distinct_names(list(found), short)
    return list(map(ImageFile, files, names, file_names, _image_ids(names)))


def _distinct_names(files: Sequence[str], short: Sequence[str]) -> tuple[list[str], list[str]]:
    """The shortest names that are all different, without and with suffix.

    Args:
        files: absolute paths.
        short: their paths within the given folders.
    """
    common = os.path.commonpath([os.path.dirname(path) for path in files])
    whole = [Path(path).relative_to(common).as_posix() for path in files]
    for file_names in (list(short), whole):
        names = [os.path.splitext(name)[0] for name in file_names]
        if len(set(names)) == len(names):
            return names, file_names
    return whole, whole


def _image_ids(names: Sequence[str]) -> list[int]:
    stems = [name.rpartition("/")[2] for name in names]
    if all(stem.isascii() and stem.isdigit() for stem in stems) and len(set(map(int, stems))) == len(stems):
        return list(map(int, stems))
    return list(range(1, len(names) + 1))
