"""Hugging Face's Mask2Former, to a model of ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmask.extras import extra
from fastmask.integrations.checkpoints.backbone_names import NOT_LEARNED
from fastmask.integrations.checkpoints.hugging_face import (
    ENCODER,
    HEAD_RULES,
    PIXEL_DECODER,
    TRANSFORMER,
    own_backbone,
    their_backbone,
)
from fastmask.integrations.checkpoints.hugging_face_format import COSTS, POINT_SAMPLED_FIELDS, HuggingFaceFormat
from fastmask.integrations.checkpoints.names import NameRule, rename
from fastmask.models.mask2former import Mask2Former, Mask2FormerConfig

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

# Fields of our configuration by those of transformers'.
FIELDS = {
    "num_queries": "num_queries",
    "hidden_dim": "hidden_dim",
    "mask_dim": "mask_feature_size",
    "pixel_decoder_dim": "feature_size",
    "encoder_layers": "encoder_layers",
    "encoder_feedforward_dim": "encoder_feedforward_dim",
    "feedforward_dim": "dim_feedforward",
    "num_heads": "num_attention_heads",
    "dropout": "dropout",
    "deep_supervision": "use_auxiliary_loss",
    **POINT_SAMPLED_FIELDS,
}
# What transformers can build and fastmask cannot, with the only value that both have; and the reverse.
FIXED = {"pre_norm": False, "activation_function": "relu", "common_stride": 4}
NUM_MAPS, NUM_POINTS = 4, 4
# The names of parts of our transformer decoder.
PREDICTOR_PARTS = {
    "query_feat": "queries_features",
    "level_embed": "level_embed",
    "input_proj": "input_projections",
    "norm": "decoder.layernorm",
}
# The names of our transformer layers' parts, in the pixel decoder and in the decoder.
ENCODER_PARTS = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "linear1": "fc1", "linear2": "fc2"}
DECODER_PARTS = {
    "norm1": "cross_attn_layer_norm",
    "norm2": "self_attn_layer_norm",
    "norm3": "final_layer_norm",
    "linear1": "fc1",
    "linear2": "fc2",
}


def from_hugging_face_mask2former(
    source: str | Path | Mask2FormerForUniversalSegmentation, **options: Any
) -> Mask2Former:
    """A model of ours that computes what Hugging Face's ``Mask2FormerForUniversalSegmentation`` does.

    Args:
        source: a folder with config.json and the weights; or the model itself.
        options: as for :meth:`~fastmask.integrations.checkpoints.hugging_face_format.HuggingFaceFormat.read`, which
            says what is returned and raised.
    """
    return MASK2FORMER.read(source, **options)


def to_hugging_face_mask2former(model: Mask2Former) -> Mask2FormerForUniversalSegmentation:
    """Hugging Face's model with the same weights, in evaluation mode; its ``save_pretrained`` writes a folder.

    Raises:
        ValueError: Hugging Face has no such architecture (another backbone than ResNet and Swin, other numbers of maps
            or points, costs that differ from the losses' weights).
    """
    return MASK2FORMER.write(model)


def rules_of(model: Mask2Former) -> list[NameRule]:
    own, layer = r"predictor\.layers\.(\d+)", rf"{TRANSFORMER}.decoder.layers.\1"
    own_encoder, encoder = r"pixel_decoder\.encoder\.(\d+)", rf"{PIXEL_DECODER}.encoder.layers.\1"
    rules = [
        rename(r"backbone\.(.*)", rf"{ENCODER}\1"),
        rename(r"pixel_decoder\.level_embed", f"{PIXEL_DECODER}.level_embed"),
        rename(r"pixel_decoder\.input_proj\.(.*)", rf"{PIXEL_DECODER}.input_projections.\1"),
        *HEAD_RULES,
        rename(rf"{own_encoder}\.(self_attn\..*)", rf"{encoder}.\2"),
        *(rename(rf"{own_encoder}\.{part}\.(.*)", rf"{encoder}.{name}.\2") for part, name in ENCODER_PARTS.items()),
        *(rename(rf"predictor\.{part}\.(.*)", rf"{TRANSFORMER}.{name}.\1") for part, name in PREDICTOR_PARTS.items()),
        rename(rf"{own}\.(cross_attn\..*)", rf"{layer}.\2"),
        NameRule(rf"{own}\.self_attn\.in_proj_(.*)", tuple(rf"{layer}.self_attn.{part}_proj.\2" for part in "qkv")),
        rename(rf"{own}\.(self_attn\.out_proj\..*)", rf"{layer}.\2"),
        *(rename(rf"{own}\.{part}\.(.*)", rf"{layer}.{name}.\2") for part, name in DECODER_PARTS.items()),
        rename(
            r"predictor\.mask_embed\.layers\.(\d+)\.(.*)",
            rf"{TRANSFORMER}.decoder.mask_predictor.mask_embedder.\1.0.\2",
        ),
    ]
    for i in range(len(model.pixel_decoder.adapters)):
        for part, name in (("adapters", "adapter"), ("layers", "layer")):
            rules += [
                rename(rf"pixel_decoder\.{part}\.{i}\.conv\.(.*)", rf"{PIXEL_DECODER}.{name}_{i + 1}.0.\1"),
                rename(rf"pixel_decoder\.{part}\.{i}\.norm\.(.*)", rf"{PIXEL_DECODER}.{name}_{i + 1}.1.\1"),
            ]
    return rules


def own_config_of(config: Any, weights: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """Our configuration of the architecture and losses that a ``transformers.Mask2FormerConfig`` describes."""
    for name, expected in FIXED.items():
        if getattr(config, name) != expected:
            raise ValueError(f"{name} is {getattr(config, name)!r}; fastmask's Mask2Former has {expected!r}")
    if config.enforce_input_projection and config.feature_size == config.hidden_dim:
        raise ValueError("enforce_input_projection is True; fastmask's Mask2Former projects maps only to another width")
    backbone, options = own_backbone(config.backbone_config)
    return Mask2FormerConfig(
        num_classes=config.num_labels,
        class_names=tuple(str(config.id2label.get(i, i)) for i in range(config.num_labels)),
        backbone=backbone,
        backbone_options=options,
        decoder_layers=config.decoder_layers - 1,  # theirs counts the prediction before the first layer
        encoder_points=NUM_POINTS,
        **{own: getattr(config, name) for own, name in {**FIELDS, **COSTS}.items()},
    )


def hugging_face_config_of(model: Mask2Former) -> Any:
    """The ``transformers.Mask2FormerConfig`` of a model of ours."""
    with extra("models"):
        import transformers

    config = model.config
    differing = [own for own in COSTS if getattr(config, own) != getattr(config, COSTS[own])]
    if differing:
        raise ValueError(
            f"{', '.join(differing)} differ from the losses' weights, by which Hugging Face's Mask2Former matches"
        )
    if (len(model.channels), config.encoder_points) != (NUM_MAPS, NUM_POINTS):
        raise ValueError(
            f"the backbone has {len(model.channels)} maps and encoder_points is {config.encoder_points}; Hugging "
            f"Face's Mask2Former has {NUM_MAPS} and {NUM_POINTS}"
        )
    return transformers.Mask2FormerConfig(
        **their_backbone(model),
        decoder_layers=config.decoder_layers + 1,
        **{name: getattr(config, own) for own, name in FIELDS.items()},
    )


MASK2FORMER = HuggingFaceFormat(
    "Mask2Former",
    Mask2Former,
    {"mask2former": "Mask2FormerForUniversalSegmentation"},
    own_config_of,
    hugging_face_config_of,
    rules_of,
    ignored=rf"{NOT_LEARNED}|criterion\.empty_weight",
    by_counts=r"predictor\.((query_feat|query_embed)\.weight|class_embed\.(weight|bias))",
)
