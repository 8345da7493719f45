"""Checkpoints of the authors' MaskFormer (detectron2's .pth and .pkl files), to a model of ours and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmask.integrations.checkpoints.backbone_names import NOT_LEARNED, detectron2_resnet, microsoft_swin
from fastmask.integrations.checkpoints.names import NameRule, rename, to_foreign, to_own
from fastmask.integrations.checkpoints.state_files import read_weights
from fastmask.models.maskformer import MaskFormer, MaskFormerConfig
from fastmask.models.weight_files import key_problems, listed, without_prefix, wrapping_prefix

DECODER = "sem_seg_head.pixel_decoder"
PREDICTOR = "sem_seg_head.predictor"
IGNORED = rf"{NOT_LEARNED}|criterion\.empty_weight|pixel_mean|pixel_std"
BY_COUNTS = (
    r"predictor\.(query_embed\.weight|class_embed\.(weight|bias))"  # shaped by the numbers of queries and classes
)


def from_original_maskformer(
    checkpoint: str | Path | Mapping[str, Tensor],
    config: MaskFormerConfig | None = None,
    *,
    ignore_mismatched_sizes: bool = False,
    prefix: str = "",
) -> MaskFormer:
    """A model of ours with the weights of the original repository's MaskFormer.

    Args:
        checkpoint: a ``.pth`` or ``.pkl`` file of detectron2, or its dict of weights by name. Nothing but arrays is
            unpickled.
        config: what to build; by default read off the weights' shapes, with 8 attention heads and the losses of the
            paper, none of which the weights tell.
        ignore_mismatched_sizes: let query embeddings and class head start at random, with a warning, where ``config``
            has another number of queries or classes.
        prefix: as for :func:`~fastmask.integrations.checkpoints.state_files.read_weights`.

    Returns:
        the model, on the CPU, in float32 and training mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is unreadable or holds something else than arrays; keys that are missing or unexpected;
            shapes that differ. The message names them.
    """
    source = "the checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    if isinstance(checkpoint, Mapping):
        weights = _upgraded(without_prefix(checkpoint, prefix, source))
    else:
        weights = _upgraded(read_weights(checkpoint, prefix))
    model = MaskFormer(config or infer_config(weights, source))
    replaceable = BY_COUNTS if ignore_mismatched_sizes else ""
    own = to_own(weights, model.weights(), rules_of(model), ignored=IGNORED, replaceable=replaceable, source=source)
    model.load_state_dict(own, strict=False)
    return model


def to_original_maskformer(model: MaskFormer) -> dict[str, Tensor]:
    """The weights of a model under the names of the original repository, which loads them with ``strict=False``.

    Save ``{"model": weights}`` with ``torch.save`` for detectron2's checkpointer.

    Raises:
        ValueError: the original has no such architecture; the message lists the weights that it has no names for.
    """
    return to_foreign(model.weights(), rules_of(model))


def rules_of(model: MaskFormer) -> list[NameRule]:
    rules = [
        *detectron2_resnet(),
        *microsoft_swin(),
        rename(r"pixel_decoder\.(mask_features|input_proj)\.(.*)", rf"{DECODER}.\1.\2"),
        rename(r"pixel_decoder\.encoder\.(.*)", rf"{DECODER}.transformer.encoder.\1"),
        rename(r"predictor\.decoder\.(.*)", rf"{PREDICTOR}.transformer.decoder.\1"),
        rename(r"predictor\.((query_embed|input_proj|class_embed|mask_embed)\..*)", rf"{PREDICTOR}.\1"),
    ]
    for i in range(len(model.channels)):
        for own, foreign in ((rf"adapters\.{i}", f"adapter_{i + 1}"), (rf"layers\.{i}", f"layer_{i + 1}")):
            rules += [
                rename(rf"pixel_decoder\.{own}\.conv\.weight", f"{DECODER}.{foreign}.weight"),
                rename(rf"pixel_decoder\.{own}\.norm\.(.*)", rf"{DECODER}.{foreign}.norm.\1"),
            ]
    return rules


def infer_config(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> MaskFormerConfig:
    """The configuration that fits the shapes of the original's weights."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            parts = dict.fromkeys(".".join(other.split(".")[:2]) for other in weights)
            problem = key_problems([name], weights) if wrapping_prefix([name], weights) else f"it has {listed(parts)}"
            raise ValueError(f"{source} has no {name}; expected the weights of the original MaskFormer; {problem}")
        return tuple(weights[name].shape)

    def count(pattern: str) -> int:
        return next(
            i for i in range(len(weights) + 1) if not any(name.startswith(pattern.format(i)) for name in weights)
        )

    decoder = f"{PREDICTOR}.transformer.decoder.layers"
    feedforward_dim, hidden_dim = shape(f"{decoder}.0.linear1.weight")
    backbone, options = _infer_backbone(weights, shape, count)
    mask_dim, pixel_decoder_dim = shape(f"{DECODER}.mask_features.weight")[:2]
    return MaskFormerConfig(
        num_classes=shape(f"{PREDICTOR}.class_embed.weight")[0] - 1,
        num_queries=shape(f"{PREDICTOR}.query_embed.weight")[0],
        backbone=backbone,
        backbone_options=options,
        hidden_dim=hidden_dim,
        mask_dim=mask_dim,
        pixel_decoder_dim=pixel_decoder_dim,
        feedforward_dim=feedforward_dim,
        encoder_layers=count(f"{DECODER}.transformer.encoder.layers.{{}}."),
        decoder_layers=count(f"{decoder}.{{}}."),
    )


def _infer_backbone(weights: Mapping[str, Tensor], shape: Any, count: Any) -> tuple[str, dict[str, Any]]:
    if "backbone.patch_embed.proj.weight" in weights:
        stages = count("backbone.layers.{}.")
        tables = [shape(f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(stages)]
        return "swin", {
            "embed_dim": shape("backbone.patch_embed.proj.weight")[0],
            "depths": [count(f"backbone.layers.{i}.blocks.{{}}.") for i in range(stages)],
            "num_heads": [heads for _, heads in tables],
            "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
        }
    depths = [count(f"backbone.res{stage}.{{}}.") for stage in range(2, 6)]
    bottleneck = "backbone.res2.0.conv3.weight" in weights
    last = 3 if bottleneck else 2
    deep = "backbone.stem.conv3.weight" in weights
    return "resnet-c" if deep else "resnet", {
        "embedding_size": shape(f"backbone.stem.conv{3 if deep else 1}.weight")[0],
        "hidden_sizes": [shape(f"backbone.res{stage}.0.conv{last}.weight")[0] for stage in range(2, 6)],
        "depths": depths,
        "layer_type": "bottleneck" if bottleneck else "basic",
    }


def _upgraded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the repository's second format: the first had the pixel decoder directly in the head."""
    head = "sem_seg_head."
    return {
        f"{DECODER}.{name.removeprefix(head)}"
        if name.startswith(head) and not name.startswith((PREDICTOR, DECODER))
        else name: torch.as_tensor(tensor)
        for name, tensor in weights.items()
    }
