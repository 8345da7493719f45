"""EoMT: configuration, presets, network and prediction, and pretrained weights for its encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from fastmask.extras import extra
from fastmask.functional import mask_products, merge_views
from fastmask.models._base import config_or_fields
from fastmask.models._configuration import IMAGENET_MEAN, IMAGENET_STD, check_pixel_statistics, require
from fastmask.models._images import ImageBatch, ImagePreprocessor, Size, pad_images
from fastmask.models._mask_classification import (
    MaskClassificationModel,
    PointSampledConfig,
    make_criterion,
)
from fastmask.models._views import ShortSideWindows
from fastmask.models.weight_files import check_keys, pretrained_config
from fastmask.modules.dino import DinoTransformer
from fastmask.modules.mlp import MLP
from fastmask.modules.predictor import MASK_EMBED_LAYERS
from fastmask.modules.resize import resize_bilinear

ENCODERS = ("dinov2", "dinov3")
# At inference, a block masks if its probability in training is at least this.
MASKED_AT_INFERENCE = 0.5

# hidden_dim, encoder_layers, num_heads, query_blocks
SIZES = {"small": (384, 12, 6, 3), "base": (768, 12, 12, 3), "large": (1024, 24, 16, 4)}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 64,
        "patch_size": 8,
        "hidden_dim": 64,
        "encoder_layers": 3,
        "num_heads": 4,
        "feedforward_dim": 128,
        "num_registers": 2,
        "query_blocks": 2,
        "upscale_blocks": 1,
        "num_queries": 25,
        "num_points": 1024,
    },
    **{
        f"eomt-{encoder}-{size}": {
            "encoder": encoder,
            "hidden_dim": dim,
            "encoder_layers": layers,
            "num_heads": heads,
            "feedforward_dim": 4 * dim,
            "query_blocks": query_blocks,
            "norm_eps": 1e-5 if encoder == "dinov3" else 1e-6,
        }
        for encoder in ENCODERS
        for size, (dim, layers, heads, query_blocks) in SIZES.items()
    },
}


@dataclass(frozen=True)
class EoMTConfig(PointSampledConfig):
    """Everything that :class:`fastmask.EoMT` is built from. The defaults are those of the paper's EoMT-L with DINOv2
    for panoptic segmentation (arXiv:2503.19108, section 4, and the authors' configuration files; for ADE20K's semantic
    segmentation they use ``image_size=512, num_queries=100``). Its presets are "tiny", "eomt-dinov2-small", "-base" and
    "-large", and the same with "dinov3". All have patches of 16 pixels, as the authors' networks and those of
    ``transformers``; DINOv2's own, of 14 pixels, are resized when its weights are loaded.

    Args:
        num_classes: K, without "no object".
        encoder: "dinov2" or "dinov3".
        image_size: side in pixels of the windows in which semantic maps are predicted, and to which the longer side of
            other images is resized; a multiple of ``patch_size``. DINOv2's position embeddings are learned for it.
        patch_size: side of a patch in pixels.
        hidden_dim: channels of all tokens, a multiple of ``num_heads``; with "dinov3", of 4 times ``num_heads``.
        encoder_layers: blocks of the encoder.
        norm_eps: added to the variance in the encoder's layer norms.
        drop_path: stochastic depth of all blocks.
        rescale: with "dinov3", the limit of the factor by which training multiplies positions.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the blocks' MLPs.
        gated_mlp: SwiGLU in the blocks' MLPs, as in the largest encoders.
        num_registers: register tokens of the encoder.
        query_blocks: the number of blocks, at the end, that process queries and patches together. There is a
            supervised prediction before each, and after the last.
        upscale_blocks: how often transposed convolutions double the patches' resolution, from ``patch_size`` pixels.
        mask_probabilities: for each of the ``query_blocks``, the probability that a query attends only where its mask
            is foreground; 1 for all unless given. Training with annealing lowers it to 0, see
            :meth:`fastmask.EoMT.set_mask_probabilities`.
        num_queries, class_weight, ...: the fields of :class:`fastmask.models._mask_classification.PointSampledConfig`,
            and ``class_names``: one name for each class, or empty.
        pixel_mean: mean of each channel, subtracted from images in 0..1.
        pixel_std: standard deviation of each channel, which divides the difference.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "EoMT"
    presets = PRESETS

    encoder: str = "dinov2"
    image_size: int = 640
    patch_size: int = 16
    hidden_dim: int = 1024
    encoder_layers: int = 24
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    rescale: float = 2.0
    num_heads: int = 16
    feedforward_dim: int = 4096
    gated_mlp: bool = False
    num_registers: int = 4
    num_queries: int = 200
    query_blocks: int = 4
    upscale_blocks: int = 2
    mask_probabilities: tuple[float, ...] = ()
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if isinstance(self.query_blocks, int) and not self.mask_probabilities:
            object.__setattr__(self, "mask_probabilities", (1.0,) * self.query_blocks)
        super().__post_init__()
        check_pixel_statistics(self.pixel_mean, self.pixel_std)
        require(self.encoder in ENCODERS, "encoder", repr(self.encoder), " or ".join(map(repr, ENCODERS)))
        self.require_at_least(1, "image_size", "patch_size", "hidden_dim", "encoder_layers", "num_heads")
        self.require_at_least(1, "feedforward_dim", "query_blocks")
        self.require_at_least(0, "num_registers", "upscale_blocks")
        expected = f"a multiple of patch_size {self.patch_size}"
        require(self.image_size % self.patch_size == 0, "image_size", self.image_size, expected)
        multiple = self.num_heads * (4 if self.encoder == "dinov3" else 1)
        require(self.hidden_dim % multiple == 0, "hidden_dim", self.hidden_dim, f"a multiple of {multiple}")
        expected = f"at most encoder_layers {self.encoder_layers}"
        require(self.query_blocks <= self.encoder_layers, "query_blocks", self.query_blocks, expected)
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "in [0, 1)")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "more than 0")
        require(self.rescale >= 1, "rescale", self.rescale, "at least 1")
        holds = len(self.mask_probabilities) == self.query_blocks and all(0 <= p <= 1 for p in self.mask_probabilities)
        expected = f"{self.query_blocks} values in 0..1, one for each of the query_blocks"
        require(holds, "mask_probabilities", self.mask_probabilities, expected)

    @property
    def recipe(self) -> str:
        prefix = "eomt" if self.encoder == "dinov2" else "eomt-dinov3"
        names = {3: f"{prefix}-coco-2x", 4: f"{prefix}-ade20k"}
        return names.get(self.query_blocks, super().recipe)

    @property
    def num_predictions(self) -> int:
        return self.query_blocks + 1


