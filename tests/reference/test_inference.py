"""The reference inference against loops over pixels and the post-processing of transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import MaskFormerImageProcessor

from fastmask.reference import PANOPTIC_RULES, instance_inference, panoptic_inference, semantic_inference

# (h, w) of the logits and (H, W) of the result: integer factor, odd sizes, one pixel either way, same size, smaller
GRIDS = [
    ((8, 8), (32, 32)),
    ((5, 7), (23, 18)),
    ((1, 1), (4, 3)),
    ((6, 5), (1, 1)),
    ((9, 9), (9, 9)),
    ((12, 9), (5, 7)),
]


@pytest.fixture(scope="module")
def processor():
    return MaskFormerImageProcessor()


def make_logits(seed, grid, *, batch=2, queries=12, classes=4, dtype=torch.float32):
    """Class scores that often pass 0.5, smooth masks of which many overlap."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(batch, queries, classes + 1, generator=generator, dtype=dtype) * 3
    coarse = torch.randn(batch, queries, 3, 3, generator=generator, dtype=dtype) * 6
    return class_logits, interpolate(coarse, size=grid, mode="bicubic")


def as_outputs(class_logits, mask_logits):
    return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)


def bilinear(maps, size):
    return interpolate(maps, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_semantic_scores_equal_a_loop_over_pixels(grid, size):
    class_logits, mask_logits = make_logits(0, grid, dtype=torch.float64)
    scores = semantic_inference(class_logits, mask_logits, size, output="scores")
    labels = semantic_inference(class_logits, mask_logits, size)
    assert scores.shape == (2, 4, *size)
    assert labels.dtype == torch.uint8
    p = np.exp(class_logits.numpy())
    p = p[..., :-1] / p.sum(-1, keepdims=True)
    masks = 1 / (1 + np.exp(-bilinear(mask_logits, size).numpy()))
    for b, row, column in np.ndindex(2, *size):
        expected = sum(p[b, n] * masks[b, n, row, column] for n in range(12))
        np.testing.assert_allclose(scores[b, :, row, column], expected, rtol=1e-12)
        assert labels[b, row, column] == expected.argmax()


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize("seed", range(2))
def test_semantic_scores_order_equals_transformers(processor, seed, grid, size):
    class_logits, mask_logits = make_logits(seed, grid)
    theirs = processor.post_process_semantic_segmentation(as_outputs(class_logits, mask_logits), [size] * 2)
    labels = semantic_inference(class_logits, mask_logits, size, order="scores")
    assert labels.long().equal(torch.stack(theirs))


def test_semantic_through_the_padded_input():
    """The two ways of the original code, step by step for each image."""
    class_logits, mask_logits = make_logits(1, (8, 10), dtype=torch.float64)
    padded, valid, size = (32, 40), (27, 31), (50, 45)
    way = {"padded_size": padded, "valid_size": valid, "output": "scores"}
    masks = bilinear(mask_logits, padded)
    probabilities = class_logits.softmax(-1)[..., :-1]

    before = bilinear(masks[..., :27, :31], size).sigmoid()
    expected = (probabilities[..., None, None] * before[:, :, None]).sum(1)
    torch.testing.assert_close(semantic_inference(class_logits, mask_logits, size, **way), expected)

    after = (probabilities[..., None, None] * masks.sigmoid()[:, :, None]).sum(1)
    expected = bilinear(after[..., :27, :31], size)
    torch.testing.assert_close(semantic_inference(class_logits, mask_logits, size, order="scores", **way), expected)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)]
)
def test_semantic_labels_take_the_smallest_dtype(classes, dtype):
    class_logits = torch.zeros(1, 1, classes + 1)
    class_logits[..., classes - 1] = 9
    labels = semantic_inference(class_logits, torch.zeros(1, 1, 1, 1), (2, 1))
    assert labels.dtype == dtype
    assert (labels == classes - 1).all()


def relabel(infos):
    return [{"id": i["id"], "category_id": i["label_id"], "isthing": not i["was_fused"]} for i in infos]


