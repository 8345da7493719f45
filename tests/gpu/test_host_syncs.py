"""Nothing in a training step waits for the device, shown without one: on meta tensors, which hold no values.

What reads a value (``.item()``, ``bool``, ``nonzero``, an index by a mask) fails on meta tensors, as it would stall on
a GPU. Copies between host and device, and tensors made of Python values, do not fail and are looked out for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmask import (
    HungarianMatcher,
    MaskFormer,
    MaskFormerConfig,
    PerPixelBaseline,
    PerPixelBaselineConfig,
    PointSampling,
    Segmenter,
    SegmenterConfig,
    SetCriterion,
    Targets,
)
from fastmask.ops import _registry

DEVICE = "meta"
SIDE = 64
WATCHING = ("caller", "__torch_function__", "__torch_dispatch__")
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
SMALL = {"num_queries": 7, "hidden_dim": 32, "mask_dim": 16, "pixel_decoder_dim": 32, "decoder_layers": 2}


class Finds:
    """Base of the modes below, which note where they find something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []


class FromTheHost(Finds, TorchFunctionMode):
    """Tensors made of values that Python holds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.from_numpy) and result.device.type == DEVICE:
            self.found.append(f"{function.__name__}, {caller()}")
        return result


class BetweenDevices(Finds, TorchDispatchMode):
    """Operators that read one device and write another; single numbers travel as arguments of a kernel."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.device.type == DEVICE or tensor.dim() > 0}
        if len(kinds) > 1:
            self.found.append(f"{function}, {caller()}")
        return result


def caller() -> str:
    """The innermost line of ours, by the names of modules: a clone may lie in any folder, with all of PyTorch in it."""
    frame = inspect.currentframe()
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in ("fastmask", "tests") and frame.f_code.co_name not in WATCHING:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of ours"


@pytest.fixture(autouse=True)
def _kernels_for_meta_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" takes for meta tensors the operator that it takes on a GPU."""
    monkeypatch.setattr(_registry, "auto_backend", lambda operator, _: "triton" if operator.triton else "native")


def check(run: Callable[[], object]) -> None:
    with FromTheHost() as made, BetweenDevices() as copied:
        run()
    assert made.found + copied.found == []


def segment_targets() -> Targets:
    labels = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    segments = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8, device=DEVICE)
    return Targets(labels, torch.zeros(2, dtype=torch.int64, device=DEVICE), segments=segments)


def listed_targets(*sizes: tuple[int, int], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return [
        {
            "labels": torch.zeros(count, dtype=torch.int64, device=DEVICE),
            "masks": torch.zeros(count, *size, dtype=dtype, device=DEVICE),
        }
        for count, size in enumerate(sizes, start=2)
    ]


def train(model: torch.nn.Module, inputs: Any, targets: Any) -> None:
    sum(model(inputs, targets).values()).backward()


MODELS = {
    "tiny": lambda: MaskFormer(MaskFormerConfig.preset("tiny", 5)),
    "masked attention": lambda: MaskFormer(MaskFormerConfig.preset("tiny", 5, masked_attention=True)),
    "fixed matching": lambda: MaskFormer(MaskFormerConfig.preset("tiny", 5, matching="fixed", num_queries=5)),
    "transformer encoder": lambda: MaskFormer(MaskFormerConfig.preset("tiny", 5, encoder_layers=1, dropout=0.1)),
    "swin": lambda: MaskFormer(num_classes=5, backbone="swin", backbone_options=SWIN, **SMALL),
    "deep stem": lambda: MaskFormer(
        num_classes=5, backbone="resnet-c", backbone_options={"depths": [1, 1, 1, 1]}, **SMALL
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_of_maskformer(name):
    model = MODELS[name]().to(DEVICE).train()
    images, targets = torch.rand(2, 3, SIDE, SIDE, device=DEVICE), segment_targets()
    check(lambda: train(model, images, targets))


@pytest.mark.parametrize(
    ("network", "config"),
    [(Segmenter, SegmenterConfig), (PerPixelBaseline, PerPixelBaselineConfig)],
    ids=["Segmenter", "PerPixelBaseline"],
)
def test_a_training_step_on_class_maps(network, config):
    model = network(config.preset("tiny", 5)).to(DEVICE).train()
    classes = torch.zeros(2, SIDE, SIDE, dtype=torch.int64, device=DEVICE)
    check(lambda: train(model, torch.rand(2, 3, SIDE, SIDE, device=DEVICE), classes))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_images_and_masks_of_several_sizes(dtype):
    """Targets as the original repository passes them, already on the device."""
    model = MODELS["tiny"]().to(DEVICE).train()
    images = [torch.rand(3, SIDE, SIDE, device=DEVICE), torch.rand(3, 50, 41, device=DEVICE)]
    check(lambda: train(model, images, listed_targets((SIDE, SIDE), (50, 41), dtype=dtype)))


@pytest.mark.parametrize("name", ["tiny", "swin"])
def test_images_to_label_maps(name):
    model = MODELS[name]().to(DEVICE)
    check(lambda: model.predict(torch.rand(2, 3, SIDE, SIDE, device=DEVICE)))


@pytest.mark.parametrize("points", [None, PointSampling(num_points=64)], ids=["all pixels", "points"])
@pytest.mark.parametrize("form", ["stacked", "a dict a layer"])
def test_the_criterion(form, points):
    matcher = HungarianMatcher(1.0, 20.0, 1.0, points=points)
    criterion = SetCriterion(5, matcher, {}, points=points).to(DEVICE)
    class_logits = torch.zeros(3, 2, 9, 6, device=DEVICE, requires_grad=True)
    mask_logits = torch.zeros(3, 2, 9, 16, 16, device=DEVICE, requires_grad=True)
    if form == "stacked":
        outputs = {"class_logits": class_logits, "mask_logits": mask_logits}
    else:
        layers = [{"pred_logits": c, "pred_masks": m} for c, m in zip(class_logits, mask_logits, strict=True)]
        outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    check(lambda: sum(criterion(outputs, segment_targets()).values()).backward())


def test_what_waits_is_noticed():
    value = torch.rand(3, device=DEVICE)
    for wait in (value[0].item, value.tolist, value.nonzero, lambda: value[value > 0], lambda: bool(value.any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            check(wait)
    for copy in (
        lambda: torch.tensor([1.0, 2.0], device=DEVICE),
        lambda: torch.rand(3).to(DEVICE),
        lambda: value.copy_(torch.rand(3)),
    ):
        with pytest.raises(AssertionError, match=rf"test_host_syncs\.py:{copy.__code__.co_firstlineno}\b"):
            check(copy)
    check(lambda: torch.where(value > 0, 1.0, value * 2) + torch.zeros(3, device=DEVICE))


def test_the_line_of_ours_is_named_wherever_others_lie():
    """PyTorch's own frames in between, whose files lie in folders of such names."""
    others = {"__name__": "torch._dynamo.eval_frame", "torch": torch, "device": DEVICE}
    source = "def copy():\n    return torch.rand(3).to(device)"
    exec(compile(source, "/home/me/fastmask/.venv/tests/eval_frame.py", "exec"), others)
    through = lambda: others["copy"]()  # noqa: E731
    with pytest.raises(AssertionError, match=rf"test_host_syncs\.py:{through.__code__.co_firstlineno}\b"):
        check(through)
