"""What the tests of exports share: networks that decide, and how results are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastmask import models
from fastmask.export import export_program
from fastmask.models import EoMT, Mask2Former, MaskFormer, PerPixelBaseline, Segmenter, SoundEventDetector
from tests.helpers.tiny_models import Convolutions

SIZE = (45, 70)  # no multiples of what any network pads to
CLASSES = 5
TINY = {"decoder_layers": 1, "hidden_dim": 32, "feedforward_dim": 64, "pixel_decoder_dim": 32, "mask_dim": 16}
TINY_SWIN = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 3}
TINY_RESNET50 = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
SEGMENTER = {"hidden_dim": 32, "feedforward_dim": 64, "encoder_layers": 1, "class_names": list("abcde")}
# Each takes seconds; of two that differ in this alone, an edit waits for one.
portable_or_not = pytest.mark.parametrize("portable", [pytest.param(True, marks=pytest.mark.slow), False])
SOUND = {"channels": (8, 8, 16, 16), "decoder_layers": 1}
# Scores and logits of float32 differ by this much, in terms of their largest: the sums have hundreds of terms.
ROUNDING = 2e-5


def backbone_of(options: dict[str, object]) -> dict[str, nn.Module]:
    """Few operators, as tracing takes its time for each, unless the options name another backbone."""
    return {} if "backbone" in options else {"backbone": Convolutions()}


def maskformer(**options: object) -> MaskFormer:
    """A MaskFormer whose queries differ in class and mask, so that results have several classes."""
    config = models.MaskFormerConfig.preset("tiny", CLASSES, **{"num_queries": 7, **TINY, **options})
    model = MaskFormer(config, **backbone_of(options))
    nn.init.normal_(model.predictor.class_embed.weight)
    nn.init.normal_(model.predictor.query_embed.weight)
    nn.init.normal_(model.pixel_decoder.mask_features.weight, std=0.1)
    return model


def mask2former(**options: object) -> Mask2Former:
    """A Mask2Former whose queries differ in class and mask."""
    sizes = {"num_queries": 7, **TINY, "decoder_layers": 2, "encoder_layers": 1, "encoder_feedforward_dim": 32}
    config = models.Mask2FormerConfig.preset("tiny", CLASSES, **{**sizes, **options})
    model = Mask2Former(config, **backbone_of(options))
    nn.init.normal_(model.predictor.class_embed.weight)
    nn.init.normal_(model.pixel_decoder.mask_features.weight, std=0.1)
    for layer in model.pixel_decoder.encoder:
        nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.1)
    return model


def per_pixel(**options: object) -> PerPixelBaseline:
    config = models.PerPixelBaselineConfig.preset("tiny", CLASSES, **{**TINY, **options})
    model = PerPixelBaseline(config, **backbone_of(options))
    nn.init.normal_(model.pixel_decoder.mask_features.weight, std=0.1)
    return model


def eomt(**options: object) -> EoMT:
    """An EoMT whose queries differ in class, with all weights at random."""
    config = models.EoMTConfig.preset("tiny", CLASSES, **{"num_queries": 7, "encoder_layers": 2, **options})
    model = EoMT(config)
    nn.init.normal_(model.class_embed.weight)
    return model


def segmenter(**options: object) -> Segmenter:
    return Segmenter(models.SegmenterConfig.preset("tiny", CLASSES, **{**SEGMENTER, **options}))


def sound_detector(**options: object) -> SoundEventDetector:
    return SoundEventDetector(models.SoundEventConfig.preset("tiny", CLASSES, **{**SOUND, **options}))


@functools.cache
def exported(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, ExportedProgram]:
    """A network and its program, for two images of one size unless the options say otherwise."""
    torch.manual_seed(0)
    model = make()
    return model, export_program(model, **{"size": SIZE, "batch_size": 2, **options})


def session(path: Path) -> Any:
    """An ONNX file, opened by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def own_operators(program: ExportedProgram) -> set[str]:
    """fastmask's operators in a program."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name for name in targets if name.startswith("fastmask")}


def whole_images(model: nn.Module) -> dict[str, int]:
    """The option with which ``predict`` takes images whole, as programs for images of any size do."""
    return {"window": 0} if isinstance(model, Segmenter) else {}


def predicted_scores(model: nn.Module, images: Tensor, size: tuple[int, int] | None = None, **windows: Any) -> Tensor:
    """``(B, K, H, W)``."""
    return torch.stack(model.predict(images, sizes=size, output="scores", **windows))


def assert_same_scores(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


def assert_same_labels(
    labels: Tensor, model: nn.Module, images: Tensor, size: tuple[int, int] | None = None, **windows: Any
) -> None:
    """Labels are those of ``model.predict`` wherever the two best classes differ by more than rounding."""
    expected = torch.stack(model.predict(images, sizes=size, **windows))
    assert labels.shape == expected.shape and labels.dtype == expected.dtype
    best = predicted_scores(model, images, size, **windows).topk(2, dim=1).values
    decided = best[:, 0] - best[:, 1] > 2 * ROUNDING * float(best.max())
    assert float(decided.float().mean()) > 0.9
    assert torch.equal(labels[decided], expected[decided])
