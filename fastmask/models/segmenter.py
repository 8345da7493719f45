"""Segmenter: semantic segmentation by a plain vision transformer and a decoder of its patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmask.models.base import Images, SegmentationModel, config_or_fields
from fastmask.models.images import ImageBatch, Size, pad_images
from fastmask.models.inference import check_sizes
from fastmask.models.per_pixel import PixelTargets, check_output, fit_class_map, per_pixel_loss, pixel_results, upsample
from fastmask.models.segmenter_config import SegmenterConfig, check_window
from fastmask.models.vit_weights import pretrained_vit
from fastmask.models.windows import windowed_batch, windowed_logits
from fastmask.modules.segmenter import LinearDecoder, MaskTransformer
from fastmask.modules.vit import VisionTransformer
from fastmask.ops._tracing import ceil_div


class Segmenter(SegmentationModel):
    """Segmenter (Strudel et al., ICCV 2021, arXiv:2105.05633).

    ``Segmenter(config)``, or ``Segmenter(num_classes=150, decoder="linear", ...)`` with the fields of
    :class:`SegmenterConfig` as keywords. The names of its weights are those of the authors' code;
    :func:`fastmask.integrations.checkpoints.from_original_segmenter` reads their checkpoints.

    Args:
        config: the configuration; None to give its fields as keywords.
        pretrained_backbone: a folder or hub id from which ``transformers`` reads a ViT or DeiT for the encoder.
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range, or a pretrained backbone of another architecture.
    """

    config_class = SegmenterConfig
    backbone_weights = ("encoder.",)
    class_weights = ("decoder.cls_emb", "decoder.mask_norm.", "decoder.head.")
    config: SegmenterConfig

    def __init__(
        self, config: SegmenterConfig | None = None, *, pretrained_backbone: str | None = None, **options: Any
    ) -> None:
        config = config_or_fields(type(self), config, options)
        super().__init__(config)
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
                padded at the bottom and right to multiples of the patch size. Normalisation happens inside. Patches
                beyond an image are not attended to, so that an image gives the same in a list as alone.
            targets: ``(B, H, W)`` integer classes in ``0..K-1`` or ``ignore_index``, or a list of ``(H_b, W_b)``; or
                what :class:`fastmask.MaskFormer` takes, whose pixels of no target and void pixels are ignored.

        Returns:
            Without targets: "logits" ``(B, K, h, w)``, one for each patch; beyond a smaller image of a list they repeat
            its last row and column.

            With targets: "loss_ce", a scalar: the cross-entropy at the images' size, averaged over the pixels that have
            a class.

        Raises:
            TypeError: images or targets of another type or dtype.
            ValueError: shapes that do not fit each other, or classes out of range.
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
        """Semantic segmentation at the size asked for. Runs in evaluation mode, without gradients.

        Args:
            images: as for a call of the model.
            sizes: (height, width) of the results, for all images or for each; by default each image's own.
            window: (size, stride) of the windows that images are predicted in, in pixels, or a size that is the stride
                too; 0 for whole images; by default the configuration's. Logits are averaged where windows overlap. An
                image with a side smaller than a window is enlarged until that side is as large.
            window_batch: how many windows to predict at a time.
            output: "labels" or "scores".

        Returns:
            One tensor an image: ``(H, W)`` labels, the smallest of uint8, int16 and int32 that holds ``0..K-1``; or
            ``(K, H, W)`` scores, the softmax over classes.

        Raises:
            TypeError: images of another type or dtype, or a window that is none.
            ValueError: an unknown output, a window or batch out of range, or sizes that do not fit the images.
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
        """The prediction in windows, which is averaged where they overlap.

        Args:
            images: ``(B, C, H, W)`` in 0..1.
            window: (size, stride) in pixels.

        Returns:
            logits ``(B, K, H, W)``; of images with a side smaller than a window, at the size of their enlargement.
        """

        def segment(windows: Tensor) -> Tensor:
            batch = pad_images(windows, self.config.patch_size, windows.shape[1])
            logits = self._patch_logits(batch)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if batch.padded_size == tuple(windows.shape[-2:]):
                return logits
            return upsample(logits, batch.padded_size)[..., : windows.shape[-2], : windows.shape[-1]]

        height, width = images.shape[-2:]
        pixels = self._batch(images).pixels[..., :height, :width]
        return windowed_batch(pixels, segment, *window)

    def _batch(self, images: Images) -> ImageBatch:
        """Normalised images, padded to multiples of the patch size."""
        batch = self._pad(images, self.config.patch_size)
        return ImageBatch(self._normalise(batch), batch.sizes)

    def _patch_logits(self, batch: ImageBatch) -> Tensor:
        """``(B, K, h, w)``: the logits of each patch of normalised images."""
        patch_size = self.config.patch_size
        rows, columns = (side // patch_size for side in batch.padded_size)
        grids = [(ceil_div(height, patch_size), ceil_div(width, patch_size)) for height, width in batch.sizes]
        padding = batch.padding_mask(rows, columns)
        attended = None if padding is None else ~padding.flatten(1)
        patches = self.encoder(batch.pixels, grids, attended)
        logits = self.decoder(patches, attended).transpose(1, 2).unflatten(2, (rows, columns))
        if padding is None:
            return logits
        # Repeating the edge makes upsampling give the same inside an image as it would without the padding.
        return torch.cat(
            [
                pad(image_logits[None, :, :h, :w], (0, columns - w, 0, rows - h), mode="replicate")
                for image_logits, (h, w) in zip(logits, grids, strict=True)
            ]
        )

    def _pixel_logits(self, batch: ImageBatch) -> Iterator[Tensor]:
        """``(K, H_b, W_b)`` of each of the normalised images, one at a time."""
        logits = self._patch_logits(batch)
        for b, (height, width) in enumerate(batch.sizes):
            image_logits = logits[b : b + 1].to(torch.promote_types(logits.dtype, torch.float32))
            yield upsample(image_logits, batch.padded_size)[0, :, :height, :width]

    def _window_logits(self, windows: Tensor) -> Iterator[Tensor]:
        """``(K, size, size)`` of each of the normalised windows ``(n, C, size, size)``."""
        return self._pixel_logits(pad_images(windows, self.config.patch_size, windows.shape[1]))

    def window_of(self, window: int | tuple[int, int] | None) -> tuple[int, int]:
        """(size, stride) of the windows that :meth:`predict` takes for its argument; a size of 0 for whole images.

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
