"""Pretrained vision transformers of ``transformers``, under the names of our encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.models.checkpoint import check_keys
from fastmask.modules.vit import VisionTransformer, resize_positions

# From the names of transformers' ViT and DeiT, of versions 4 and 5, to those of timm, which are ours; in this order.
NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "layers.": "blocks.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm.": "norm.",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.attention.": "attn.",
    "attention.": "attn.",
}
# Queries, keys and values, in version 5 and in version 4.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def pretrained_vit(folder: str, encoder: VisionTransformer, grid_size: tuple[int, int]) -> dict[str, Tensor]:
    """The state dict of an encoder from a ViT or DeiT; position embeddings are resized to the encoder's grid.

    Args:
        folder: a folder or hub id, read by ``transformers``.
        encoder: the encoder to fit.
        grid_size: (rows, columns) of its patches.

    Raises:
        ValueError: a model of another type, or weights that do not fit; the message names them.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type not in ("vit", "deit"):
        raise ValueError(f"pretrained_backbone {folder!r} is of model type {config.model_type!r}; expected vit or deit")
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    weights = _renamed(model.state_dict())
    extra = 2 if config.model_type == "deit" else 1
    tokens, patches = weights["pos_embed"].split([extra, weights["pos_embed"].shape[1] - extra], 1)
    height, width = _pair(config.image_size)
    patch_height, patch_width = _pair(config.patch_size)
    from_grid = (height // patch_height, width // patch_width)
    weights["pos_embed"] = torch.cat([tokens, resize_positions(patches, from_grid, grid_size)], 1)
    own = encoder.state_dict()
    for name in check_keys(own, weights, folder):
        raise ValueError(
            f"pretrained_backbone {folder!r} has {name} of shape {tuple(weights[name].shape)}; "
            f"the configuration asks for {tuple(own[name].shape)}"
        )
    return weights


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for theirs, ours in NAMES.items():
        weights = {name.replace(theirs, ours): tensor for name, tensor in weights.items()}
    for query, key, value in PROJECTIONS:
        for name in [name for name in weights if f"attn.{query}." in name]:
            parts = [weights.pop(name.replace(query, part)) for part in (query, key, value)]
            weights[name.replace(query, "qkv")] = torch.cat(parts)
    return weights


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
