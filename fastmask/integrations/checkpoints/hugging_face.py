"""Hugging Face's MaskFormer, to a model of ours and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmask.extras import extra
from fastmask.integrations.checkpoints.backbone_names import NOT_LEARNED, hugging_face_swin
from fastmask.integrations.checkpoints.names import NameRule, rename, to_foreign, to_own
from fastmask.integrations.checkpoints.state_files import read_weights
from fastmask.models._configuration import read_config
from fastmask.models.backbones import describe_config
from fastmask.models.maskformer import MaskFormer, MaskFormerConfig
from fastmask.models.weight_files import CONFIG_FILE, key_problems, listed, wrapping_prefix

if TYPE_CHECKING:
    from transformers import MaskFormerForInstanceSegmentation

WEIGHTS_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ENCODER = "model.pixel_level_module.encoder."
PIXEL_DECODER = "model.pixel_level_module.decoder"
TRANSFORMER = "model.transformer_module"
IGNORED = rf"{NOT_LEARNED}|criterion\.empty_weight"
BY_COUNTS = r"predictor\.(query_embed\.weight|class_embed\.(weight|bias))"
# The names of transformers v4, which checkpoints on the hub have.
OLDER_NAMES = (
    (r"(transformer_module\.decoder\.layers\.\d+\.\w+)\.out_proj\.", r"\1.o_proj."),
    (r"(transformer_module\.decoder\.layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
)
# Fields of our configuration by those of transformers': of its decoder, and of the model.
DECODER_FIELDS = {
    "num_queries": "num_queries",
    "hidden_dim": "d_model",
    "decoder_layers": "decoder_layers",
    "num_heads": "decoder_attention_heads",
    "feedforward_dim": "decoder_ffn_dim",
    "dropout": "dropout",
}
MODEL_FIELDS = {
    "mask_dim": "mask_feature_size",
    "pixel_decoder_dim": "fpn_feature_size",
    "deep_supervision": "use_auxiliary_loss",
    "class_weight": "cross_entropy_weight",
    "mask_weight": "mask_weight",
    "dice_weight": "dice_weight",
    "no_object_weight": "no_object_weight",
}
NORMS = {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}


def from_hugging_face_maskformer(
    source: str | Path | MaskFormerForInstanceSegmentation,
    *,
    num_queries: int | None = None,
    num_classes: int | None = None,
    ignore_mismatched_sizes: bool = False,
    prefix: str = "",
) -> MaskFormer:
    """A model of ours that computes what Hugging Face's ``MaskFormerForInstanceSegmentation`` does.

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
    if isinstance(source, str | Path):
        weights, config = _read_folder(Path(source), prefix)
    else:
        weights, config = source.state_dict(), source.config
        _check_type(_name(source), config.to_dict())
    own_config = own_config_of(config)
    asked = {"num_queries": num_queries, "num_classes": num_classes}
    changes: dict[str, Any] = {
        name: value for name, value in asked.items() if value not in (None, getattr(own_config, name))
    }
    if changes and not ignore_mismatched_sizes:
        raise ValueError(
            f"{_name(source)} has {', '.join(f'{name}={getattr(own_config, name)}' for name in changes)}; "
            "ignore_mismatched_sizes=True starts what depends on them at random"
        )
    if "num_classes" in changes:
        changes["class_names"] = ()
    model = MaskFormer(own_config.replace(**changes))
    own = to_own(
        newer_names(weights), model.weights(), rules_of(model), ignored=IGNORED,
        replaceable=BY_COUNTS if changes else "", source=_name(source),
    )  # fmt: skip
    model.load_state_dict(own, strict=False)
    return model


