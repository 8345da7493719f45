"""Metrics from logits: the numbers of the dense way, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import EomtImageProcessor, MaskFormerImageProcessor, OneFormerImageProcessor
from transformers import Mask2FormerImageProcessor as Mask2FormerProcessor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.models.oneformer.modeling_oneformer import OneFormerForUniversalSegmentationOutput
from transformers.models.rf_detr.modeling_rf_detr import RfDetrInstanceSegmentationOutput

from fastmask import Targets, reference
from fastmask.metrics import InstanceMetrics, PanopticMetrics, SemanticMetrics

K, N, GRID, B = 6, 12, (24, 32), 3
SIZES = [(60, 88), (88, 60), (97, 129)]
STUFF = (4, 5)
PANOPTIC = {"threshold": 0.4, "overlap_threshold": 0.4, "mask_threshold": 0.45}
OUTPUTS = {
    "maskformer": MaskFormerForInstanceSegmentationOutput,
    "mask2former": Mask2FormerForUniversalSegmentationOutput,
    "oneformer": OneFormerForUniversalSegmentationOutput,
    "eomt": EomtForUniversalSegmentationOutput,
}
EOMT_SIZE = {"shortest_edge": 96, "longest_edge": 96}  # four times its grid


def logits(generator, *, classes=K + 1, batch=B):
    """Confident classes, and smooth masks of which many overlap."""
    class_logits = 3 * torch.randn(batch, N, classes, generator=generator)
    coarse = torch.randn(batch, N, 4, 4, generator=generator) * 5
    return class_logits, interpolate(coarse, size=GRID, mode="bicubic")


def outputs_and_truth(family, generator):
    class_logits, mask_logits = logits(generator)
    if family == "eomt":
        mask_logits = mask_logits[..., :24]
    outputs = OUTPUTS[family](class_queries_logits=class_logits, masks_queries_logits=mask_logits)
    return outputs, truth_of(class_logits, mask_logits, generator)


def processor(family):
    if family == "eomt":
        return EomtImageProcessor(size=EOMT_SIZE)
    if family == "oneformer":
        return object.__new__(OneFormerImageProcessor)  # its constructor downloads the names of classes
    return {"maskformer": MaskFormerImageProcessor, "mask2former": Mask2FormerProcessor}[family]()


def truth_of(class_logits, mask_logits, generator, sizes=SIZES):
    """Near what some queries predict, with void between segments; the last image has no objects."""
    truth = []
    for classes, masks, size in zip(class_logits, mask_logits, sizes, strict=True):
        picked = torch.randperm(N, generator=generator)[:5]
        soft = interpolate(masks[None, picked], size=size, mode="bilinear")[0]
        soft = soft + 2 * interpolate(torch.randn(1, 5, 5, 5, generator=generator), size=size, mode="bicubic")[0]
        best = soft.max(0)
        segments = torch.where(best.values > 1, best.indices, -1).to(torch.int16)
        truth.append({"segments": segments, "labels": classes[picked, :K].argmax(-1)})
    truth[-1] = {"segments": torch.full(sizes[-1], -1, dtype=torch.int16), "labels": torch.zeros(0).long()}
    return truth


def masks_of(target):
    return target["segments"] == torch.arange(len(target["labels"]))[:, None, None]


def counts(metrics):
    return {name: value.tolist() for name, value in vars(metrics).items() if hasattr(value, "tolist")}


def near_boundary_of_classes(outputs, padded_size, size):
    """Pixels where the two best scores are too close for rounding to be sure, for each image."""
    class_logits, mask_logits = outputs.class_queries_logits.double(), outputs.masks_queries_logits.double()
    scores = reference.semantic_inference(
        class_logits, mask_logits, size, order="scores", output="scores", padded_size=padded_size
    )
    best = scores.topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]) < 1e-5


@pytest.mark.parametrize("family", OUTPUTS)
def test_semantic_equals_the_image_processor(family, generator):
    outputs, truth = outputs_and_truth(family, generator)
    padded = {"mask2former": (384, 384), "eomt": (96, 96)}.get(family)
    dense, ours = SemanticMetrics(K), SemanticMetrics(K)
    maps = []
    labels = processor(family).post_process_semantic_segmentation(outputs, SIZES)
    for b, (found, target) in enumerate(zip(labels, truth, strict=True)):
        classes = torch.cat([target["labels"], torch.tensor([255])])[target["segments"].long()]
        unsure = near_boundary_of_classes(outputs, padded, SIZES[b])[b]
        maps.append(classes.masked_fill(unsure, 255))
        dense.update(found, maps[-1])
    ours.update_from_logits(outputs, maps)
    assert counts(ours) == counts(dense)
    assert ours.confusion.sum() > 1000
    whole = SemanticMetrics(K)
    whole.update_from_logits(outputs, truth)
    assert abs(whole.confusion - ours.confusion).sum() < 0.01 * ours.confusion.sum()


@pytest.mark.parametrize("family", OUTPUTS)
def test_panoptic_equals_the_image_processor(family, generator):
    """Its own ids repeat after fused segments, and its areas are wrong; so its text, corrected, is the dense way."""
    outputs, truth = outputs_and_truth(family, generator)
    dense, ours = (PanopticMetrics(K, STUFF) for _ in range(2))
    if family == "eomt":
        options = {**PANOPTIC, "overlap_mask_area_threshold": PANOPTIC["overlap_threshold"]}
        options = {name: value for name, value in options.items() if name != "overlap_threshold"}
        results = processor(family).post_process_panoptic_segmentation(
            outputs, SIZES, **options, stuff_classes=list(STUFF), size=EOMT_SIZE
        )
        found = [
            (one["segmentation"], [{"id": s["id"], "category_id": s["label_id"]} for s in one["segments_info"]])
            for one in results
        ]
    else:
        found = [
            reference.panoptic_inference(
                outputs.class_queries_logits[b],
                outputs.masks_queries_logits[b],
                size,
                rule="huggingface",
                stuff_classes=STUFF,
                padded_size=(384, 384) if family == "mask2former" else None,
                **PANOPTIC,
            )[0]
            for b, size in enumerate(SIZES)
        ]
    for one, target in zip(found, truth, strict=True):
        dense.update(one, target["segments"], target["labels"])
    ours.update_from_logits(outputs, truth, **PANOPTIC)
    assert counts(ours) == counts(dense)
    assert counts(ours)["_counts"] != counts(PanopticMetrics(K))["_counts"]


@pytest.mark.parametrize("family", ["maskformer", "mask2former"])
def test_instances_equal_the_image_processor(family, generator):
    outputs, truth = outputs_and_truth(family, generator)
    dense, ours = InstanceMetrics(K), InstanceMetrics(K)
    results = processor(family).post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=SIZES, return_binary_maps=True
    )
    for b, (one, target) in enumerate(zip(results, truth, strict=True)):
        infos = one["segments_info"]
        found = {
            "masks": one["segmentation"].bool(),
            "labels": torch.tensor([info["label_id"] for info in infos]),
            "scores": torch.tensor([info["score"] for info in infos]),
        }
        dense.update(str(b), found, masks_of(target), target["labels"])
    ours.update_from_logits(outputs, truth, top_k=N)
    assert ours.compute() == pytest.approx(dense.compute(), abs=1e-9, nan_ok=True)
    assert ours.compute()["AR_100"] > 0


@pytest.mark.parametrize("family", ["oneformer", "eomt"])
def test_instances_by_the_rule_of_mask2former(family, generator):
    outputs, truth = outputs_and_truth(family, generator)
    steps = {} if family == "oneformer" else {"padded_size": (96, 96)}
    dense, ours = InstanceMetrics(K), InstanceMetrics(K)
    for b, (size, target) in enumerate(zip(SIZES, truth, strict=True)):
        if family == "eomt":
            steps["valid_size"] = get_size_with_aspect_ratio(size, 96, 96)
        (found,) = reference.instance_inference(
            outputs.class_queries_logits[b], outputs.masks_queries_logits[b], size, **steps
        )
        dense.update(str(b), found, masks_of(target), target["labels"])
    ours.update_from_logits(outputs, truth)
    assert ours.compute() == pytest.approx(dense.compute(), abs=1e-9, nan_ok=True)


def rf_detr_predictions(outputs, b, size, top_k):
    """As the text of transformers' image processor has them."""
    probabilities = outputs.logits[b].sigmoid()
    best = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    queries, labels = best.indices // probabilities.shape[1], best.indices % probabilities.shape[1]
    masks = interpolate(outputs.pred_masks[b, queries][:, None], size, mode="bilinear", align_corners=False)[:, 0] > 0
    return {"scores": best.values, "labels": labels, "masks": masks}


