"""The files of predictions: label maps, ids in colors, records in COCO's formats, overlays, and a page of them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from torch import Tensor

from fastmask.data import DatasetInfo
from fastmask.data.coco_instances import draw
from fastmask.data.folder import CLASSES_FILE, classes_content
from fastmask.data.palette import distinct_colors
from fastmask.files import replace_file, replace_files
from fastmask.prediction import page
from fastmask.prediction.inputs import RESULT_FOLDERS, ImageFile
from fastmask.prediction.overlay import Palette, SegmentMap, draw_overlay
from fastmask.prediction.records import RecordFile

LABELS, OVERLAYS, PANOPTIC = RESULT_FOLDERS
IMAGES_FILE = "images.json"
PANOPTIC_FILE = "panoptic.json"
INSTANCES_FILE = "instances.json"
# By task: the folders with a picture for each image, and the other files.
FOLDERS = {
    "semantic": (LABELS, OVERLAYS),
    "general": (LABELS, OVERLAYS),
    "panoptic": (PANOPTIC, LABELS, OVERLAYS),
    "instance": (OVERLAYS,),
}
FILES = {
    "semantic": (CLASSES_FILE,),
    "general": (CLASSES_FILE,),
    "panoptic": (PANOPTIC_FILE, CLASSES_FILE),
    "instance": (INSTANCES_FILE, IMAGES_FILE),
}

# An image with written pictures, its (width, height), its records, and what the page shows of it.
Written = tuple[ImageFile, tuple[int, int], list[dict[str, Any]], str]
# Pictures by folder, records, and the segments to draw over the image.
Results = tuple[dict[str, Callable[[], Image.Image]], list[dict[str, Any]], Callable[[], SegmentMap]]


class Outputs:
    """The files of one call of ``predict``. A context manager that writes the JSON files on leaving.

    Args:
        folder: the folder to write to.
        task: "semantic", "general", "panoptic" or "instance".
        info: the classes; ``ignore_index`` is the label of pixels without a class.
        threshold: the score that an instance must exceed to be drawn.
        overlays: write overlays too.
        workers: threads that write, one image at a time each.
        html: a page with the first images, or None.
        html_images: the most images of the page.

    Attributes:
        folders: the names of the folders with a picture for each image.
        written: the images whose results are complete.
        failures: the images that could not be read, each with the reason.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        info: DatasetInfo,
        threshold: float,
        overlays: bool,
        workers: int,
        html: Path | None,
        html_images: int,
    ):
        self.folder, self.task, self.info = folder, task, info
        self.folders = tuple(name for name in FOLDERS[task] if overlays or name != OVERLAYS)
        self.written: list[ImageFile] = []
        self.failures: list[tuple[Path, str]] = []
        self._html, self._html_images = html, html_images
        self._figures: list[str] = []
        self._started = 0  # images
        self._threshold = threshold
        self._workers = workers
        self._pending: deque[Future[Written]] = deque()
        self._images: list[dict[str, Any]] = []
        self._palette = info.palette or distinct_colors(info.num_classes)
        self._categories = _categories(info, self._palette)
        self._records: RecordFile | None = None

    def existing(self, files: Sequence[ImageFile]) -> list[Path]:
        """The existing files that these images would overwrite."""
        paths = [self.folder / name / f"{file.name}.png" for file in files for name in self.folders]
        paths += [self.folder / name for name in FILES[self.task] if name != CLASSES_FILE or self._other_classes()]
        paths += [] if self._html is None else [self._html]
        return [path for path in paths if path.exists()]

    def __enter__(self) -> Outputs:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.task == "panoptic":
            self._records = RecordFile(self.folder / PANOPTIC_FILE, '{"annotations": [')
        elif self.task == "instance":
            self._records = RecordFile(self.folder / INSTANCES_FILE, "[")
        self._pool = ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._pool.shutdown()
            # An image that could not be written does not keep the others out of the lists.
            errors = []
            for future in self._pending:
                if error := future.exception():
                    errors.append(error)
                else:
                    self._enter(future.result())
            if self._images:
                self._finish()
            if errors and kind is None:
                raise errors[0]
        finally:
            if self._records is not None:
                self._records.discard()

    def write(self, file: ImageFile, image: Tensor, result: Any) -> None:
        """Writes the files of one image, each whole or not at all. Writing may continue after the return.

        Args:
            file: the image's file.
            image: ``(3, H, W)`` uint8.
            result: the result of the model's ``predict`` for this task; for "instance" with run lengths and boxes.
        """
        while len(self._pending) >= self._workers:
            self._enter(self._pending.popleft().result())
        shown = self._html is not None and self._started < self._html_images
        self._started += 1
        self._pending.append(self._pool.submit(self._write_pictures, file, image, result, shown))

    def _write_pictures(self, file: ImageFile, image: Tensor, result: Any, shown: bool) -> Written:
        photo = Image.fromarray(image.permute(1, 2, 0).numpy())
        results: Results = getattr(self, f"_{self.task}")(file, result, photo.size[::-1])
        pictures, records, make_segments = results
        segments = make_segments() if shown or OVERLAYS in self.folders else None
        if segments is not None:
            pictures[OVERLAYS] = partial(draw_overlay, photo, segments, self.info.class_names, self._palette)
        writers = {
            f"{name}/{file.name}.png": partial(_save, make=make)
            for name, make in pictures.items()
            if name in self.folders
        }
        replace_files(self.folder, writers)
        figure = ""
        if shown and segments is not None:
            figure = page.segments(photo, {self.task: segments}, self.info.class_names, self._palette, file.file_name)
        return file, photo.size, records, figure

    def _enter(self, written: Written) -> None:
        """Lists an image whose pictures are written."""
        file, (width, height), records, figure = written
        for record in records:
            self._records_file().add(record)
        self._images.append({"id": file.image_id, "file_name": file.file_name, "width": width, "height": height})
        self.written.append(file)
        if figure:
            self._figures.append(figure)

    def _records_file(self) -> RecordFile:
        assert self._records is not None  # it is open within the context
        return self._records

    def _semantic(self, file: ImageFile, result: Tensor, size: tuple[int, int]) -> Results:
        labels = result.cpu().numpy()
        segments = partial(SegmentMap.of_labels, labels, self.info.num_classes)
        return {LABELS: partial(self._label_picture, labels)}, [], segments

    _general = _semantic

    def _panoptic(
        self, file: ImageFile, result: tuple[Tensor, Sequence[Mapping[str, Any]]], size: tuple[int, int]
    ) -> Results:
        ids, infos = result[0].cpu().numpy(), result[1]
        boxes = ndimage.find_objects(ids)
        stuff = self.info.stuff_classes
        record = {
            "image_id": file.image_id,
            "file_name": f"{file.name}.png",
            "segments_info": [
                {
                    "id": info["id"],
                    "category_id": self._category(info["category_id"]),
                    "isthing": int(info["category_id"] not in stuff),
                    "iscrowd": 0,
                    "bbox": _box_of(boxes[info["id"] - 1]),
                    "area": int(info["area"]),
                    "score": round(float(info["score"]), 5),
                }
                for info in infos
            ],
        }
        classes = {info["id"]: info["category_id"] for info in infos}
        table = np.full(max(classes, default=0) + 1, self.info.ignore_index, self._label_dtype)
        table[list(classes)] = list(classes.values())
        pictures: dict[str, Callable[[], Image.Image]] = {
            PANOPTIC: partial(_id_picture, ids),
            LABELS: lambda: self._label_picture(table[ids]),
        }
        return pictures, [record], partial(SegmentMap.of_panoptic, ids, infos)

    def _instance(self, file: ImageFile, result: Mapping[str, Any], size: tuple[int, int]) -> Results:
        scores, labels = result["scores"].tolist(), result["labels"].tolist()
        codes = [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in result["rle"]]
        records = [
            {
                "image_id": file.image_id,
                "category_id": self._category(label),
                "segmentation": code,
                "bbox": [left, top, right - left, bottom - top],
                "score": round(score, 5),
            }
            for label, code, (left, top, right, bottom), score in zip(
                labels, codes, result["boxes"].tolist(), scores, strict=True
            )
            if right > left
        ]
        order = sorted((k for k, score in enumerate(scores) if score > self._threshold), key=scores.__getitem__)
        masks = ((draw(codes[k], size), labels[k], scores[k]) for k in order)
        return {}, records, partial(SegmentMap.of_masks, size, masks)

    def _label_picture(self, labels: np.ndarray) -> Image.Image:
        return Image.fromarray(labels.astype(self._label_dtype, copy=False))

    @property
    def _label_dtype(self) -> type:
        return np.uint8 if self.info.ignore_index <= 255 else np.uint16

    def _category(self, label: int) -> int:
        return self._categories[label]["id"]

    def _finish(self) -> None:
        """Writes the files that belong to all images."""
        images, categories = json.dumps(self._images), json.dumps(self._categories)
        if self.task == "panoptic":
            self._records_file().finish(f'],\n"images": {images},\n"categories": {categories}}}\n')
        elif self.task == "instance":
            self._records_file().finish("]\n")
            self._write_text(IMAGES_FILE, f'{{"images": {images},\n"categories": {categories}}}\n')
        if CLASSES_FILE in FILES[self.task]:
            self._write_text(CLASSES_FILE, self._classes_text())
        if self._html is not None:
            self._write_page(self._html)

    def _write_page(self, path: Path) -> None:
        count, shown = len(self.written), len(self._figures)
        lead = f"{self.task.capitalize()} segmentation of {count} {'image' if count == 1 else 'images'}"
        if shown < count:
            lead += f", the first {shown} of them shown"
        blocks = [page.mask_slider(), *self._figures]
        if self.failures:
            rows = [(str(path), reason) for path, reason in self.failures]
            blocks += [page.heading("Images that could not be read"), page.table([("image", "reason"), *rows])]
        page.write_page(path, "Predictions", lead, blocks)

    def _write_text(self, name: str, text: str) -> None:
        replace_file(self.folder / name, lambda path: path.write_text(text, encoding="utf-8"))

    def _classes_text(self) -> str:
        return json.dumps(classes_content(self.info), indent=1) + "\n"

    def _other_classes(self) -> bool:
        path = self.folder / CLASSES_FILE
        return path.is_file() and path.read_text(encoding="utf-8") != self._classes_text()


def _categories(info: DatasetInfo, palette: Palette) -> list[dict[str, Any]]:
    ids = range(info.num_classes) if info.category_ids is None else info.category_ids
    return [
        {"id": i, "name": name, "isthing": int(k not in info.stuff_classes), "color": list(color)}
        for k, (i, name, color) in enumerate(zip(ids, info.class_names, palette, strict=True))
    ]


def _save(path: Path, make: Callable[[], Image.Image]) -> None:
    make().save(path, format="PNG", compress_level=3)


def _id_picture(ids: np.ndarray) -> Image.Image:
    """COCO's colors of ids, R + 256 G + 65536 B."""
    return Image.fromarray(np.stack([(ids >> shift).astype(np.uint8) for shift in (0, 8, 16)], -1))


def _box_of(place: tuple[slice, slice]) -> list[int]:
    """[left, top, width, height]."""
    rows, columns = place
    return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