class Upscale(nn.Module):
    """Doubles the resolution of a map: a transposed convolution, GELU, a convolution per channel and a layer norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, 1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, dim, h, w)`` to ``(B, dim, 2 h, 2 w)``."""
        maps = self.conv2(gelu(self.conv1(maps)))
        return self.norm(maps.movedim(1, -1)).movedim(-1, 1)


# Class logits (B, N, K+1), mask embeddings (B, N, C) and pixel embeddings (B, C, h, w) of one layer.
Layer = tuple[Tensor, Tensor, Tensor]


class EoMT(MaskClassificationModel):
    """The encoder-only mask transformer (Kerssies et al., CVPR 2025, arXiv:2503.19108): a plain vision transformer
    whose last blocks process learned queries and patches together.

    Before each of these blocks, and after the last, the queries predict classes and masks. In the block, a query
    attends to all queries, the class token, the registers and the patches where its mask is foreground; all other
    tokens attend to every token. In training with annealing, a query is masked with a probability that falls from 1 to
    0, one block after the other, so that inference needs no masks and predicts once, at the end; see
    :meth:`set_mask_probabilities`. :class:`fastmask.modules.dino.MaskedSelfAttention` says how attention runs.

    ``forward`` pads the images of a batch to multiples of ``patch_size`` with black. As in the authors' code, the
    network sees this padding. There are L = ``query_blocks`` + 1 predictions; in evaluation mode only those before
    blocks that mask, and the last.

    ``predict`` sees images at the sizes of the authors' evaluation. For "semantic", an image is resized so that its
    shorter side is ``image_size``, and predicted in square windows at even distances along its longer side; the scores
    of windows are averaged where they overlap. For the other tasks, its longer side is resized to ``image_size``, and
    its shorter one padded to it. With ``window``, ``scales`` or ``flip``, the network sees those views instead.

    Call ``EoMT(config)``, or ``EoMT(num_classes=150, encoder="dinov3", ...)`` with the fields of :class:`EoMTConfig` as
    keywords. :func:`fastmask.integrations.checkpoints.from_hugging_face_eomt` reads the networks of ``transformers``.

    Args:
        config: the configuration; None to give its fields as keywords.
        pretrained_backbone: a folder or hub id from which ``transformers`` reads a DINOv2, with or without registers,
            or a DINOv3 for the encoder, such as "facebook/dinov2-with-registers-large" or
            "facebook/dinov3-vitl16-pretrain-lvd1689m".
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range, or a pretrained backbone of another architecture.
    """

    config_class = EoMTConfig
    backbone_weights = ("encoder.",)
    backbone_blocks = r"encoder\.blocks\.(\d+)\."
    class_weights = ("class_embed.",)
    config: EoMTConfig
    masking: Tensor

    def __init__(
        self, config: EoMTConfig | None = None, *, pretrained_backbone: str | None = None, **options: Any
    ) -> None:
        config = config_or_fields(type(self), config, options)
        super().__init__(config)
        self.preprocessor = ImagePreprocessor(config.pixel_mean, config.pixel_std, config.patch_size)
        side = config.image_size // config.patch_size
        self.encoder = DinoTransformer(
            (side, side),
            config.patch_size,
            dim=config.hidden_dim,
            num_layers=config.encoder_layers,
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            rotary=config.encoder == "dinov3",
            rescale=config.rescale,
            num_registers=config.num_registers,
            gated=config.gated_mlp,
            norm_eps=config.norm_eps,
            drop_path=config.drop_path,
            channels=len(config.pixel_mean),
        )
        self.query_embed = nn.Embedding(config.num_queries, config.hidden_dim)
        self.class_embed = nn.Linear(config.hidden_dim, config.num_classes + 1)
        dims = (config.hidden_dim,) * 3
        self.mask_embed = MLP(*dims, MASK_EMBED_LAYERS, activation=gelu)
        self.upscale = nn.Sequential(*(Upscale(config.hidden_dim) for _ in range(config.upscale_blocks)))
        self.criterion = make_criterion(config)
        # The configuration has these probabilities; on the device, random masking reads them without a copy.
        self.register_buffer("masking", torch.ones(config.query_blocks), persistent=False)
        self.set_mask_probabilities(config.mask_probabilities)
        if pretrained_backbone is not None:
            self.encoder.load_state_dict(pretrained_encoder(pretrained_backbone, self.encoder, config))

    def set_mask_probabilities(self, probabilities: Sequence[float]) -> None:
        """Sets the probability, for each block with queries, that a query attends only where its mask is foreground.

        In training, each query of each image is masked at random. In evaluation mode nothing is random: a block masks
        all queries if its probability is at least 0.5, otherwise none, without the prediction before it.
        :class:`fastmask.training.Trainer` calls this after each step if its recipe anneals. The configuration keeps the
        probabilities, so a saved network has them.

        Args:
            probabilities: ``query_blocks`` values in 0..1, the first block's first.

        Raises:
            ValueError: another number of values, or a value out of range.
        """
        self.config = self.config.replace(mask_probabilities=tuple(map(float, probabilities)))
        for entry, probability in zip(self.masking.unbind(), self.config.mask_probabilities, strict=True):
            entry.fill_(probability)  # needs no copy from the host, which would wait for the device
        self._masked = {
            True: tuple(p > 0 for p in self.config.mask_probabilities),
            False: tuple(p >= MASKED_AT_INFERENCE for p in self.config.mask_probabilities),
        }

    def _predict_layers(self, batch: ImageBatch) -> list[Layer]:
        layers = self._layers(batch, all_layers=True)
        return [(classes[None], masks[None], pixels) for classes, masks, pixels in layers]

    def _results(
        self, batch: ImageBatch, tasks: Mapping[str, Mapping[str, Any]], sizes: Sequence[Size]
    ) -> dict[str, list[Any]]:
        side = self.config.image_size
        crops = [pixels[:, :h, :w] for pixels, (h, w) in zip(batch.pixels, batch.sizes, strict=True)]
        results: dict[str, list[Any]] = {}
        if "semantic" in tasks:
            views = ShortSideWindows(None, (1.0,), False, 1, side=side)
            results["semantic"] = [
                merge_views(views.of(_resized(image, size), size, self.final_logits), size, **tasks["semantic"])
                for image, size in zip(crops, sizes, strict=True)
            ]
        of_whole = {task: options for task, options in tasks.items() if task != "semantic"}
        if of_whole:
            fitted = pad_images([_resized(image, _fitted(image, side)) for image in crops], side, batch.pixels.shape[1])
            results |= super()._results(fitted, of_whole, sizes)
        return {task: results[task] for task in tasks}

    def _predict(self, batch: ImageBatch, *, all_layers: bool) -> tuple[Tensor, Tensor, Tensor]:
        class_logits, mask_embed, pixel_embed = self._layers(batch, all_layers=False)[-1]
        return class_logits[None], mask_embed[None], pixel_embed

    def _layers(self, batch: ImageBatch, *, all_layers: bool) -> list[Layer]:
        """The predictions before each block with queries and after the last; without ``all_layers`` only the last."""
        pixels = self.preprocessor.normalize(replace(batch, sizes=(batch.padded_size,)))
        tokens, rotation, grid = self.encoder.embed(pixels)
        layers = []
        first = self.config.encoder_layers - self.config.query_blocks
        for i, block in enumerate(self.encoder.blocks):
            if i == first:
                queries = self.query_embed.weight.expand(tokens.shape[0], -1, -1)
                tokens = torch.cat([queries, tokens], 1)
            attended = None
            masked = i >= first and self._masked[self.training][i - first]
            if masked or (i >= first and all_layers and self.training):
                layers.append(self._heads(tokens, grid))
            if masked:
                attended = self._attended(layers[-1], grid, tokens.shape[1], self.masking[i - first])
            tokens = block(tokens, rotation, attended)
        layers.append(self._heads(tokens, grid))
        return layers

    def _heads(self, tokens: Tensor, grid: tuple[int, int]) -> Layer:
        """The prediction from ``tokens (B, N + 1 + num_registers + S, C)``, queries first."""
        config = self.config
        tokens = self.encoder.norm(tokens)
        queries, patches = tokens[:, : config.num_queries], tokens[:, config.num_queries + 1 + config.num_registers :]
        pixel_embed = self.upscale(patches.transpose(1, 2).unflatten(2, grid))
        return self.class_embed(queries), self.mask_embed(queries), pixel_embed

    @torch.no_grad()
    def _attended(self, layer: Layer, grid: tuple[int, int], num_tokens: int, probability: Tensor) -> Tensor:
        """``(B, N, T)`` bool: the tokens to which each query attends in the next block."""
        _, mask_embed, pixel_embed = layer
        # Resizing is linear, so it may precede the product, which then covers the patches only.
        attended = mask_products(mask_embed, resize_bilinear(pixel_embed, grid)).flatten(2) > 0
        if self.training:
            attended |= torch.rand(attended.shape[:2], device=attended.device)[..., None] >= probability
        others = attended.new_ones(*attended.shape[:2], num_tokens - attended.shape[2])
        return torch.cat([others, attended], 2)