@pytest.mark.parametrize("classes", [1, K, K + 2], ids=["one class", "K columns", "more columns"])
def test_rf_detr(classes, generator):
    """Columns beyond K are no classes of the truth."""
    class_logits, mask_logits = logits(generator, classes=classes)
    outputs = RfDetrInstanceSegmentationOutput(
        logits=class_logits, pred_masks=mask_logits, pred_boxes=torch.rand(B, N, 4, generator=generator)
    )
    truth = truth_of(class_logits, mask_logits, generator)
    dense, ours, named = (InstanceMetrics(K) for _ in range(3))
    for b, (size, target) in enumerate(zip(SIZES, truth, strict=True)):
        found = rf_detr_predictions(outputs, b, size, 20)
        found = {name: value[found["labels"] < K] for name, value in found.items()}
        dense.update(str(b), found, masks_of(target), target["labels"])
    ours.update_from_logits(outputs, truth, top_k=20)
    assert ours.compute() == pytest.approx(dense.compute(), abs=1e-9, nan_ok=True)
    plain = {"pred_logits": class_logits, "pred_masks": mask_logits, "pred_boxes": outputs.pred_boxes}
    named.update_from_logits(plain, truth, top_k=20, rule="rf_detr")
    assert named.compute() == pytest.approx(ours.compute(), abs=0, nan_ok=True)
    with pytest.raises(ValueError, match="name the rule"):
        named.update_from_logits(plain, truth)
    with pytest.raises(ValueError, match="no semantic inference"):
        SemanticMetrics(K).update_from_logits(outputs, truth)