def to_hugging_face_maskformer(model: MaskFormer) -> MaskFormerForInstanceSegmentation:
    """Hugging Face's model with the same weights, in evaluation mode; its ``save_pretrained`` writes a folder.

    Raises:
        ValueError: Hugging Face has no such architecture (an encoder in the pixel decoder, fixed matching, another
            backbone than ResNet and Swin).
    """
    with extra("models"):
        from transformers import MaskFormerForInstanceSegmentation

    config = model.config
    if config.encoder_layers or config.matching != "bipartite":
        raise ValueError(
            f"encoder_layers={config.encoder_layers}, matching={config.matching!r}: Hugging Face's MaskFormer has "
            "neither an encoder in the pixel decoder nor fixed matching"
        )
    other = MaskFormerForInstanceSegmentation(hugging_face_config_of(model)).eval()
    weights = to_foreign(model.weights(), rules_of(model))
    own_names = {newer_name(name): name for name in other.state_dict()}
    outcome = other.load_state_dict({own_names[name]: value for name, value in weights.items()}, strict=False)
    missing = [name for name in outcome.missing_keys if not re.fullmatch(IGNORED, name)]
    if missing:
        raise ValueError(f"Hugging Face's model needs {', '.join(missing)}, which the model does not have")
    return other


def rules_of(model: MaskFormer) -> list[NameRule]:
    layer = rf"{TRANSFORMER}.decoder.layers.\1"
    own = r"predictor\.decoder\.layers\.(\d+)"
    rules = [
        *hugging_face_swin(ENCODER),
        rename(r"backbone\.((embedder|encoder)\..*)", rf"{ENCODER}\1"),
        rename(r"pixel_decoder\.mask_features\.(.*)", rf"{PIXEL_DECODER}.mask_projection.\1"),
        rename(r"predictor\.query_embed\.(.*)", rf"{TRANSFORMER}.queries_embedder.\1"),
        rename(r"predictor\.input_proj\.(.*)", rf"{TRANSFORMER}.input_projection.\1"),
        rename(r"predictor\.decoder\.norm\.(.*)", rf"{TRANSFORMER}.decoder.layernorm.\1"),
        rename(r"predictor\.class_embed\.(.*)", r"class_predictor.\1"),
        rename(r"predictor\.mask_embed\.layers\.(\d+)\.(.*)", r"mask_embedder.\1.0.\2"),
        rename(rf"{own}\.linear(\d)\.(.*)", rf"{layer}.mlp.fc\2.\3"),
        *(rename(rf"{own}\.{norm}\.(.*)", rf"{layer}.{name}.\2") for norm, name in NORMS.items()),
    ]
    for attention, name in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
        parts = tuple(rf"{layer}.{name}.{part}_proj.\2" for part in "qkv")
        rules += [
            NameRule(rf"{own}\.{attention}\.in_proj_(.*)", parts),
            rename(rf"{own}\.{attention}\.out_proj\.(.*)", rf"{layer}.{name}.o_proj.\2"),
        ]
    # Their pyramid counts from the coarsest map, ours from the finest.
    coarsest = len(model.channels) - 1
    levels = [(rf"layers\.{coarsest}", "fpn.stem")]
    for i in range(coarsest):
        levels += [
            (rf"layers\.{coarsest - 1 - i}", f"fpn.layers.{i}.block"),
            (rf"adapters\.{coarsest - 1 - i}", f"fpn.layers.{i}.proj"),
        ]
    for own_level, name in levels:
        rules += [
            rename(rf"pixel_decoder\.{own_level}\.conv\.weight", f"{PIXEL_DECODER}.{name}.0.weight"),
            rename(rf"pixel_decoder\.{own_level}\.norm\.(.*)", rf"{PIXEL_DECODER}.{name}.1.\1"),
        ]
    return rules


def newer_name(name: str) -> str:
    """A weight's name in transformers v5, from that or from v4's."""
    for pattern, replacement in OLDER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def newer_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {newer_name(name): tensor for name, tensor in weights.items()}


def own_config_of(config: Any) -> MaskFormerConfig:
    """Our configuration of the architecture and losses that a ``transformers.MaskFormerConfig`` describes."""
    names = tuple(str(config.id2label.get(i, i)) for i in range(config.num_labels))
    backbone, options = _backbone_of(config.backbone_config)
    return MaskFormerConfig(
        num_classes=config.num_labels,
        class_names=names,
        backbone=backbone,
        backbone_options=options,
        mask_cost=config.mask_weight,
        dice_cost=config.dice_weight,
        **{own: getattr(config.decoder_config, name) for own, name in DECODER_FIELDS.items()},
        **{own: getattr(config, name) for own, name in MODEL_FIELDS.items()},
    )


