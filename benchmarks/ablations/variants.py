"""The plan of training: the variants of each comparison, and the settings that all variants share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fastmask.data.open import is_composed
from fastmask.training import Recipe

COMPARISONS = ("structures", "queries", "layers", "inference", "sound")
QUERIES = (5, 13, 25, 50, 100)
LAYERS = (1, 3, 6)
PER_PIXEL, PER_PIXEL_PLUS, FIXED, BIPARTITE = "per-pixel", "per-pixel+", "fixed", "bipartite"
FRAMES, PRESENCE, NO_MASK_LOSSES = "frame-wise", "presence x mask", "presence x mask, no mask losses"
# With the letters by which the documentation refers to the structures.
TITLES = {
    PER_PIXEL: "(a) per-pixel",
    PER_PIXEL_PLUS: "(b) per-pixel+",
    FIXED: "(c) masks, fixed matching",
    BIPARTITE: "(d) masks, bipartite matching",
    FRAMES: "frame-wise",
    PRESENCE: "(e) presence × mask",
    NO_MASK_LOSSES: "(e) without mask losses",
}
STRUCTURES = (PER_PIXEL, PER_PIXEL_PLUS, FIXED, BIPARTITE)
SOUND = (FRAMES, PRESENCE, NO_MASK_LOSSES)
# Structures without mask classification, whose losses have no weight of classes.
UNWEIGHTED = (PER_PIXEL, PER_PIXEL_PLUS, *SOUND)
CLASS_WEIGHT = 2.0  # as in the demo, unless tuned
# Of the runs that find the best choice for a structure; no comparison uses it.
TUNING_SEED = 1000


@dataclass(frozen=True)
class Choice:
    """What is tuned for each structure: the peak learning rate, and the weight of the classes' loss."""

    learning_rate: float
    class_weight: float


@dataclass(frozen=True)
class Settings:
    """The settings that all runs on one data set share: data, budget and optimizer.

    Args:
        data: "composed:scenes", "composed:icons-K", "composed:clips" or a folder.
        model: the preset of a MaskFormer, Mask2Former or EoMT with all settings that no comparison varies.
        pretrained: where ``transformers`` reads the backbone's weights; empty for random weights. The backbone of
            the demo's network always takes the place of one called "tiny", with its weights or with those of this
            file of :mod:`benchmarks.ablations.backbone`. Sound starts from random weights.
        size: for images, the side of a scene or crop, and the short side of other images, in pixels; for clips, their
            length in seconds.
        val_samples: the most samples of the validation split to evaluate, from the first on.
        batch_size: samples per step.
        steps: the number of optimizer steps.
        learning_rates: the peak learning rates from which each structure takes its best.
        class_weights: the weights of the classes' loss, likewise.
        precision: as for :class:`fastmask.training.Trainer`.
        tuning_steps: optimizer steps of the runs that try rates and weights; 0 for as many as in the others.
        masked_attention: whether mask classification has the decoder of Mask2Former, as MaskFormer's configuration
            allows. Per-pixel classification keeps its decoder, as the masks of its queries are no foreground.
    """

    data: str
    model: str
    pretrained: str
    size: int
    val_samples: int
    batch_size: int
    steps: int
    learning_rates: tuple[float, ...]
    class_weights: tuple[float, ...] = (CLASS_WEIGHT,)
    precision: str = "float32"
    tuning_steps: int = 0
    masked_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rates", "class_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def choices(self, structure: str) -> list[Choice]:
        """What to try for a structure: one choice if nothing is tuned."""
        weights = self.class_weights[:1] if structure in UNWEIGHTED else self.class_weights
        return [Choice(*values) for values in product(self.learning_rates, weights)]

    @property
    def composed(self) -> bool:
        """Whether samples are composed at random, so that they need no augmentation."""
        return is_composed(self.data)

    def as_row(self) -> dict[str, Any]:
        """As a result file holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def recipe(self, choice: Choice) -> Recipe:
        """The demo's recipe (its backbone multiplier, weight decay, clipping and warm-up) with a poly schedule."""
        return Recipe(
            learning_rate=choice.learning_rate,
            weight_decay=0.05,
            backbone_multiplier=0.3,
            warmup_steps=self.steps // 30,
            clip_norm=1.0,
            steps=self.steps,
            batch_size=self.batch_size,
            augmentation="none" if self.composed else "semantic",
            crop=(self.size, self.size),
            short_side=self.size,
            max_side=4 * self.size,
        )


