"""Hugging Face's MaskFormer, to a model of ours and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmask.extras import extra
from fastmask.integrations.checkpoints.backbone_names import NOT_LEARNED, hugging_face_swin
from fastmask.integrations.checkpoints.hugging_face_format import HuggingFaceFormat
from fastmask.integrations.checkpoints.names import NameRule, rename
from fastmask.models.backbones import describe_config
from fastmask.models.mask2former import Mask2Former
from fastmask.models.maskformer import MaskFormer, MaskFormerConfig

if TYPE_CHECKING:
    from transformers import MaskFormerForInstanceSegmentation

ENCODER = "model.pixel_level_module.encoder."
PIXEL_DECODER = "model.pixel_level_module.decoder"
TRANSFORMER = "model.transformer_module"
# The names of transformers v4, which checkpoints on the hub have.
OLDER_NAMES = (
    (r"(transformer_module\.decoder\.layers\.\d+\.\w+)\.out_proj\.", r"\1.o_proj."),
    (r"(transformer_module\.decoder\.layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
)
# What MaskFormer and Mask2Former name alike.
HEAD_RULES = (
    rename(r"pixel_decoder\.mask_features\.(.*)", rf"{PIXEL_DECODER}.mask_projection.\1"),
    rename(r"predictor\.query_embed\.(.*)", rf"{TRANSFORMER}.queries_embedder.\1"),
    rename(r"predictor\.class_embed\.(.*)", r"class_predictor.\1"),
)
# Fields of our configuration by those of transformers': of its decoder, and of the model.
DECODER_FIELDS = {
    "num_queries": "num_queries",
    "hidden_dim": "d_model",
    "decoder_layers": "decoder_layers",
    "num_heads": "decoder_attention_heads",
    "feedforward_dim": "decoder_ffn_dim",
    "dropout": "dropout",
}
MODEL_FIELDS = {
    "mask_dim": "mask_feature_size",
    "pixel_decoder_dim": "fpn_feature_size",
    "deep_supervision": "use_auxiliary_loss",
    "class_weight": "cross_entropy_weight",
    "mask_weight": "mask_weight",
    "dice_weight": "dice_weight",
    "no_object_weight": "no_object_weight",
}
NORMS = {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}


def from_hugging_face_maskformer(source: str | Path | MaskFormerForInstanceSegmentation, **options: Any) -> MaskFormer:
    """A model of ours that computes what Hugging Face's ``MaskFormerForInstanceSegmentation`` does.

    Args:
        source: a folder with config.json and the weights, as transformers v4 or v5 writes it; or the model itself.
        options: as for :meth:`~fastmask.integrations.checkpoints.hugging_face_format.HuggingFaceFormat.read`, which
            says what is returned and raised.
    """
    return MASKFORMER.read(source, **options)


def to_hugging_face_maskformer(model: MaskFormer) -> MaskFormerForInstanceSegmentation:
    """Hugging Face's model with the same weights, in evaluation mode; its ``save_pretrained`` writes a folder.

    Raises:
        ValueError: Hugging Face has no such architecture (an encoder in the pixel decoder, fixed matching, another
            backbone than ResNet and Swin).
    """
    return MASKFORMER.write(model)


def rules_of(model: MaskFormer) -> list[NameRule]:
    layer = rf"{TRANSFORMER}.decoder.layers.\1"
    own = r"predictor\.decoder\.layers\.(\d+)"
    rules = [
        *hugging_face_swin(ENCODER),
        rename(r"backbone\.((embedder|encoder)\..*)", rf"{ENCODER}\1"),
        *HEAD_RULES,
        rename(r"predictor\.input_proj\.(.*)", rf"{TRANSFORMER}.input_projection.\1"),
        rename(r"predictor\.decoder\.norm\.(.*)", rf"{TRANSFORMER}.decoder.layernorm.\1"),
        rename(r"predictor\.mask_embed\.layers\.(\d+)\.(.*)", r"mask_embedder.\1.0.\2"),
        rename(rf"{own}\.linear(\d)\.(.*)", rf"{layer}.mlp.fc\2.\3"),
        *(rename(rf"{own}\.{norm}\.(.*)", rf"{layer}.{name}.\2") for norm, name in NORMS.items()),
    ]
    for attention, name in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
        parts = tuple(rf"{layer}.{name}.{part}_proj.\2" for part in "qkv")
        rules += [
            NameRule(rf"{own}\.{attention}\.in_proj_(.*)", parts),
            rename(rf"{own}\.{attention}\.out_proj\.(.*)", rf"{layer}.{name}.o_proj.\2"),
        ]
    # Their pyramid counts from the coarsest map, ours from the finest.
    coarsest = len(model.channels) - 1
    levels = [(rf"layers\.{coarsest}", "fpn.stem")]
    for i in range(coarsest):
        levels += [
            (rf"layers\.{coarsest - 1 - i}", f"fpn.layers.{i}.block"),
            (rf"adapters\.{coarsest - 1 - i}", f"fpn.layers.{i}.proj"),
        ]
    for own_level, name in levels:
        rules += [
            rename(rf"pixel_decoder\.{own_level}\.conv\.weight", f"{PIXEL_DECODER}.{name}.0.weight"),
            rename(rf"pixel_decoder\.{own_level}\.norm\.(.*)", rf"{PIXEL_DECODER}.{name}.1.\1"),
        ]
    return rules


def newer_name(name: str) -> str:
    """A weight's name in transformers v5, from that or from v4's."""
    for pattern, replacement in OLDER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def own_config_of(config: Any, weights: Mapping[str, Tensor]) -> MaskFormerConfig:
    """Our configuration of the architecture and losses that a ``transformers.MaskFormerConfig`` describes."""
    names = tuple(str(config.id2label.get(i, i)) for i in range(config.num_labels))
    backbone, options = own_backbone(config.backbone_config)
    return MaskFormerConfig(
        num_classes=config.num_labels,
        class_names=names,
        backbone=backbone,
        backbone_options=options,
        mask_cost=config.mask_weight,
        dice_cost=config.dice_weight,
        **{own: getattr(config.decoder_config, name) for own, name in DECODER_FIELDS.items()},
        **{own: getattr(config, name) for own, name in MODEL_FIELDS.items()},
    )


def hugging_face_config_of(model: MaskFormer) -> Any:
    """The ``transformers.MaskFormerConfig`` of a model of ours."""
    with extra("models"):
        import transformers

    config = model.config
    if config.encoder_layers or config.matching != "bipartite":
        raise ValueError(
            f"encoder_layers={config.encoder_layers}, matching={config.matching!r}: Hugging Face's MaskFormer has "
            "neither an encoder in the pixel decoder nor fixed matching"
        )
    decoder = transformers.DetrConfig(**{name: getattr(config, own) for own, name in DECODER_FIELDS.items()})
    return transformers.MaskFormerConfig(
        **their_backbone(model),
        decoder_config=decoder.to_dict(),
        **{name: getattr(config, own) for own, name in MODEL_FIELDS.items()},
    )


def their_backbone(model: MaskFormer | Mask2Former) -> dict[str, Any]:
    """The fields of a configuration of transformers that describe a model's backbone and classes."""
    with extra("models"):
        import transformers

    config = model.config
    backbone_config = getattr(model.backbone, "config", None)
    backbone = {} if backbone_config is None else backbone_config.to_dict()
    model_type = backbone.pop("model_type", None)
    if model_type not in ("resnet", "swin") or config.backbone == "resnet-c":
        raise ValueError(f"backbone is {config.backbone!r}; expected a ResNet or a Swin of transformers")
    labels = config.class_names or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    return {
        "backbone_config": transformers.AutoConfig.for_model(model_type, **backbone),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def own_backbone(config: Any) -> tuple[str, dict[str, Any]]:
    """The name and options of the backbone that a configuration of transformers describes."""
    if config.model_type not in ("resnet", "swin", "maskformer-swin"):
        raise ValueError(f"the backbone is of model type {config.model_type!r}; expected 'resnet' or 'swin'")
    from transformers import ResNetConfig, SwinConfig

    # MaskFormer's own Swin has the fields of the common one.
    kind = ResNetConfig if config.model_type == "resnet" else SwinConfig
    fields = {name: value for name, value in config.to_dict().items() if name in kind().to_dict()}
    return describe_config(kind(**{**fields, "model_type": kind.model_type}))


MASKFORMER = HuggingFaceFormat(
    "MaskFormer",
    MaskFormer,
    {"maskformer": "MaskFormerForInstanceSegmentation"},
    own_config_of,
    hugging_face_config_of,
    rules_of,
    ignored=rf"{NOT_LEARNED}|criterion\.empty_weight",
    by_counts=r"predictor\.(query_embed\.weight|class_embed\.(weight|bias))",
    newer_name=newer_name,
)
