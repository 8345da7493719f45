"""MaskFormer as a whole, ours and transformers' with the same weights: what the end-to-end benchmarks run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.registry import Case
from benchmarks.ops.inputs import VOID, make_scene
from fastmask import MaskFormer, MaskFormerConfig, Targets

CLASSES = 150
R50 = {"preset": "maskformer-r50", "images": 16, "size": (512, 512), "targets": 20, "options": {}}
SWIN_B = R50 | {"preset": "maskformer-swin-base", "options": {"backbone_options": {"drop_path_rate": 0.0}}}
TRIAL = R50 | {"preset": "tiny", "images": 2, "size": (64, 64), "targets": 4}
CASES = (
    Case("quick", TRIAL, ("quick",)),
    Case("R50, B16, 512x512", R50, ("gpu",), ("bfloat16",)),
    Case("Swin-B, B16, 512x512", SWIN_B, ("gpu",), ("bfloat16",)),
)


@dataclass(frozen=True)
class NetworkInputs:
    """A network with random weights, in float32, and a batch.

    Args:
        model: in training mode, without dropout, so that implementations can be compared.
        images: ``(B, 3, H, W)`` float32 in 0..1.
        targets: of the B images.
        dtype: to compute in.
    """

    model: MaskFormer
    images: Tensor
    targets: Targets
    dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> NetworkInputs:
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset(sizes["preset"], CLASSES, dropout=0.0, **sizes["options"]))
    generator = torch.Generator().manual_seed(0)
    counts = [sizes["targets"]] * sizes["images"]
    segments = torch.stack([make_scene(count, sizes["size"], generator) for count in counts])
    labels = [torch.randint(CLASSES, (count,), generator=generator) for count in counts]
    targets = Targets.from_segments(segments, labels, void=VOID)
    images = torch.rand(sizes["images"], 3, *sizes["size"], generator=generator)
    return NetworkInputs(model.to(device), images.to(device), targets.to(device), dtype)


def as_transformers(model: MaskFormer, *, auxiliary_loss: bool) -> nn.Module:
    """transformers' MaskFormer with the same weights, in evaluation mode, on the same device."""
    from fastmask.integrations.checkpoints import to_hugging_face_maskformer

    other = to_hugging_face_maskformer(model).to(model.device)
    # Its auxiliary losses need the hidden states, and without the loss it would compute their logits for nothing.
    other.config.use_auxiliary_loss = other.config.output_hidden_states = auxiliary_loss
    return other


def normalized(inputs: NetworkInputs) -> Tensor:
    """The images as transformers' model takes them."""
    return (inputs.images - inputs.model.preprocessor.mean) / inputs.model.preprocessor.std


def forward_flops(inputs: NetworkInputs) -> int:
    """Matrix products and convolutions of the network, forward."""
    counter = FlopCounterMode(display=False)
    with counter:  # it needs autograd to tell modules apart
        copy.deepcopy(inputs.model).eval()(inputs.images)
    return counter.get_total_flops()


def weight_bytes(inputs: NetworkInputs) -> int:
    return sum(p.nbytes for p in inputs.model.parameters())
