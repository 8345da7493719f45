"""Checkpoints of the authors' MaskFormer, to a model of ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmask.integrations.checkpoints.names import NameRule, rename
from fastmask.integrations.checkpoints.original_format import (
    DECODER,
    PREDICTOR,
    OriginalFormat,
    Shapes,
    shared_rules,
)
from fastmask.models.maskformer import MaskFormer, MaskFormerConfig


def from_original_maskformer(
    checkpoint: str | Path | Mapping[str, Tensor], config: MaskFormerConfig | None = None, **options: Any
) -> MaskFormer:
    """A model of ours with the weights of the original repository's MaskFormer.

    Args:
        checkpoint: a ``.pth`` or ``.pkl`` file of detectron2, or its dict of weights by name.
        config: what to build; by default read off the weights' shapes.
        options: as for :meth:`~fastmask.integrations.checkpoints.original_format.OriginalFormat.read`, which says what
            is returned and raised.
    """
    return MASKFORMER.read(checkpoint, config, **options)


def to_original_maskformer(model: MaskFormer) -> dict[str, Tensor]:
    """The weights of a model under the names of the original repository; see
    :meth:`~fastmask.integrations.checkpoints.original_format.OriginalFormat.write`.
    """
    return MASKFORMER.write(model)


def rules_of(model: MaskFormer) -> list[NameRule]:
    return [
        *shared_rules(len(model.channels)),
        rename(r"pixel_decoder\.encoder\.(.*)", rf"{DECODER}.transformer.encoder.\1"),
        rename(r"predictor\.decoder\.(.*)", rf"{PREDICTOR}.transformer.decoder.\1"),
        rename(r"predictor\.((query_embed|input_proj|class_embed|mask_embed)\..*)", rf"{PREDICTOR}.\1"),
    ]


def config_of(shapes: Shapes) -> MaskFormerConfig:
    decoder = f"{PREDICTOR}.transformer.decoder.layers"
    feedforward_dim, hidden_dim = shapes.of(f"{decoder}.0.linear1.weight")
    return MaskFormerConfig(
        **shapes.fields(),
        num_queries=shapes.of(f"{PREDICTOR}.query_embed.weight")[0],
        hidden_dim=hidden_dim,
        feedforward_dim=feedforward_dim,
        encoder_layers=shapes.count(f"{DECODER}.transformer.encoder.layers.{{}}."),
        decoder_layers=shapes.count(f"{decoder}.{{}}."),
    )


MASKFORMER = OriginalFormat(
    MaskFormer,
    config_of,
    rules_of,
    by_counts=r"predictor\.(query_embed\.weight|class_embed\.(weight|bias))",
    older_names={},
)
