"""Checkpoints of the authors' Mask2Former, to a model of ours and back."""

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
from fastmask.models.mask2former import Mask2Former, Mask2FormerConfig

CROSS, SELF, FEEDFORWARD = (
    f"{PREDICTOR}.transformer_{part}_layers" for part in ("cross_attention", "self_attention", "ffn")
)
ENCODER = f"{DECODER}.transformer.encoder.layers"
NUM_HEADS = 8  # which the weights do not tell


def from_original_mask2former(
    checkpoint: str | Path | Mapping[str, Tensor], config: Mask2FormerConfig | None = None, **options: Any
) -> Mask2Former:
    """A model of ours with the weights of the original repository's Mask2Former.

    Args:
        checkpoint: a ``.pth`` or ``.pkl`` file of detectron2, or its dict of weights by name.
        config: what to build; by default read off the weights' shapes.
        options: as for :meth:`~fastmask.integrations.checkpoints.original_format.OriginalFormat.read`, which says what
            is returned and raised.
    """
    return MASK2FORMER.read(checkpoint, config, **options)


def to_original_mask2former(model: Mask2Former) -> dict[str, Tensor]:
    """The weights of a model under the names of the original repository; see
    :meth:`~fastmask.integrations.checkpoints.original_format.OriginalFormat.write`.
    """
    return MASK2FORMER.write(model)


def rules_of(model: Mask2Former) -> list[NameRule]:
    own = r"predictor\.layers\.(\d+)"
    embeddings = "query_feat|query_embed|level_embed|input_proj|class_embed|mask_embed"
    return [
        *shared_rules(len(model.pixel_decoder.adapters)),
        rename(r"pixel_decoder\.level_embed", f"{DECODER}.transformer.level_embed"),
        rename(r"pixel_decoder\.encoder\.(.*)", rf"{ENCODER}.\1"),
        rename(rf"{own}\.cross_attn\.(.*)", rf"{CROSS}.\1.multihead_attn.\2"),
        rename(rf"{own}\.self_attn\.(.*)", rf"{SELF}.\1.self_attn.\2"),
        rename(rf"{own}\.(linear\d)\.(.*)", rf"{FEEDFORWARD}.\1.\2.\3"),
        *(
            rename(rf"{own}\.norm{i}\.(.*)", rf"{part}.\1.norm.\2")
            for i, part in enumerate((CROSS, SELF, FEEDFORWARD), start=1)
        ),
        rename(r"predictor\.norm\.(.*)", rf"{PREDICTOR}.decoder_norm.\1"),
        rename(rf"predictor\.(({embeddings})\..*)", rf"{PREDICTOR}.\1"),
    ]


def config_of(shapes: Shapes) -> Mask2FormerConfig:
    num_queries, hidden_dim = shapes.of(f"{PREDICTOR}.query_feat.weight")
    num_levels = shapes.of(f"{DECODER}.transformer.level_embed")[0]
    return Mask2FormerConfig(
        **shapes.fields(),
        num_queries=num_queries,
        hidden_dim=hidden_dim,
        num_heads=NUM_HEADS,
        feedforward_dim=shapes.of(f"{FEEDFORWARD}.0.linear1.weight")[0],
        encoder_feedforward_dim=shapes.of(f"{ENCODER}.0.linear1.weight")[0],
        encoder_points=shapes.of(f"{ENCODER}.0.self_attn.attention_weights.weight")[0] // (NUM_HEADS * num_levels),
        encoder_layers=shapes.count(f"{ENCODER}.{{}}."),
        decoder_layers=shapes.count(f"{FEEDFORWARD}.{{}}."),
    )


MASK2FORMER = OriginalFormat(
    Mask2Former,
    config_of,
    rules_of,
    by_counts=r"predictor\.((query_feat|query_embed)\.weight|class_embed\.(weight|bias))",
    older_names={"static_query": "query_feat"},
)
