"""Images in 0..255 are warned of once."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastmask.models import _images, make_model
from fastmask.models._images import PixelRange
from fastmask.targets import Targets
from tests.helpers.host_syncs import host_syncs

MODELS = ["tiny", "segmenter-tiny", "eomt-tiny", "per-pixel-tiny"]


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch):
    monkeypatch.setattr(_images, "PIXEL_RANGE", PixelRange())


def images(highest):
    return torch.rand(2, 3, 64, 64) * highest


def calls(model):
    """Every way to hand images to a model."""
    targets = Targets.from_segmentation(torch.zeros(2, 64, 64, dtype=torch.uint8), 3)
    return {
        "train": lambda x: model(x, targets),
        "call": lambda x: model.eval()(x),
        "list": lambda x: model.eval()(list(x)),
        "predict": lambda x: model.predict(x),
        "windows": lambda x: model.predict(x, window=(32, 32)),
        "final_logits": lambda x: model.eval().final_logits(x),
    }


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *((name, call) for name in MODELS for call in ("train", "call", "list", "predict", "final_logits")),
        *((name, "windows") for name in MODELS[:3]),
    ],
)
def test_images_in_bytes_are_warned_of_once(name, call):
    run = calls(make_model(name, 3))[call]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(images(1))
    with pytest.warns(UserWarning, match=r"images hold 25\d.*; expected values in 0\.\.1: divide bytes by 255"):
        run(images(255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(images(255))
        make_model(name, 3).eval()(images(255))


@pytest.mark.parametrize("name", MODELS)
def test_other_images_are_not_warned_of(name):
    model = make_model(name, 3).eval()
    bytes_by_choice = make_model(name, 3, pixel_mean=(123.7, 116.3, 103.5), pixel_std=(58.4, 57.1, 57.4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(1))
        model(images(1) * 1.3 - 0.2)  # sharpened by a resize
        model((images(1) - model.preprocessor.mean) / model.preprocessor.std)
        model(images(float("nan")))
        bytes_by_choice(images(255))


def test_a_compiled_model_has_no_question_of_values():
    model = make_model("segmenter-tiny", 3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(model, backend="eager", fullgraph=True)(images(255))


@pytest.mark.cuda
def test_a_gpu_is_not_waited_for():
    model = make_model("tiny", 3).eval().cuda()
    bright = images(255).cuda()
    model(images(1).cuda() * 0)  # what a first call sets up may wait
    _images.PIXEL_RANGE = PixelRange()
    with host_syncs():
        model(bright)
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="images hold 25"):
        model(bright)
