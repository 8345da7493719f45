"""A model trained with fastmask's kernels learns as one trained with the reference does."""

from __future__ import annotations

import pytest
import torch

from fastmask import MaskFormer, MaskFormerConfig, PerPixelBaseline, Segmenter, Targets
from fastmask.data import CLASS_NAMES, ComposedScenes, collate_scenes
from tests.helpers.tiny_models import learn

STEPS = 6


def loss_curve(backend: str, seed: int) -> torch.Tensor:
    """``(steps, losses)``: every loss of the first training steps, from one seed."""
    torch.manual_seed(seed)
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2))
    model.criterion.backend = model.criterion.matcher.backend = backend
    # AdamW would take whole steps along gradients that are nothing but rounding.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scenes = ComposedScenes("train", size=(64, 64), seed=seed)
    curve = []
    for step in range(STEPS):
        losses = model(*collate_scenes([scenes[3 * step + i] for i in range(3)]))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        curve.append(torch.stack([loss.detach() for loss in losses.values()]))
    return torch.stack(curve)


@pytest.mark.parametrize("seed", [0, 1])
def test_first_steps_follow_the_curve_of_the_reference(seed):
    native, reference = loss_curve("native", seed), loss_curve("reference", seed)
    # The first step differs by the rounding of one criterion; from then on the weights differ by rounding too, which
    # each step magnifies.
    torch.testing.assert_close(native[0], reference[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-6)
    assert native[-1].sum() < native[0].sum()


@pytest.fixture
def batch() -> tuple[torch.Tensor, Targets]:
    torch.manual_seed(0)
    scenes = ComposedScenes("train", size=(64, 64))
    return collate_scenes([scenes[i] for i in range(4)])


@pytest.mark.parametrize("options", [{}, {"matching": "fixed", "num_queries": len(CLASS_NAMES)}])
@pytest.mark.slow
def test_both_matchings_learn_one_batch(batch, options):
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2, **options))
    totals = learn(model, *batch, 40)
    assert sum(totals[-5:]) < 0.7 * sum(totals[:5])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Segmenter, {"decoder": "mask"}),
        (Segmenter, {"decoder": "linear"}),
        (PerPixelBaseline, {"transformer_decoder": False}),
        (PerPixelBaseline, {"transformer_decoder": True, "decoder_layers": 2}),
    ],
)
@pytest.mark.slow
def test_tiny_presets_of_per_pixel_models_learn_one_batch(batch, kind, options):
    model = kind(kind.config_class.preset("tiny", len(CLASS_NAMES), **options))
    images, targets = batch
    truth = targets.class_map()

    def accuracy():
        return (torch.stack(model.predict(images)) == truth)[truth != 255].float().mean()

    before = accuracy()
    totals = learn(model, images, targets, 40, 2e-3)
    assert sum(totals[-5:]) < 0.5 * sum(totals[:5])
    assert accuracy() > max(0.7, before)
