"""A training step of transformers' MaskFormer and Mask2Former, forward and backward, plain and patched.

The optimizer's step is left out, as it is the same for both. Weights and images are float32; in bfloat16, autocast
chooses what is computed in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.machine import Work
from benchmarks.harness.providers import require_backend
from benchmarks.harness.registry import Case, Operation, Provider, Unavailable
from benchmarks.ops.inputs import VOID, make_scene
from fastmask import Targets, patch, unpatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CLASSES = 150
STAGES = ["stage1", "stage2", "stage3", "stage4"]
# The published checkpoints for ADE20K, and models small enough to try the benchmark itself.
SWIN_B = {
    "family": "MaskFormer",
    "backbone": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "decoder": {},
    "size": (512, 512),
    "targets": (20, 17),  # of each image
}
TRIAL = {
    "family": "MaskFormer",
    "backbone": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
    "decoder": {"d_model": 64, "num_queries": 20, "decoder_layers": 2, "decoder_ffn_dim": 64},
    "size": (128, 128),
    "targets": (5, 4),
}
# Mask2Former has the same targets, and 9 layers of auxiliary losses at 12,544 points.
MASK2FORMER = SWIN_B | {"family": "Mask2Former"}
MASK2FORMER_T = MASK2FORMER | {
    "backbone": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
}
MASK2FORMER_TRIAL = TRIAL | {
    "family": "Mask2Former",
    "decoder": {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 3,
                "encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 4, "num_queries": 20,
                "train_num_points": 200},
}  # fmt: skip
CASES = (
    Case("quick", TRIAL, ("quick",)),
    Case("quick, Mask2Former", MASK2FORMER_TRIAL, ("quick",)),
    Case("MaskFormer Swin-B, B2, 512x512, 6 auxiliary layers", SWIN_B, ("cpu", "gpu")),
    Case("Mask2Former Swin-T, B2, 512x512", MASK2FORMER_T, ("cpu",), ("float32", "bfloat16")),
    Case("Mask2Former Swin-B, B2, 512x512", MASK2FORMER, ("gpu",)),
)
# What can be patched alone in Mask2Former, which tells how the time that patching saves divides.
PARTS = {
    "deformable attention": "model.pixel_level_module.decoder",
    "masked attention": "model.transformer_module",
    "losses": "criterion",
}
# Of loss and gradients in float32. Mask2Former chooses keys and points by thresholds, which rounding crosses.
TOLERANCES = {"MaskFormer": (1e-5, 1e-3), "Mask2Former": (1e-3, 5e-2)}
# Parameters whose gradients are compared: both heads, and the first layer of the backbone.
WATCHED = ("class_predictor.weight", "mask_embedder.0.0.weight", "patch_embeddings.projection.weight")


@dataclass(frozen=True)
class StepInputs:
    """A model with random weights, the keyword arguments of its training step, and the dtype to compute in."""

    family: str
    model: nn.Module
    batch: Mapping[str, Any]
    dtype: torch.dtype


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> StepInputs:
    model = MODELS[sizes["family"]](sizes["backbone"], sizes["decoder"])
    generator = torch.Generator().manual_seed(0)
    segments = torch.stack([make_scene(count, sizes["size"], generator) for count in sizes["targets"]])
    labels = [torch.randint(CLASSES, (count,), generator=generator) for count in sizes["targets"]]
    targets = Targets.from_segments(segments, labels, void=VOID).to(device).to_list()
    batch = {
        "pixel_values": torch.randn(len(labels), 3, *sizes["size"], generator=generator).to(device),
        "mask_labels": [target["masks"].float() for target in targets],
        "class_labels": [target["labels"] for target in targets],
    }
    return StepInputs(sizes["family"], model.to(device), batch, dtype)


def swin(options: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import SwinConfig

    return SwinConfig(image_size=384, drop_path_rate=0.3, out_features=STAGES, **options)


def make_maskformer(backbone: Mapping[str, Any], decoder: Mapping[str, Any]) -> nn.Module:
    """MaskFormer with auxiliary losses, which fail in transformers unless hidden states are asked for."""
    from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation

    torch.manual_seed(0)
    config = MaskFormerConfig(
        num_labels=CLASSES,
        use_auxiliary_loss=True,
        output_hidden_states=True,
        backbone_config=swin(backbone),
        decoder_config={"model_type": "detr", **decoder},
    )
    return MaskFormerForInstanceSegmentation(config).train()


def make_mask2former(backbone: Mapping[str, Any], decoder: Mapping[str, Any]) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    torch.manual_seed(0)
    config = Mask2FormerConfig(num_labels=CLASSES, backbone_config=swin(backbone), **decoder)
    return Mask2FormerForUniversalSegmentation(config).train()


MODELS = {"MaskFormer": make_maskformer, "Mask2Former": make_mask2former}


def train_step(inputs: StepInputs) -> dict[str, Tensor]:
    """The loss and the watched gradients. Seeded, so that dropout is the same in every step."""
    torch.manual_seed(0)
    inputs.model.zero_grad()
    with torch.autocast(inputs.model.device.type, inputs.dtype, enabled=inputs.dtype != torch.float32):
        loss = inputs.model(**inputs.batch).loss
    loss.backward()
    watched = {name: p.grad for name, p in inputs.model.named_parameters() if name.endswith(WATCHED)}
    return {"loss": loss.detach(), **watched}


class SameStep:
    """The patched step is right when it gives the plain one's loss to a tolerance and its gradients to rounding, which
    all the layers beneath have magnified. In a narrower type, its error from the plain step in float32 may be twice the
    plain step's own."""

    def __init__(self, inputs: StepInputs) -> None:
        in_float32 = train_step(replace(inputs, dtype=torch.float32))
        self.expected = {name: value.clone() for name, value in in_float32.items()}
        loss, gradients = TOLERANCES[inputs.family]
        self.tolerances = dict.fromkeys(self.expected, gradients) | {"loss": loss}
        if inputs.dtype != torch.float32:
            plain = train_step(inputs)
            self.tolerances = {name: 2 * self.error(name, value) for name, value in plain.items()}

    def error(self, name: str, value: Tensor) -> float:
        """The largest, in units of the largest element expected."""
        expected = self.expected[name]
        return float((value - expected).abs().max() / expected.abs().max())

    def disagreement(self, result: Mapping[str, Tensor], error_factor: float) -> str | None:
        if set(result) != set(self.expected):
            return f"gives {', '.join(sorted(result))}; expected {', '.join(sorted(self.expected))}"
        for name, tolerance in self.tolerances.items():
            error = self.error(name, result[name])
            if not error <= error_factor * tolerance:  # so that NaN fails
                return f"{name} is off by {error:.1e} of its largest element; the tolerance is {tolerance:.0e}"
        return None


