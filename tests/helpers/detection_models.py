"""Tiny models of transformers' DETR family from configurations alone, and batches to train them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import ResNetConfig

from tests.helpers.foreign_models import off_the_pixels

NUM_CLASSES, NUM_QUERIES, SIZE = 5, 9, 64
LABELS = {"num_labels": NUM_CLASSES, "num_queries": NUM_QUERIES, "auxiliary_loss": True}
# Grounding DINO's text: BERT's start and end, and a full stop, 1012, after each class.
PHRASES = [101, 1000, 1001, 1012, 1002, 1012, 1003, 1012, 1004, 1012, 1005, 1006, 1012, 102]
TRANSFORMER = {
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
    "dropout": 0.0,
}
MULTISCALE = {"num_feature_levels": 3, "decoder_n_points": 2}
HYBRID = {
    **{name: value for name, value in TRANSFORMER.items() if name != "encoder_layers"},
    **MULTISCALE,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 32],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 4,
}


def backbone(stages: int) -> ResNetConfig:
    names = [f"stage{number}" for number in range(5 - stages, 5)]
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=names)


def detr(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name.split('For')[0]}Config")
    return getattr(transformers, name)(config(backbone_config=backbone(4), **LABELS, **(TRANSFORMER | options)))


def detr_masks(name: str) -> nn.Module:
    return detr(name, d_model=128, encoder_attention_heads=8)


def dab_detr(_: str) -> nn.Module:
    sizes = {name: size for name, size in TRANSFORMER.items() if name != "d_model"} | {"hidden_size": 32}
    config = transformers.DabDetrConfig(backbone_config=backbone(4), **LABELS, **sizes)
    return transformers.DabDetrForObjectDetection(config)


def yolos(_: str) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.YolosConfig(
        image_size=[SIZE, SIZE], num_detection_tokens=NUM_QUERIES, num_labels=NUM_CLASSES, **sizes
    )
    return transformers.YolosForObjectDetection(config)


def multiscale(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name.split('For')[0]}Config")
    sizes = TRANSFORMER | MULTISCALE | {"encoder_n_points": 2}
    return getattr(transformers, name)(config(backbone_config=backbone(3), **LABELS, **sizes, **options))


def hybrid(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name.split('For')[0]}Config")
    return getattr(transformers, name)(config(backbone_config=backbone(3), **LABELS, **HYBRID, **options))


def lw_detr(_: str) -> nn.Module:
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "num_windows": 4}
    config = transformers.LwDetrConfig(
        backbone_config=transformers.LwDetrViTConfig(**vit, out_features=["stage2"], pretrain_image_size=SIZE),
        projector_scale_factors=[1.0],
        group_detr=3,
        **LABELS,
        **grouped_sizes(),
    )
    return transformers.LwDetrForObjectDetection(config)


def grouped_sizes() -> dict[str, Any]:
    return {
        "d_model": 32,
        "decoder_ffn_dim": 32,
        "decoder_n_points": 2,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "c2f_num_blocks": 1,
        "dropout": 0.0,
    }


def rf_detr(name: str) -> nn.Module:
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    config = transformers.RfDetrConfig(
        backbone_config=transformers.RfDetrDinov2Config(**vit, num_windows=2, out_features=["stage2"]),
        group_detr=3,
        intermediate_size=32,
        mask_downsample_ratio=2,
        **LABELS,
        **grouped_sizes(),
    )
    return getattr(transformers, name)(config)


def grounding_dino(name: str) -> nn.Module:
    kind = name.split("For")[0]
    text = transformers.BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone(3),
        text_config=text,
        max_text_len=16,
        fusion_droppath=0.0,
        disable_custom_kernels=True,
        encoder_n_points=2,
        **LABELS,
        **TRANSFORMER,
        **MULTISCALE,
    )
    return getattr(transformers, name)(config)


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "DetrForObjectDetection": detr,
    "DetrForSegmentation": detr_masks,
    "ConditionalDetrForObjectDetection": detr,
    "ConditionalDetrForSegmentation": detr_masks,
    "DabDetrForObjectDetection": dab_detr,
    "TableTransformerForObjectDetection": detr,
    "YolosForObjectDetection": yolos,
    "DeformableDetrForObjectDetection": multiscale,
    "RTDetrForObjectDetection": hybrid,
    "RTDetrV2ForObjectDetection": hybrid,
    "DFineForObjectDetection": hybrid,
    "Deimv2ForObjectDetection": hybrid,
    "GroundingDinoForObjectDetection": grounding_dino,
    "MMGroundingDinoForObjectDetection": grounding_dino,
    "LwDetrForObjectDetection": lw_detr,
    "RfDetrForObjectDetection": rf_detr,
    "RfDetrForInstanceSegmentation": rf_detr,
}


def tiny_detector(name: str) -> nn.Module:
    """A seeded model of 2 decoder layers, in training; no rounding decides a match between predictions so far apart."""
    torch.manual_seed(0)
    model = MODELS[name](name)
    for key, weight in model.named_parameters():
        if key.endswith(("query_position_embeddings.weight", "detection_tokens")):
            nn.init.normal_(weight, std=10.0)
        if key.endswith("class_labels_classifier.weight"):
            nn.init.normal_(weight)  # not so large that softmax gives many queries the same 0 or 1
    return off_the_pixels(model).train()


def random_labels(seed: int, counts: tuple[int, ...] = (4, 2), text: bool = False) -> dict[str, Any]:
    """Keyword arguments of a training step: images, and ``counts[b]`` classes, boxes and masks of each; with ``text``
    the classes are phrases of one or two words."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        sizes = 0.1 + 0.4 * torch.rand(count, 2, generator=generator)
        centers = sizes / 2 + (1 - sizes) * torch.rand(count, 2, generator=generator)
        target = {
            "class_labels": torch.randint(NUM_CLASSES, (count,), generator=generator),
            "boxes": torch.cat([centers, sizes], 1),
            "masks": (torch.rand(count, SIZE, SIZE, generator=generator) < 0.3).float(),
        }
        labels.append(target)
    batch = {"pixel_values": torch.randn(len(counts), 3, SIZE, SIZE, generator=generator), "labels": labels}
    if text:
        batch["input_ids"] = torch.tensor([PHRASES] * len(counts))
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch
