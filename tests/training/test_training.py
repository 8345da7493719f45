"""A model trained with fastmask's kernels learns as one trained with the reference does."""

from __future__ import annotations

import pytest
import torch

from fastmask import MaskFormer, MaskFormerConfig, PerPixelBaseline, Segmenter, Targets
from fastmask.data import CLASS_NAMES, ComposedScenes, collate_scenes

STEPS = 6


def loss_curve(backend: str, seed: int) -> torch.Tensor:
    """``(steps, losses)``: every loss of the first training steps, from one seed."""
    torch.manual_seed(seed)
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2))
    model.criterion.backend = model.criterion.matcher.backend = backend
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
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
    torch.testing.assert_close(native, reference, rtol=2e-3, atol=1e-5)


def one_batch(num_images: int = 2) -> tuple[torch.Tensor, Targets]:
    scenes = ComposedScenes("train", size=(64, 64))
    return collate_scenes([scenes[i] for i in range(num_images)])


def test_model_and_criterion_compile_to_one_graph():
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2))
    images, targets = one_batch()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        losses = run(images, targets)
        sum(losses.values()).backward()
        results.append(losses | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_losses_and_gradients_in_the_parameters_dtype(dtype):
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2))
    images, targets = one_batch()
    expected = model(images, targets)
    with torch.autocast("cpu", dtype=dtype):
        losses = model(images, targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=0.1, atol=0.05)


def test_a_pure_bfloat16_model_trains():
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2)).bfloat16()
    images, targets = one_batch()
    losses = model(images, targets)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("matching", ["bipartite", "fixed"])
def test_both_matchings_learn_one_batch(matching):
    torch.manual_seed(0)
    options = {"matching": "fixed", "num_queries": len(CLASS_NAMES)} if matching == "fixed" else {}
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2, **options))
    images, targets = one_batch(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(40):
        total = sum(model(images, targets).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
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
def test_tiny_presets_of_per_pixel_models_learn_one_batch(kind, options):
    torch.manual_seed(0)
    model = kind(kind.config_class.preset("tiny", len(CLASS_NAMES), **options))
    scenes = ComposedScenes("train", size=(64, 64))
    images, targets = collate_scenes([scenes[i] for i in range(4)])
    truth = targets.class_map()

    def accuracy():
        return (torch.stack(model.predict(images)) == truth)[truth != 255].float().mean()

    before = accuracy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        total = sum(model(images, targets).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert accuracy() > max(0.7, before)
