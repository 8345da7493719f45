"""Shards give the samples that were written, in streams that cover each epoch once and continue where they stopped."""

from __future__ import annotations

import pickle
import tarfile

import pytest
import torch
from torch.utils.data import DataLoader

from fastmask.data import Compose, RandomCrop, ShardStream, check_dataset, open_dataset, write_shards
from fastmask.data.composed.dataset import SceneDataset
from tests.helpers import dataset_trees as trees

NUM_SAMPLES = 23
SPLITS = {"ade20k": "train", "coco-panoptic": "val"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Panoptic scenes in six shards to train on and one to evaluate on."""
    path = tmp_path_factory.mktemp("shards")
    write_shards(SceneDataset("train", NUM_SAMPLES, size=(32, 40)), path, samples_per_shard=4)
    write_shards(SceneDataset("val", 3, size=(32, 32)), path, samples_per_shard=9, seed=1)
    return path


def pattern(folder, split="train"):
    return f"{folder}/{split}-{{000000..00000{5 if split == 'train' else 0}}}.tar"


def by_key(dataset):
    samples = [dataset[i] for i in range(len(dataset))]
    return {int(sample.name.rpartition("/")[2]): sample for sample in samples}


@pytest.mark.parametrize("task", [None, "semantic", "instance"])
@pytest.mark.parametrize("glob", [False, True])
def test_samples_are_those_that_were_written(folder, task, glob):
    dataset = open_dataset(f"{folder}/*.tar" if glob else pattern(folder), "train", task=task)
    scenes = SceneDataset("train", NUM_SAMPLES, size=(32, 40), task=task)
    assert len(dataset) == NUM_SAMPLES
    assert (dataset.info.class_names, dataset.info.stuff_classes) == (
        scenes.info.class_names,
        scenes.info.stuff_classes,
    )
    assert dataset.info.task == scenes.info.task
    samples = by_key(dataset)
    assert list(samples) != sorted(samples), "shards hold a random order"
    assert len({sample.name for sample in samples.values()}) == NUM_SAMPLES
    for index, sample in samples.items():
        expected = scenes[index]
        for name in ("image", "labels", "segments", "masks", "crowd"):
            one, other = getattr(sample, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), name
    check_dataset(dataset)


def test_any_order_and_pickles(folder):
    dataset = open_dataset(pattern(folder), "train")
    names = [dataset[i].name for i in range(len(dataset))]
    for i in (5, 4, 22, 0, -1):
        assert dataset[i].name == names[i]
    assert pickle.loads(pickle.dumps(dataset))[7].name == names[7]
    with pytest.raises(IndexError):
        dataset[NUM_SAMPLES]


@pytest.mark.parametrize("layout", ["ade20k", "coco-panoptic"])
def test_files_keep_their_bytes_and_truth(tmp_path, layout):
    tree = {"ade20k": trees.ade20k_tree, "coco-panoptic": trees.panoptic_tree}[layout]
    source = open_dataset(tree(tmp_path / "source"), SPLITS[layout], layout)
    write_shards(source, tmp_path / "shards")
    shards = by_key(open_dataset(f"{tmp_path}/shards/*.tar", SPLITS[layout]))
    assert len(shards) == len(source)
    for index, sample in shards.items():
        expected = source[index]
        assert torch.equal(sample.image, expected.image)
        assert torch.equal(sample.segments, expected.segments)
        assert torch.equal(sample.labels, expected.labels)
        assert (sample.crowd is None) == (expected.crowd is None)
        assert sample.crowd is None or torch.equal(sample.crowd, expected.crowd)


CROP = Compose((RandomCrop((24, 24)),))


def names_and_pixels(stream, batches, workers=0):
    """The names of each batch, and a sum that tells crops apart."""
    loader = DataLoader(stream, stream.batch_size, collate_fn=list, num_workers=workers)
    found = []
    for batch, _ in zip(loader, range(batches), strict=False):
        found.append([(sample.name, int(sample.image.long().sum())) for sample in batch])
    return found


def names_of(batches):
    return [name for batch in batches for name, _ in batch]


def test_an_epoch_holds_each_sample_once_in_a_new_order(folder):
    dataset = open_dataset(pattern(folder), "train")
    order = names_of(names_and_pixels(ShardStream(dataset, CROP, 3, 1), 2 * NUM_SAMPLES))
    assert sorted(order[:NUM_SAMPLES]) == sorted(order[NUM_SAMPLES:])
    assert len(set(order[:NUM_SAMPLES])) == NUM_SAMPLES
    assert order[:NUM_SAMPLES] != order[NUM_SAMPLES:]
    assert order != names_of(names_and_pixels(ShardStream(dataset, CROP, 4, 1), 2 * NUM_SAMPLES))


def test_processes_and_workers_share_an_epoch(folder):
    dataset = open_dataset(pattern(folder), "train")
    shards = {
        (rank, worker): {name.partition("/")[0] for name in names_of(batches[worker::2])}
        for rank in range(2)
        for batches in [names_and_pixels(ShardStream(dataset, CROP, 0, 1, rank=rank, world_size=2), 6, workers=2)]
        for worker in range(2)
    }
    found = [shard for names in shards.values() for shard in names]
    assert len(found) == len(set(found)), "no shard is read twice"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [1, 9, 20])
def test_a_stream_continues_with_the_same_samples(folder, workers, first):
    dataset = open_dataset(pattern(folder), "train")
    whole = names_and_pixels(ShardStream(dataset, CROP, 5, 2), 24, workers)
    rest = names_and_pixels(ShardStream(dataset, CROP, 5, 2, first), 24 - first, workers)
    assert rest == whole[first:]


def test_what_is_wrong_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard of split 'test', such as test-000000.tar"):
        open_dataset(pattern(folder), "test")
    with pytest.raises(FileNotFoundError, match="no shard of split 'val'"):
        open_dataset(pattern(folder), "val")
    with pytest.raises(ValueError, match="6 shards of split 'train' for 7 processes times 1 workers"):
        next(iter(ShardStream(open_dataset(pattern(folder), "train"), CROP, 0, 1, world_size=7)))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / "train-000001.tar"
    dataset = open_dataset(pattern(copy), "train")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"train-000001\.tar"):
        [dataset[i] for i in range(8)]
    with tarfile.open(path, "w") as empty:
        empty.add(copy / "classes.json", "a.json")
    with pytest.raises(ValueError, match=r"a\.jpg: missing; the sample has json"):
        dataset[4]
    (copy / "shards.json").write_text('{"train-000000.tar": 3, "train-000001.tar": 1}')
    with pytest.raises(ValueError, match=r"train-000000\.tar: 4 samples; shards\.json says 3"):
        list(open_dataset(f"{copy}/train-{{000000..000001}}.tar", "train").read(0))
    (copy / "shards.json").unlink()
    with pytest.raises(ValueError, match=r"shards\.json: .*No such file"):
        open_dataset(pattern(copy), "train")


def test_segmentation_of_other_kinds_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="shards hold segment maps"):
        write_shards(SceneDataset("val", 2, task="instance"), tmp_path)
    write_shards(SceneDataset("val", 2, task="semantic"), tmp_path)
    assert open_dataset(f"{tmp_path}/*.tar", "val").info.task == "semantic"
    with pytest.raises(ValueError, match="task='panoptic': the shards have truth for semantic segmentation only"):
        open_dataset(f"{tmp_path}/*.tar", "val", task="panoptic")
