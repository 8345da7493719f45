"""The forward pass against Hugging Face's MaskFormer with the same weights."""

import pytest
import torch
import transformers
from torch import Tensor

from fastmask.models import MaskFormer

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 2}
LAYERS, QUERIES, CLASSES, DIM = 3, 7, 5, 32


def theirs(backbone):
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"decoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_queries": QUERIES}
    parts = {"backbone_config": backbone, "decoder_config": transformers.DetrConfig(d_model=DIM, **sizes).to_dict()}
    config = transformers.MaskFormerConfig(**parts, fpn_feature_size=64, mask_feature_size=24, num_labels=CLASSES)
    return transformers.MaskFormerForInstanceSegmentation(config).eval()


def ours(backbone: str, options: dict) -> MaskFormer:
    sizes = {"hidden_dim": DIM, "mask_dim": 24, "pixel_decoder_dim": 64, "feedforward_dim": 48}
    sizes |= {"num_classes": CLASSES, "num_queries": QUERIES, "decoder_layers": LAYERS, "num_heads": 4}
    return MaskFormer(backbone=backbone, backbone_options=options, **sizes).eval()


def converted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names."""
    weights = {name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc"): w for name, w in weights.items()}
    encoder = "model.pixel_level_module.encoder."
    result = {
        f"backbone.{name.removeprefix(encoder)}": value for name, value in weights.items() if name.startswith(encoder)
    }
    fpn = "model.pixel_level_module.decoder.fpn."
    for ours_, theirs_ in [("layers.3", "stem")] + [(f"layers.{2 - i}", f"layers.{i}.block") for i in range(3)]:
        result[f"pixel_decoder.{ours_}.conv.weight"] = weights[f"{fpn}{theirs_}.0.weight"]
        for kind in ("weight", "bias"):
            result[f"pixel_decoder.{ours_}.norm.{kind}"] = weights[f"{fpn}{theirs_}.1.{kind}"]
    for i in range(3):
        result[f"pixel_decoder.adapters.{2 - i}.conv.weight"] = weights[f"{fpn}layers.{i}.proj.0.weight"]
        for kind in ("weight", "bias"):
            result[f"pixel_decoder.adapters.{2 - i}.norm.{kind}"] = weights[f"{fpn}layers.{i}.proj.1.{kind}"]
    module = "model.transformer_module."
    result["predictor.query_embed.weight"] = weights[f"{module}queries_embedder.weight"]
    for kind in ("weight", "bias"):
        result[f"pixel_decoder.mask_features.{kind}"] = weights[
            f"model.pixel_level_module.decoder.mask_projection.{kind}"
        ]
        if f"{module}input_projection.{kind}" in weights:
            result[f"predictor.input_proj.{kind}"] = weights[f"{module}input_projection.{kind}"]
        result[f"predictor.decoder.norm.{kind}"] = weights[f"{module}decoder.layernorm.{kind}"]
        result[f"predictor.class_embed.{kind}"] = weights[f"class_predictor.{kind}"]
        for i in range(3):
            result[f"predictor.mask_embed.layers.{i}.{kind}"] = weights[f"mask_embedder.{i}.0.{kind}"]
        for i in range(LAYERS):
            own, other = f"predictor.decoder.layers.{i}", f"{module}decoder.layers.{i}"
            for attention, their_attention in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
                result[f"{own}.{attention}.in_proj_{kind}"] = torch.cat(
                    [weights[f"{other}.{their_attention}.{part}_proj.{kind}"] for part in "qkv"]
                )
                result[f"{own}.{attention}.out_proj.{kind}"] = weights[f"{other}.{their_attention}.out_proj.{kind}"]
            for layer, their_layer in (
                ("linear1", "fc1"),
                ("linear2", "fc2"),
                ("norm1", "self_attn_layer_norm"),
                ("norm2", "encoder_attn_layer_norm"),
                ("norm3", "final_layer_norm"),
            ):
                result[f"{own}.{layer}.{kind}"] = weights[f"{other}.{their_layer}.{kind}"]
    return result


@pytest.mark.parametrize(
    ("backbone", "config", "options"),
    [("resnet", transformers.ResNetConfig, RESNET), ("maskformer-swin", transformers.SwinConfig, SWIN)],
)
@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_logits_of_all_layers_equal_those_of_hugging_face(size, backbone, config, options):
    torch.manual_seed(0)
    other = theirs(config(**options)).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = ours(backbone, options).double()
    weights = converted(other.state_dict())
    assert model.weights().keys() == weights.keys()
    model.load_state_dict(weights, strict=False)

    images = torch.rand(2, 3, *size).double()
    outputs = model(images)
    expected = other((images - model.preprocessor.mean) / model.preprocessor.std, output_hidden_states=True)
    torch.testing.assert_close(outputs["pred_logits"], expected.class_queries_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs["pred_masks"], expected.masks_queries_logits, rtol=1e-9, atol=1e-9)
    # Hugging Face skips the final norm for the earlier layers; the original, like DETR, does not.
    hidden = expected.transformer_decoder_hidden_states[-LAYERS:-1]
    for layer, queries in zip(outputs["aux_outputs"], hidden, strict=True):
        queries = other.model.transformer_module.decoder.layernorm(queries)
        masks = torch.einsum("bnc,bchw->bnhw", other.mask_embedder(queries), expected.pixel_decoder_last_hidden_state)
        torch.testing.assert_close(layer["pred_logits"], other.class_predictor(queries), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer["pred_masks"], masks, rtol=1e-9, atol=1e-9)
