"""Tiny models of transformers from configurations alone, and batches to train them on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)

import fastmask

NUM_CLASSES, NUM_QUERIES, NUM_POINTS, SIZE = 5, 9, 80, 64
VOCABULARY = 50  # of OneFormer's text encoder
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def tiny_backbone(name: str) -> SwinConfig | ResNetConfig:
    if name == "resnet":
        return ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=STAGES)
    return SwinConfig(
        image_size=SIZE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        drop_path_rate=0.0,
        out_features=STAGES,
    )


def with_distinct_queries(model: nn.Module) -> nn.Module:
    """``model`` with queries so far apart that no rounding decides which of them a target is matched with."""
    for name, weight in model.named_parameters():
        if name.endswith("queries_embedder.weight"):
            nn.init.normal_(weight, std=10.0)
    return model


def off_the_pixels(model: nn.Module) -> nn.Module:
    """``model`` whose deformable attention samples between pixels. It begins at their centers, where rounding decides
    which of two sides the derivative is taken from."""
    for name, weight in model.named_parameters():
        if "sampling_offsets" in name:
            nn.init.normal_(weight, std=1.0 if weight.dim() == 1 else 0.02)
    return model


# What the configurations of several families share.
COMMON = {"num_labels": NUM_CLASSES, "num_queries": NUM_QUERIES, "train_num_points": NUM_POINTS}
DECODER = {"encoder_feedforward_dim": 32, "encoder_layers": 1, "num_attention_heads": 4, "dim_feedforward": 32}


def tiny_maskformer(
    backbone: str = "swin",
    *,
    auxiliary: bool = True,
    hidden: bool = True,
    cls: type[nn.Module] = MaskFormerForInstanceSegmentation,
) -> nn.Module:
    """A seeded model of 3 decoder layers; ``hidden`` shows the hidden states, which auxiliary losses ask for."""
    decoder = {"model_type": "detr", "d_model": 32, "num_queries": NUM_QUERIES, "dropout": 0.0}
    for part in ("encoder", "decoder"):
        decoder |= {f"{part}_layers": 3, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    options = {"use_auxiliary_loss": auxiliary, "output_hidden_states": hidden, "decoder_config": decoder}
    sizes = {"num_labels": NUM_CLASSES, "fpn_feature_size": 32, "mask_feature_size": 32}
    torch.manual_seed(0)
    return with_distinct_queries(cls(MaskFormerConfig(backbone_config=tiny_backbone(backbone), **options, **sizes)))


def tiny_mask2former(backbone: str = "swin", **options: object) -> nn.Module:
    """A seeded model of 4 decoder layers, which predict 5 times; every level has its turn."""
    torch.manual_seed(0)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "decoder_layers": 5}
    config = Mask2FormerConfig(backbone_config=tiny_backbone(backbone), **COMMON, **DECODER, **sizes, **options)
    model = Mask2FormerForUniversalSegmentation(config)
    # Masks of some size: sigmoid rounds the smallest logits of either sign to exactly 0.5, where attention turns over.
    for name, weight in model.named_parameters():
        if "mask_embedder" in name and weight.dim() == 2:
            nn.init.normal_(weight, std=0.3)
    return off_the_pixels(model)


def tiny_oneformer() -> nn.Module:
    """A seeded model with its text encoder, in training."""
    torch.manual_seed(0)
    sizes = {"conv_dim": 64, "mask_dim": 64, "hidden_dim": 64, "decoder_layers": 3, "query_dec_layers": 1}
    text = {"width": 64, "num_layers": 1, "vocab_size": VOCABULARY, "n_ctx": 2}
    text = {f"text_encoder_{name}": value for name, value in text.items()}
    options = {"is_training": True, "dropout": 0.0, "backbone_config": tiny_backbone("swin")}
    config = OneFormerConfig(**COMMON, **DECODER, **sizes, **text, **options)
    return off_the_pixels(with_distinct_queries(OneFormerForUniversalSegmentation(config))).train()


EOMT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_blocks": 2, "patch_size": 16}


def tiny_eomt() -> nn.Module:
    """A seeded model of 3 layers, the last two with queries."""
    torch.manual_seed(0)
    return EomtForUniversalSegmentation(EomtConfig(image_size=SIZE, **COMMON, **EOMT)).train()


def tiny_eomt_dinov3() -> nn.Module:
    """A seeded model of 3 layers, the last two with queries."""
    torch.manual_seed(0)
    config = transformers.EomtDinov3Config(image_size=SIZE, intermediate_size=64, **COMMON, **EOMT)
    return transformers.EomtDinov3ForUniversalSegmentation(config).train()


def tiny_videomt() -> nn.Module:
    """A seeded model of 3 layers, the last two with queries that move on from frame to frame."""
    torch.manual_seed(0)
    config = transformers.VideomtConfig(image_size=SIZE, **COMMON, **EOMT)
    return transformers.VideomtForUniversalSegmentation(config).train()


def random_batch(seed: int, counts: tuple[int, ...] = (4, 2), sizes: tuple[int, ...] = (SIZE, SIZE)) -> dict:
    """Keyword arguments of a training step: images, and ``counts[b]`` masks of ``sizes[b]`` rows; they overlap, and
    some pixels are in none (what an image processor makes of ignored ones)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(len(counts), 3, SIZE, SIZE, generator=generator),
        "mask_labels": [
            (torch.rand(count, rows, SIZE, generator=generator) < 0.3).float()
            for count, rows in zip(counts, sizes, strict=True)
        ],
        "class_labels": [torch.randint(NUM_CLASSES, (count,), generator=generator) for count in counts],
    }


