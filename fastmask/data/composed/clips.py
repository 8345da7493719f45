"""The data set of composed sound clips and its batches."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmask.data.composed.library import SPLITS
from fastmask.data.composed.plan import Draws
from fastmask.data.composed.sounds import EVENT_CLASSES, SAMPLE_RATE, load_sounds

DEFAULT_LENGTHS = {"train": 2048, "val": 256}
MAX_EVENTS = 6
# Gains in decibels, relative to a peak of 1.
EVENT_GAIN = (-18.0, -3.0)
AMBIENCE_GAIN = (-40.0, -20.0)
MIN_DURATION = 1.0  # seconds


class Clip(NamedTuple):
    """One clip and its exact events.

    Attributes:
        waveform: ``(S,)`` float32 at 16 kHz, within -1..1.
        labels: ``(E,)`` int64, the class of each event, an index into ``EVENT_CLASSES``; by onset.
        onsets: ``(E,)`` float32, in seconds.
        offsets: ``(E,)`` float32, in seconds; not beyond the clip.
    """

    waveform: Tensor
    labels: Tensor
    onsets: Tensor
    offsets: Tensor


class ComposedClips(Dataset[Clip]):
    """Drums, tabla, bells and bass notes over ambience, composed from real recordings.

    Clip ``i`` depends only on ``split``, ``seed``, ``duration`` and ``i``. The two splits share no recording. A clip
    has at most six events, which may overlap.

    Args:
        split: ``"train"`` or ``"val"``.
        length: the number of clips; by default 2048 for train and 256 for val.
        duration: the duration of a clip in seconds, at least 1.
        seed: 0..2**64-1; another seed gives other clips.

    Raises:
        TypeError: a length or seed that is not an integer.
        ValueError: an unknown split, a negative length, a duration below one second, or a seed out of range.
        FileNotFoundError: the package was installed without its sounds.
        ImportError: soundfile is missing.
    """

    def __init__(self, split: str, length: int | None = None, duration: float = 4.0, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f'split={split!r} is unknown; expected "train" or "val"')
        length = DEFAULT_LENGTHS[split] if length is None else operator.index(length)
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        if not duration >= MIN_DURATION:
            raise ValueError(f"duration must be at least {MIN_DURATION} seconds, got {duration}")
        if not 0 <= operator.index(seed) < 2**64:
            raise ValueError(f"seed must be in 0..2**64-1, got {seed}")
        self.split = split
        self.duration = float(duration)
        self.seed = seed
        self._length = length
        self._sounds = load_sounds(split)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Clip:
        index = operator.index(index)
        if not -self._length <= index < self._length:
            raise IndexError(f"clip {index} of {self._length}")
        draws = Draws(self.seed, SPLITS.index(self.split), index % self._length)
        samples = round(self.duration * SAMPLE_RATE)
        waveform = _ambience(self._sounds.ambience, samples, draws)
        events = []
        for _ in range(draws.below(MAX_EVENTS + 1)):
            label = draws.below(len(EVENT_CLASSES))
            recordings = self._sounds.events[label]
            sound = recordings[draws.below(len(recordings))]
            onset = int(draws.uniform() * (samples - SAMPLE_RATE // 10))
            sound = sound[: samples - onset]
            waveform[onset : onset + len(sound)] += _gain(draws, EVENT_GAIN) * sound
            events.append((onset / SAMPLE_RATE, (onset + len(sound)) / SAMPLE_RATE, label))
        events.sort()
        onsets, offsets, labels = zip(*events, strict=True) if events else ((), (), ())
        waveform /= max(1.0, np.abs(waveform).max())
        return Clip(
            torch.from_numpy(waveform),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(onsets, dtype=torch.float32),
            torch.tensor(offsets, dtype=torch.float32),
        )


def collate_clips(clips: Sequence[Clip]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Batches clips of one duration for ``SoundEventDetector``: waveforms ``(B, S)`` and the events of each clip."""
    waveforms = torch.stack([clip.waveform for clip in clips])
    return waveforms, [{"labels": c.labels, "onsets": c.onsets, "offsets": c.offsets} for c in clips]


def _ambience(recordings: Sequence[np.ndarray], samples: int, draws: Draws) -> np.ndarray:
    """A recording from a random sample on, played alternately forward and backward to avoid clicks."""
    recording = recordings[draws.below(len(recordings))]
    loop = np.concatenate([recording, recording[::-1]])
    positions = (draws.below(len(loop)) + np.arange(samples)) % len(loop)
    return _gain(draws, AMBIENCE_GAIN) * loop[positions]


def _gain(draws: Draws, decibels: tuple[float, float]) -> np.float32:
    return np.float32(10 ** (draws.uniform(*decibels) / 20))