@dataclass(frozen=True)
class Variant:
    """One network and the truth that it learns from.

    Args:
        structure: a key of ``TITLES``.
        queries: N; one for each class in per-pixel classification with a transformer and in sound; 0 without queries.
        layers: layers of the transformer decoder, or an EoMT's blocks with queries; 0 without either.
        task: "semantic", "panoptic" or "events".
    """

    structure: str
    queries: int
    layers: int
    task: str = "semantic"

    @property
    def name(self) -> str:
        return f"{self.structure}, {self.queries} queries, {self.layers} layers, {self.task}"


@dataclass(frozen=True)
class Run:
    """One training run of a variant. The seed determines initial weights, sample order and augmentation.

    Args:
        variant: what to train.
        seed: ``TUNING_SEED`` if the run tries a choice.
        choice: None until the best one is known.
    """

    variant: Variant
    seed: int
    choice: Choice | None = None

    @property
    def tunes(self) -> bool:
        return self.seed == TUNING_SEED

    @property
    def name(self) -> str:
        if self.tunes and self.choice is not None:
            rate, weight = self.choice.learning_rate, self.choice.class_weight
            return f"{self.variant.name}, learning rate {rate:g}, class weight {weight:g}"
        return f"{self.variant.name}, seed {self.seed}"


def main_metric(run: Run) -> str:
    """The metric by which a structure's best choice is found."""
    return "F1" if run.variant.structure in SOUND else "mIoU"


def comparisons(
    num_classes: int,
    base_layers: int,
    *,
    panoptic: bool,
    sound_classes: int,
    sound_layers: int,
    per_pixel: bool = True,
    queries: Sequence[int] = QUERIES,
    layers: Sequence[int] = LAYERS,
) -> dict[str, list[Variant]]:
    """The variants of each comparison.

    As in the paper's table 4, all structures have as many queries as classes. The other comparisons vary one number of
    structure (d), which they therefore share.

    Args:
        num_classes: K of the images.
        base_layers: decoder layers in comparisons that do not vary them.
        panoptic: whether the data has panoptic truth, on which the numbers of layers are then compared, too.
        sound_classes, sound_layers: classes and decoder layers of the sound event detector.
        per_pixel: whether structure (d) is a MaskFormer, with which alone the other structures share their parts; there
            is no comparison of structures otherwise.
        queries: the numbers of queries to compare.
        layers: the numbers of layers to compare.
    """
    base = Variant(BIPARTITE, num_classes, base_layers)
    structures = [
        Variant(PER_PIXEL, 0, 0),
        Variant(PER_PIXEL_PLUS, num_classes, base_layers),
        Variant(FIXED, num_classes, base_layers),
        base,
    ]
    tasks = ("semantic", "panoptic") if panoptic else ("semantic",)
    return {
        **({"structures": structures} if per_pixel else {}),
        "queries": [Variant(BIPARTITE, number, base_layers) for number in queries],
        "layers": [Variant(BIPARTITE, num_classes, number, task) for task in tasks for number in layers],
        "inference": [base],
        "sound": [
            Variant(
                structure,
                0 if structure == FRAMES else sound_classes,
                0 if structure == FRAMES else sound_layers,
                "events",
            )
            for structure in SOUND
        ],
    }


def plan(variants: dict[str, list[Variant]], only: Sequence[str], seeds: int) -> list[Run]:
    """The runs of the requested comparisons, each once: one comparison after another, and within it one seed after
    another, so that an interruption leaves complete comparisons and complete seeds.

    Raises:
        ValueError: an unknown comparison.
    """
    unknown = [name for name in only if name not in variants]
    if unknown:
        raise ValueError(f"no comparison {', '.join(unknown)}; there are {', '.join(variants)}")
    runs = [
        Run(variant, seed)
        for name in variants
        if name in only or not only
        for seed in range(seeds)
        for variant in variants[name]
    ]
    return list(dict.fromkeys(runs))


def tuning_plan(
    variants: dict[str, list[Variant]], runs: Sequence[Run], choices: Callable[[str], list[Choice]]
) -> list[Run]:
    """The runs that try the choices for each structure of other runs, with the settings that no comparison varies.

    Args:
        variants: of each comparison.
        runs: the other runs.
        choices: those of a structure; one that has only one is not tuned.
    """
    bases = [v for name in ("structures", "inference", "sound") for v in variants.get(name, ())]
    base = {variant.structure: variant for variant in reversed(bases)}
    structures = dict.fromkeys(run.variant.structure for run in runs)
    return [
        Run(base[structure], TUNING_SEED, choice)
        for structure in structures
        for choice in choices(structure)
        if len(choices(structure)) > 1
    ]
