"""Makes the recordings in ``fastmask/data/assets`` from the samples of Sonic Pi.

    sudo apt-get install sonic-pi-samples
    pip install soundfile scipy
    python -m fastmask.data.composed.prepare_sounds

Each recording is mixed to mono, resampled to 16 kHz, cut to its audible part and scaled to a peak of 1. In alphabetical
order, every third recording of a class goes to the val split and the others to train.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from fastmask.data.composed.library import ASSET_DIRECTORY, SPLITS
from fastmask.data.composed.sounds import AMBIENCE, EVENT_CLASSES, INDEX_FILE, SAMPLE_RATE, sound_file

SONIC_PI = Path("/usr/share/sonic-pi/samples")
SOURCES = {
    "kick": (
        "bd_808 bd_ada bd_boom bd_fat bd_gas bd_haus bd_klub bd_pure bd_sone bd_tek bd_zome bd_zum drum_heavy_kick "
        "drum_bass_hard drum_bass_soft elec_soft_kick elec_hollow_kick"
    ),
    "snare": (
        "drum_snare_hard drum_snare_soft elec_hi_snare elec_lo_snare elec_mid_snare elec_snare sn_dolf sn_dub sn_zome"
    ),
    "cymbal": (
        "drum_cymbal_closed drum_cymbal_hard drum_cymbal_open drum_cymbal_pedal drum_cymbal_soft drum_splash_hard "
        "drum_splash_soft elec_cymbal"
    ),
    "tom": (
        "drum_tom_hi_hard drum_tom_hi_soft drum_tom_lo_hard drum_tom_lo_soft drum_tom_mid_hard drum_tom_mid_soft "
        "elec_fuzz_tom"
    ),
    "tabla": (
        "tabla_dhec tabla_ghe1 tabla_ghe2 tabla_ghe4 tabla_ghe6 tabla_na tabla_na_o tabla_na_s tabla_re tabla_tas1 "
        "tabla_tas3 tabla_te1 tabla_te2 tabla_te_m tabla_tun1 tabla_tun2 tabla_tun3"
    ),
    "bell": "drum_cowbell elec_bell elec_bong elec_chime elec_ping elec_triangle perc_bell",
    "bass": "bass_dnb_f bass_drop_c bass_hard_c bass_hit_c bass_thick_c bass_trance_c bass_voxy_hit_c bass_woodsy_c",
    AMBIENCE: (
        "ambi_dark_woosh ambi_drone ambi_glass_hum ambi_glass_rub ambi_haunted_hum ambi_lunar_land ambi_piano "
        "vinyl_hiss"
    ),
}
VAL_STEP = 3
LONGEST = {"event": 1.2, "ambience": 4.0}  # seconds
FADE = 0.05  # seconds, at the end of a recording that was cut
AUDIBLE = 0.02  # of the peak: -34 dB
ENVELOPE = 0.01  # seconds over which loudness is measured


def prepare(samples: np.ndarray, rate: int, longest: float) -> np.ndarray:
    """The audible part of a recording ``(S,)`` or ``(S, channels)``, of at most ``longest`` seconds."""
    from scipy.signal import resample_poly

    mono = samples.mean(1) if samples.ndim == 2 else samples
    mono = resample_poly(mono, SAMPLE_RATE // 100, rate // 100)
    mono = mono / np.abs(mono).max()
    window = int(ENVELOPE * SAMPLE_RATE)
    loudness = np.sqrt(np.convolve(mono**2, np.full(window, 1 / window), "same"))
    heard = np.flatnonzero(loudness > AUDIBLE * loudness.max())
    sound = mono[heard[0] : heard[-1] + 1][: int(longest * SAMPLE_RATE)].copy()
    fade = min(int(FADE * SAMPLE_RATE), len(sound) // 4)
    sound[len(sound) - fade :] *= np.linspace(1, 0, fade)
    return sound / np.abs(sound).max()


def main() -> None:
    import soundfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SONIC_PI, help="folder of Sonic Pi's samples")
    source = parser.parse_args().source
    index: dict[str, list[dict[str, str | int]]] = {split: [] for split in SPLITS}
    sounds: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for kind in (*EVENT_CLASSES, AMBIENCE):
        longest = LONGEST["ambience" if kind == AMBIENCE else "event"]
        for i, name in enumerate(sorted(SOURCES[kind].split())):
            split = "val" if i % VAL_STEP == VAL_STEP - 1 else "train"
            samples, rate = soundfile.read(source / f"{name}.flac")
            sound = prepare(samples, rate, longest)
            sounds[split].append(sound)
            index[split].append({"name": name, "class": kind, "samples": len(sound)})
    for split in SPLITS:
        # 12 bits are enough under ambience, and take a third less room than 16.
        quantized = np.round(np.concatenate(sounds[split]) * 2047) / 2048
        soundfile.write(ASSET_DIRECTORY / sound_file(split), quantized, SAMPLE_RATE, "PCM_16", format="FLAC")
    (ASSET_DIRECTORY / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
