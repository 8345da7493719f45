"""Made-up rows of the ablation's results."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks.ablations.variants import (
    BIPARTITE,
    PER_PIXEL,
    PER_PIXEL_PLUS,
    Settings,
    Variant,
)

ROOT = Path(__file__).resolve().parents[2]
SCENES = Settings("composed:scenes", "tiny", "", 32, 4, 2, 2, (1e-3,))
D13 = Variant(BIPARTITE, 13, 3)


def make_rows(variant, values, metric="mIoU", **other):
    shared = {
        "op": "ablation on composed:scenes",
        "device": "cpu",
        "settings": SCENES.as_row(),
        "base_layers": 3,
        "class_names": [f"class {i}" for i in range(13)],
        "parameters": 1_234_567,
        "date": "2026-01-02 03:04 UTC",
        "commit": "abc",
        "dirty": False,
        "loss": 1.0,
    }
    return [
        shared | {"variant": asdict(variant), "seed": seed, "metrics": {metric: value}} | other
        for seed, value in enumerate(values)
    ]


A, B = Variant(PER_PIXEL, 0, 0), Variant(PER_PIXEL_PLUS, 13, 3)
