"""Saves and loads weights as safetensors files, and compares their names with those that a model expects."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmask.extras import extra

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SHOWN_NAMES = 5


def pretrained_config(source: str, **fields: Any) -> Any:
    """The configuration that ``transformers`` reads from a folder or a hub id.

    Raises:
        OSError: neither can be read; the message names the source.
    """
    with extra("models"):
        import transformers

    try:
        return transformers.AutoConfig.from_pretrained(source, **fields)
    except OSError as error:
        where = "folder" if Path(source).is_dir() else "hub id (there is no folder of this name)"
        raise OSError(f"pretrained_backbone {source!r} cannot be read as a {where}: {error}") from error


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written, for example to a full disk; the message names it.
    """
    with extra("models"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or not safetensors; the message names it.
    """
    with extra("models"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def without_prefix(weights: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, with the prefix stripped; all weights for "".

    Raises:
        ValueError: no name begins with the prefix.
    """
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if weights and not own:
        raise ValueError(f"{source} has no name that begins with {prefix!r}; it has {listed(weights)}")
    return own


def wrapping_prefix(expected: Iterable[str], found: Iterable[str]) -> str:
    """The prefix that more than half of the ``expected`` names have in ``found``; "" if there is none.

    Wrappers add such prefixes: DistributedDataParallel "module.", torch.compile "_orig_mod.", a Lightning module
    "model.".
    """
    expected, counts = set(expected), Counter[str]()
    for name in found:
        starts = (0, *(match.end() for match in re.finditer(r"\.", name)))
        counts.update(name[:start] for start in starts if name[start:] in expected)
    prefix, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return prefix if 2 * count > len(expected) else ""


def key_problems(expected: Collection[str], found: Collection[str]) -> str:
    """Describes missing and unexpected names of weights, or a prefix of all names; "" if the names match."""
    if prefix := wrapping_prefix(expected, found):
        return (
            f"its names begin with {prefix!r}, which a wrapper of the model adds; prefix={prefix!r} strips it, and so "
            f"does fastmask convert --prefix {prefix}"
        )
    problems = {"missing": sorted(set(expected) - set(found)), "unexpected": sorted(set(found) - set(expected))}
    return "; ".join(f"{kind} keys: {listed(names)}" for kind, names in problems.items() if names)


def listed(names: Iterable[str]) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Compares the weights that a model expects with those in a file.

    Returns:
        the names of weights whose shapes differ.

    Raises:
        ValueError: names are missing, unexpected or prefixed; the message names them.
    """
    if problems := key_problems(expected, found):
        raise ValueError(f"{path} does not fit the model; {problems}")
    return [name for name in expected if expected[name].shape != found[name].shape]
