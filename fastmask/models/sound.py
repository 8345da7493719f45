"""Sound event detection by mask classification over time: configuration, targets and network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmask.functional import mask_loss, mask_products
from fastmask.models._base import PretrainedModel, config_or_fields
from fastmask.models._configuration import ModelConfig, require
from fastmask.modules.across_processes import across_processes
from fastmask.modules.audio import FrameEncoder, LogMel, linear_softmax, median_filter
from fastmask.modules.predictor import TransformerPredictor
from fastmask.targets import PADDING_LABEL, Targets

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "channels": (16, 32, 48, 64),
        "hidden_dim": 64,
        "mask_dim": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward_dim": 128,
        "dropout": 0.0,
    },
    "base": {},
}


@dataclass(frozen=True)
class SoundEventConfig(ModelConfig):
    """Everything that :class:`fastmask.SoundEventDetector` is built from. Its presets are "tiny" and "base".

    Args:
        num_classes: K, the kinds of events.
        sample_rate: sample rate of the waveforms in Hz.
        num_mels: mel bands of the spectrogram.
        window: length of the spectrogram's windows in samples.
        hop: samples from one window to the next.
        time_stride: windows per frame, a power of two, at most ``2 ** len(channels)``.
        channels: output channels of each convolutional block.
        hidden_dim: channels of encoder and decoder, a multiple of 4 and of ``num_heads``.
        mask_dim: channels of the frame and mask embeddings.
        encoder_layers: transformer layers over the frames.
        decoder_layers: number of layers of the transformer decoder.
        num_heads: attention heads of the encoder and the decoder.
        feedforward_dim: hidden channels of the MLPs in the encoder and the decoder.
        dropout: dropout probability in the encoder and the decoder.
        temperature: divisor of the products of mask and frame embeddings.
        deep_supervision: predict and supervise after each decoder layer instead of only after the last.
        strong_weight: weight of the cross-entropy of each frame.
        weak_weight: weight of the cross-entropy of the whole clip.
        mask_weight: weight of the focal mask loss.
        dice_weight: weight of the dice loss.
        median_seconds: length in seconds of the median filter that smooths events.
        class_names: one name for each class, or empty.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "SoundEventDetector"
    presets = PRESETS

    sample_rate: int = 16_000
    num_mels: int = 64
    window: int = 512
    hop: int = 160
    time_stride: int = 4
    channels: tuple[int, ...] = (32, 64, 128, 128)
    hidden_dim: int = 128
    mask_dim: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 3
    num_heads: int = 4
    feedforward_dim: int = 512
    dropout: float = 0.1
    temperature: float = 1.0
    deep_supervision: bool = True
    strong_weight: float = 1.0
    weak_weight: float = 0.5
    mask_weight: float = 5.0
    dice_weight: float = 1.0
    median_seconds: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "sample_rate", "num_mels", "hop", "hidden_dim", "mask_dim", "decoder_layers")
        self.require_at_least(1, "num_heads", "feedforward_dim")
        self.require_at_least(0, "encoder_layers", "median_seconds")
        require(self.window >= self.hop, "window", self.window, f"at least hop {self.hop}")
        strides = [2**i for i in range(len(self.channels) + 1)]
        require(len(self.channels) >= 1 and min(self.channels) >= 1, "channels", self.channels, "one or more widths")
        require(self.time_stride in strides, "time_stride", self.time_stride, f"one of {strides}")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        multiple = math.lcm(4, self.num_heads)
        require(self.hidden_dim % multiple == 0, "hidden_dim", self.hidden_dim, f"a multiple of {multiple}")
        for f in fields(self):
            if f.name.endswith("_weight"):
                value = getattr(self, f.name)
                require(value >= 0 and math.isfinite(value), f.name, value, "finite and at least 0")

    @property
    def frame_samples(self) -> int:
        """Samples in a frame."""
        return self.hop * self.time_stride

    @property
    def frame_seconds(self) -> float:
        """Seconds in a frame."""
        return self.frame_samples / self.sample_rate


