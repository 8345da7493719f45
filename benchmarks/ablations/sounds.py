"""Structure (e) on composed clips, and the frame-wise classifier with which it is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from torch.utils.data import DataLoader, Dataset

from benchmarks.ablations.variants import FRAMES, NO_MASK_LOSSES, Run, Settings, Variant
from fastmask.data import EVENT_CLASSES, Clip, ComposedClips, collate_clips
from fastmask.metrics import SoundEventMetrics
from fastmask.models import SoundEventConfig, SoundEventDetector
from fastmask.models.sound import SoundTargets, decode_events
from fastmask.training.sampler import StepSampler

CLIPS = "composed:clips"


class FrameClassifier(nn.Module):
    """The counterpart of (a) for sound: classifies each frame from the features of the same encoder, without queries.

    Args:
        config: the configuration of the detector with which it is compared; decoder fields are not used.
    """

    def __init__(self, config: SoundEventConfig):
        super().__init__()
        self.config = config
        self.frame_encoder = SoundEventDetector(config).frame_encoder
        self.classifier = nn.Conv1d(config.hidden_dim, config.num_classes, 1)

    def forward(self, waveforms: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The cross-entropy of the frames of ``(B, S)`` waveforms, as "loss_strong"."""
        logits = self._logits(waveforms)
        config = self.config
        truth = SoundTargets.from_events(
            targets, config.num_classes, logits.shape[-1], config.frame_seconds, logits.device
        )
        loss = binary_cross_entropy_with_logits(logits, truth.activity.to(logits.dtype))
        return {"loss_strong": config.strong_weight * loss}

    @torch.inference_mode()
    def predict(self, waveforms: Tensor) -> list[dict[str, Any]]:
        """{"events"} of each clip, as :meth:`SoundEventDetector.predict`; in evaluation mode, which the caller sets."""
        frames = self._logits(waveforms).sigmoid()
        return [{"events": decode_events(clip, self.config.frame_seconds)} for clip in frames]

    def _logits(self, waveforms: Tensor) -> Tensor:
        """``(B, K, T)``."""
        waveforms = pad(waveforms, (0, -waveforms.shape[1] % self.config.frame_samples))
        return self.classifier(self.frame_encoder(waveforms))


class _Indexed(Dataset[Clip]):
    """Clips by (epoch, index), as a ``StepSampler`` gives them; a clip is the same in each epoch."""

    def __init__(self, clips: ComposedClips):
        self.clips = clips

    def __getitem__(self, index: tuple[int, int]) -> Clip:
        return self.clips[index[1]]


def sound_config(model: str) -> SoundEventConfig:
    return SoundEventConfig.preset(model, len(EVENT_CLASSES), class_names=tuple(EVENT_CLASSES))


def make_detector(settings: Settings, variant: Variant) -> nn.Module:
    config = sound_config(settings.model)
    if variant.structure == FRAMES:
        return FrameClassifier(config)
    if variant.structure == NO_MASK_LOSSES:
        config = config.replace(mask_weight=0.0, dice_weight=0.0)
    return SoundEventDetector(config.replace(decoder_layers=variant.layers))


def training_clips(settings: Settings, run: Run, workers: int, start: int = 0) -> Iterator[Any]:
    """The batches of a run from step ``start`` on, which depend only on the seed."""
    clips = ComposedClips("train", duration=settings.size)
    sampler = StepSampler(len(clips), settings.batch_size, run.seed, start, settings.steps)
    return iter(DataLoader(_Indexed(clips), batch_sampler=sampler, collate_fn=collate_clips, num_workers=workers))


def validation_clips(settings: Settings, workers: int) -> DataLoader:
    clips = ComposedClips("val", length=settings.val_samples, duration=settings.size)
    return DataLoader(clips, settings.batch_size, collate_fn=collate_clips, num_workers=workers)


def evaluate_clips(network: nn.Module, batches: DataLoader, device: torch.device) -> dict[str, float]:
    """Event-based "F1", "precision", "recall" and "F1_macro", in 0..1."""
    network.eval()
    metrics = SoundEventMetrics(len(EVENT_CLASSES))
    for waveforms, events in batches:
        for result, truth in zip(network.predict(waveforms.to(device)), events, strict=True):
            metrics.update(result["events"], truth)
    return metrics.compute()
