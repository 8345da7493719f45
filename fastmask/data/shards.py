"""WebDataset shards: tar files that are read sequentially, for data too large for a single disk."""

from __future__ import annotations

import bisect
import glob
import io
import itertools
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from fastmask.data.coco_panoptic import decode_ids, panoptic_truth, segment_faults
from fastmask.data.derived_truth import task_view
from fastmask.data.folder import CLASSES_FILE, classes_content, parse_classes, void_label
from fastmask.data.image_files import IMAGE_SUFFIXES, UNREADABLE, FileDataset, decode_labels, label_truth
from fastmask.data.pictures import decode_picture
from fastmask.data.sample import Sample, SegmentationDataset
from fastmask.data.transforms import Transform
from fastmask.extras import extra
from fastmask.files import read_json, replace_file, write_json

COUNTS_FILE = "shards.json"
LABELS, IDS, SEGMENTS = "labels.png", "panoptic.png", "segments.json"
SHARD_NAME = re.compile(r"[^/\s]+\.tar\b")
SHUFFLE_BUFFER = 1000  # samples, not yet decoded

RawSample = dict[str, Any]  # the bytes of a sample's files by suffix, and its "__key__" and "__url__"
T = TypeVar("T")


def is_pattern(path: str | Path) -> bool:
    """Whether a data set's path names shards."""
    return SHARD_NAME.search(str(path)) is not None and not Path(path).is_dir()


def is_url(path: str) -> bool:
    """Whether a path is a URL or a command that webdataset opens."""
    return "://" in path or path.startswith("pipe:")


class ShardDataset(SegmentationDataset):
    """Samples in the tar files of a pattern, such as ``/data/train-{000000..000127}.tar``.

    The name of a shard begins with its split and a hyphen. The folder of the shards also holds ``classes.json``, as in
    a plain folder, and ``shards.json``, the number of samples of each shard: {"train-000000.tar": 1000, ...}. A sample
    KEY has an image, ``KEY.jpg`` or another format, and either ``KEY.labels.png``, a label map as in a plain folder, or
    ``KEY.panoptic.png`` and ``KEY.segments.json``: segment ids R + 256 G + 65536 B (0 is void), and a list of
    {"id", "category_id", "iscrowd"}, where the category is the index of a class. :func:`write_shards` writes all these.

    Shards are local files or URLs that webdataset opens ("https:", "gs:", "pipe:COMMAND"). Training reads them with a
    :class:`ShardStream`. ``dataset[i]`` reads the shard from its beginning, or continues from the last sample: reading
    in order, as in evaluation, takes one pass in each process. ``check_dataset`` does not read shards: broken samples
    raise errors when they are read.

    Args:
        pattern: paths or URLs with ranges and lists in braces; local paths may contain ``*``. Shards of other splits
            are ignored, so that ``/data/*.tar`` serves all splits.
        split: "train", "val" or another split of the shards.
        task: "semantic", "panoptic" or "instance"; by default the task of the first sample's truth.

    Raises:
        FileNotFoundError: the split has no shard.
        ImportError: webdataset is missing.
        ValueError: a JSON file or the first sample cannot be read, or there is no truth for the task.
    """

    def __init__(self, pattern: str | Path, split: str, task: str | None = None):
        self.split = split
        urls = [url for url in _expand(str(pattern)) if _shard_name(url).startswith(f"{split}-")]
        if not urls:
            raise FileNotFoundError(f"{pattern}: no shard of split {split!r}, such as {split}-000000.tar")
        counts = _read_beside(urls[0], COUNTS_FILE)
        self.urls = urls
        self.counts = [counts.get(_shard_name(url), 0) if isinstance(counts, dict) else 0 for url in urls]
        for url, count in zip(urls, self.counts, strict=True):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{COUNTS_FILE} of {url} has no number of samples for {_shard_name(url)}")
        self._starts = list(itertools.accumulate(self.counts, initial=0))
        self._reader: tuple[tuple[int, int], int, Iterator[RawSample]] | None = None
        info, self._classes = parse_classes(_read_beside(urls[0], CLASSES_FILE), f"{CLASSES_FILE} beside {urls[0]}")
        first = self._raw(0, 0)
        self._is_panoptic = IDS in first
        if not self._is_panoptic and task not in (None, "semantic"):
            raise ValueError(f"task={task!r}: the shards have truth for semantic segmentation only")
        self.info, self._view = task_view(replace(info, task="panoptic"), task if self._is_panoptic else "semantic")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        shard = bisect.bisect_right(self._starts, index) - 1
        return self.decode(self._raw(shard, index - self._starts[shard]))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def read(self, shard: int) -> Iterator[RawSample]:
        """The samples of a shard in order, not decoded.

        Raises:
            ValueError: the shard cannot be read, or its number of samples differs from ``shards.json``.
        """
        with extra("shards"):
            import webdataset
        url, count = self.urls[shard], 0
        try:
            for raw in webdataset.tarfile_to_samples()(iter([{"url": url}])):
                yield raw
                count += 1
        except (OSError, EOFError, tarfile.TarError) as error:
            raise ValueError(f"{url}: {error}") from error
        if count != self.counts[shard]:
            raise ValueError(f"{url}: {count} samples; {COUNTS_FILE} says {self.counts[shard]}")

    def decode(self, raw: RawSample) -> Sample:
        """Decodes a sample from the bytes that :meth:`read` returns.

        Raises:
            ValueError: a file is missing or broken; the message names it.
        """
        suffix = next((suffix for suffix in raw if f".{suffix}" in IMAGE_SUFFIXES), "jpg")
        image = _decoded(raw, suffix, decode_picture)
        if self._is_panoptic:
            truth = _decoded(raw, SEGMENTS, partial(self._panoptic, raw))
        else:
            truth = _decoded(raw, LABELS, lambda file: label_truth(decode_labels(file), self._classes))
        if image.shape[1:] != truth["segments"].shape:
            sizes = " and ".join(f"{plane.shape[-2]} x {plane.shape[-1]}" for plane in (image, truth["segments"]))
            raise ValueError(f"{raw['__url__']}: {raw['__key__']}: image and truth have {sizes} pixels")
        name = f"{_shard_name(raw['__url__']).removesuffix('.tar')}/{raw['__key__']}"
        return self._view(Sample(image, name=name, **truth).without_empty())

    def _panoptic(self, raw: RawSample, file: io.BytesIO) -> dict[str, torch.Tensor]:
        segments = json.load(file)
        classes = {label: label for label in range(int(self._classes.max()) + 1)}
        faults = segment_faults(segments, classes) if isinstance(segments, list) else ["expected a list of segments"]
        if faults:
            raise ValueError("; ".join(faults))
        return _decoded(raw, IDS, lambda ids: panoptic_truth(decode_ids(ids), segments, classes))

    def _raw(self, shard: int, place: int) -> RawSample:
        # A forked process must not share the position in an open file with its parent.
        key = os.getpid(), shard
        if self._reader is None or self._reader[0] != key or self._reader[1] > place:
            self._reader = key, 0, self.read(shard)
        _, start, samples = self._reader
        self._reader = key, place + 1, samples
        return next(itertools.islice(samples, place - start, None))