def hugging_face_config_of(model: MaskFormer) -> Any:
    """The ``transformers.MaskFormerConfig`` of a model of ours."""
    with extra("models"):
        import transformers

    config = model.config
    backbone_config = getattr(model.backbone, "config", None)
    backbone = {} if backbone_config is None else backbone_config.to_dict()
    model_type = backbone.pop("model_type", None)
    if model_type not in ("resnet", "swin") or config.backbone == "resnet-c":
        raise ValueError(f"backbone is {config.backbone!r}; expected a ResNet or a Swin of transformers")
    decoder = transformers.DetrConfig(**{name: getattr(config, own) for own, name in DECODER_FIELDS.items()})
    labels = config.class_names or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    return transformers.MaskFormerConfig(
        backbone_config=transformers.AutoConfig.for_model(model_type, **backbone),
        decoder_config=decoder.to_dict(),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **{name: getattr(config, own) for own, name in MODEL_FIELDS.items()},
    )


def _backbone_of(config: Any) -> tuple[str, dict[str, Any]]:
    if config.model_type not in ("resnet", "swin", "maskformer-swin"):
        raise ValueError(f"the backbone is of model type {config.model_type!r}; expected 'resnet' or 'swin'")
    from transformers import ResNetConfig, SwinConfig

    # MaskFormer's own Swin has the fields of the common one.
    kind = ResNetConfig if config.model_type == "resnet" else SwinConfig
    fields = {name: value for name, value in config.to_dict().items() if name in kind().to_dict()}
    return describe_config(kind(**{**fields, "model_type": kind.model_type}))


def _read_folder(folder: Path, prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Weights and configuration, read by transformers itself, whatever its version wrote."""
    with extra("models"):
        from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    _check_type(str(folder), read_config(folder / CONFIG_FILE))
    files = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder} has the configuration of a MaskFormer of transformers and no weights; it holds "
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
        options["config"] = MaskFormerConfig.from_pretrained(folder)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the errors below report the keys
    try:
        model, outcome = MaskFormerForInstanceSegmentation.from_pretrained(path, **options)
    except Exception as error:  # of safetensors, pickle, zip files and of transformers itself
        raise ValueError(f"{folder} could not be read: {str(error).strip().partition(chr(10))[0]}") from error
    finally:
        logger.setLevel(level)
    missing, unexpected = (
        {name for name in outcome[f"{kind}_keys"] if not re.fullmatch(IGNORED, name)}
        for kind in ("missing", "unexpected")
    )
    problems = []
    if missing or unexpected:
        # transformers itself tries names without "model.", so that what it misses does not show a prefix.
        in_file = () if prefix or files[0].suffix == ".json" else read_weights(files[0])
        own, names = ({newer_name(name) for name in each} for each in (model.state_dict(), in_file))
        problems.append(key_problems(*((own, names) if wrapping_prefix(own, names) else (missing, unexpected))))
    if wrong := sorted(
        f"{name} of shape {tuple(found)} for {tuple(own)}" for name, found, own in outcome["mismatched_keys"]
    ):
        problems.append(f"it has {listed(wrong)}")
    if problems:
        raise ValueError(f"{folder} does not fit the model; {'; '.join(problems)}")
    return model.state_dict(), model.config


def _check_type(name: str, config: Mapping[str, Any]) -> None:
    """Refuses the configuration of another architecture of transformers than MaskFormer."""
    if "model_type" not in config:
        raise ValueError(f"{name} has no model_type in its {CONFIG_FILE}; expected a MaskFormer of transformers")
    if config["model_type"] != "maskformer":
        classes = f" ({', '.join(config['architectures'])})" if config.get("architectures") else ""
        raise ValueError(
            f"{name} is of model type {config['model_type']!r}{classes}; of transformers' models fastmask reads "
            "'maskformer' (MaskFormerForInstanceSegmentation)"
        )


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
