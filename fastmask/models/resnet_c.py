"""ResNet-C, the backbone of MaskFormer's "R101c" models, with a stem of three convolutions and a dilated last stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import ResNetBackbone

MODEL_TYPE = "resnet-c"
LAST_STAGE_DILATIONS = (1, 2, 4)  # of the stage's blocks in turn


def to_resnet_c(backbone: ResNetBackbone) -> ResNetBackbone:
    """Changes a ResNet backbone of ``transformers`` in place, as DeepLab does (arXiv:1706.05587): three 3 x 3
    convolutions, the first two with half the channels, replace the stem's 7 x 7 one; the 3 x 3 convolutions of the last
    stage are dilated by 1, 2 and 4 in turn, and its stride does not change.

    Args:
        backbone: a ResNet with ``layer_type`` "bottleneck".

    Raises:
        ValueError: another layer type, or an odd ``embedding_size``.
    """
    config = backbone.config
    if config.layer_type != "bottleneck" or config.embedding_size % 2:
        raise ValueError(
            f"layer_type is {config.layer_type!r} and embedding_size {config.embedding_size}; expected "
            f"'bottleneck' and an even number for {MODEL_TYPE}"
        )
    stem = backbone.embedder.embedder
    make = type(stem)
    half = config.embedding_size // 2
    backbone.embedder.embedder = nn.Sequential(
        make(config.num_channels, half, kernel_size=3, stride=2, activation=config.hidden_act),
        make(half, half, kernel_size=3, activation=config.hidden_act),
        make(half, config.embedding_size, kernel_size=3, activation=config.hidden_act),
    )
    for conv in (layer.convolution for layer in backbone.embedder.embedder):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    for i, block in enumerate(backbone.encoder.stages[-1].layers):
        conv = block.layer[1].convolution
        conv.dilation = conv.padding = (LAST_STAGE_DILATIONS[i % len(LAST_STAGE_DILATIONS)],) * 2
    return backbone
