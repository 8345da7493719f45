"""What the networks of transformers have in common: reading a folder or a model, and filling a model of theirs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmask.extras import extra
from fastmask.integrations.checkpoints.names import NameRule, to_foreign, to_own
from fastmask.integrations.checkpoints.state_files import read_weights
from fastmask.models._base import PretrainedModel
from fastmask.models._configuration import read_config
from fastmask.models.weight_files import CONFIG_FILE, key_problems, listed, wrapping_prefix

WEIGHTS_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


# Fields of our ``PointSampledConfig`` by those of transformers' configurations of Mask2Former and EoMT.
POINT_SAMPLED_FIELDS = {
    "class_weight": "class_weight",
    "mask_weight": "mask_weight",
    "dice_weight": "dice_weight",
    "no_object_weight": "no_object_weight",
    "num_points": "train_num_points",
    "oversample_ratio": "oversample_ratio",
    "importance_sample_ratio": "importance_sample_ratio",
}
# Those networks' matching costs are their loss weights.
COSTS = {"class_cost": "class_weight", "mask_cost": "mask_weight", "dice_cost": "dice_weight"}


@dataclass(frozen=True)
class HuggingFaceFormat:
    """How transformers stores the networks of a family.

    Args:
        family: the family's name in errors, such as "MaskFormer".
        kind: our network.
        classes: by model type of transformers, the name of its class.
        own_config: makes our configuration of one of transformers and of the weights.
        their_config: makes the configuration of transformers of a model of ours; raises a ValueError for an
            architecture that transformers does not have.
        rules: the names of a model of ours and of its counterpart.
        ignored: a regular expression for names of transformers that carry nothing to be loaded.
        by_counts: a regular expression for names of ours whose shapes depend on the numbers of queries and classes.
        newer_name: a weight's name in transformers v5, from that or from v4's.
        buffers: makes the buffers of transformers' model that our configuration determines.
    """

    family: str
    kind: type[PretrainedModel]
    classes: Mapping[str, str]
    own_config: Callable[[Any, Mapping[str, Tensor]], Any]
    their_config: Callable[[Any], Any]
    rules: Callable[[Any], list[NameRule]]
    ignored: str
    by_counts: str
    newer_name: Callable[[str], str] = str
    buffers: Callable[[Any], dict[str, Tensor]] = lambda model: {}

    def read(
        self,
        source: Any,
        *,
        num_queries: int | None = None,
        num_classes: int | None = None,
        ignore_mismatched_sizes: bool = False,
        prefix: str = "",
    ) -> Any:
        """A model of ours from a folder or a model of transformers.

        Args:
            source: a folder with config.json and the weights, as transformers v4 or v5 writes it; or the model itself.
            num_queries, num_classes: of the new model, if they are to differ.
            ignore_mismatched_sizes: allow that: query embeddings and class head then start at random, with a warning.
            prefix: of the names of a folder's weights, as for
                :func:`~fastmask.integrations.checkpoints.state_files.read_weights`.

        Returns:
            the model, on the CPU, in float32 and training mode, with the class names of ``source``.

        Raises:
            FileNotFoundError: no such folder, or no configuration or weights in it.
            ValueError: a file that cannot be read, another architecture, keys that are missing or unexpected, shapes or
                numbers that differ.
        """
        name = str(source) if isinstance(source, str | Path) else type(source).__name__
        if isinstance(source, str | Path):
            weights, config = self._read_folder(Path(source), prefix)
        else:
            weights, config = source.state_dict(), source.config
            check_type(name, config.to_dict(), self.classes)
        own_config = self.own_config(config, weights)
        asked = {"num_queries": num_queries, "num_classes": num_classes}
        changes: dict[str, Any] = {
            field: value for field, value in asked.items() if value not in (None, getattr(own_config, field))
        }
        if changes and not ignore_mismatched_sizes:
            raise ValueError(
                f"{name} has {', '.join(f'{field}={getattr(own_config, field)}' for field in changes)}; "
                "ignore_mismatched_sizes=True starts what depends on them at random"
            )
        if "num_classes" in changes:
            changes["class_names"] = ()
        model = self.kind(own_config.replace(**changes))
        own = to_own(
            {self.newer_name(foreign): tensor for foreign, tensor in weights.items()},
            model.weights(),
            self.rules(model),
            ignored=self.ignored,
            replaceable=self.by_counts if changes else "",
            source=name,
        )
        model.load_state_dict(own, strict=False)
        return model

    def write(self, model: PretrainedModel) -> Any:
        """The model of transformers with the weights of a model of ours, in evaluation mode.

        Raises:
            ValueError: transformers has no such architecture.
        """
        with extra("models"):
            import transformers

        config = self.their_config(model)
        other = getattr(transformers, self.classes[config.model_type])(config).eval()
        weights = to_foreign(model.weights(), self.rules(model)) | self.buffers(model)
        own_names = {self.newer_name(name): name for name in other.state_dict()}
        outcome = other.load_state_dict({own_names[name]: value for name, value in weights.items()}, strict=False)
        missing = [name for name in outcome.missing_keys if not re.fullmatch(self.ignored, name)]
        if missing:
            raise ValueError(f"Hugging Face's model needs {', '.join(missing)}, which the model does not have")
        return other

    def _read_folder(self, folder: Path, prefix: str) -> tuple[dict[str, Tensor], Any]:
        """Weights and configuration, read by transformers itself, whatever its version wrote."""
        with extra("models"):
            import transformers

        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        model_type = check_type(str(folder), read_config(folder / CONFIG_FILE), self.classes)
        files = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"{folder} has the configuration of {self.family} of transformers and no weights; it holds "
                f"{listed(sorted(path.name for path in folder.iterdir()))}; expected {' or '.join(WEIGHTS_FILES[::2])}"
            )
        path: Path | None = folder
        options: dict[str, Any] = {
            "local_files_only": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        if prefix:
            if files[0].suffix == ".json":
                raise ValueError(f"{folder} has its weights in several files; prefix goes with one")
            path, options["state_dict"] = None, read_weights(files[0], prefix)
            options["config"] = transformers.AutoConfig.from_pretrained(folder)
        logger = logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # the errors below report the keys
        try:
            model, outcome = getattr(transformers, self.classes[model_type]).from_pretrained(path, **options)
        except Exception as error:  # of safetensors, pickle, zip files and of transformers itself
            raise ValueError(f"{folder} could not be read: {str(error).strip().partition(chr(10))[0]}") from error
        finally:
            logger.setLevel(level)
        missing, unexpected = (
            {name for name in outcome[f"{kind}_keys"] if not re.fullmatch(self.ignored, name)}
            for kind in ("missing", "unexpected")
        )
        problems = []
        if missing or unexpected:
            # transformers itself tries names without "model.", so that what it misses does not show a prefix.
            in_file = () if prefix or files[0].suffix == ".json" else read_weights(files[0])
            own, names = ({self.newer_name(name) for name in each} for each in (model.state_dict(), in_file))
            problems.append(key_problems(*((own, names) if wrapping_prefix(own, names) else (missing, unexpected))))
        if wrong := sorted(
            f"{name} of shape {tuple(found)} for {tuple(own)}" for name, found, own in outcome["mismatched_keys"]
        ):
            problems.append(f"it has {listed(wrong)}")
        if problems:
            raise ValueError(f"{folder} does not fit the model; {'; '.join(problems)}")
        return model.state_dict(), model.config


def check_type(name: str, config: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    """The model type of transformers that a configuration has.

    Args:
        name: of the source, for errors.
        config: the fields of the configuration.
        classes: the known model types, and the name of the class of each.

    Raises:
        ValueError: it has none, or none of these.
    """
    if "model_type" not in config:
        raise ValueError(f"{name} has no model_type in its {CONFIG_FILE}; expected {' or '.join(classes.values())}")
    model_type = config["model_type"]
    if model_type not in classes:
        found = f" ({', '.join(config['architectures'])})" if config.get("architectures") else ""
        known = ", ".join(f"{own!r} ({theirs})" for own, theirs in classes.items())
        raise ValueError(
            f"{name} is of model type {model_type!r}{found}; of transformers' models fastmask reads {known}"
        )
    return model_type
