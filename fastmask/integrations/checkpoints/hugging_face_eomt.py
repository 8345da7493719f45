"""Hugging Face's EoMT, with DINOv2 and DINOv3, to a model of ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmask.extras import extra
from fastmask.integrations.checkpoints.hugging_face_format import COSTS, POINT_SAMPLED_FIELDS, HuggingFaceFormat
from fastmask.integrations.checkpoints.names import NameRule, rename
from fastmask.models.eomt import EoMT, EoMTConfig
from fastmask.modules.dino import DinoTransformer

if TYPE_CHECKING:
    from transformers import EomtDinov3ForUniversalSegmentation, EomtForUniversalSegmentation

ENCODERS = {"eomt": "dinov2", "eomt_dinov3": "dinov3"}
# Fields of our configuration by those of transformers'.
FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_registers": "num_register_tokens",
    "norm_eps": "layer_norm_eps",
    "drop_path": "drop_path_rate",
    "num_queries": "num_queries",
    "query_blocks": "num_blocks",
    "upscale_blocks": "num_upscale_blocks",
    **POINT_SAMPLED_FIELDS,
}
MOST_RATIO = 16  # of an MLP's hidden channels
# What transformers can build and this library cannot, by field, with the only value that both have.
FIXED = {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "num_channels": 3}
FIXED_DINOV3 = {
    "use_gated_mlp": False,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
}


def from_hugging_face_eomt(
    source: str | Path | EomtForUniversalSegmentation | EomtDinov3ForUniversalSegmentation, **options: Any
) -> EoMT:
    """A model of ours that computes what Hugging Face's EoMT, with DINOv2 or DINOv3, does.

    At inference, their model masks a block whose probability is more than 0, at random, and keeps that mask for later
    blocks of probability 0; ours masks for all queries where the probability is at least 0.5. For trained networks,
    whose probabilities are all 0, this is the same, and in training, too.

    Args:
        source: a folder with config.json and the weights; or the model itself.
        options: as for :meth:`~fastmask.integrations.checkpoints.hugging_face_format.HuggingFaceFormat.read`, which
            says what is returned and raised.
    """
    return EOMT.read(source, **options)


def to_hugging_face_eomt(model: EoMT) -> EomtForUniversalSegmentation | EomtDinov3ForUniversalSegmentation:
    """Hugging Face's model with the same weights, in evaluation mode; its ``save_pretrained`` writes a folder.

    Raises:
        ValueError: Hugging Face has no such architecture.
    """
    return EOMT.write(model)


def rules_of(model: EoMT) -> list[NameRule]:
    rotary, gated = model.config.encoder == "dinov3", model.config.gated_mlp
    own, layer = r"encoder\.blocks\.(\d+)", r"layers.\1"
    names = {"out_proj": "o_proj", "fc1": "up_proj", "fc2": "down_proj"} if rotary else {}
    mlp = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    return [
        rename(r"encoder\.(cls_token|register_tokens)", r"embeddings.\1"),
        rename(r"encoder\.pos_embed", "embeddings.position_embeddings.weight"),
        rename(
            r"encoder\.patch_embed\.proj\.(.*)", rf"embeddings.patch_embeddings.{'' if rotary else 'projection.'}\1"
        ),
        rename(r"encoder\.norm\.(.*)", r"layernorm.\1"),
        rename(rf"{own}\.(norm\d)\.(.*)", rf"{layer}.\2.\3"),
        rename(rf"{own}\.scale(\d)", rf"{layer}.layer_scale\2.lambda1"),
        rename(rf"{own}\.attn\.(\w_proj)\.(.*)", rf"{layer}.attention.\2.\3"),
        rename(rf"{own}\.attn\.out_proj\.(.*)", rf"{layer}.attention.{names.get('out_proj', 'out_proj')}.\2"),
        *(rename(rf"{own}\.mlp\.{name}\.(.*)", rf"{layer}.mlp.{names.get(name, name)}.\2") for name in mlp),
        rename(r"query_embed\.weight", "query.weight"),
        rename(r"class_embed\.(.*)", r"class_predictor.\1"),
        *(rename(rf"mask_embed\.layers\.{i}\.(.*)", rf"mask_head.fc{i + 1}.\1") for i in range(3)),
        rename(r"upscale\.(\d+)\.(conv\d)\.(.*)", r"upscale_block.block.\1.\2.\3"),
        rename(r"upscale\.(\d+)\.norm\.(.*)", r"upscale_block.block.\1.layernorm2d.\2"),
    ]


def own_config_of(config: Any, weights: Mapping[str, Tensor]) -> EoMTConfig:
    """Our configuration of the architecture and losses that a ``transformers.EomtConfig`` or ``EomtDinov3Config``
    describes, with the masks' probabilities, which are among the weights.
    """
    encoder = ENCODERS[config.model_type]
    values = config.to_dict()
    fixed = {**FIXED, **(FIXED_DINOV3 if encoder == "dinov3" else {})}
    for name, expected in fixed.items():
        if values[name] != expected:
            raise ValueError(f"{name} is {values[name]!r}; fastmask's EoMT has {expected!r}")
    fields = {own: values[theirs] for own, theirs in {**FIELDS, **COSTS}.items()}
    for name in ("image_size", "patch_size"):
        fields[name] = _side(name, fields[name])
    if encoder == "dinov3":
        base = values["rope_parameters"]["rope_theta"]
        if base != DinoTransformer.ROTARY_BASE:
            raise ValueError(f"rope_theta is {base}; fastmask's EoMT has {DinoTransformer.ROTARY_BASE}")
        fields |= {"feedforward_dim": values["intermediate_size"], "rescale": values["pos_embed_rescale"] or 1.0}
    else:
        gated, ratio = values["use_swiglu_ffn"], values["mlp_ratio"]
        fields |= {"feedforward_dim": _feedforward_dim(config.hidden_size, ratio, gated), "gated_mlp": gated}
    names = tuple(str(config.id2label.get(i, i)) for i in range(config.num_labels))
    probabilities = tuple(weights["attn_mask_probs"].tolist()) if "attn_mask_probs" in weights else ()
    return EoMTConfig(config.num_labels, encoder=encoder, class_names=names, mask_probabilities=probabilities, **fields)


def hugging_face_config_of(model: EoMT) -> Any:
    """The configuration of ``transformers`` of a model of ours."""
    with extra("models"):
        import transformers

    config = model.config
    differing = [own for own, theirs in COSTS.items() if getattr(config, own) != getattr(config, theirs)]
    if differing:
        raise ValueError(
            f"{', '.join(differing)} differ from the losses' weights, which Hugging Face's EoMT matches by"
        )
    if len(config.pixel_mean) != FIXED["num_channels"]:
        raise ValueError(f"the images have {len(config.pixel_mean)} channels; Hugging Face's EoMT has 3")
    labels = config.class_names or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    fields = {theirs: getattr(config, own) for own, theirs in FIELDS.items()}
    fields |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if config.encoder == "dinov3":
        if config.gated_mlp:
            raise ValueError("gated_mlp is True; Hugging Face's EoMT with DINOv3 has no SwiGLU beside GELU")
        return transformers.EomtDinov3Config(
            **fields, intermediate_size=config.feedforward_dim, pos_embed_rescale=config.rescale
        )
    ratios = [
        ratio
        for ratio in range(1, MOST_RATIO + 1)
        if _feedforward_dim(config.hidden_dim, ratio, config.gated_mlp) == config.feedforward_dim
    ]
    if not ratios:
        raise ValueError(
            f"feedforward_dim is {config.feedforward_dim}; Hugging Face's EoMT with DINOv2 has an integer mlp_ratio "
            f"times hidden_dim {config.hidden_dim}{', two thirds of it with gated_mlp' if config.gated_mlp else ''}"
        )
    return transformers.EomtConfig(**fields, mlp_ratio=ratios[0], use_swiglu_ffn=config.gated_mlp)


def _feedforward_dim(hidden_dim: int, ratio: int, gated: bool) -> int:
    """The hidden channels of an MLP of DINOv2; gated ones have two thirds, rounded up to a multiple of 8."""
    dim = int(hidden_dim * ratio)
    return (int(dim * 2 / 3) + 7) // 8 * 8 if gated else dim


def _side(name: str, value: Any) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"{name} is {value}; fastmask's EoMT has squares")
    return sides.pop()


EOMT = HuggingFaceFormat(
    "EoMT",
    EoMT,
    {"eomt": "EomtForUniversalSegmentation", "eomt_dinov3": "EomtDinov3ForUniversalSegmentation"},
    own_config_of,
    hugging_face_config_of,
    rules_of,
    ignored=r"attn_mask_probs|criterion\.empty_weight",
    by_counts=r"query_embed\.weight|class_embed\.(weight|bias)",
    buffers=lambda model: {"attn_mask_probs": torch.tensor(model.config.mask_probabilities)},
)