def test_windows_of_eomt(generator):
    """Semantic models of EoMT see square windows along the longer side."""
    sizes = [(40, 64), (80, 50)]
    class_logits, mask_logits = logits(generator, batch=4)
    mask_logits = mask_logits[..., :24]
    offsets = [[0, 0, 96], [0, 57, 153], [1, 0, 96], [1, 57, 153]]
    outputs = EomtForUniversalSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=mask_logits, patch_offsets=offsets
    )
    labels = EomtImageProcessor(size={"shortest_edge": 96, "longest_edge": None}).post_process_semantic_segmentation(
        outputs, sizes
    )
    ours, dense = SemanticMetrics(K), SemanticMetrics(K)
    ours.update_from_logits(outputs, labels)
    for found in labels:
        dense.update(found, found)
    assert ours.confusion.trace() >= dense.confusion.trace() - 3  # pixels of nearly equal scores
    with pytest.raises(ValueError, match="cannot merge"):
        PanopticMetrics(K).update_from_logits(outputs, truth_of(class_logits[:2], mask_logits[:2], generator, sizes))


@pytest.mark.parametrize("form", ["logits", "embeddings"])
def test_own_models_with_padding(form, generator):
    """Images of different sizes in one batch: what the network saw of each is cropped from its padded input."""
    class_logits = 3 * torch.randn(B, N, K + 1, generator=generator)
    embeddings = torch.randn(B, N, 8, generator=generator), torch.randn(B, 8, *GRID, generator=generator)
    masks = torch.einsum("bnc,bchw->bnhw", *embeddings)
    outputs = {"pred_logits": class_logits, "pred_masks": masks}
    if form == "embeddings":
        outputs = {"class_logits": class_logits[None], "mask_embed": embeddings[0][None], "pixel_embed": embeddings[1]}
    valid = [(90, 128), (96, 70), (33, 100)]
    steps = {"padded_size": (96, 128), "valid_sizes": valid}
    truth = truth_of(class_logits, masks, generator)
    semantic, panoptic, instances = SemanticMetrics(K), PanopticMetrics(K, STUFF), InstanceMetrics(K)
    semantic.update_from_logits(outputs, truth, **steps)
    panoptic.update_from_logits(outputs, truth, **steps, **PANOPTIC)
    instances.update_from_logits(outputs, truth, **steps)
    dense = SemanticMetrics(K), PanopticMetrics(K, STUFF), InstanceMetrics(K)
    for b, (size, target) in enumerate(zip(SIZES, truth, strict=True)):
        of_image = {"padded_size": (96, 128), "valid_size": valid[b]}
        arguments = class_logits[b].double(), masks[b].double(), size
        classes = torch.cat([target["labels"], torch.tensor([255])])[target["segments"].long()]
        dense[0].update(reference.semantic_inference(*arguments, **of_image)[0], classes)
        (found,) = reference.panoptic_inference(*arguments, **of_image, **PANOPTIC, stuff_classes=STUFF)
        dense[1].update(found, target["segments"], target["labels"])
        (found,) = reference.instance_inference(*arguments, **of_image)
        dense[2].update(str(b), found, masks_of(target), target["labels"])
    for ours, theirs in zip((semantic, panoptic, instances), dense, strict=True):
        assert ours.compute() == pytest.approx(theirs.compute(), abs=2e-3, nan_ok=True)


