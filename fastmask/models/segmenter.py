"""Segmenter: configuration, presets, the network with both decoders, and pretrained weights for its ViT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmask.extras import extra
from fastmask.models._base import PretrainedModel, config_or_fields
from fastmask.models._configuration import ModelConfig, check_pixel_statistics, require
from fastmask.models._images import ImageBatch, ImagePreprocessor, Images, Size, pad_images
from fastmask.models._inference import check_sizes
from fastmask.models._pixels import PixelTargets, check_output, fit_class_map, per_pixel_loss, pixel_results
from fastmask.models._views import windowed_batch, windowed_logits
from fastmask.models.weight_files import check_keys, pretrained_config
from fastmask.modules.patch_decoders import LinearDecoder, MaskTransformer
from fastmask.modules.resize import resize_bilinear
from fastmask.modules.vit import VisionTransformer, resize_positions
from fastmask.ops._tracing import ceil_div

DECODERS = ("mask", "linear")
# ViTs pretrained on ImageNet-21k expect pixels in -1..1; DeiTs expect ImageNet's mean and deviation.
VIT_MEAN = (0.5, 0.5, 0.5)
VIT_STD = (0.5, 0.5, 0.5)


# hidden_dim, encoder_layers, num_heads, side of images and windows, patch sizes
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


@dataclass(frozen=True)
class SegmenterConfig(ModelConfig):
    """Everything that :class:`fastmask.Segmenter` is built from. The defaults are those of the paper's Seg-S-Mask/16 on
    ADE20K (arXiv:2105.05633, section 4, and the authors' configuration file). Its presets are "tiny" and
    "seg-SIZE-DECODER-PATCH": "seg-tiny-mask-16", "seg-small-mask-16", "-32", "seg-base-mask-8", "-16", "-32",
    "seg-large-mask-16", "-32", and the same with "linear".

    Args:
        num_classes: K.
        decoder: "mask" for the mask transformer, "linear" for the point-wise linear decoder.
        image_size: (height, width) in pixels for which position embeddings are learned, multiples of ``patch_size``.
            The embeddings are resized for images of other sizes.
        patch_size: side of a patch in pixels.
        hidden_dim: channels of encoder and decoder, a multiple of ``num_heads`` (and ``decoder_heads``).
        encoder_layers: blocks of the encoder.
        num_heads: attention heads of the encoder.
        feedforward_dim: hidden channels of the blocks' MLPs, in encoder and decoder.
        dropout: dropout probability in the encoder.
        drop_path: stochastic depth of the encoder's last block; it grows linearly from 0 at the first.
        distilled: whether the encoder has a distillation token, as in DeiT (the paper's Seg-B†).
        decoder_layers: blocks of the mask transformer.
        decoder_heads: attention heads of the mask transformer.
        decoder_dropout: dropout probability in the mask transformer.
        decoder_drop_path: stochastic depth of the mask transformer's last block.
        window_size: side in pixels of the windows in which images are predicted; 0 for whole images.
        window_stride: pixels from one window to the next, at most ``window_size``.
        ignore_index: the value of ignored pixels, outside ``0..K-1``.
        class_names: one name for each class, or empty.
        pixel_mean: mean of each channel, subtracted from images in 0..1.
        pixel_std: standard deviation of each channel, which divides the difference.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "Segmenter"
    presets = PRESETS

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
    pixel_mean: tuple[float, ...] = VIT_MEAN
    pixel_std: tuple[float, ...] = VIT_STD

    @property
    def recipe(self) -> str:
        return "segmenter-ade20k"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixel_statistics(self.pixel_mean, self.pixel_std)
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
        """(rows, columns) of the patches for which position embeddings are learned."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size


def check_window(size: int, stride: int) -> None:
    """Checks that windows cover every pixel.

    Raises:
        ValueError: a negative size, or a stride that is not in ``1..size``.
    """
    require(size >= 0, "window_size", size, "at least 1, or 0 for whole images")
    require(size == 0 or 1 <= stride <= size, "window_stride", stride, f"in 1..{size}, the window's size")


# Replacements, in this order, from the names of ViT and DeiT in transformers 4 and 5 to timm's, which Segmenter uses.
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
# Queries, keys and values in transformers 5 and 4.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def pretrained_vit(folder: str, encoder: VisionTransformer, grid_size: tuple[int, int]) -> dict[str, Tensor]:
    """A state dict for the encoder from a ViT or DeiT; position embeddings are resized to the encoder's grid.

    Args:
        folder: a folder or hub id from which ``transformers`` reads the model.
        encoder: the encoder to fit.
        grid_size: (rows, columns) of its patches.

    Raises:
        ValueError: a model of another type, or weights that do not fit; the message names them.
    """
    with extra("models"):
        import transformers

    config = pretrained_config(folder)
    if config.model_type not in ("vit", "deit"):
        raise ValueError(f"pretrained_backbone {folder!r} is of model type {config.model_type!r}; expected vit or deit")
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    weights = _renamed(model.state_dict())
    num_special = 2 if config.model_type == "deit" else 1
    tokens, patches = weights["pos_embed"].split([num_special, weights["pos_embed"].shape[1] - num_special], 1)
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


class Segmenter(PretrainedModel):
    """Segmenter (Strudel et al., ICCV 2021, arXiv:2105.05633).

    Call ``Segmenter(config)``, or ``Segmenter(num_classes=150, decoder="linear", ...)`` with the fields of
    :class:`SegmenterConfig` as keywords. The weights have the names of the authors' code, whose checkpoints
    :func:`fastmask.integrations.checkpoints.from_original_segmenter` reads.

    Args:
        config: the configuration; None to give its fields as keywords.
        pretrained_backbone: a folder or hub id from which ``transformers`` reads a ViT or DeiT for the encoder.
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range, or a pretrained backbone of another architecture.
    """

    config_class = SegmenterConfig
    views = ("window",)
    backbone_weights = ("encoder.",)
    backbone_blocks = r"encoder\.blocks\.(\d+)\."
    class_weights = ("decoder.cls_emb", "decoder.mask_norm.", "decoder.head.")
    config: SegmenterConfig

    def __init__(
        self, config: SegmenterConfig | None = None, *, pretrained_backbone: str | None = None, **options: Any
    ) -> None:
        config = config_or_fields(type(self), config, options)
        super().__init__(config)
        self.preprocessor = ImagePreprocessor(config.pixel_mean, config.pixel_std, config.patch_size)
        self.encoder = VisionTransformer(
            config.grid_size,
            config.patch_size,
            config.hidden_dim,
            config.encoder_layers,
            config.num_heads,
            config.feedforward_dim,
            dropout=config.dropout,
            drop_path=config.drop_path,
            distilled=config.distilled,
            channels=len(config.pixel_mean),
        )
        self.decoder: LinearDecoder | MaskTransformer
        if config.decoder == "linear":
            self.decoder = LinearDecoder(config.hidden_dim, config.num_classes)
        else:
            self.decoder = MaskTransformer(
                config.hidden_dim,
                config.num_classes,
                config.decoder_layers,
                config.decoder_heads,
                config.feedforward_dim,
                config.decoder_dropout,
                config.decoder_drop_path,
            )
        if pretrained_backbone is not None:
            self.encoder.load_state_dict(pretrained_vit(pretrained_backbone, self.encoder, config.grid_size))

    def forward(self, images: Images, targets: PixelTargets | None = None) -> dict[str, Tensor]:
        """Predictions, or the loss if there are targets.

        Args:
            images: ``(B, C, H, W)`` floating point in 0..1, or a list of ``(C, H_b, W_b)`` of any sizes, which are
                padded at the bottom and right to multiples of the patch size. The model normalizes the images itself.
                It does not attend to patches beyond an image, so an image gives the same logits in a list as alone.
            targets: ``(B, H, W)`` integer classes in ``0..K-1`` or ``ignore_index``, or a list of ``(H_b, W_b)``; or
                targets of :class:`fastmask.MaskFormer`, where void pixels and pixels without a target are ignored.

        Returns:
            Without targets: "logits" ``(B, K, h, w)`` of each patch; beyond a smaller image of a list they repeat the
            image's last row and column.

            With targets: "loss_ce", a scalar: the cross-entropy at the images' size, averaged over the pixels that have
            a class.

        Raises:
            TypeError: images or targets of another type or dtype.
            ValueError: shapes that do not match, or classes out of range.
        """
        batch = self._batch(images)
        ignore_index = self.config.ignore_index
        if targets is None:
            return {"logits": self._patch_logits(batch)}
        targets = fit_class_map(targets, batch, self.config.num_classes, ignore_index)
        return {"loss_ce": per_pixel_loss(self._patch_logits(batch), targets, ignore_index)}

    @torch.inference_mode()
    def predict(
        self,
        images: Images,
        sizes: Size | Sequence[Size] | None = None,
        *,
        window: int | tuple[int, int] | None = None,
        window_batch: int = 4,
        output: str = "labels",
    ) -> list[Tensor]:
        """Semantic segmentation at any size. Runs in evaluation mode, without gradients.

        Args:
            images: as for a call of the model.
            sizes: (height, width) of the results, for all images or for each; by default the images' sizes.
            window: (size, stride) in pixels of the windows in which images are predicted, or a size that is also the
                stride; 0 for whole images; by default the configuration's. Logits are averaged where windows overlap.
                An image with a side smaller than a window is enlarged until that side equals the window's.
            window_batch: number of windows to predict at a time.
            output: "labels" or "scores".

        Returns:
            One tensor per image: ``(H, W)`` labels, the smallest of uint8, int16 and int32 that holds ``0..K-1``; or
            ``(K, H, W)`` scores, the softmax over classes.

        Raises:
            TypeError: images of another type or dtype, or a window that is not a pair of integers.
            ValueError: an unknown output, a window or batch size out of range, or sizes that do not fit the images.
        """
        check_output(output)
        size, stride = self.window_of(window)
        if window_batch < 1:
            raise ValueError(f"window_batch must be at least 1, got {window_batch}")
        batch = self._batch(images)
        sizes = check_sizes(sizes, batch.sizes)
        with self._evaluating():
            if size == 0:
                logits = self._pixel_logits(batch)
            else:
                crops = [pixels[:, :h, :w] for pixels, (h, w) in zip(batch.pixels, batch.sizes, strict=True)]
                logits = windowed_logits(crops, self._window_logits, size, stride, window_batch)
            return [
                pixel_results(image_logits[None], image_size, output)[0]
                for image_logits, image_size in zip(logits, sizes, strict=True)
            ]

    def final_logits(self, images: Tensor) -> tuple[Tensor, Size]:
        """The prediction for whole images.

        Args:
            images: ``(B, C, H, W)`` in 0..1.

        Returns:
            logits ``(B, K, h, w)``, one for each patch, and the (height, width) of the padded input that they cover.
        """
        batch = self._batch(images)
        return self._patch_logits(batch), batch.padded_size

    def window_logits(self, images: Tensor, window: tuple[int, int]) -> Tensor:
        """The prediction in windows, averaged where they overlap.

        Args:
            images: ``(B, C, H, W)`` in 0..1.
            window: (size, stride) in pixels.

        Returns:
            logits ``(B, K, H, W)``; images with a side smaller than a window give logits of the enlarged image's size.
        """

        def segment(windows: Tensor) -> Tensor:
            batch = pad_images(windows, self.config.patch_size, windows.shape[1])
            logits = self._patch_logits(batch)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if batch.padded_size == tuple(windows.shape[-2:]):
                return logits
            return resize_bilinear(logits, batch.padded_size)[..., : windows.shape[-2], : windows.shape[-1]]

        height, width = images.shape[-2:]
        pixels = self._batch(images).pixels[..., :height, :width]
        return windowed_batch(pixels, segment, *window)

    def _batch(self, images: Images) -> ImageBatch:
        """Normalized images, padded to multiples of the patch size."""
        batch = self.preprocessor(images)
        return ImageBatch(self.preprocessor.normalize(batch), batch.sizes)

    def _patch_logits(self, batch: ImageBatch) -> Tensor:
        """``(B, K, h, w)``: the logits of each patch of normalized images."""
        patch_size = self.config.patch_size
        rows, columns = (side // patch_size for side in batch.padded_size)
        grids = [(ceil_div(height, patch_size), ceil_div(width, patch_size)) for height, width in batch.sizes]
        padding = batch.padding_mask(rows, columns)
        attended = None if padding is None else ~padding.flatten(1)
        patches = self.encoder(batch.pixels, grids, attended)
        logits = self.decoder(patches, attended).transpose(1, 2).unflatten(2, (rows, columns))
        if padding is None:
            return logits
        # With the edge repeated, upsampling gives the same values inside an image as without the padding.
        return torch.cat(
            [
                pad(image_logits[None, :, :h, :w], (0, columns - w, 0, rows - h), mode="replicate")
                for image_logits, (h, w) in zip(logits, grids, strict=True)
            ]
        )

    def _pixel_logits(self, batch: ImageBatch) -> Iterator[Tensor]:
        """``(K, H_b, W_b)`` of each of the normalized images, one at a time."""
        logits = self._patch_logits(batch)
        for b, (height, width) in enumerate(batch.sizes):
            image_logits = logits[b : b + 1].to(torch.promote_types(logits.dtype, torch.float32))
            yield resize_bilinear(image_logits, batch.padded_size)[0, :, :height, :width]

    def _window_logits(self, windows: Tensor) -> Iterator[Tensor]:
        """``(K, size, size)`` of each of the normalized windows ``(n, C, size, size)``."""
        return self._pixel_logits(pad_images(windows, self.config.patch_size, windows.shape[1]))

    def window_of(self, window: int | tuple[int, int] | None) -> tuple[int, int]:
        """(size, stride) of the windows that :meth:`predict` uses for its ``window``; a size of 0 for whole images.

        Raises:
            TypeError, ValueError: as for :meth:`predict`.
        """
        if window is None:
            return self.config.window_size, self.config.window_stride
        try:
            size, stride = (index(window), index(window)) if isinstance(window, int) else map(index, window)
        except (TypeError, ValueError) as error:
            raise TypeError(f"window must be a size or (size, stride) in pixels, got {window!r}") from error
        check_window(size, stride)
        return size, stride