@dataclass(frozen=True)
class SoundTargets:
    """The events of a batch of clips.

    Args:
        presence: ``(B, K)`` float32, 1 where a clip has events of a class.
        activity: ``(B, K, T)`` uint8, 1 in frames in which a class is active; 0 for clips without times.
        strong: ``(B,)`` bool, whether the times of a clip's events are known.
    """

    presence: Tensor
    activity: Tensor
    strong: Tensor

    @staticmethod
    def from_events(
        events: Sequence[Mapping[str, Tensor]],
        num_classes: int,
        num_frames: int,
        frame_seconds: float,
        device: torch.device | str | None = None,
    ) -> SoundTargets:
        """The targets of clips of ``num_frames`` frames each.

        A class is active in the frames between the rounded times of its events, at least one frame per event.

        Args:
            events: for each clip "labels" ``(E,)`` in ``0..K-1`` and, where times are known, "onsets" and "offsets"
                ``(E,)`` in seconds.
            num_classes: K.
            num_frames: T.
            frame_seconds: length of a frame in seconds.
            device: device of the result.

        Raises:
            TypeError: anything but a dict for each clip.
            ValueError: labels out of range, another number of times than labels, an event that ends before it begins,
                or times that are not finite.
        """
        presence = torch.zeros(len(events), num_classes)
        activity = torch.zeros(len(events), num_classes, num_frames, dtype=torch.uint8)
        strong = torch.zeros(len(events), dtype=torch.bool)
        for b, clip in enumerate(events):
            labels, times = _check_clip(b, clip, num_classes)
            presence[b, labels] = 1
            strong[b] = times is not None
            for label, (onset, offset) in zip(labels, times or (), strict=False):
                first = min(max(round(onset / frame_seconds), 0), num_frames - 1)
                activity[b, label, first : max(round(offset / frame_seconds), first + 1)] = 1
        return SoundTargets(presence.to(device), activity.to(device), strong.to(device))

    def masks(self) -> Targets:
        """The present classes as targets of the mask losses, with masks of 1 x T pixels."""
        present = (self.presence > 0) & self.strong[:, None]
        # Targets expects the present classes first.
        order = (~present).to(torch.uint8).argsort(dim=1, stable=True)
        labels = order.masked_fill(~present.gather(1, order), PADDING_LABEL)
        masks = self.activity.gather(1, order[..., None].expand_as(self.activity))
        return Targets(labels, present.sum(1), masks=masks[:, :, None])


