"""Validation from logits under Lightning and transformers' Trainer: the numbers of a loop over the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from fastmask import MaskFormer, MaskFormerConfig, patch
from fastmask.data import collate, open_dataset
from fastmask.integrations.transformers import TrainerMetrics, collate_segmentation, segmentation_targets
from fastmask.metrics import MetricsFromLogits, PanopticMetrics, SemanticMetrics

INFO = open_dataset("composed:scenes", "val").info
K = INFO.num_classes
THRESHOLDS = {"threshold": 0.05, "overlap_threshold": 0.1}
OPTIONS = {"panoptic": THRESHOLDS}


def metrics():
    return {"semantic": SemanticMetrics(K), "panoptic": PanopticMetrics(K, INFO.stuff_classes)}


def images(count=5):
    return Subset(open_dataset("composed:scenes", "val"), range(count))


def make_model():
    torch.manual_seed(0)
    return MaskFormer(MaskFormerConfig.preset("tiny", K)).eval()


@torch.no_grad()
def expected_scores(model):
    """By ``update`` and the network's own inference, image by image."""
    semantic, panoptic = metrics().values()
    for sample in images():
        image = sample.image.float()[None] / 255
        semantic.update(model.predict(image)[0], sample.class_map())
        (found,) = model.predict(image, "panoptic", stuff_classes=INFO.stuff_classes, **THRESHOLDS)
        panoptic.update(found, sample.segments, sample.labels)
    return semantic.compute() | panoptic.compute()


def test_lightning():
    lightning = pytest.importorskip("lightning")
    from fastmask.integrations.lightning import LogitMetricsCallback

    class Segmentation(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def validation_step(self, batch, index):
            return self.model(batch[0])

    model = make_model()
    given = metrics()
    callback = LogitMetricsCallback(given, OPTIONS, prefix="val/")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", callbacks=[callback], enable_checkpointing=False, **options)
    loader = DataLoader(images(), 2, collate_fn=collate)
    expected = {f"val/{name}": value for name, value in expected_scores(model).items()}
    for _ in range(2):  # each run starts anew
        (scores,) = trainer.validate(Segmentation(model), loader, verbose=False)
        assert scores == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert given["semantic"].confusion.sum() == 0


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, mask_labels, class_labels):
        outputs = self.model(images)
        return {"loss": outputs["pred_logits"].sum(), "aux_outputs": outputs["aux_outputs"], **outputs}


def named(samples):
    pictures, targets = collate(samples)
    labels = [one[:count] for one, count in zip(targets.labels, targets.counts, strict=True)]
    return {"images": pictures, "mask_labels": targets.segments, "class_labels": labels}


def evaluated_twice(model, by_trainer, examples, collator, folder, **arguments):
    """The scores of two evaluations of the Trainer, of which each starts anew."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    common = {"per_device_eval_batch_size": 2, "remove_unused_columns": False, "report_to": []}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=folder, use_cpu=True, disable_tqdm=True, **common, **arguments),
        data_collator=collator,
        compute_metrics=by_trainer.compute_metrics,
        preprocess_logits_for_metrics=by_trainer.preprocess_logits_for_metrics,
    )
    return [trainer.evaluate(examples) for _ in range(2)]


@pytest.mark.parametrize("batch_eval_metrics", [True, False])
def test_trainer(batch_eval_metrics, tmp_path):
    model = WithLoss(make_model())
    by_trainer = TrainerMetrics(model, metrics(), OPTIONS)
    arguments = {"batch_eval_metrics": batch_eval_metrics, "eval_do_concat_batches": False}
    expected = {f"eval_{name}": value for name, value in expected_scores(model.model).items()}
    for scores in evaluated_twice(model, by_trainer, images(), named, tmp_path, **arguments):
        assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-6, nan_ok=True)
    with pytest.raises(RuntimeError, match="has not run in evaluation mode"):
        by_trainer.preprocess_logits_for_metrics((), ())


def test_trainer_evaluates_a_model_of_transformers(tmp_path):
    """The hook knows the model's outputs by their class: Mask2Former's logits pass through 384 x 384."""
    transformers = pytest.importorskip("transformers")
    from tests.helpers.foreign_models import NUM_CLASSES, tiny_mask2former

    model = patch(tiny_mask2former().eval())  # which takes maps as labels
    metrics = {"semantic": SemanticMetrics(NUM_CLASSES), "panoptic": PanopticMetrics(NUM_CLASSES)}
    examples = [
        {
            "pixel_values": sample.image.float()[:, :64, :64] / 255,
            **segmentation_targets(sample.class_map()[:64, :64] % NUM_CLASSES),
        }
        for sample in images(3)
    ]
    arguments = {"batch_eval_metrics": True, "label_names": ["mask_labels", "class_labels"]}
    by_trainer = TrainerMetrics(model, metrics)
    scores, _ = evaluated_twice(model, by_trainer, examples, collate_segmentation, tmp_path, **arguments)
    processor = transformers.Mask2FormerImageProcessor()
    dense = SemanticMetrics(NUM_CLASSES)
    for example in examples:
        with torch.no_grad():
            outputs = model(example["pixel_values"][None])
        (found,) = processor.post_process_semantic_segmentation(outputs, [(64, 64)])
        dense.update(found, example["class_labels"][example["mask_labels"].long()])
    for name, value in dense.compute().items():
        assert scores[f"eval_{name}"] == pytest.approx(value, abs=2e-3, nan_ok=True)


def test_options_of_metrics_that_are_not_there():
    with pytest.raises(ValueError, match="options names panoptic; metrics has semantic"):
        MetricsFromLogits({"semantic": SemanticMetrics(K)}, OPTIONS)
