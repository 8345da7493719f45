"""Small runs of training: a data set on disk and configurations that a test can afford."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fastmask.data import CLASS_NAMES, STUFF_CLASSES, ComposedScenes
from fastmask.training import Recipe, TrainingConfig, make_training_config

SIZE = (64, 64)


def scene_folder(root: Path, train: int = 7, val: int = 3, sizes: tuple[tuple[int, int], ...] = (SIZE,)) -> Path:
    """Composed scenes as a plain folder of pictures and label maps; their sizes take turns."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            image, segments, labels = ComposedScenes(split, size=sizes[i % len(sizes)])[i]
            classes = np.append(labels.numpy(), [255] * (256 - len(labels)))[segments.numpy()]
            for folder, picture in (
                ("images", (image * 255).byte().permute(1, 2, 0).numpy()),
                ("annotations", classes),
            ):
                path = root / folder / split / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(path)
    (root / "classes.json").write_text(json.dumps({"classes": CLASS_NAMES, "stuff": STUFF_CLASSES}))
    return root


def tiny_config(data: Path | str, steps: int = 6, **options) -> TrainingConfig:
    """A few steps of a tiny MaskFormer with dropout on crops of these scenes."""
    recipe = Recipe(
        **{
            "steps": steps,
            "batch_size": 2,
            "crop": (48, 64),
            "short_side": 64,
            "max_side": 256,
            "learning_rate": 1e-3,
            **options.pop("recipe", {}),
        }
    )
    fields = {"decoder_layers": 1, "dropout": 0.1, "num_queries": 20, **options.pop("model_fields", {})}
    return make_training_config(data, options.pop("model", "tiny"), recipe, model_fields=fields, **options)