def test_every_form_of_targets(generator):
    """Segment maps, masks, padded batches, samples and transformers' names give the same numbers."""
    outputs, truth = outputs_and_truth("maskformer", generator)
    masks = [{"masks": masks_of(one), "labels": one["labels"]} for one in truth]
    foreign = [{"mask_labels": one["masks"].float(), "class_labels": one["labels"]} for one in masks]
    maps = [{"mask_labels": one["segments"], "class_labels": one["labels"]} for one in truth]
    samples = [SimpleNamespace(**one, crowd=None, areas=None, masks=None) for one in truth]
    padded = Targets.from_list(masks)
    segments = torch.full((B, *padded.size), 255, dtype=torch.uint8)
    for one, plane in zip(truth, segments, strict=True):
        plane[: one["segments"].shape[0], : one["segments"].shape[1]] = one["segments"].to(torch.uint8)
    forms = {
        "segments": (truth, None),
        "masks": (masks, None),
        "transformers' masks": (foreign, None),
        "transformers' maps": (maps, SIZES),
        "samples": (samples, None),
        "padded masks": (padded, SIZES),
        "padded segments": (Targets(padded.labels, padded.counts, segments=segments), SIZES),
    }
    results = {}
    for name, (targets, sizes) in forms.items():
        several = SemanticMetrics(K), PanopticMetrics(K, STUFF), InstanceMetrics(K)
        for metrics in several:
            metrics.update_from_logits(outputs, targets, sizes)
        results[name] = [metrics.compute() for metrics in several]
    for name, result in results.items():
        for one, other in zip(result, results["segments"], strict=True):
            assert one == pytest.approx(other, abs=0, nan_ok=True), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, generator):
    """Results are those of the same numbers in float32."""
    class_logits, mask_logits = (one.to(dtype) for one in logits(generator))
    truth = truth_of(class_logits, mask_logits, generator)
    for kind in (SemanticMetrics, PanopticMetrics, InstanceMetrics):
        half, single = kind(K), kind(K)
        half.update_from_logits({"pred_logits": class_logits, "pred_masks": mask_logits}, truth)
        single.update_from_logits({"pred_logits": class_logits.float(), "pred_masks": mask_logits.float()}, truth)
        assert half.compute() == pytest.approx(single.compute(), abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("kind", [SemanticMetrics, PanopticMetrics, InstanceMetrics])
def test_nan_logits_win_nothing(kind, generator):
    """A query with NaN mask logits might be absent; so might one with NaN class logits, unless scores are summed."""
    class_logits, mask_logits = logits(generator)
    truth = truth_of(class_logits, mask_logits, generator)
    mask_logits[:, 3] = float("nan")
    rest = [n for n in range(N) if n != 3]
    if kind is not SemanticMetrics:
        class_logits[:, 5] = float("nan")
        rest.remove(5)
    broken, without = kind(K), kind(K)
    broken.update_from_logits({"pred_logits": class_logits, "pred_masks": mask_logits}, truth)
    without.update_from_logits({"pred_logits": class_logits[:, rest], "pred_masks": mask_logits[:, rest]}, truth)
    assert broken.compute() == pytest.approx(without.compute(), abs=1e-9, nan_ok=True)


def test_bad_arguments(generator):
    outputs, truth = outputs_and_truth("maskformer", generator)
    semantic, panoptic, instances = SemanticMetrics(K), PanopticMetrics(K), InstanceMetrics(K)
    wrong = [{**truth[0], "labels": truth[0]["labels"] + K}, *truth[1:]]
    for metrics in (semantic, panoptic, instances):
        with pytest.raises(ValueError, match="targets has 2 images, outputs 3"):
            metrics.update_from_logits(outputs, truth[:2])
        with pytest.raises(ValueError, match=r"sizes\[1\] is \(89, 60\)"):
            metrics.update_from_logits(outputs, truth, [(60, 88), (89, 60), (97, 129)])
        with pytest.raises(ValueError, match="sizes has 1 entries"):
            metrics.update_from_logits(outputs, truth, SIZES[:1])
        with pytest.raises(ValueError, match="rule must be one of"):
            metrics.update_from_logits(outputs, truth, rule="segmenter")
        with pytest.raises(ValueError, match="valid_sizes has 1 entries"):
            metrics.update_from_logits(outputs, truth, padded_size=(96, 128), valid_sizes=[(9, 9)])
        with pytest.raises(TypeError, match="class logits and mask logits"):
            metrics.update_from_logits({"logits": torch.zeros(1)}, truth)
        with pytest.raises(TypeError, match=r"targets\[0\] must hold"):
            metrics.update_from_logits(outputs, [{}] * B)
        with pytest.raises(ValueError, match="holds class|outside 0"):
            metrics.update_from_logits(outputs, wrong)
    with pytest.raises(ValueError, match="names has 1 entries"):
        instances.update_from_logits(outputs, truth, names=["a"])
    with pytest.raises(ValueError, match="binary masks"):
        instances.update_from_logits(
            outputs, [{"masks": torch.full((5, *SIZES[0]), 0.5), "labels": truth[0]["labels"]}] * B
        )


LARGE = """
import resource, sys
import torch
from torch.nn.functional import interpolate
import fastmask
from fastmask.metrics import InstanceMetrics, PanopticMetrics, SemanticMetrics

generator = torch.Generator().manual_seed(0)
class_logits = 3 * torch.randn(1, 100, 134, generator=generator)
mask_logits = interpolate(5 * torch.randn(1, 100, 20, 30, generator=generator), (200, 300), mode="bicubic")
outputs = {"pred_logits": class_logits, "pred_masks": mask_logits}
coarse = torch.randint(0, 20, (1, 40, 60), generator=generator, dtype=torch.uint8)
segments = coarse.repeat_interleave(100, 1).repeat_interleave(100, 2)
labels = torch.randint(0, 133, (1, 20), generator=generator)
metrics = {"semantic": SemanticMetrics, "panoptic": PanopticMetrics, "instance": InstanceMetrics}[sys.argv[1]]

def update(segments):
    one = metrics(133)
    one.update_from_logits(outputs, fastmask.Targets(labels, torch.tensor([20]), segments=segments.contiguous()))
    return one

update(segments[:, :64, :96])  # loads and warms up everything
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
update(segments)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units")
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
@pytest.mark.slow
def test_memory_of_a_large_image(task):
    """100 queries and 133 classes at 4000 x 6000 pixels: 10 GB of masks and 13 GB of scores, in less than 400 MB."""
    result = subprocess.run([sys.executable, "-c", LARGE, task], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 400