def _fitted(image: Tensor, side: int) -> Size:
    """The size of an image whose longer side is resized to ``side``."""
    longer = max(image.shape[-2:])
    height, width = (max(1, round(length * side / longer)) for length in image.shape[-2:])
    return height, width


def _resized(image: Tensor, size: Size) -> Tensor:
    """``image (C, H, W)`` in 0..1, resized bilinearly with antialiasing."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return interpolate(image[None], tuple(size), mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


# Replacements, in this order, of regular expressions in the names of DINOv2 and DINOv3 in transformers 4 and 5.
NAMES = (
    (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.o_proj\.", ".attn.out_proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$", r".scale\1"),
)
MODEL_TYPES = {"dinov2": ("dinov2", "dinov2_with_registers"), "dinov3": ("dinov3_vit",)}


def pretrained_encoder(folder: str, encoder: DinoTransformer, config: EoMTConfig) -> dict[str, Tensor]:
    """A state dict for the encoder from a DINOv2 or DINOv3; position embeddings and the projection of patches are
    resized to the encoder's.

    Args:
        folder: a folder or hub id from which ``transformers`` reads the model.
        encoder: the encoder to fit.
        config: the network's configuration.

    Raises:
        ValueError: a model of another type, or weights that do not fit; the message names them.
    """
    with extra("models"):
        import transformers

    theirs = pretrained_config(folder)
    expected = MODEL_TYPES[config.encoder]
    if theirs.model_type not in expected:
        raise ValueError(
            f"pretrained_backbone {folder!r} is of model type {theirs.model_type!r}; encoder {config.encoder!r} reads "
            f"{' or '.join(expected)}"
        )
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    own = encoder.state_dict()
    weights = own_names(model.state_dict(), gated=config.gated_mlp)
    weights.setdefault("register_tokens", own["register_tokens"][:, :0])  # DINOv2 without registers
    if (positions := weights.pop("embeddings.position_embeddings", None)) is not None:
        special, patches = positions[0, :1], positions[0, 1:]
        weights["cls_token"] = weights["cls_token"] + special
        weights["pos_embed"] = _resized_positions(patches, encoder.grid_size)
    weights["patch_embed.proj.weight"] = resized_patches(weights["patch_embed.proj.weight"], config.patch_size)
    for name in check_keys(own, weights, folder):
        raise ValueError(
            f"pretrained_backbone {folder!r} has {name} of shape {tuple(weights[name].shape)}; "
            f"the configuration asks for {tuple(own[name].shape)}"
        )
    return weights


def own_names(weights: Mapping[str, Tensor], *, gated: bool) -> dict[str, Tensor]:
    """The weights of a DINOv2 or DINOv3 of ``transformers`` under the names of :class:`DinoTransformer`."""
    names = NAMES if gated else (*NAMES, (r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
    result = {}
    for name, tensor in weights.items():
        if name in ("embeddings.mask_token", "rope_embeddings.inv_freq"):
            continue
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def _resized_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings ``(S, C)`` of a square grid, resized to another as DINOv2 does, bicubically."""
    side = round(len(positions) ** 0.5)
    planes = positions.T.unflatten(1, (side, side))[None]
    if grid != (side, side):
        planes = interpolate(planes, grid, mode="bicubic", align_corners=False, antialias=True)
    return planes[0].flatten(1).T.contiguous()


def resized_patches(weight: Tensor, patch_size: int) -> Tensor:
    """A projection of patches ``(C, channels, p, p)`` for patches of another size: it gives for a resized patch what
    ``weight`` gives for the original, as nearly as possible (FlexiViT, Beyer et al., arXiv:2212.08013, section 3.4).
    """
    side = weight.shape[-1]
    if side == patch_size:
        return weight
    units = torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)
    resize = interpolate(units, (patch_size, patch_size), mode="bicubic", align_corners=False, antialias=True)
    inverse = torch.linalg.pinv(resize.flatten(1))  # (patch_size^2, p^2)
    return (weight.double().flatten(2) @ inverse.T).unflatten(2, (patch_size, patch_size)).to(weight.dtype)