def without(infos, *keys):
    return [{key: value for key, value in info.items() if key not in keys} for info in infos]


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize("stuff_classes", [(), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_panoptic_exact_equals_transformers_bit_for_bit(processor, seed, stuff_classes, grid, size):
    class_logits, mask_logits = make_logits(seed, grid, batch=3)
    class_logits[2, :, -1] = 30  # an image without any object
    limits = {"threshold": 0.5, "mask_threshold": 0.3}
    theirs = processor.post_process_panoptic_segmentation(
        as_outputs(class_logits, mask_logits.clone()),
        overlap_mask_area_threshold=0.4,
        label_ids_to_fuse=set(stuff_classes),
        target_sizes=[size] * 3,
        **limits,
    )
    ours = panoptic_inference(
        class_logits,
        mask_logits,
        size,
        rule="huggingface-exact",
        overlap_threshold=0.4,
        stuff_classes=stuff_classes,
        **limits,
    )
    for (segmentation, infos), their in zip(ours, theirs, strict=True):
        assert segmentation.dtype == torch.int32
        assert segmentation.equal(their["segmentation"].int())
        assert without(infos, "score", "area") == relabel(their["segments_info"])
        assert [round(info["score"], 6) for info in infos] == [info["score"] for info in their["segments_info"]]


def expected_panoptic(rule, class_logits, mask_logits, size, limits, stuff_classes):
    """One image, pixel by pixel, by the text of the original code and of what "huggingface" mends."""
    threshold, overlap_threshold, mask_threshold = limits
    hugging_face = rule == "huggingface"
    if hugging_face:
        masks = bilinear(mask_logits[None].sigmoid(), size)[0].numpy()
    else:
        masks = bilinear(mask_logits[None], size)[0].sigmoid().numpy()
    p = class_logits.softmax(-1).numpy()
    queries = [n for n in range(len(p)) if p[n].argmax() != p.shape[1] - 1 and p[n].max() > threshold]
    segmentation = np.zeros(size, dtype=np.int32)
    if not queries:
        return segmentation, []
    winner = np.array(queries)[np.argmax([p[n].max() * masks[n] for n in queries], axis=0)]
    segments, next_id = {}, 1
    for n in queries:
        won, own = winner == n, masks[n] >= mask_threshold
        if won.sum() == 0 or own.sum() == 0:
            continue
        if rule == "mask2former" and (won & own).sum() == 0:
            continue
        share = won.sum() / own.sum()
        if (share <= overlap_threshold) if hugging_face else (share < overlap_threshold):
            continue
        k = int(p[n].argmax())
        same = [i for i, info in segments.items() if info["category_id"] == k and k in stuff_classes]
        segment = same[0] if same else next_id
        if not same:
            segments[segment] = {"id": segment, "category_id": k, "isthing": k not in stuff_classes}
            segments[segment]["score"] = p[n].max()
            next_id += 1
        segmentation[won & own if rule == "mask2former" else won] = segment
    for i, info in segments.items():
        info["area"] = int((segmentation == i).sum())
    return segmentation, list(segments.values())


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize("rule", ["maskformer", "mask2former", "huggingface"])
@pytest.mark.parametrize("seed", range(3))
def test_panoptic_rules_equal_the_plain_text(seed, rule, grid, size):
    class_logits, mask_logits = make_logits(seed, grid, batch=3, dtype=torch.float64)
    class_logits[2, :, -1] = 30
    threshold, overlap_threshold, mask_threshold = limits = (0.4, 0.37, 0.45)
    stuff_classes = {1, 3}
    results = panoptic_inference(
        class_logits,
        mask_logits,
        size,
        rule=rule,
        threshold=threshold,
        overlap_threshold=overlap_threshold,
        mask_threshold=mask_threshold,
        stuff_classes=stuff_classes,
    )
    for b, (segmentation, infos) in enumerate(results):
        expected, segments = expected_panoptic(rule, class_logits[b], mask_logits[b], size, limits, stuff_classes)
        np.testing.assert_array_equal(segmentation, expected)
        assert without(infos, "score") == without(segments, "score")
        assert [i["score"] for i in infos] == pytest.approx([i["score"] for i in segments])
        ids = [info["id"] for info in infos]
        assert ids == list(range(1, len(ids) + 1))


def test_panoptic_corrects_both_faults_of_transformers(processor):
    """Columns: stuff 0, thing 1, stuff 0 again, thing 2; every class score is 0.62, every mask near 0 or 1."""
    class_logits = torch.zeros(1, 4, 4)
    class_logits[0, [0, 1, 2, 3], [0, 1, 0, 2]] = 1.6
    mask_logits = torch.full((1, 4, 1, 4), -9.0)
    mask_logits[0, range(4), 0, range(4)] = 9.0

    def panoptic(rule, mask_threshold):
        (segmentation, infos), *_ = panoptic_inference(
            class_logits,
            mask_logits,
            (1, 4),
            rule=rule,
            threshold=0.5,
            mask_threshold=mask_threshold,
            stuff_classes=(0,),
        )
        return segmentation.tolist(), [(info["id"], info["category_id"], info["area"]) for info in infos]

    def theirs(mask_threshold):
        (result,) = processor.post_process_panoptic_segmentation(
            as_outputs(class_logits, mask_logits), 0.5, mask_threshold, label_ids_to_fuse={0}, target_sizes=[(1, 4)]
        )
        return result["segmentation"].tolist()

    corrected = [[1, 2, 1, 3]], [(1, 0, 2), (2, 1, 1), (3, 2, 1)]
    assert panoptic("huggingface", 0.5) == corrected
    assert panoptic("huggingface-exact", 0.5) == ([[1, 2, 1, 2]], [(1, 0, 2), (2, 1, 2), (1, 0, 2), (2, 2, 2)])
    assert theirs(0.5) == [[1, 2, 1, 2]]
    assert panoptic("huggingface", 0.7) == corrected
    assert panoptic("huggingface-exact", 0.7) == ([[0, 0, 0, 0]], [])
    assert theirs(0.7) == [[0, 0, 0, 0]]


@pytest.mark.parametrize("rule", sorted(PANOPTIC_RULES))
def test_panoptic_takes_one_image_and_the_padded_input(rule):
    class_logits, mask_logits = make_logits(3, (8, 10), batch=1)
    batched = panoptic_inference(class_logits, mask_logits, (20, 20), rule=rule, threshold=0.4)
    single = panoptic_inference(class_logits[0], mask_logits[0], (20, 20), rule=rule, threshold=0.4)
    assert len(single) == 1
    assert single[0][0].equal(batched[0][0])
    assert single[0][1] == batched[0][1]

    way = {"padded_size": (32, 40), "valid_size": (27, 31)}
    through = panoptic_inference(class_logits, mask_logits, (20, 20), rule=rule, threshold=0.4, **way)
    cropped = bilinear(mask_logits, (32, 40))[..., :27, :31]
    direct = panoptic_inference(class_logits, cropped, (20, 20), rule=rule, threshold=0.4)
    assert through[0][0].equal(direct[0][0])


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_instances_equal_the_plain_text(grid, size):
    class_logits, mask_logits = make_logits(4, grid, dtype=torch.float64)
    results = instance_inference(class_logits, mask_logits, size, top_k=17)
    for b, result in enumerate(results):
        p = class_logits[b].softmax(-1)[:, :-1].numpy()
        x = bilinear(mask_logits[b : b + 1], size)[0].numpy()
        pairs = sorted(np.ndindex(p.shape), key=lambda pair: -p[pair])[:17]
        assert result["labels"].tolist() == [k for _, k in pairs]
        assert result["masks"].dtype == torch.bool
        np.testing.assert_array_equal(result["masks"], x[[n for n, _ in pairs]] > 0)
        expected = [p[n, k] * (1 / (1 + np.exp(-x[n][x[n] > 0]))).sum() / ((x[n] > 0).sum() + 1e-6) for n, k in pairs]
        np.testing.assert_allclose(result["scores"], expected, rtol=1e-12)


@pytest.mark.parametrize(("grid", "size"), GRIDS)
@pytest.mark.parametrize("seed", range(2))
def test_instances_equal_transformers(processor, seed, grid, size):
    class_logits, mask_logits = make_logits(seed, grid)
    theirs = processor.post_process_instance_segmentation(
        as_outputs(class_logits, mask_logits), threshold=0.0, target_sizes=[size] * 2, return_binary_maps=True
    )
    ours = instance_inference(class_logits, mask_logits, size, top_k=12, rule="huggingface")
    for result, their in zip(ours, theirs, strict=True):
        kept = result["masks"].any(2).any(1)
        order = result["scores"][kept].argsort(descending=True)
        infos = their["segments_info"]
        their_order = sorted(range(len(infos)), key=lambda i: -infos[i]["score"])
        assert len(infos) == len(order)
        scores = [infos[i]["score"] for i in their_order]
        assert result["scores"][kept][order].tolist() == pytest.approx(scores, abs=1e-6)
        assert result["labels"][kept][order].tolist() == [infos[i]["label_id"] for i in their_order]
        if infos:
            assert result["masks"][kept][order].equal(their["segmentation"][their_order].bool())


def test_instances_without_stuff_and_with_few_pairs():
    class_logits, mask_logits = make_logits(5, (6, 6), queries=3)
    everything = instance_inference(class_logits, mask_logits, (12, 12))
    assert all(len(result["scores"]) == 12 for result in everything)
    things = instance_inference(class_logits, mask_logits, (12, 12), stuff_classes={0, 2})
    for result, thing in zip(everything, things, strict=True):
        keep = result["labels"] % 2 == 1
        for key in ("scores", "labels", "masks"):
            assert thing[key].equal(result[key][keep])


def test_wrong_arguments_are_named():
    class_logits, mask_logits = make_logits(6, (4, 4))
    with pytest.raises(ValueError, match="order must be one of 'masks', 'scores', got 'both'"):
        semantic_inference(class_logits, mask_logits, (8, 8), order="both")
    with pytest.raises(ValueError, match="output"):
        semantic_inference(class_logits, mask_logits, (8, 8), output="logits")
    with pytest.raises(ValueError, match=r"valid_size=\(9, 4\) does not lie within the \(8, 8\) map"):
        semantic_inference(class_logits, mask_logits, (8, 8), padded_size=(8, 8), valid_size=(9, 4))
    with pytest.raises(ValueError, match="rule must be one of 'maskformer'"):
        panoptic_inference(class_logits, mask_logits, (8, 8), rule="detr")
    with pytest.raises(ValueError, match=r"class_logits has shape \(1, 12, 5\) and mask_logits \(2, 12, 4, 4\)"):
        panoptic_inference(class_logits[:1], mask_logits, (8, 8))
    with pytest.raises(ValueError, match="top_k"):
        instance_inference(class_logits, mask_logits, (8, 8), top_k=0)
    with pytest.raises(ValueError, match="rule"):
        instance_inference(class_logits, mask_logits, (8, 8), rule="maskformer")