def train_step(model: nn.Module, batch: dict, **options: object) -> tuple[object, dict[str, Tensor]]:
    """The outputs, and the gradient of each parameter."""
    torch.manual_seed(1)
    outputs = model(**batch, **options)
    model.zero_grad()
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rounded_steps(model: nn.Module, batch: dict, **options: object) -> list[tuple[object, dict[str, Tensor]]]:
    """``train_step``, and again with images whose last bits are changed at random. How far rounding carries the
    gradient of an ill-conditioned parameter is a matter of chance, so that the worst of several steps is compared."""
    steps, images = [train_step(model, batch, **options)], batch["pixel_values"]
    for seed in range(4):
        bits = torch.randint(-1, 2, images.shape, generator=torch.Generator().manual_seed(seed))
        moved = images * (1 + bits * torch.finfo(images.dtype).eps)
        steps.append(train_step(model, {**batch, "pixel_values": moved}, **options))
    return steps


def exact_step(model: nn.Module, batch: dict, **options: object) -> tuple[object, dict[str, Tensor]]:
    """``train_step`` in float64, of a copy of the model as transformers wrote it, at the same random points; what it
    casts to float32 stays float64."""

    def doubled(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    batch = {
        name: doubled(value) if isinstance(value, Tensor) else [doubled(x) for x in value]
        for name, value in batch.items()
    }
    rand = torch.rand
    with (
        mock.patch.object(torch, "rand", lambda *sizes, **options: rand(*sizes, **options).double()),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        return train_step(fastmask.unpatch(copy.deepcopy(model)).double(), batch, **options)


def assert_same_step(actual: Sequence[tuple], expected: Sequence[tuple], exact: tuple) -> None:
    """``rounded_steps`` that are equal but for rounding: losses within 1e-5, and gradients, in the worst step, at most
    twice as far from the ``exact`` ones as those expected in their worst. Errors are relative to the parameter's
    largest gradient, or to 1e-6 of the largest of all where that is more; the worst parameter counts. Gradients that
    are zero in float64, such as those of the keys' bias, are nothing but rounding, whose size is a matter of chance:
    they stay below 1e-6 of the largest."""
    for (outputs, gradients), (their_outputs, their_gradients) in zip(actual, expected, strict=True):
        torch.testing.assert_close(outputs.loss, their_outputs.loss, rtol=1e-5, atol=0)
        assert gradients.keys() == their_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in exact[1].values())
    zero = {name for name, gradient in exact[1].items() if gradient.abs().max().item() < 1e-12 * largest}
    assert all(gradients[name].abs().max().item() < 1e-6 * largest for _, gradients in actual for name in zero)

    def error(gradients: Mapping[str, Tensor]) -> tuple[float, str]:
        return max(
            (((gradients[name].double() - gradient).abs().max() / (gradient.abs().max() + 1e-6 * largest)).item(), name)
            for name, gradient in exact[1].items()
            if name not in zero
        )

    own, theirs = (max(error(gradients) for _, gradients in steps) for steps in (actual, expected))
    assert own[0] <= 2 * theirs[0] + 1e-6, (own, theirs)


def assert_same_weights(theirs: nn.Module, back: nn.Module) -> None:
    """Checks that a model that was converted to ours and back has its weights."""
    weights = theirs.state_dict()
    kept = {name: value for name, value in back.state_dict().items() if "criterion" not in name}
    assert all(torch.equal(value, weights[name]) for name, value in kept.items())
