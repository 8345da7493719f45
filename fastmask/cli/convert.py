"""Checkpoints from one format to another."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch

from fastmask.models import MaskFormer, PerPixelBaseline, Segmenter
from fastmask.models.base import SegmentationModel
from fastmask.models.checkpoint import CONFIG_FILE

FORMATS = ("fastmask", "huggingface", "original")
SEGMENTER_VARIANT = "variant.yml"  # stands beside the weights of an original Segmenter, and of nothing else


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: str = "fastmask",
    source_format: str | None = None,
    *,
    num_queries: int | None = None,
    num_classes: int | None = None,
    ignore_mismatched_sizes: bool = False,
) -> SegmentationModel:
    """Reads a MaskFormer or a Segmenter in one format and writes it in another.

    Args:
        source: a folder that fastmask or transformers saved, a file of the original MaskFormer's weights, or the folder
            of an original Segmenter's checkpoint.pth and variant.yml.
        destination: a folder, or for a MaskFormer with ``to="original"`` a file that detectron2's checkpointer reads;
            must not exist.
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
    if (source / SEGMENTER_VARIANT).is_file():
        return "original"
    path = source / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{source} has no {CONFIG_FILE}; name its format, one of {', '.join(FORMATS)}")
    return "huggingface" if "model_type" in json.loads(path.read_text(encoding="utf-8")) else "fastmask"


def _read(
    source: Path, source_format: str, changes: dict[str, int], ignore_mismatched_sizes: bool
) -> SegmentationModel:
    from fastmask.integrations import checkpoints

    ignore = {"ignore_mismatched_sizes": ignore_mismatched_sizes}
    if source_format == "huggingface":
        return checkpoints.from_hugging_face_maskformer(source, **changes, **ignore)
    folder = source if source.is_dir() else source.parent
    is_segmenter = source_format == "original" and (folder / SEGMENTER_VARIANT).is_file()
    if source_format == "original" and not is_segmenter:
        return _read_original_maskformer(source, changes, ignore_mismatched_sizes)
    if "num_queries" in changes:
        kind = "of an original Segmenter" if is_segmenter else "of fastmask itself"
        raise ValueError(f"num_queries cannot change in a checkpoint {kind}")
    if is_segmenter:
        return checkpoints.from_original_segmenter(source, **changes, **ignore)
    return _saved_kind(source).from_pretrained(source, **changes, **ignore)


def _read_original_maskformer(source: Path, changes: dict[str, int], ignore_mismatched_sizes: bool) -> MaskFormer:
    from fastmask.integrations.checkpoints import from_original_maskformer
    from fastmask.integrations.checkpoints.files import read_weights
    from fastmask.integrations.checkpoints.original_maskformer import infer_config

    weights = read_weights(source)
    config = infer_config(weights, str(source)).replace(**changes)
    return from_original_maskformer(weights, config, ignore_mismatched_sizes=ignore_mismatched_sizes)


def _saved_kind(folder: Path) -> type[SegmentationModel]:
    """The model whose configuration has the fields that a folder's has; MaskFormer, which will say what is wrong, if
    none has.
    """
    path = folder / CONFIG_FILE
    names = set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()
    kinds = (MaskFormer, Segmenter, PerPixelBaseline)
    return next((kind for kind in kinds if names <= {f.name for f in fields(kind.config_class)}), MaskFormer)


def _write(model: SegmentationModel, destination: Path, to: str) -> None:
    from fastmask.integrations import checkpoints

    if to == "fastmask":
        model.save_pretrained(destination)
    elif to == "original" and isinstance(model, Segmenter):
        checkpoints.save_original_segmenter(model, destination)
    elif not isinstance(model, MaskFormer):
        raise ValueError(f"the format {to} has no {type(model).__name__}")
    elif to == "huggingface":
        checkpoints.to_hugging_face_maskformer(model).save_pretrained(destination)
    else:
        weights = checkpoints.to_original_maskformer(model)
        destination.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": weights}, destination)
