"""The one description of a sound event detector, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from fastmask.models.base_config import ModelConfig, require


@dataclass(frozen=True)
class SoundEventConfig(ModelConfig):
    """Everything that :class:`fastmask.SoundEventDetector` is built from.

    Args:
        num_classes: K, the kinds of events.
        sample_rate: of the waveforms, in Hz.
        num_mels: bands of the spectrogram.
        window: samples of its windows.
        hop: samples from one window to the next.
        time_stride: windows in a frame, a power of two, at most 2 to the number of ``channels``.
        channels: of the convolutional blocks.
        hidden_dim: channels of encoder and decoder, a multiple of 4 and of ``num_heads``.
        mask_dim: channels of the frame and mask embeddings.
        encoder_layers: transformer layers over the frames.
        decoder_layers: L.
        num_heads: attention heads of both transformers.
        feedforward_dim: hidden channels of their perceptrons.
        dropout: of both transformers.
        temperature: what the products of mask and frame embeddings are divided by.
        deep_supervision: predict and supervise after each decoder layer instead of after the last alone.
        strong_weight: weight of the cross-entropy of each frame.
        weak_weight: weight of the cross-entropy of the whole clip.
        mask_weight: weight of the focal mask loss.
        dice_weight: weight of the dice loss.
        median_seconds: length of the median filter that events are smoothed with.
        class_names: one name for each class, or empty.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "SoundEventDetector"

    num_classes: int
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
    class_names: tuple[str, ...] = ()

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

    @staticmethod
    def preset(name: str, num_classes: int, **overrides: Any) -> SoundEventConfig:
        """A configuration by name: "tiny" for tests and demonstrations, or "base".

        Raises:
            ValueError: an unknown name.
        """
        return SoundEventConfig._from_preset(PRESETS, name, {"num_classes": num_classes, **overrides})


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
