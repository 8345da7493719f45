"""The feature pyramid that turns the backbone's maps into per-pixel embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.transformer import TransformerEncoder

NORM_GROUPS = 32


class ConvNorm(nn.Module):
    """A convolution without bias, group norm with 32 groups, and ReLU if ``relu``."""

    def __init__(self, input_dim: int, output_dim: int, kernel_size: int, *, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_dim, output_dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, output_dim)
        self.relu = relu
        conv_init(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, input_dim, h, w)`` to ``(B, output_dim, h, w)``."""
        x = self.norm(self.conv(x))
        return x.relu() if self.relu else x


class PixelDecoder(nn.Module):
    """MaskFormer's feature pyramid (arXiv:2107.06278, section 3.3). From coarse to fine, the output of a 1 x 1 adapter
    on each map is added to the upsampled coarser result, and a 3 x 3 layer follows; a last 3 x 3 convolution computes
    the pixel embeddings.

    With ``encoder_layers`` a transformer encoder runs on the coarsest map first, as in the paper's panoptic models, and
    the transformer decoder reads its output instead of the backbone's.

    Args:
        channels: channels of the backbone's maps, from fine to coarse.
        dim: channels of the pyramid, a multiple of 32.
        mask_dim: channels of the pixel embeddings.
        encoder_layers: transformer layers on the coarsest map; 0 for none.
        num_heads: attention heads of these layers.
        feedforward_dim: hidden channels of these layers.
        dropout: dropout probability in these layers.

    Raises:
        ValueError: no channels, or ``dim`` is not a multiple of 32.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 256,
        mask_dim: int = 256,
        *,
        encoder_layers: int = 0,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(channels) == 0:
            raise ValueError("channels is empty; expected the channels of each map of the backbone")
        if dim <= 0 or dim % NORM_GROUPS:
            raise ValueError(f"dim must be a positive multiple of {NORM_GROUPS}, got {dim}")
        coarsest = channels[-1]
        self.input_proj: nn.Conv2d | None = None
        self.encoder: TransformerEncoder | None = None
        if encoder_layers > 0:
            self.input_proj = nn.Conv2d(coarsest, dim, 1)
            conv_init(self.input_proj)
            self.encoder = TransformerEncoder(encoder_layers, dim, num_heads, feedforward_dim, dropout)
            coarsest = dim
        self.adapters = nn.ModuleList(ConvNorm(width, dim, 1, relu=False) for width in channels[:-1])
        self.layers = nn.ModuleList(
            ConvNorm(width, dim, 3, relu=True) for width in (*[dim] * (len(channels) - 1), coarsest)
        )
        self.mask_features = nn.Conv2d(dim, mask_dim, 3, padding=1)
        conv_init(self.mask_features)

    def forward(self, features: Sequence[Tensor], padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixel embeddings, and the map that the transformer decoder reads.

        Args:
            features: the backbone's maps ``(B, channels[i], h_i, w_i)`` from fine to coarse.
            padding_mask: ``(B, h_last, w_last)`` bool, True at padding of the coarsest map, to which the encoder does
                not attend.

        Returns:
            ``pixel_embed (B, mask_dim, h_0, w_0)`` and ``memory (B, C, h_last, w_last)``, where C is ``dim`` with an
            encoder, and else the channels of the backbone's coarsest map.
        """
        maps, memory = self.pyramid(features, padding_mask)
        return self.mask_features(maps[-1]), memory

    def pyramid(self, features: Sequence[Tensor], padding_mask: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The maps ``(B, dim, h_i, w_i)`` of the pyramid, from coarse to fine, and the memory, as in ``forward``;
        ``mask_features`` turns the finest map into the pixel embeddings.
        """
        memory = features[-1]
        if self.encoder is not None and self.input_proj is not None:
            memory = _encode(self.encoder, self.input_proj(memory), padding_mask)
        maps = [self.layers[-1](memory)]
        for i in range(len(self.adapters) - 1, -1, -1):
            lateral = self.adapters[i](features[i])
            maps.append(self.layers[i](lateral + interpolate(maps[-1], size=lateral.shape[-2:], mode="nearest")))
        return maps, memory


def _encode(encoder: TransformerEncoder, memory: Tensor, padding_mask: Tensor | None) -> Tensor:
    _, dim, height, width = memory.shape
    position = sine_position_encoding(
        height, width, dim, padding_mask=padding_mask, dtype=memory.dtype, device=memory.device
    )
    if padding_mask is not None:
        padding_mask = padding_mask.flatten(1)
    tokens = encoder(memory.flatten(2).transpose(1, 2), position, padding_mask)
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def projection(input_dim: int, output_dim: int) -> nn.Module:
    """A 1 x 1 convolution, or the identity if the numbers of channels are equal."""
    if input_dim == output_dim:
        return nn.Identity()
    conv = nn.Conv2d(input_dim, output_dim, 1)
    conv_init(conv)
    return conv


def conv_init(conv: nn.Conv2d) -> None:
    """Initializes uniformly with variance ``1 / fan_in`` and zero bias, as the original does outside the backbone."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
