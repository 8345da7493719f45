"""What the checkpoints of MaskFormer's and Mask2Former's authors (detectron2's .pth and .pkl files) have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmask.integrations.checkpoints.backbone_names import NOT_LEARNED, detectron2_resnet, microsoft_swin
from fastmask.integrations.checkpoints.names import NameRule, rename, to_foreign, to_own
from fastmask.integrations.checkpoints.state_files import read_weights
from fastmask.models._base import PretrainedModel
from fastmask.models.weight_files import key_problems, listed, without_prefix, wrapping_prefix

HEAD = "sem_seg_head."
DECODER = f"{HEAD}pixel_decoder"
PREDICTOR = f"{HEAD}predictor"
IGNORED = rf"{NOT_LEARNED}|criterion\.empty_weight|pixel_mean|pixel_std"


@dataclass(frozen=True)
class OriginalFormat:
    """How the authors' code stores the networks of a family.

    Args:
        kind: our network.
        infer: the configuration that fits the shapes of weights.
        rules: the names of a model of ours and of its counterpart.
        by_counts: a regular expression for names of ours whose shapes depend on the numbers of queries and classes.
        older_names: parts of names in earlier versions of the code, and those that took their place.
    """

    kind: type[PretrainedModel]
    infer: Callable[[Shapes], Any]
    rules: Callable[[Any], list[NameRule]]
    by_counts: str
    older_names: Mapping[str, str]

    def read(
        self,
        checkpoint: str | Path | Mapping[str, Tensor],
        config: Any = None,
        *,
        ignore_mismatched_sizes: bool = False,
        prefix: str = "",
    ) -> Any:
        """A model of ours with the weights of the authors' model.

        Args:
            checkpoint: a ``.pth`` or ``.pkl`` file of detectron2, or its dict of weights by name. Nothing but arrays is
                unpickled.
            config: what to build; by default read off the weights' shapes, with 8 attention heads and the losses of the
                paper, none of which the weights tell.
            ignore_mismatched_sizes: let query embeddings and class head start at random, with a warning, where
                ``config`` has another number of queries or classes.
            prefix: as for :func:`~fastmask.integrations.checkpoints.state_files.read_weights`.

        Returns:
            the model, on the CPU, in float32 and training mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is unreadable or holds something else than arrays; keys that are missing or
                unexpected; shapes that differ. The message names them.
        """
        source = "the checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
        if isinstance(checkpoint, Mapping):
            weights = without_prefix(checkpoint, prefix, source)
        else:
            weights = read_weights(checkpoint, prefix)
        model = self.kind(config or self.infer_config(weights, source))
        own = to_own(
            self.newer_names(weights),
            model.weights(),
            self.rules(model),
            ignored=IGNORED,
            replaceable=self.by_counts if ignore_mismatched_sizes else "",
            source=source,
        )
        model.load_state_dict(own, strict=False)
        return model

    def write(self, model: PretrainedModel) -> dict[str, Tensor]:
        """The weights of a model under the authors' names, which their code loads with ``strict=False``.

        Save ``{"model": weights}`` with ``torch.save`` for detectron2's checkpointer.

        Raises:
            ValueError: the original has no such architecture; the message lists the weights that it has no names for.
        """
        return to_foreign(model.weights(), self.rules(model))

    def infer_config(self, weights: Mapping[str, Tensor], source: str = "the checkpoint") -> Any:
        """The configuration that fits the shapes of weights; what they do not tell is the paper's."""
        return self.infer(Shapes(self.newer_names(weights), source, self.kind.__name__))

    def newer_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights under the names of the newest code; the oldest had the pixel decoder directly in the head."""
        named = {}
        for name, tensor in weights.items():
            if name.startswith(HEAD) and not name.startswith((PREDICTOR, DECODER)):
                name = f"{DECODER}.{name.removeprefix(HEAD)}"
            for older, newer in self.older_names.items():
                name = name.replace(older, newer)
            named[name] = torch.as_tensor(tensor)
        return named


@dataclass(frozen=True)
class Shapes:
    """The shapes of the weights in a checkpoint.

    Args:
        weights: by name.
        source: of the weights, for errors.
        network: the name of the network that is expected, for errors.
    """

    weights: Mapping[str, Tensor]
    source: str
    network: str

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of a weight.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.weights:
            parts = dict.fromkeys(".".join(other.split(".")[:2]) for other in self.weights)
            behind_prefix = wrapping_prefix([name], self.weights)
            problem = key_problems([name], self.weights) if behind_prefix else f"it has {listed(parts)}"
            raise ValueError(
                f"{self.source} has no {name}; expected the weights of the original {self.network}; {problem}"
            )
        return tuple(self.weights[name].shape)

    def count(self, pattern: str) -> int:
        """How many numbers from 0 on, put into ``pattern``, begin the name of a weight."""
        counts = range(len(self.weights) + 1)
        return next(i for i in counts if not any(name.startswith(pattern.format(i)) for name in self.weights))

    def fields(self) -> dict[str, Any]:
        """The fields of the configuration that every family stores alike."""
        backbone, options = self.backbone()
        mask_dim, pixel_decoder_dim = self.of(f"{DECODER}.mask_features.weight")[:2]
        return {
            "num_classes": self.of(f"{PREDICTOR}.class_embed.weight")[0] - 1,
            "backbone": backbone,
            "backbone_options": options,
            "mask_dim": mask_dim,
            "pixel_decoder_dim": pixel_decoder_dim,
        }

    def backbone(self) -> tuple[str, dict[str, Any]]:
        """The backbone's name and options, for :func:`fastmask.models.build_backbone`."""
        if "backbone.patch_embed.proj.weight" in self.weights:
            stages = self.count("backbone.layers.{}.")
            tables = [self.of(f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(stages)]
            return "swin", {
                "embed_dim": self.of("backbone.patch_embed.proj.weight")[0],
                "depths": [self.count(f"backbone.layers.{i}.blocks.{{}}.") for i in range(stages)],
                "num_heads": [heads for _, heads in tables],
                "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
            }
        depths = [self.count(f"backbone.res{stage}.{{}}.") for stage in range(2, 6)]
        bottleneck = "backbone.res2.0.conv3.weight" in self.weights
        last = 3 if bottleneck else 2
        deep = "backbone.stem.conv3.weight" in self.weights
        return "resnet-c" if deep else "resnet", {
            "embedding_size": self.of(f"backbone.stem.conv{3 if deep else 1}.weight")[0],
            "hidden_sizes": [self.of(f"backbone.res{stage}.0.conv{last}.weight")[0] for stage in range(2, 6)],
            "depths": depths,
            "layer_type": "bottleneck" if bottleneck else "basic",
        }


def shared_rules(num_maps: int) -> list[NameRule]:
    """The names of the backbones and of the pixel decoders' convolutions; the authors count those on and after each map
    from 1."""
    rules = [
        *detectron2_resnet(),
        *microsoft_swin(),
        rename(r"pixel_decoder\.(mask_features|input_proj)\.(.*)", rf"{DECODER}.\1.\2"),
    ]
    for i in range(num_maps):
        for own, foreign in ((rf"adapters\.{i}", f"adapter_{i + 1}"), (rf"layers\.{i}", f"layer_{i + 1}")):
            rules += [
                rename(rf"pixel_decoder\.{own}\.conv\.weight", f"{DECODER}.{foreign}.weight"),
                rename(rf"pixel_decoder\.{own}\.norm\.(.*)", rf"{DECODER}.{foreign}.norm.\1"),
            ]
    return rules
