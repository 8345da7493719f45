"""Evaluation: numbers worked out by hand, the metrics fed directly, and one process against two."""

from __future__ import annotations

import json
import pickle
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from fastmask.data import ComposedClips, DatasetInfo, Sample, SceneDataset, SegmentationDataset, collate_clips
from fastmask.metrics import InstanceMetrics, PanopticMetrics, SemanticMetrics, SoundEventMetrics
from fastmask.models import MaskFormer, PerPixelBaseline, Segmenter, make_model
from fastmask.training import evaluate
from fastmask.training.distributed import cleanup, setup, wrap
from tests.helpers.shared_batches import fork_together

VOID = -1
# Two stripes of things, stuff below and a corner of void; a car that is crowd.
CAR, TREE, ROAD = range(3)
NAMES = ("car", "tree", "road")


class Pictures(SegmentationDataset):
    """Samples whose images are their own index, all bytes of them."""

    def __init__(self, task="panoptic", sizes=((4, 6), (4, 6), (4, 8)), names=NAMES):
        self.info = DatasetInfo(names, task, stuff_classes=() if task == "instance" else (ROAD,))
        self.sizes = sizes
        self.alive = []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        height, width = self.sizes[index]
        segments = torch.zeros(height, width, dtype=torch.int16)
        segments[:, width // 2 :] = 1
        segments[height // 2 :] = 2
        segments[-1, -1] = VOID
        image = torch.full((3, height, width), index, dtype=torch.uint8)
        self.alive.append(weakref.ref(image))
        sample = Sample(
            image, torch.tensor([CAR, TREE, ROAD]), segments, crowd=torch.tensor([index == 1, False, False])
        )
        if self.info.task == "instance":
            masks = segments == torch.arange(3)[:, None, None]
            return sample._replace(segments=None, masks=masks)
        if self.info.task == "semantic":
            return sample._replace(crowd=None)
        return sample


class Oracle:
    """Stands in for the network: it knows the truth, shifted by a pixel to the right if it is asked to err."""

    data, wrong = Pictures(), False

    def truth(self, images, sizes):
        for image, size in zip(images, sizes, strict=True):
            index = int((image.flatten()[0] * 255).round())
            sample = Pictures(sizes=self.data.sizes)[index]
            assert image.dtype == torch.float32 and size == sample.size
            yield sample._replace(segments=sample.segments.roll(1, 1)) if self.wrong else sample

    def results(self, task, images, sizes, **options):
        self.calls = [*getattr(self, "calls", []), (task, tuple(images.shape), options)]
        for sample in self.truth(images, sizes):
            if task in ("semantic", "general"):
                yield sample.class_map(options.get("ignore_index", 0))
            elif task == "panoptic":
                infos = [{"id": m + 1, "category_id": int(label)} for m, label in enumerate(sample.labels)]
                yield sample.segments + 1, infos
            else:
                things = torch.tensor([c for c in range(3) if c not in options["stuff_classes"]])
                masks = sample.segments == things[:, None, None]
                yield {"scores": torch.linspace(0.9, 0.8, len(things)), "labels": things, "masks": masks}


class MaskOracle(Oracle, MaskFormer):
    def predict_tasks(self, images, tasks, sizes=None):
        return {task: list(self.results(task, images, sizes, **options)) for task, options in tasks.items()}


class PixelOracle(Oracle, PerPixelBaseline):
    def predict(self, images, sizes=None, **options):
        return list(self.results("semantic", images, sizes, **options))


def oracle(wrong=False, kind=MaskOracle, data=None):
    name = "tiny" if issubclass(kind, MaskFormer) else "per-pixel-tiny"
    model = kind(make_model(name, 3, class_names=NAMES).config)
    model.wrong, model.data = wrong, data or Pictures()
    return model


def test_a_perfect_model_scores_one_in_every_task():
    pytest.importorskip("pycocotools")
    result = evaluate(oracle(), Pictures(), ["semantic", "general", "panoptic", "instance"], batch_size=2)
    for name in (
        "mIoU",
        "fwIoU",
        "pixel_accuracy",
        "boundary_IoU",
        "general_mIoU",
        "PQ",
        "SQ_things",
        "RQ_stuff",
        "AP",
    ):
        assert result.numbers[name] == pytest.approx(1), name
    assert result.tasks == ("semantic", "general", "panoptic", "instance")
    assert result.num_samples == 3 and result.class_names == NAMES
    assert result.per_class["IoU"] == result.per_class["PQ"] == [1, 1, 1]
    assert np.isnan(result.per_class["AP"][ROAD])
    assert json.loads(json.dumps(result.to_dict()))["per_class"]["AP"][ROAD] is None


def test_classes_that_are_not_in_the_truth_are_named():
    pytest.importorskip("pycocotools")
    names = ("car", "tree", "road", "bird", "snow")

    class Rich(Pictures):
        def __init__(self, task="panoptic"):
            super().__init__(task)
            self.info = DatasetInfo(names, task, stuff_classes=() if task == "instance" else (ROAD, 4))

    model = MaskOracle(make_model("tiny", 5, class_names=names).config)
    for tasks, absent in (
        (["semantic"], ("bird", "snow")),
        (["panoptic", "semantic"], ("bird", "snow")),
        (["instance"], ("bird",)),
        (["semantic", "instance"], ("bird", "snow")),
    ):
        result = evaluate(model, Rich(), tasks)
        assert result.absent_classes == absent and result.to_dict()["absent_classes"] == list(absent)
    assert evaluate(oracle(), Pictures()).absent_classes == ()


def test_a_shifted_prediction_scores_what_it_scores_by_hand():
    """Of two rows of 6 pixels, CAR 3 and TREE 3 each, a shift leaves 2 of either right and one of either wrong. Below,
    ROAD has two rows of 6, less the void pixel; its pixel beside the void is now no class.
    """
    data = Pictures(sizes=((4, 6),))
    result = evaluate(oracle(wrong=True, data=data), data)
    assert result.tasks == ("semantic", "panoptic")
    # Intersections over unions: the void pixel of the truth does not count; where the prediction is void, class 0
    # stands in the semantic result, and no segment in the panoptic one.
    car, tree, road = 4 / (6 + 6 + 1 - 4), 4 / (6 + 6 - 4), 10 / 11
    assert result.per_class["IoU"] == pytest.approx([car, tree, road])
    assert result.numbers["mIoU"] == pytest.approx((car + tree + road) / 3)
    assert result.numbers["pixel_accuracy"] == pytest.approx(18 / 23)
    assert result.numbers["fwIoU"] == pytest.approx((6 * car + 6 * tree + 11 * road) / 23)
    # IoU of things is 4 / 8: no match. One of three classes is found.
    assert result.per_class["PQ"] == pytest.approx([0, 0, 10 / 11])
    assert result.numbers["PQ"] == pytest.approx(10 / 33)
    assert (result.numbers["PQ_things"], result.numbers["RQ_stuff"]) == (0, 1)


def test_only_equal_sizes_are_predicted_together():
    model = oracle()
    evaluate(model, Pictures(), ["semantic"], batch_size=3)
    assert [shape for _, shape, _ in model.calls] == [(2, 3, 4, 6), (1, 3, 4, 8)]


def test_images_are_resized_and_results_are_not():
    class Bigger(MaskOracle):
        def truth(self, images, sizes):
            assert images.shape[2] == 8
            return super().truth(images, sizes)

    model = oracle(kind=Bigger)
    assert evaluate(model, Pictures(), short_side=8).numbers["mIoU"] == 1
    assert [shape[2:] for task, shape, _ in model.calls if task == "semantic"] == [(8, 12), (8, 16)]
    model = oracle(kind=MaskOracle)
    evaluate(model, Pictures(), ["semantic"], short_side=8, max_side=9)
    assert [shape[2:] for _, shape, _ in model.calls] == [(6, 9), (5, 9)]


def test_options_and_stuff_reach_the_task():
    model = oracle()
    evaluate(model, Pictures(), ["panoptic", "general"], options={"panoptic": {"threshold": 0.3}})
    assert {task: options for task, _, options in model.calls} == {
        "panoptic": {"stuff_classes": (ROAD,), "threshold": 0.3},
        "general": {"ignore_index": 3},
    }


@pytest.mark.parametrize(
    ("kind", "task", "expected"),
    [
        (MaskOracle, "semantic", ("semantic",)),
        (MaskOracle, "panoptic", ("semantic", "panoptic")),
        (MaskOracle, "instance", ("instance",)),
        (PixelOracle, "semantic", ("semantic",)),
        (PixelOracle, "panoptic", ("semantic",)),
    ],
)
def test_what_is_evaluated_by_default(kind, task, expected):
    if task == "instance":
        pytest.importorskip("pycocotools")
    result = evaluate(oracle(kind=kind), Pictures(task))
    assert result.tasks == expected
    assert result.numbers["AP" if task == "instance" else "mIoU"] == pytest.approx(1)


def test_crowd_is_no_fault():
    """Image 1's car is crowd: finding nothing there misses no car."""
    data = Pictures(sizes=((4, 6), (4, 6)))

    class Blind(MaskOracle):
        def results(self, task, images, sizes, **options):
            return [
                (segments, [info for info in infos if info["category_id"] != CAR])
                for segments, infos in super().results(task, images, sizes, **options)
            ]

    result = evaluate(oracle(kind=Blind, data=data), data, ["panoptic"])
    assert result.per_class["PQ"] == [0, 1, 1]
    crowded = torch.utils.data.Subset(data, [1])
    crowded.info = data.info
    assert evaluate(oracle(kind=Blind, data=data), crowded, ["panoptic"]).numbers["PQ"] == 1


def real_model(name="tiny", **options):
    torch.manual_seed(0)
    return make_model(name, 13, **options)


def test_a_network_is_evaluated_as_the_metrics_say():
    pytest.importorskip("pycocotools")
    data = SceneDataset("val", length=5, size=(48, 64))
    model = real_model(stuff_classes=data.info.stuff_classes)
    found = evaluate(
        model, data, ["semantic", "panoptic", "instance"], batch_size=1, options={"panoptic": {"threshold": 0.05}}
    )
    expected = SemanticMetrics(13), PanopticMetrics(13, data.info.stuff_classes), InstanceMetrics(13)
    for i in range(len(data)):
        sample = data[i]
        images = sample.image[None] / 255
        things = (sample.labels < 10).nonzero().flatten()
        masks = sample.segments == things[:, None, None]
        expected[0].update(model.predict(images)[0], sample.class_map())
        panoptic = model.predict(images, "panoptic", threshold=0.05)[0]
        expected[1].update(panoptic, sample.segments, sample.labels)
        expected[2].update(f"{i:03d}", model.predict(images, "instance")[0], masks, sample.labels[things])
    numbers = {}
    for metrics in expected:
        numbers |= metrics.compute()
    assert found.numbers == pytest.approx(numbers, nan_ok=True, abs=0)


def test_each_image_is_given_with_its_own_numbers():
    """They are those of a data set of this image alone, and change nothing about the evaluation."""
    pytest.importorskip("pycocotools")
    data = SceneDataset("val", length=3, size=(48, 64))
    model = real_model(stuff_classes=data.info.stuff_classes)
    seen = []
    options = {"options": {"panoptic": {"threshold": 0.05}}, "tasks": ["semantic", "general", "panoptic", "instance"]}
    found = evaluate(model, data, **options, each=lambda *arguments: seen.append(arguments))
    assert found.to_dict() == evaluate(model, data, **options).to_dict()
    assert [sample.name for sample, _, _ in seen] == [data[i].name for i in range(3)]
    for i, (sample, results, numbers) in enumerate(seen):
        assert list(results) == options["tasks"]
        assert results["semantic"].shape == sample.size
        one = Subset(data, [i])
        one.info = data.info
        alone = evaluate(model, one, **options)
        assert numbers == pytest.approx(alone.numbers, nan_ok=True, abs=0)


def test_segmenter_is_evaluated_in_windows():
    data = SceneDataset("val", length=3, size=(48, 80), task="semantic")
    model = real_model("segmenter-tiny")
    for window in (None, (48, 32)):
        expected = SemanticMetrics(13, boundary_share=None)
        for i in range(len(data)):
            expected.update(model.predict(data[i].image[None] / 255, window=window)[0], data[i].class_map())
        found = evaluate(model, data, batch_size=1, window=window, boundary_share=None)
        assert found.numbers == pytest.approx(expected.compute(), abs=0)


def test_an_eomt_is_evaluated_as_it_predicts():
    data = SceneDataset("val", length=3, size=(48, 80))
    model = real_model("eomt-tiny", stuff_classes=data.info.stuff_classes)
    expected = SemanticMetrics(13), PanopticMetrics(13, data.info.stuff_classes)
    for i in range(len(data)):
        sample, images = data[i], data[i].image[None] / 255
        expected[0].update(model.predict(images)[0], sample.class_map())
        expected[1].update(model.predict(images, "panoptic", threshold=0.05)[0], sample.segments, sample.labels)
    options = {"panoptic": {"threshold": 0.05}}
    found = evaluate(model, data, ["semantic", "panoptic"], batch_size=1, options=options)
    assert found.numbers == pytest.approx(expected[0].compute() | expected[1].compute(), nan_ok=True, abs=0)


def test_views_are_averaged_for_semantic_maps_alone():
    data = SceneDataset("val", length=2, size=(48, 64))
    model = real_model(stuff_classes=data.info.stuff_classes)
    views = {"scales": (0.5, 1.0), "flip": True, "window": (48, 32)}
    found = evaluate(model, data, ["semantic", "panoptic"], batch_size=1, **views)
    semantic = SemanticMetrics(13)
    for i in range(len(data)):
        semantic.update(model.predict(data[i].image[None] / 255, **views)[0], data[i].class_map())
    plain = evaluate(model, data, ["panoptic"], batch_size=1)
    assert found.numbers == pytest.approx({**semantic.compute(), **plain.numbers}, nan_ok=True, abs=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precisions_run_under_autocast(precision, monkeypatch):
    seen = []
    plain = MaskFormer._predict
    monkeypatch.setattr(
        MaskFormer,
        "_predict",
        lambda self, *args, **kwargs: seen.append(torch.get_autocast_dtype("cpu")) or plain(self, *args, **kwargs),
    )
    data = SceneDataset("val", length=2, size=(32, 32))
    result = evaluate(real_model(stuff_classes=data.info.stuff_classes), data, precision=precision)
    assert seen == [getattr(torch, precision)] and 0 <= result.numbers["mIoU"] <= 1


def test_modes_and_random_state_stay_as_they_were():
    model = real_model(stuff_classes=(10, 11, 12)).train()
    model.backbone.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    evaluate(model, SceneDataset("val", length=2, size=(32, 32)))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_does_not_grow_with_the_data_set():
    data = Pictures(sizes=((4, 6),) * 40)
    most = []

    class Watching(MaskOracle):
        def truth(self, images, sizes):
            most.append(sum(reference() is not None for reference in data.alive))
            return super().truth(images, sizes)

    evaluate(oracle(kind=Watching, data=data), data, batch_size=4)
    assert max(most) <= 8


def test_workers_read_the_same():
    data = SceneDataset("val", length=5, size=(32, 32))
    model = real_model(stuff_classes=data.info.stuff_classes)
    assert evaluate(model, data, workers=1).numbers == pytest.approx(evaluate(model, data).numbers, nan_ok=True, abs=0)


def test_a_bar_is_shown_if_asked_for(capsys):
    pytest.importorskip("tqdm")
    evaluate(oracle(), Pictures(), progress=True)
    assert "evaluating" in capsys.readouterr().err


def test_sound_events():
    pytest.importorskip("soundfile")
    clips = ComposedClips("val", length=5, duration=2.0)
    torch.manual_seed(0)
    model = make_model("sound-tiny", 7)
    nn.init.constant_(model.predictor.class_embed.bias, 0.0)
    options = {"threshold": 0.2}
    found = evaluate(model, clips, batch_size=2, options={"events": options})
    expected = SoundEventMetrics(7)
    for i in range(len(clips)):
        waveforms, truth = collate_clips([clips[i]])
        expected.update(model.predict(waveforms, **options)[0]["events"], truth[0])
    assert found.numbers == pytest.approx(expected.compute(), nan_ok=True)
    assert found.tasks == ("events",) and len(found.per_class["F1"]) == len(found.class_names) == 7
    with pytest.raises(ValueError, match="SoundEventDetector: unknown tasks semantic; known are events"):
        evaluate(model, clips, ["semantic"])
    with pytest.raises(ValueError, match="SoundEventDetector hears sounds"):
        evaluate(model, clips, short_side=3)
    with pytest.raises(ValueError, match="hears sounds; the data set has images"):
        evaluate(model, Pictures())
    with pytest.raises(TypeError, match="dataset must have a DatasetInfo"):
        evaluate(oracle(), clips)


def test_wrong_arguments_are_named():
    data = Pictures()
    model, per_pixel = oracle(), oracle(kind=PixelOracle)
    with pytest.raises(ValueError, match="the model has 4 classes, the data set 3"):
        evaluate(make_model("tiny", 4), data)
    with pytest.raises(ValueError, match="precision='int8' is unknown; expected one of float32"):
        evaluate(model, data, precision="int8")
    with pytest.raises(ValueError, match="PixelOracle and panoptic truth: unknown tasks panoptic; known are semantic"):
        evaluate(per_pixel, data, ["panoptic"])
    with pytest.raises(ValueError, match="unknown tasks instance; known are semantic, general"):
        evaluate(model, Pictures("semantic"), ["instance"])
    with pytest.raises(ValueError, match="PixelOracle and instance truth have no task in common"):
        evaluate(per_pixel, Pictures("instance"))
    with pytest.raises(ValueError, match="this evaluation: unknown options panoptic; known are semantic"):
        evaluate(model, data, ["semantic"], options={"panoptic": {}})
    with pytest.raises(ValueError, match="a PixelOracle does not predict with flip, window"):
        evaluate(per_pixel, data, window=(4, 4), flip=True)
    with pytest.raises(ValueError, match="a Segmenter does not predict with scales; it does with window"):
        evaluate(make_model("segmenter-tiny", 3), data, scales=(1, 2))
    with pytest.raises(ValueError, match="flip goes with the task 'semantic' only, got 'panoptic'"):
        evaluate(model, data, ["panoptic"], flip=True)
    with pytest.raises(ValueError, match="max_side goes with short_side"):
        evaluate(model, data, max_side=9)
    with pytest.raises(ValueError, match="short_side must be at least 1, got 0"):
        evaluate(model, data, short_side=0)
    with pytest.raises(TypeError, match=r"tasks must be several names, got 'semantic'; expected \['semantic'\]"):
        evaluate(model, data, "semantic")
    with pytest.raises(ValueError, match="device='gpu' cannot be used"):
        evaluate(model, data, device="gpu")


def test_other_class_names_are_warned_of():
    with pytest.warns(UserWarning, match="1 classes have other names .* the first 1: 'bush' and 'tree'"):
        evaluate(oracle(), Pictures(names=("car", "bush", "road")))
    assert isinstance(oracle(kind=PixelOracle), PerPixelBaseline) and not isinstance(oracle(), Segmenter)


def work(path):
    rank = setup("cpu").rank
    # Processes that share the weights evaluate whole copies, since each has other images.
    (path / f"{rank}.pickle").write_bytes(pickle.dumps(of_all_kinds(partial(wrap, strategy="fsdp"))))
    cleanup()


def of_all_kinds(wrapped=lambda model: model):
    data = SceneDataset("val", length=5, size=(32, 32))
    model = real_model(stuff_classes=data.info.stuff_classes)
    options = {"panoptic": {"threshold": 0.05}}
    return evaluate(wrapped(model), data, ["semantic", "panoptic", "instance"], batch_size=1, options=options)


def test_two_processes_equal_one(tmp_path):
    pytest.importorskip("pycocotools")
    fork_together(work, tmp_path)
    alone = of_all_kinds()
    for rank in range(2):
        found = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert found.numbers == pytest.approx(alone.numbers, nan_ok=True, rel=1e-12)
        assert found.per_class["IoU"] == pytest.approx(alone.per_class["IoU"], nan_ok=True)
        assert found.num_samples == 5