def work(inputs: StepInputs) -> Work:
    """Matrix products and convolutions of the network forward, and twice as many backward; reading and writing each
    weight and its gradient once."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        inputs.model(inputs.batch["pixel_values"])
    weights = sum(p.nbytes for p in inputs.model.parameters())
    return Work(bytes=2 * weights, flops=3 * counter.get_total_flops())


def prepare_plain(inputs: StepInputs) -> Callable[[], dict[str, Tensor]]:
    return lambda: train_step(inputs)


def prepare_patched(inputs: StepInputs, part: str = "") -> Callable[[], dict[str, Tensor]]:
    """The step with the whole model patched, or the submodule ``part`` of a Mask2Former alone."""
    if part and inputs.family != "Mask2Former":
        raise Unavailable(f"{inputs.family} is only patched as a whole")
    images = inputs.batch["pixel_values"]
    require_backend("mask_loss", "triton" if images.is_cuda else "native", images)

    def call() -> dict[str, Tensor]:
        patch(inputs.model.get_submodule(part))
        try:
            return train_step(inputs)
        finally:
            unpatch(inputs.model)

    return call


OPERATION = Operation(
    title="Training step of transformers' MaskFormer and Mask2Former, forward and backward, plain and patched",
    cases=CASES,
    providers=(
        Provider("fastmask.patch", prepare_patched, error_factor=1.0),
        *(
            Provider(
                f"fastmask.patch, {name} only", partial(prepare_patched, part=part), error_factor=1.0, partial=True
            )
            for name, part in PARTS.items()
        ),
        Provider("transformers", prepare_plain, error_factor=1.0),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=SameStep,
    work=work,
)
