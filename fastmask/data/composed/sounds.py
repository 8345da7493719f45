"""The recordings of the clips, read from the package."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fastmask.data.composed.library import ASSET_DIRECTORY
from fastmask.extras import extra
from fastmask.files import read_json

EVENT_CLASSES = ("kick", "snare", "cymbal", "tom", "tabla", "bell", "bass")
AMBIENCE = "ambience"
SAMPLE_RATE = 16_000
INDEX_FILE = "sounds.json"


def sound_file(split: str) -> str:
    return f"sounds-{split}.flac"


@dataclass(frozen=True)
class SoundLibrary:
    """Recordings of one split, mono at 16 kHz, float32 with a peak of 1.

    Attributes:
        events: for each class of ``EVENT_CLASSES`` its recordings, cut to their audible part.
        ambience: recordings without events.
    """

    events: tuple[tuple[np.ndarray, ...], ...]
    ambience: tuple[np.ndarray, ...]


@functools.lru_cache(maxsize=2)
def load_sounds(split: str) -> SoundLibrary:
    """Reads the recordings of a split.

    Raises:
        FileNotFoundError: the package was installed without its sounds.
        ImportError: soundfile is missing.
    """
    with extra("sound"):
        import soundfile

    path = ASSET_DIRECTORY / sound_file(split)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; install fastmask with its data files")
    samples, _ = soundfile.read(path, dtype="float32")
    index = read_json(ASSET_DIRECTORY / INDEX_FILE)[split]
    recordings: dict[str, list[np.ndarray]] = {name: [] for name in (*EVENT_CLASSES, AMBIENCE)}
    begin = 0
    for entry in index:
        sound = samples[begin : begin + entry["samples"]]
        sound.flags.writeable = False
        recordings[entry["class"]].append(sound)
        begin += entry["samples"]
    return SoundLibrary(tuple(tuple(recordings[name]) for name in EVENT_CLASSES), tuple(recordings[AMBIENCE]))
