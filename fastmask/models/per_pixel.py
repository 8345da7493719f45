"""The per-pixel baselines that MaskFormer's paper compares with: the same features, classified pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.functional import mask_products
from fastmask.models._base import PixelDecoderModel
from fastmask.models._configuration import TINY, PixelDecoderConfig
from fastmask.models._images import ImageBatch, Images, Size
from fastmask.models._inference import check_sizes
from fastmask.models._pixels import (
    PixelTargets,
    check_output,
    fit_class_map,
    per_pixel_losses,
    pixel_results,
)
from fastmask.modules.predictor import TransformerPredictor
from fastmask.modules.resize import resize_bilinear

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "per-pixel-r50": {},
    "per-pixel-plus-r50": {"transformer_decoder": True},
}


@dataclass(frozen=True)
class PerPixelBaselineConfig(PixelDecoderConfig):
    """Everything that :class:`fastmask.PerPixelBaseline` is built from. Its presets are "tiny", and the paper's
    "per-pixel-r50" and "per-pixel-plus-r50".

    Args:
        num_classes: K.
        transformer_decoder: False for the paper's PerPixelBaseline, True for PerPixelBaseline+.
        ignore_index: the value of ignored pixels, outside ``0..K-1``.
        backbone, hidden_dim, ...: as for :class:`fastmask.MaskFormerConfig`.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "PerPixelBaseline"
    presets = PRESETS

    transformer_decoder: bool = False
    ignore_index: int = 255

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_outside_classes("ignore_index")


class PerPixelBaseline(PixelDecoderModel):
    """Per-pixel classification on MaskFormer's features (arXiv:2107.06278, section 4, "Baseline models").

    PerPixelBaseline classifies the pixel embeddings by a 1 x 1 convolution. PerPixelBaseline+, with
    ``transformer_decoder=True``, gives MaskFormer's transformer decoder K queries, one for each class: the logits are
    the products of the pixel embeddings and the decoded queries.

    Call ``PerPixelBaseline(config)``, or ``PerPixelBaseline(num_classes=150, backbone="swin-tiny", ...)`` with the
    fields of :class:`PerPixelBaselineConfig` as keywords; the other arguments and the errors are those of
    :class:`fastmask.MaskFormer`.
    """

    config_class = PerPixelBaselineConfig
    class_weights = ("classifier.", "predictor.query_embed.")
    config: PerPixelBaselineConfig

    def _build_head(self) -> None:
        num_classes = self.config.num_classes
        if self.config.transformer_decoder:
            self.predictor = TransformerPredictor(
                num_classes=None, num_queries=num_classes, **self._transformer_options
            )
        else:
            self.classifier = nn.Conv2d(self.config.mask_dim, num_classes, 1)
            nn.init.kaiming_normal_(self.classifier.weight, mode="fan_out", nonlinearity="relu")
            torch.nn.init.zeros_(self.classifier.get_parameter("bias"))

    def forward(self, images: Images, targets: PixelTargets | None = None) -> dict[str, Any]:
        """Predictions, or losses if there are targets.

        Args:
            images: ``(B, C, H, W)`` floating point in 0..1, or a list of ``(C, H_b, W_b)`` of any sizes, which are
                padded at the bottom and right; height and width of the batch become multiples of
                ``size_divisibility``. The model normalizes the images itself.
            targets: ``(B, H, W)`` integer classes in ``0..K-1`` or ``ignore_index``, or a list of ``(H_b, W_b)``; or
                targets of :class:`fastmask.MaskFormer`, where void pixels and pixels without a target are ignored.

        Returns:
            Without targets: "logits" ``(B, K, h, w)``, and "aux_outputs", a list with the same for each decoder layer
            before the last, empty without a transformer decoder.

            With targets: "loss_ce", and the same with "_0", "_1", ... for the layers before the last, each a scalar:
            the cross-entropy at the images' size, averaged over the pixels that have a class. Training minimizes their
            sum.

        Raises:
            TypeError: images or targets of another type or dtype.
            ValueError: shapes that do not match, or classes out of range.
        """
        batch = self.preprocessor(images)
        ignore_index = self.config.ignore_index
        if targets is not None:
            targets = fit_class_map(targets, batch, self.config.num_classes, ignore_index)
        *earlier, logits = self._predict_logits(batch, all_layers=self.config.deep_supervision)
        if targets is None:
            return {"logits": logits, "aux_outputs": [{"logits": layer} for layer in earlier]}
        loss, *others = per_pixel_losses([logits, *earlier], targets, ignore_index)
        return {"loss_ce": loss} | {f"loss_ce_{i}": other for i, other in enumerate(others)}

    @torch.inference_mode()
    def predict(
        self, images: Images, sizes: Size | Sequence[Size] | None = None, *, output: str = "labels"
    ) -> list[Tensor]:
        """Semantic segmentation at any size. Runs in evaluation mode, without gradients.

        Args:
            images: as for a call of the model.
            sizes: (height, width) of the results, for all images or for each; by default the images' sizes.
            output: "labels" or "scores".

        Returns:
            One tensor per image: ``(H, W)`` labels, the smallest of uint8, int16 and int32 that holds ``0..K-1``; or
            ``(K, H, W)`` scores, the softmax over classes.

        Raises:
            TypeError: images of another type or dtype.
            ValueError: an unknown output, or sizes that do not fit the images.
        """
        check_output(output)
        batch = self.preprocessor(images)
        sizes = check_sizes(sizes, batch.sizes)
        with self._evaluating():
            logits = self._predict_logits(batch, all_layers=False)[-1]
        results = []
        for b, (size, (height, width)) in enumerate(zip(sizes, batch.sizes, strict=True)):
            padded = resize_bilinear(logits[b : b + 1].float(), batch.padded_size)
            results.append(pixel_results(padded[..., :height, :width], size, output)[0])
        return results

    def final_logits(self, images: Tensor) -> tuple[Tensor, Size]:
        """The prediction of the last layer only.

        Args:
            images: ``(B, C, H, W)`` in 0..1.

        Returns:
            logits ``(B, K, h, w)``, and the (height, width) of the padded input that they cover.
        """
        batch = self.preprocessor(images)
        return self._predict_logits(batch, all_layers=False)[-1], batch.padded_size

    def _predict_logits(self, batch: ImageBatch, *, all_layers: bool) -> Sequence[Tensor]:
        """``(B, K, h, w)`` of each layer that predicts, the last layer last."""
        pixel_embed, memory, padding_mask = self._embed_pixels(batch)
        if not self.config.transformer_decoder:
            return [self.classifier(pixel_embed)]
        _, class_embed = self.predictor(memory, padding_mask, all_layers=all_layers)
        return mask_products(class_embed, pixel_embed).unbind()
