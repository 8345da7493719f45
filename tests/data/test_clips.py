"""Composed clips: exact events, splits that share nothing, the same clips everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastmask.data import EVENT_CLASSES, ComposedClips, collate_clips
from fastmask.data.composed.library import ASSET_DIRECTORY
from fastmask.data.composed.sounds import INDEX_FILE, SAMPLE_RATE, load_sounds


def test_a_clip_is_what_its_key_says():
    clips = ComposedClips("train", length=20)
    again = ComposedClips("train", length=7)
    for i in (0, 3, 6):
        assert all(torch.equal(a, b) for a, b in zip(clips[i], again[i], strict=True))
    assert torch.equal(clips[-1].waveform, clips[19].waveform)
    assert not torch.equal(clips[0].waveform, ComposedClips("train", seed=1)[0].waveform)
    assert not torch.equal(clips[0].waveform, ComposedClips("val")[0].waveform)
    with pytest.raises(IndexError, match="clip 20 of 20"):
        clips[20]


def test_events_are_exact():
    """Where no event is, only the quiet ambience is heard."""
    clips = ComposedClips("val", length=60)
    counts, kinds = set(), set()
    for clip in clips:
        assert clip.waveform.shape == (4 * SAMPLE_RATE,) and clip.waveform.dtype == torch.float32
        assert clip.waveform.abs().max() <= 1
        assert (clip.onsets < clip.offsets).all() and (clip.offsets <= 4).all() and (clip.onsets.diff() >= 0).all()
        counts.add(len(clip.labels))
        kinds |= set(clip.labels.tolist())
        silent = np.ones(len(clip.waveform), bool)
        for onset, offset in zip(clip.onsets.tolist(), clip.offsets.tolist(), strict=True):
            silent[int(onset * SAMPLE_RATE) - 1 : int(offset * SAMPLE_RATE) + 2] = False
        if silent.any():
            assert np.abs(clip.waveform.numpy()[silent]).max() <= 0.1 + 1e-4
    assert counts == set(range(7)) and kinds == set(range(len(EVENT_CLASSES)))


def test_splits_share_no_recording():
    index = json.loads((ASSET_DIRECTORY / INDEX_FILE).read_text())
    names = {split: {entry["name"] for entry in entries} for split, entries in index.items()}
    assert not names["train"] & names["val"]
    for split in names:
        sounds = load_sounds(split)
        assert min(len(recordings) for recordings in sounds.events) >= 2 and len(sounds.ambience) >= 2
        assert all(abs(np.abs(sound).max() - 1) < 2e-3 for recordings in sounds.events for sound in recordings)


def test_collate():
    waveforms, events = collate_clips([ComposedClips("train", duration=1.5)[i] for i in range(3)])
    assert waveforms.shape == (3, 24_000)
    assert [set(clip) for clip in events] == [{"labels", "onsets", "offsets"}] * 3


def test_bad_arguments():
    with pytest.raises(ValueError, match="split='test' is unknown"):
        ComposedClips("test")
    with pytest.raises(ValueError, match="length must not be negative"):
        ComposedClips("val", length=-1)
    with pytest.raises(ValueError, match=r"duration must be at least 1.0 seconds, got 0.5"):
        ComposedClips("val", duration=0.5)
    with pytest.raises(ValueError, match="seed must be"):
        ComposedClips("val", seed=-1)
    with pytest.raises(TypeError):
        ComposedClips("val", length=1.5)