def decode_events(
    probabilities: Tensor, frame_seconds: float, *, threshold: float = 0.5, median_seconds: float = 0.0
) -> list[dict[str, Any]]:
    """The events of a clip: runs of frames in which a class is more probable than ``threshold``.

    Args:
        probabilities: ``(K, T)``, the probability of each class in each frame.
        frame_seconds: length of a frame in seconds.
        threshold: a probability in 0..1.
        median_seconds: length of a median filter that closes gaps and drops spikes, rounded to an odd number of frames.

    Returns:
        {"label", "onset", "offset", "score"} of each event, ordered by onset; times are in seconds, and the score is
        the mean probability of the event's frames.

    Raises:
        ValueError: a threshold outside 0..1, or a negative length.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in 0..1, got {threshold}")
    if not median_seconds >= 0:
        raise ValueError(f"median_seconds must be at least 0, got {median_seconds}")
    probabilities = probabilities.detach().float().cpu()
    active = median_filter(probabilities > threshold, 2 * round(median_seconds / frame_seconds / 2) + 1)
    edges = torch.nn.functional.pad(active.int(), (1, 1)).diff(dim=1)  # 1 where a run begins, -1 after its end
    # Both lists are ordered by class, then by time, so beginnings and ends correspond.
    begins, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    events = [
        {
            "label": label,
            "onset": begin * frame_seconds,
            "offset": end * frame_seconds,
            "score": probabilities[label, begin:end].mean().item(),
        }
        for (label, begin), (_, end) in zip(begins, ends, strict=True)
    ]
    return sorted(events, key=lambda event: (event["onset"], event["label"]))


def _check_clip(b: int, clip: Any, num_classes: int) -> tuple[list[int], list[tuple[float, float]] | None]:
    if not isinstance(clip, Mapping) or "labels" not in clip:
        raise TypeError(f'targets[{b}] must be a dict with "labels", and with "onsets" and "offsets" where known')
    labels = torch.as_tensor(clip["labels"]).tolist()
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise ValueError(f'targets[{b}]["labels"] holds {label}; expected 0..{num_classes - 1}')
    if ("onsets" in clip) != ("offsets" in clip):
        raise ValueError(f'targets[{b}] has only one of "onsets" and "offsets"')
    if "onsets" not in clip:
        return labels, None
    onsets, offsets = (torch.as_tensor(clip[key]).tolist() for key in ("onsets", "offsets"))
    if not len(onsets) == len(offsets) == len(labels):
        raise ValueError(
            f"targets[{b}] has {len(labels)} labels, {len(onsets)} onsets and {len(offsets)} offsets; expected one each"
        )
    for onset, offset in zip(onsets, offsets, strict=True):
        if not 0 <= onset <= offset < float("inf"):
            raise ValueError(
                f"targets[{b}] has an event from {onset} to {offset} seconds; expected times of 0 and more, in order"
            )
    return labels, list(zip(onsets, offsets, strict=True))


EPSILON = 1e-7  # probabilities are clamped to EPSILON..1 - EPSILON


class SoundEventDetector(PretrainedModel):
    """Detects the sound events of a clip and their times: MaskFormer (arXiv:2107.06278) over time instead of an image.

    Each class has a query. The decoder predicts whether the class occurs in the clip, and a mask embedding, whose
    products with the embeddings of the frames, divided by a temperature, are the mask logits. The probability of a
    frame is sigmoid(presence) sigmoid(mask). The probability of the clip pools its frames by linear softmax, so that
    clips without times also train the masks.

    Call ``SoundEventDetector(config)``, or ``SoundEventDetector(num_classes=10, ...)`` with the fields of
    :class:`SoundEventConfig` as keywords.

    Args:
        config: the configuration; None to give its fields as keywords.
        frame_encoder: a module that maps ``(B, S)`` waveforms to ``(B, hidden_dim, T)`` features, one frame for each
            ``config.frame_samples`` samples, rounded up; by default a spectrogram and a convolutional network.
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range.
    """

    config_class = SoundEventConfig
    tasks = ("events",)
    class_weights = ("predictor.query_embed.",)
    config: SoundEventConfig

    def __init__(
        self, config: SoundEventConfig | None = None, *, frame_encoder: nn.Module | None = None, **options: Any
    ) -> None:
        config = config_or_fields(type(self), config, options)
        super().__init__(config)
        transformer: dict[str, Any] = {
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
                ``(E,)`` in seconds; or :class:`SoundTargets` with the result's number of frames.

        Returns:
            Without targets: "presence_logits" ``(L, B, K)`` and "mask_logits" ``(L, B, K, T)`` of all layers, and
            "frame_probabilities" ``(B, K, T)`` and "clip_probabilities" ``(B, K)`` of the last.

            With targets: "loss_strong" (cross-entropy of the frames of clips with known times), "loss_weak" (of the
            clips), "loss_mask" and "loss_dice" (of the masks of present classes), and the same with "_0", "_1", ... for
            the layers before the last, each a weighted scalar.

        Raises:
            TypeError: waveforms or targets of another type or dtype.
            ValueError: shapes that do not match, labels out of range, or invalid times.
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
        """The events of a batch as targets for the frames of ``mask_logits (..., B, K, T)``."""
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
            median_seconds: length of the median filter in seconds; by default the configuration's.

        Returns:
            For each clip a dict of "events", as :func:`decode_events` returns them, "frame_probabilities" ``(K, T)``
            and "clip_probabilities" ``(K,)``.

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
        """The presence logits ``(B, K)`` and mask logits ``(B, K, T)`` of the last decoder layer only, for waveforms
        ``(B, S)``.
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
        # Of two classes, the event and "no object", the difference of the logits is the logit of the event.
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
    """The float32 probability ``(..., K, T)`` of each class in each frame, from ``(..., K)`` and ``(..., K, T)``."""
    return presence_logits.float().sigmoid()[..., None] * mask_logits.float().sigmoid()


def _cross_entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    # Autocast rejects binary_cross_entropy of probabilities, and products of two sigmoids have no simple logits.
    p = probabilities.clamp(EPSILON, 1 - EPSILON)
    return -(targets * p.log() + (1 - targets) * (1 - p).log())
