"""Sound event detection as mask classification in one dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmask.functional import mask_loss, mask_products
from fastmask.models.base import PretrainedModel, config_or_fields
from fastmask.models.sound_config import SoundEventConfig
from fastmask.models.sound_targets import SoundTargets, decode_events
from fastmask.modules.audio import FrameEncoder, LogMel, linear_softmax
from fastmask.modules.predictor import TransformerPredictor
from fastmask.modules.processes import across_processes

EPSILON = 1e-7  # probabilities stay this far from 0 and 1


class SoundEventDetector(PretrainedModel):
    """Which sounds a clip holds, and when: MaskFormer (arXiv:2107.06278) over time instead of an image.

    A query stands for each class. From the decoder it learns whether its class occurs in the clip, and a mask embedding
    whose products with the embeddings of the frames, divided by a temperature, are the logits of when. A frame's
    probability is that of the clip times that of the mask, sigmoid(presence) sigmoid(mask); the clip's own prediction
    pools its frames by linear softmax, so that clips without times train the masks too.

    ``SoundEventDetector(config)``, or ``SoundEventDetector(num_classes=10, ...)`` with the fields of
    :class:`SoundEventConfig` as keywords.

    Args:
        config: the configuration; None to give its fields as keywords.
        frame_encoder: a module that brings ``(B, S)`` waveforms to ``(B, hidden_dim, T)`` features, of one frame each
            ``frame_samples`` of the configuration, rounded up; by default a spectrogram and a convolutional network.
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range.
    """

    config_class = SoundEventConfig
    class_weights = ("predictor.query_embed.",)
    config: SoundEventConfig

    def __init__(
        self, config: SoundEventConfig | None = None, *, frame_encoder: nn.Module | None = None, **options: Any
    ) -> None:
        config = config_or_fields(type(self), config, options)
        super().__init__(config)
        transformer = {
            "num_heads": config.num_heads,
            "feedforward_dim": config.feedforward_dim,
            "dropout": config.dropout,
        }
        self.frame_encoder = frame_encoder or nn.Sequential(
            LogMel(config.sample_rate, config.num_mels, config.window, config.hop),
            FrameEncoder(
                config.num_mels,
                config.channels,
                config.hidden_dim,
                config.time_stride,
                encoder_layers=config.encoder_layers,
                **transformer,
            ),
        )
        self.frame_embed = nn.Conv1d(config.hidden_dim, config.mask_dim, 1)
        self.predictor = TransformerPredictor(
            config.hidden_dim,
            1,
            num_queries=config.num_classes,
            hidden_dim=config.hidden_dim,
            mask_dim=config.mask_dim,
            decoder_layers=config.decoder_layers,
            **transformer,
        )

    def forward(
        self, waveforms: Tensor, targets: Sequence[Mapping[str, Tensor]] | SoundTargets | None = None
    ) -> dict[str, Tensor]:
        """Predictions, or losses if there are targets.

        Args:
            waveforms: ``(B, S)`` floating point, at the configuration's sample rate.
            targets: for each clip a dict of "labels" ``(E,)`` and, where the times are known, "onsets" and "offsets"
                ``(E,)`` in seconds; or :class:`SoundTargets` of as many frames as the result has.

        Returns:
            Without targets: "presence_logits" ``(L, B, K)``, "mask_logits" ``(L, B, K, T)``, and of the last layer
            "frame_probabilities" ``(B, K, T)`` and "clip_probabilities" ``(B, K)``.

            With targets: "loss_strong" (cross-entropy of the frames of clips with known times), "loss_weak" (of the
            clips), "loss_mask" and "loss_dice" (of the masks of classes that occur), and the same with "_0", "_1", ...
            for the layers before the last, each a scalar that is multiplied by its weight already.

        Raises:
            TypeError: waveforms or targets of another type or dtype.
            ValueError: shapes that do not fit, labels out of range, or impossible times.
        """
        presence_logits, mask_logits = self._predict_logits(waveforms, all_layers=self.config.deep_supervision)
        if targets is not None:
            if not isinstance(targets, SoundTargets):
                targets = self.targets_of(targets, mask_logits)
            if targets.activity.shape != mask_logits.shape[1:]:
                raise ValueError(
                    f"targets have activity of shape {tuple(targets.activity.shape)}; expected "
                    f"{tuple(mask_logits.shape[1:])} for the waveforms"
                )
            return self._losses(presence_logits, mask_logits, targets)
        frames = frame_probabilities(presence_logits[-1], mask_logits[-1])
        return {
            "presence_logits": presence_logits,
            "mask_logits": mask_logits,
            "frame_probabilities": frames,
            "clip_probabilities": linear_softmax(frames),
        }

    def targets_of(self, events: Sequence[Mapping[str, Tensor]], mask_logits: Tensor) -> SoundTargets:
        """The events of a batch on the frames of ``mask_logits (..., B, K, T)``."""
        if not isinstance(events, list | tuple) or len(events) != mask_logits.shape[-3]:
            found = len(events) if isinstance(events, list | tuple) else type(events).__name__
            raise ValueError(f"targets must be a list of {mask_logits.shape[-3]} dicts, one for each clip; got {found}")
        config = self.config
        return SoundTargets.from_events(
            events, config.num_classes, mask_logits.shape[-1], config.frame_seconds, mask_logits.device
        )

    @torch.inference_mode()
    def predict(
        self, waveforms: Tensor, *, threshold: float = 0.5, median_seconds: float | None = None
    ) -> list[dict[str, Any]]:
        """The events of each clip. Runs in evaluation mode, without gradients.

        Args:
            waveforms: ``(B, S)`` floating point.
            threshold: the probability, 0..1, that a frame must exceed.
            median_seconds: of the filter; the configuration's by default.

        Returns:
            For each clip {"events": as :func:`decode_events` gives them, "frame_probabilities" ``(K, T)``,
            "clip_probabilities" ``(K,)``}.

        Raises:
            TypeError, ValueError: as for a call of the model; a threshold or length out of range.
        """
        median_seconds = self.config.median_seconds if median_seconds is None else median_seconds
        with self._evaluating():
            frames = frame_probabilities(*self.final_logits(waveforms))
        return [
            {
                "events": decode_events(
                    clip, self.config.frame_seconds, threshold=threshold, median_seconds=median_seconds
                ),
                "frame_probabilities": clip,
                "clip_probabilities": linear_softmax(clip),
            }
            for clip in frames
        ]

    def final_logits(self, waveforms: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions of the last decoder layer alone: ``(B, S)`` to ``(B, K)`` logits of presence and
        ``(B, K, T)`` of when.
        """
        presence_logits, mask_logits = self._predict_logits(waveforms, all_layers=False)
        return presence_logits[-1], mask_logits[-1]

    def _predict_logits(self, waveforms: Tensor, *, all_layers: bool) -> tuple[Tensor, Tensor]:
        """``presence_logits (L, B, K)`` and ``mask_logits (L, B, K, T)``."""
        if not isinstance(waveforms, Tensor) or not waveforms.is_floating_point():
            found = waveforms.dtype if isinstance(waveforms, Tensor) else type(waveforms).__name__
            raise TypeError(f"waveforms must be a floating-point tensor, got {found}")
        frame = self.config.frame_samples
        if waveforms.dim() != 2 or waveforms.shape[0] == 0 or waveforms.shape[1] < frame:
            raise ValueError(
                f"waveforms has shape {tuple(waveforms.shape)}; expected (B, S) with at least one frame of {frame} "
                "samples"
            )
        waveforms = F.pad(waveforms, (0, -waveforms.shape[1] % frame))
        features = self.frame_encoder(waveforms)
        class_logits, mask_embed = self.predictor(features[:, :, None], all_layers=all_layers)
        mask_logits = mask_products(mask_embed, self.frame_embed(features)[:, :, None]).squeeze(-2)
        # Two classes, the event and no-object: the difference of their logits is that of the event's probability.
        return class_logits[..., 0] - class_logits[..., 1], mask_logits / self.config.temperature

    def _losses(self, presence_logits: Tensor, mask_logits: Tensor, targets: SoundTargets) -> dict[str, Tensor]:
        config = self.config
        frames = frame_probabilities(presence_logits, mask_logits)
        strong = targets.strong[:, None, None].to(frames.dtype)
        activity = targets.activity.to(frames.dtype).expand_as(frames)
        presence = targets.presence.to(frames.dtype).expand_as(presence_logits)
        masks = targets.masks()
        # Means over the frames of clips with known times, over all clips, and over the masks.
        known = strong.sum() * activity[0, 0].numel()
        clips = torch.full_like(known, presence[0].numel())
        known, clips, num_masks = across_processes([known, clips, masks.counts.sum().float()], least=(1, 1, 1))
        loss_strong = (strong * _cross_entropy(frames, activity)).flatten(1).sum(1) / known
        loss_weak = _cross_entropy(linear_softmax(frames), presence).flatten(1).sum(1) / clips
        assignment = masks.labels.expand(len(mask_logits), -1, -1).contiguous()
        loss_mask, loss_dice = mask_loss(mask_logits.unsqueeze(-2), masks, assignment, num_masks=num_masks)
        losses = {}
        for name, values, weight in (
            ("loss_strong", loss_strong, config.strong_weight),
            ("loss_weak", loss_weak, config.weak_weight),
            ("loss_mask", loss_mask, config.mask_weight),
            ("loss_dice", loss_dice, config.dice_weight),
        ):
            losses[name] = weight * values[-1]
            losses |= {f"{name}_{i}": weight * value for i, value in enumerate(values[:-1])}
        return losses


def frame_probabilities(presence_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """``(..., K)`` and ``(..., K, T)`` to float32 probabilities ``(..., K, T)`` that a class sounds in a frame."""
    return presence_logits.float().sigmoid()[..., None] * mask_logits.float().sigmoid()


def _cross_entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    # Autocast refuses binary_cross_entropy of probabilities, which these are: products of two sigmoids.
    p = probabilities.clamp(EPSILON, 1 - EPSILON)
    return -(targets * p.log() + (1 - targets) * (1 - p).log())
