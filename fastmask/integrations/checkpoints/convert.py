"""Checkpoints from one format to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastmask.integrations.checkpoints import hugging_face, hugging_face_eomt, hugging_face_mask2former
from fastmask.integrations.checkpoints.hugging_face_format import HuggingFaceFormat, check_type
from fastmask.integrations.checkpoints.original_mask2former import CROSS, MASK2FORMER
from fastmask.integrations.checkpoints.original_maskformer import MASKFORMER
from fastmask.integrations.checkpoints.original_segmenter import from_original_segmenter, save_original_segmenter
from fastmask.integrations.checkpoints.state_files import SUFFIXES, read_weights
from fastmask.models import Mask2Former, MaskFormer, Segmenter, load_model
from fastmask.models._base import PretrainedModel
from fastmask.models._configuration import read_config
from fastmask.models._registry import SAVED_IN_RUN
from fastmask.models.weight_files import CONFIG_FILE, WEIGHTS_FILE, listed

FORMATS = ("fastmask", "huggingface", "original")
# Of the networks in checkpoints of transformers, and of those of detectron2.
HUGGING_FACE = (hugging_face.MASKFORMER, hugging_face_mask2former.MASK2FORMER, hugging_face_eomt.EOMT)
ORIGINAL = (MASKFORMER, MASK2FORMER)
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
    prefix: str = "",
) -> PretrainedModel:
    """Reads a MaskFormer, Mask2Former, EoMT or Segmenter in one format and writes it in another.

    Args:
        source: a folder that fastmask or transformers saved, that of a run of training, a file of the weights of the
            original MaskFormer or Mask2Former, or the folder of an original Segmenter's checkpoint.pth and variant.yml.
        destination: a folder, or for a MaskFormer or Mask2Former with ``to="original"`` a file that detectron2's
            checkpointer reads; must not exist.
        to: "fastmask", "huggingface" or "original".
        source_format: the same; by default that of the file or the folder's configuration.
        num_queries, num_classes: of the result, if they are to differ.
        ignore_mismatched_sizes: allow that; the weights that depend on them start at random, with a warning.
        prefix: as for :func:`~fastmask.integrations.checkpoints.state_files.read_weights`.

    Returns:
        the model.

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
    options = {"ignore_mismatched_sizes": ignore_mismatched_sizes, "prefix": prefix}
    model = _read(source, source_format, {k: v for k, v in changes.items() if v is not None}, options)
    _write(model, destination, to)
    return model


def find_format(source: Path) -> str:
    """The format of a folder or file.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a folder that holds nothing of a known format, a file out of a model's folder, or a configuration
            that is not JSON.
    """
    if source.is_file():
        if source.suffix in (".safetensors", ".bin") and (source.parent / CONFIG_FILE).is_file():
            raise ValueError(f"{source} stands beside a {CONFIG_FILE}; give their folder, {source.parent}")
        return "original"
    if not source.is_dir():
        raise FileNotFoundError(f"no folder or file {source}")
    if (source / SEGMENTER_VARIANT).is_file():
        return "original"
    path = source / CONFIG_FILE
    if path.is_file():
        return "huggingface" if "model_type" in read_config(path) else "fastmask"
    if any((source / name / CONFIG_FILE).is_file() for name in SAVED_IN_RUN):
        return "fastmask"
    content = sorted(path.name for path in source.iterdir())
    raise ValueError(
        f"{source} holds {listed(content) or 'nothing'}; expected {CONFIG_FILE} and {WEIGHTS_FILE} (of fastmask, or of "
        f"a MaskFormer, Mask2Former or EoMT of transformers), {SEGMENTER_VARIANT} and checkpoint.pth (of an original "
        f"Segmenter), or instead of the folder the file of an original MaskFormer's or Mask2Former's weights "
        f"({', '.join(SUFFIXES)})"
    )


def _read(source: Path, source_format: str, changes: dict[str, Any], options: dict[str, Any]) -> PretrainedModel:
    if source_format == "huggingface":
        return _hugging_face_format(source).read(source, **changes, **options)
    folder = source if source.is_dir() else source.parent
    is_segmenter = source_format == "original" and (folder / SEGMENTER_VARIANT).is_file()
    if source_format == "original" and not is_segmenter:
        return _read_original(source, changes, **options)
    if "num_queries" in changes:
        kind = "of an original Segmenter" if is_segmenter else "of fastmask itself"
        raise ValueError(f"num_queries cannot change in a checkpoint {kind}")
    if is_segmenter:
        return from_original_segmenter(source, **changes, **options)
    return load_model(source, **changes, **options)


def _hugging_face_format(folder: Path) -> HuggingFaceFormat:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    forms = {model_type: form for form in HUGGING_FACE for model_type in form.classes}
    classes = {model_type: form.classes[model_type] for model_type, form in forms.items()}
    return forms[check_type(str(folder), read_config(folder / CONFIG_FILE), classes)]


def _read_original(
    source: Path, changes: dict[str, int], ignore_mismatched_sizes: bool, prefix: str
) -> MaskFormer | Mask2Former:
    """A MaskFormer, or a Mask2Former if the file has a weight of its masked attention."""
    weights = read_weights(source, prefix)
    form = MASK2FORMER if any(CROSS in name for name in weights) else MASKFORMER
    config = form.infer_config(weights, str(source)).replace(**changes)
    return form.read(weights, config, ignore_mismatched_sizes=ignore_mismatched_sizes)


def _write(model: PretrainedModel, destination: Path, to: str) -> None:
    if to == "fastmask":
        model.save_pretrained(destination)
    elif to == "original" and isinstance(model, Segmenter):
        save_original_segmenter(model, destination)
    elif to == "huggingface":
        _format_of(model, HUGGING_FACE, to).write(model).save_pretrained(destination)
    else:
        weights = _format_of(model, ORIGINAL, to).write(model)
        destination.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": weights}, destination)


def _format_of(model: PretrainedModel, forms: Sequence[Any], to: str) -> Any:
    for form in forms:
        if isinstance(model, form.kind):
            return form
    raise ValueError(f"the format {to} has no {type(model).__name__}")
