"""The one description of a Segmenter: encoder, decoder, windows and classes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastmask.models.base_config import ImageModelConfig, require

DECODERS = ("mask", "linear")
# ViTs that were pretrained on ImageNet-21k want pixels in -1..1; DeiTs want ImageNet's mean and deviation.
VIT_MEAN = (0.5, 0.5, 0.5)
VIT_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SegmenterConfig(ImageModelConfig):
    """Everything that :class:`fastmask.Segmenter` is built from. The defaults are those of the paper's Seg-S-Mask/16 on
    ADE20K (arXiv:2105.05633, section 4, and the authors' configuration file).

    Args:
        num_classes: K.
        decoder: "mask" for the mask transformer, "linear" for the point-wise linear decoder.
        image_size: (height, width) in pixels that position embeddings are learned for, multiples of ``patch_size``.
            Images of other sizes get them resized.
        patch_size: side of a patch in pixels.
        hidden_dim: channels of encoder and decoder, a multiple of ``num_heads`` (and ``decoder_heads``).
        encoder_layers: blocks of the encoder.
        num_heads: attention heads of the encoder.
        feedforward_dim: hidden channels of the blocks' perceptrons, in encoder and decoder.
        dropout: of the encoder.
        drop_path: stochastic depth of the encoder's last block; it grows linearly from 0 at the first.
        distilled: the encoder has a distillation token, as DeiT (the paper's Seg-B†).
        decoder_layers: blocks of the mask transformer.
        decoder_heads: attention heads of the mask transformer.
        decoder_dropout: of the mask transformer.
        decoder_drop_path: stochastic depth of the mask transformer's last block.
        window_size: side in pixels of the windows in which images are predicted; 0 for whole images.
        window_stride: pixels from one window to the next, at most ``window_size``.
        ignore_index: the class of pixels that do not count, outside ``0..K-1``.
        class_names: one name for each class, or empty.
        pixel_mean: per channel, subtracted from images in 0..1.
        pixel_std: per channel, divides what remains.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "Segmenter"

    num_classes: int
    decoder: str = "mask"
    image_size: tuple[int, ...] = (512, 512)
    patch_size: int = 16
    hidden_dim: int = 384
    encoder_layers: int = 12
    num_heads: int = 6
    feedforward_dim: int = 1536
    dropout: float = 0.0
    drop_path: float = 0.1
    distilled: bool = False
    decoder_layers: int = 2
    decoder_heads: int = 6
    decoder_dropout: float = 0.1
    decoder_drop_path: float = 0.0
    window_size: int = 512
    window_stride: int = 512
    ignore_index: int = 255
    class_names: tuple[str, ...] = ()
    pixel_mean: tuple[float, ...] = VIT_MEAN
    pixel_std: tuple[float, ...] = VIT_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decoder in DECODERS, "decoder", repr(self.decoder), " or ".join(map(repr, DECODERS)))
        self.require_at_least(1, "patch_size", "hidden_dim", "encoder_layers", "num_heads", "feedforward_dim")
        self.require_at_least(1, "decoder_layers", "decoder_heads")
        require(
            len(self.image_size) == 2 and all(side > 0 and side % self.patch_size == 0 for side in self.image_size),
            "image_size",
            self.image_size,
            f"(height, width), positive multiples of patch_size {self.patch_size}",
        )
        for heads in ("num_heads", *(["decoder_heads"] if self.decoder == "mask" else [])):
            multiple = getattr(self, heads)
            require(self.hidden_dim % multiple == 0, "hidden_dim", self.hidden_dim, f"a multiple of {heads} {multiple}")
        for name in ("dropout", "drop_path", "decoder_dropout", "decoder_drop_path"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        check_window(self.window_size, self.window_stride)
        self.require_outside_classes("ignore_index")

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of the patches that position embeddings are learned for."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @staticmethod
    def preset(name: str, num_classes: int, **overrides: Any) -> SegmenterConfig:
        """A configuration by name: "tiny" for tests and demonstrations, or one of the paper's models.

        Args:
            name: "tiny" or "seg-SIZE-DECODER-PATCH": "seg-tiny-mask-16", "seg-small-mask-16", "-32",
                "seg-base-mask-8", "-16", "-32", "seg-large-mask-16", "-32", and the same with "linear".
            num_classes: K.
            overrides: fields to set otherwise.

        Raises:
            ValueError: an unknown name.
        """
        return SegmenterConfig._from_preset(PRESETS, name, {"num_classes": num_classes, **overrides})


def check_window(size: int, stride: int) -> None:
    """Refuses windows that would leave pixels out.

    Raises:
        ValueError: a negative size, or a stride that is not in ``1..size``.
    """
    require(size >= 0, "window_size", size, "at least 1, or 0 for whole images")
    require(size == 0 or 1 <= stride <= size, "window_stride", stride, f"in 1..{size}, the window's size")


# hidden_dim, encoder_layers, heads, side of images and windows, patch sizes
SIZES = {
    "tiny": (192, 12, 3, 512, (16,)),
    "small": (384, 12, 6, 512, (16, 32)),
    "base": (768, 12, 12, 512, (8, 16, 32)),
    "large": (1024, 24, 16, 640, (16, 32)),
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": (64, 64),
        "patch_size": 8,
        "hidden_dim": 96,
        "encoder_layers": 3,
        "num_heads": 4,
        "feedforward_dim": 256,
        "drop_path": 0.0,
        "decoder_layers": 1,
        "decoder_heads": 4,
        "decoder_dropout": 0.0,
        "window_size": 64,
        "window_stride": 48,
    },
    **{
        f"seg-{size}-{decoder}-{patch_size}": {
            "decoder": decoder,
            "image_size": (side, side),
            "patch_size": patch_size,
            "hidden_dim": dim,
            "encoder_layers": layers,
            "num_heads": heads,
            "feedforward_dim": 4 * dim,
            "decoder_heads": heads,
            "window_size": side,
            "window_stride": side,
        }
        for size, (dim, layers, heads, side, patch_sizes) in SIZES.items()
        for decoder in DECODERS
        for patch_size in patch_sizes
    },
}
