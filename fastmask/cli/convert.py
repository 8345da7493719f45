"""Checkpoints from one format to another."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastmask.models import MaskFormer
from fastmask.models.checkpoint import CONFIG_FILE

FORMATS = ("fastmask", "huggingface", "original")


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: str = "fastmask",
    source_format: str | None = None,
    *,
    num_queries: int | None = None,
    num_classes: int | None = None,
    ignore_mismatched_sizes: bool = False,
) -> MaskFormer:
    """Reads a MaskFormer in one format and writes it in another.

    Args:
        source: a folder that fastmask or transformers saved, or a file of the original repository's weights.
        destination: a folder, or for ``to="original"`` a file that detectron2's checkpointer reads; must not exist.
        to: "fastmask", "huggingface" or "original".
        source_format: the same; by default found out from the file or the folder's configuration.
        num_queries, num_classes: of the result, if they are to differ.
        ignore_mismatched_sizes: allow that: what depends on them starts at random, with a warning.

    Returns:
        the model in between.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: the destination exists.
        ValueError: an unknown format; a source that does not hold what its format says; an architecture that the format
            has no names for.
    """
    source, destination = Path(source), Path(destination)
    for name, value in (("to", to), ("source_format", source_format)):
        if value is not None and value not in FORMATS:
            raise ValueError(f"{name} must be one of {', '.join(FORMATS)}, got {value!r}")
    if destination.exists():
        raise FileExistsError(f"{destination} exists already")
    source_format = source_format or find_format(source)
    changes = {"num_queries": num_queries, "num_classes": num_classes}
    model = _read(source, source_format, {k: v for k, v in changes.items() if v is not None}, ignore_mismatched_sizes)
    _write(model, destination, to)
    return model


def find_format(source: Path) -> str:
    """The format of a folder or file.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a folder without a configuration that says.
    """
    if source.is_file():
        return "original"
    if not source.is_dir():
        raise FileNotFoundError(f"no folder or file {source}")
    path = source / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{source} has no {CONFIG_FILE}; name its format, one of {', '.join(FORMATS)}")
    return "huggingface" if "model_type" in json.loads(path.read_text(encoding="utf-8")) else "fastmask"


def _read(source: Path, source_format: str, changes: dict[str, int], ignore_mismatched_sizes: bool) -> MaskFormer:
    from fastmask.integrations import checkpoints
    from fastmask.integrations.checkpoints.files import read_weights
    from fastmask.integrations.checkpoints.original_maskformer import infer_config

    ignore = {"ignore_mismatched_sizes": ignore_mismatched_sizes}
    if source_format == "huggingface":
        return checkpoints.from_hugging_face_maskformer(source, **changes, **ignore)
    if source_format == "original":
        weights = read_weights(source)
        return checkpoints.from_original_maskformer(
            weights, infer_config(weights, str(source)).replace(**changes), **ignore
        )
    if "num_queries" in changes:
        raise ValueError("num_queries cannot change in a checkpoint of fastmask itself")
    return MaskFormer.from_pretrained(source, **changes, **ignore)


def _write(model: MaskFormer, destination: Path, to: str) -> None:
    from fastmask.integrations import checkpoints

    if to == "fastmask":
        model.save_pretrained(destination)
    elif to == "huggingface":
        checkpoints.to_hugging_face_maskformer(model).save_pretrained(destination)
    else:
        weights = checkpoints.to_original_maskformer(model)
        destination.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": weights}, destination)