class ShardStream(IterableDataset[Sample]):
    """An endless stream of training samples for one process, which a ``DataLoader`` batches by ``batch_size``.

    In each epoch, ``(seed, epoch)`` deals the shards to the workers of all processes. A worker reads its shards once,
    shuffles the samples in a buffer of 1000, and goes on to the next epoch. The samples and their augmentation depend
    only on the seed, the numbers of processes and workers, and the batch size. A stream that starts at batch n
    continues with the same samples as an uninterrupted stream: it skips whole epochs, and reads the current one up to
    that point without decoding.

    Args:
        dataset: the shards to read.
        transform: the augmentation.
        seed: an integer, not negative.
        batch_size: samples per batch of this process.
        first_batch: the number of batches to skip.
        rank: the rank of this process.
        world_size: the number of processes.

    Raises:
        ValueError: while reading: fewer shards than processes times workers, or a broken shard.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        transform: Transform,
        seed: int,
        batch_size: int,
        first_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.batch_size, self.first_batch = batch_size, first_batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Sample]:
        with extra("shards"):
            import webdataset
        counts = np.array(self.dataset.counts)
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        # The loader always requests its first batch from worker 0, the next from worker 1, and so on.
        part = (self.first_batch + (0 if worker is None else worker.id)) % workers
        share, shares = self.rank * workers + part, self.world_size * workers
        if len(counts) < shares:
            raise ValueError(
                f"{len(counts)} shards of split {self.dataset.split!r} for {self.world_size} processes times {workers} "
                "workers; expected at least one for each worker"
            )
        skipped = len(range(part, self.first_batch, workers)) * self.batch_size
        for epoch in itertools.count():
            shards = np.random.default_rng([self.seed, epoch]).permutation(len(counts))[share::shares]
            if skipped >= counts[shards].sum():
                skipped -= int(counts[shards].sum())
                continue
            samples = itertools.chain.from_iterable(map(self.dataset.read, shards.tolist()))
            rng = random.Random(f"{self.seed} {epoch} {share}")
            shuffled = webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)(samples)
            for place, raw in enumerate(itertools.islice(shuffled, skipped, None), skipped):
                draws = np.random.default_rng([self.seed, epoch, share, place])
                yield self.transform(self.dataset.decode(raw), draws)
            skipped = 0


def write_shards(
    dataset: SegmentationDataset, folder: str | Path, *, samples_per_shard: int = 1000, seed: int = 0
) -> list[Path]:
    """Writes a data set with segment maps as the shards that :class:`ShardDataset` reads.

    Image files are copied; images from other sources are written as PNG. Samples are written in random order, since
    training shuffles only within a buffer. Write the splits of a data set to the same folder, one after another.

    Args:
        dataset: a data set opened for semantic or panoptic segmentation.
        folder: the folder to write to.
        samples_per_shard: samples per shard; the last shard may have fewer.
        seed: the seed of the order.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: the data set has instances, which may overlap, or an argument is out of range.
    """
    with extra("shards"):
        import webdataset
    if dataset.info.task == "instance":
        raise ValueError("shards hold segment maps; open the data set for the task 'panoptic' or 'semantic'")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()

    def write(indices: list[int], path: Path) -> None:
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
            for index in indices:
                writer.write(_encoded(dataset, index))

    counts = {}
    for number, start in enumerate(range(0, len(order), samples_per_shard)):
        indices = order[start : start + samples_per_shard]
        name = f"{dataset.split}-{number:06d}.tar"
        replace_file(Path(folder, name), partial(write, indices))
        counts[name] = len(indices)
    write_json(Path(folder, CLASSES_FILE), classes_content(dataset.info))
    known = read_json(Path(folder, COUNTS_FILE), {})
    others = {name: count for name, count in known.items() if not name.startswith(f"{dataset.split}-")}
    write_json(Path(folder, COUNTS_FILE), others | counts)
    return [Path(folder, name) for name in counts]


def _encoded(dataset: SegmentationDataset, index: int) -> RawSample:
    """The files of a sample."""
    sample = dataset[index]
    raw: RawSample = {"__key__": f"{index:09d}"}
    if isinstance(dataset, FileDataset):
        path = dataset.entries[index].image
        raw[path.suffix[1:].lower()] = path.read_bytes()
    else:
        raw["png"] = _png(sample.image.permute(1, 2, 0).numpy())
    if dataset.info.task == "semantic":
        void = void_label(dataset.info.num_classes)
        raw[LABELS] = _png(sample.class_map(void).numpy().astype(np.uint8 if void <= 255 else np.uint16))
        return raw
    assert sample.segments is not None
    ids = sample.segments.numpy().astype(np.int32) + 1
    raw[IDS] = _png(np.stack([(ids >> shift).astype(np.uint8) for shift in (0, 8, 16)], -1))
    crowd = [False] * len(sample.labels) if sample.crowd is None else sample.crowd.tolist()
    segments = [
        {"id": m, "category_id": label, "iscrowd": int(is_crowd)}
        for m, (label, is_crowd) in enumerate(zip(sample.labels.tolist(), crowd, strict=True), 1)
    ]
    raw[SEGMENTS] = json.dumps(segments).encode()
    return raw


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _decoded(raw: RawSample, suffix: str, decode: Callable[[io.BytesIO], T]) -> T:
    place = f"{raw['__url__']}: {raw['__key__']}.{suffix}"
    if suffix not in raw:
        raise ValueError(f"{place}: missing; the sample has {', '.join(key for key in raw if key[:2] != '__')}")
    try:
        return decode(io.BytesIO(raw[suffix]))
    except UNREADABLE as error:
        message = str(error)
        raise ValueError(message if raw["__url__"] in message else f"{place}: {message}") from error


def _expand(pattern: str) -> list[str]:
    """The URLs of a pattern, sorted."""
    with extra("shards"):
        from webdataset.shardlists import expand_urls
    urls: set[str] = set()
    for url in expand_urls(pattern):
        urls |= set(glob.glob(url)) if glob.has_magic(url) and not is_url(url) else {url}
    return sorted(urls)


def _shard_name(url: str) -> str:
    found = SHARD_NAME.search(url)
    if found is None:
        raise ValueError(f"{url} names no .tar file")
    return found[0]


def _read_beside(url: str, name: str) -> Any:
    """The content of a JSON file in the folder of a shard."""
    with extra("shards"):
        import webdataset
    place = SHARD_NAME.sub(name, url)
    try:
        with webdataset.gopen(place) as file:
            return json.loads(file.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
