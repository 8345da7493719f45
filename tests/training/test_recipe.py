"""Recipes: their fields and presets, and the optimizer, schedule and clipping that follow from them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from fastmask import (
    EoMT,
    MaskFormer,
    PerPixelBaseline,
    Segmenter,
    SoundEventDetector,
)
from fastmask.data import Sample
from fastmask.training import (
    Recipe,
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from fastmask.training.recipe import PRESETS

# Every value differs from every other, so that a group shows where its own come from.
DISTINCT = Recipe(
    learning_rate=0.5, backbone_multiplier=0.25, weight_decay=0.1, norm_weight_decay=0.2, embed_weight_decay=0.3
)
TINY = {"num_classes": 3, "backbone": "tiny", "hidden_dim": 32, "mask_dim": 32, "pixel_decoder_dim": 32} | {
    "decoder_layers": 2,
    "num_heads": 4,
    "feedforward_dim": 32,
}


def maskformer(**options):
    return MaskFormer(MaskFormer.config_class(**TINY | {"num_queries": 5} | options))


MODELS = {
    "maskformer": maskformer,
    "masked attention": lambda: maskformer(masked_attention=True),
    "swin": lambda: maskformer(
        backbone="swin", backbone_options={"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    ),
    "dinov2": lambda: maskformer(
        backbone="dinov2",
        backbone_options={"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4},
        size_divisibility=28,
    ),
    "convnext": lambda: maskformer(backbone="convnext", backbone_options={"depths": [1, 1, 1, 1]}),
    "efficientnet-lite0": lambda: maskformer(backbone="efficientnet-lite0", encoder_layers=1),
    "per-pixel": lambda: PerPixelBaseline(PerPixelBaseline.config_class(**TINY)),
    "per-pixel+": lambda: PerPixelBaseline(PerPixelBaseline.config_class(**TINY, transformer_decoder=True)),
    "segmenter": lambda: Segmenter(Segmenter.config_class.preset("tiny", 3)),
    "segmenter linear": lambda: Segmenter(Segmenter.config_class.preset("tiny", 3, decoder="linear", distilled=True)),
    "sound": lambda: SoundEventDetector(SoundEventDetector.config_class.preset("tiny", 3)),
    "eomt": lambda: EoMT(EoMT.config_class.preset("tiny", 3)),
}
# By hand: the names of what does not decay as weights do.
NORMS = re.compile(r"norm|frame_encoder.*\.blocks\.\d\.1\.|downsampling_layer\.0\.")
EMBEDDINGS = re.compile(
    r"query_(embed|feat)\.|level_embed\.|relative_position_bias_table|cls_(token|emb)$|register_tokens|dist_token|mask_token|"
    r"pos_embed|position_embeddings"
)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_the_group_that_its_name_asks_for(name):
    model = MODELS[name]()
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {}
    for path in names.values():
        part = "backbone" if path.startswith(("backbone.", "encoder.")) else "head"
        kind = "norms" if NORMS.search(path) else "embeddings" if EMBEDDINGS.search(path) else "weights"
        expected.setdefault(f"{part}/{kind}", []).append(path)
    groups = parameter_groups(model, DISTINCT)
    assert {group["name"]: [names[p] for p in group["params"]] for group in groups} == expected
    for group in groups:
        part, kind = group["name"].split("/")
        assert group["multiplier"] == {"backbone": 0.25, "head": 1.0}[part]
        assert group["lr"] == 0.5 * group["multiplier"]
        assert group["weight_decay"] == {"weights": 0.1, "norms": 0.2, "embeddings": 0.3}[kind]


def test_the_groups_of_a_small_model_listed_by_name():
    model = maskformer(decoder_layers=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: [names[p] for p in group["params"]] for group in parameter_groups(model, DISTINCT)}
    assert list(groups) == ["backbone/weights", "backbone/norms", "head/weights", "head/norms", "head/embeddings"]
    assert groups["backbone/weights"][0] == "backbone.embedder.embedder.convolution.weight"
    assert groups["backbone/norms"][:2] == [
        "backbone.embedder.embedder.normalization.weight",
        "backbone.embedder.embedder.normalization.bias",
    ]
    assert groups["head/embeddings"] == ["predictor.query_embed.weight"]
    # Biases decay as weights do.
    assert groups["head/weights"][-8:] == [
        "predictor.class_embed.weight",
        "predictor.class_embed.bias",
        *(f"predictor.mask_embed.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")),
    ]


def test_layer_decay_lowers_the_rate_from_block_to_block():
    """As the authors of EoMT: what precedes the blocks has the first one's rate, the final norm the full rate."""
    model = MODELS["eomt"]()
    names = {parameter: name for name, parameter in model.named_parameters()}
    recipe = DISTINCT.replace(layer_decay=0.5)
    rates = {names[p]: group["multiplier"] for group in parameter_groups(model, recipe) for p in group["params"]}
    for name, rate in rates.items():
        block = re.match(r"encoder\.blocks\.(\d)", name)
        shares = {"0": 0.25, "1": 0.5, "2": 1.0}
        backbone = 0.25 * (shares[block[1]] if block else 1.0 if "encoder.norm" in name else 0.25)
        assert rate == (backbone if name.startswith("encoder.") else 1.0), name
    assert {"encoder.pos_embed", "encoder.patch_embed.proj.bias", "encoder.norm.bias"} <= rates.keys()
    exempt = {
        group["name"]: group["multiplier"]
        for group in parameter_groups(model, recipe.replace(decay_query_blocks=False))
    }
    assert [exempt[f"backbone/{i}/weights"] for i in range(3)] == [0.25**2, 0.25, 0.25]
    with pytest.raises(ValueError, match="layer_decay is 0.5; a MaskFormer has no backbone of equal blocks"):
        parameter_groups(maskformer(), recipe)
    assert len(parameter_groups(MODELS["segmenter"](), recipe)) > 6


def test_two_stages_of_warmup_are_the_authors_formula():
    recipe = Recipe.preset("eomt-ade20k")
    steps = (0, 250, 499, 500, 1000, 1499, 1500, 20_000, 39_153, 40_000)
    for step in steps:
        head = step / 500 if step < 500 else max(0, 1 - (step - 500) / (39_153 - 500)) ** 0.9
        backbone = 0 if step < 500 else (step - 500) / 1000
        if step >= 1500:
            backbone = max(0, 1 - (step - 1500) / (39_153 - 1500)) ** 0.9
        assert learning_rate_factor(recipe, step) == pytest.approx(head, rel=1e-12)
        assert learning_rate_factor(recipe, step, backbone=True) == pytest.approx(backbone, rel=1e-12)
    optimizer = make_optimizer(MODELS["eomt"](), recipe)
    schedule = make_schedule(optimizer, recipe)
    optimizer.step()
    for _ in range(600):
        schedule.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["head/weights"] == pytest.approx(1e-4 * learning_rate_factor(recipe, 600))
    assert rates["backbone/1/norms"] == pytest.approx(1e-4 * 0.8 * 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay is 0.0; expected in"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"backbone_warmup_steps": 10}, 'backbone_warmup_steps is 10; expected 0 without "two-stage-poly"'),
        (
            {"schedule": "two-stage-poly", "steps": 10, "warmup_steps": 5, "backbone_warmup_steps": 5},
            "fewer than steps",
        ),
    ],
)
def test_wrong_decay_and_warmup_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_shared_parameters_count_once_and_frozen_ones_not():
    model = nn.ModuleDict({"backbone": nn.Linear(3, 3), "head": nn.Linear(3, 3), "norm": nn.LayerNorm(3)})
    model["head"].weight = model["backbone"].weight
    model["norm"].bias.requires_grad_(False)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, DISTINCT)}
    backbone, head, norm = model["backbone"], model["head"], model["norm"]
    expected = {"backbone/weights": [backbone.weight, backbone.bias], "head/weights": [head.bias]}
    expected["head/norms"] = [norm.weight]
    assert groups.keys() == expected.keys()
    for name, parameters in expected.items():
        assert [id(p) for p in groups[name]] == [id(p) for p in parameters]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="ModuleDict has no trainable parameters"):
        parameter_groups(model, DISTINCT)


def test_a_compiled_model_has_the_same_groups():
    model = MODELS["segmenter"]()
    groups = parameter_groups(torch.compile(model), DISTINCT)
    for group, expected in zip(groups, parameter_groups(model, DISTINCT), strict=True):
        assert group["name"] == expected["name"]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]


def test_optimizers_take_the_recipe_and_its_groups():
    model = maskformer()
    adamw = make_optimizer(model, Recipe.preset("maskformer-ade20k"))
    assert isinstance(adamw, torch.optim.AdamW)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in adamw.param_groups}
    assert rates["backbone/weights"] == (pytest.approx(1e-5), 1e-4) and rates["head/norms"] == (1e-4, 0.0)
    sgd = make_optimizer(Segmenter(Segmenter.config_class.preset("tiny", 3)), Recipe.preset("segmenter-ade20k"))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(g["momentum"] == 0.9 and g["nesterov"] and g["weight_decay"] == 0 for g in sgd.param_groups)
    assert {g["lr"] for g in sgd.param_groups} == {1e-3}


@pytest.mark.parametrize("preset", ["maskformer-ade20k", "maskformer-ade20k-swin"])
def test_poly_is_the_authors_formula_and_ends_at_zero(preset):
    recipe = Recipe.preset(preset)
    for step in (0, 1, 700, 1499, 1500, 80_000, 159_999):
        line = min(step / recipe.warmup_steps, 1) if recipe.warmup_steps else 1
        expected = (1e-6 * (1 - line) + line) * math.pow(1 - step / 160_000, 0.9)
        assert learning_rate_factor(recipe, step) == pytest.approx(expected, rel=1e-12)
    assert learning_rate_factor(recipe, 160_000) == learning_rate_factor(recipe, 170_000) == 0


def test_segmenters_schedule_ends_at_its_least_rate():
    recipe = Recipe.preset("segmenter-ade20k")
    for step in (0, 1, 40_000, 160_000):
        expected = (1e-3 - 1e-5) * (1 - step / 160_000) ** 0.9 + 1e-5
        assert 1e-3 * learning_rate_factor(recipe, step) == pytest.approx(expected, rel=1e-12)


def test_steps_fall_at_the_authors_milestones():
    recipe = Recipe.preset("mask2former-coco")
    values = [learning_rate_factor(recipe, step) for step in (0, 327_777, 327_778, 355_091, 355_092, 368_749)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    recipe = Recipe.preset("maskformer-coco-panoptic-swin")
    values = [learning_rate_factor(recipe, step) for step in (0, 750, 1500, 369_599, 369_600)]
    assert values == pytest.approx([1e-6, 0.5000005, 1, 1, 0.1])
    assert learning_rate_factor(Recipe(schedule="constant"), 12345) == 1


@pytest.mark.parametrize("schedule", [{}, {"schedule": "steps", "milestones": (0.4, 0.8)}, {"schedule": "constant"}])
def test_schedule_sets_each_groups_rate_and_resumes(schedule):
    recipe = Recipe(steps=10, warmup_steps=3, learning_rate=0.1, backbone_multiplier=0.5, **schedule)

    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        optimizer = make_optimizer(model, recipe)
        return model, optimizer, make_schedule(optimizer, recipe)

    def train(model, optimizer, schedule, steps):
        for step in steps:
            for group in optimizer.param_groups:
                expected = 0.1 * group["multiplier"] * learning_rate_factor(recipe, step)
                assert group["lr"] == pytest.approx(expected, rel=1e-12)
            model["head"](model["backbone"](torch.full((1, 4), step + 1.0))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    whole, first, second = make(), make(), make()
    train(*whole, range(10))
    train(*first, range(5))
    for part, saved in zip(second, first, strict=True):
        part.load_state_dict(saved.state_dict())
    assert [group["name"] for group in second[1].param_groups] == ["backbone/weights", "head/weights"]
    train(*second, range(5, 10))
    for value, expected in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("clip_norm", [0.01, 1.0, 1e6, 0.0])
def test_clipping_is_that_of_torch_over_all_parameters_together(clip_norm):
    torch.manual_seed(0)
    models = [maskformer() for _ in range(2)]
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for parameter in list(model.parameters())[::2]:  # the others have no gradient
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    norm = clip_gradients(models[0], clip_norm)
    expected = torch.nn.utils.clip_grad_norm_(models[1].parameters(), clip_norm or math.inf)
    assert torch.equal(norm, expected) and norm.shape == ()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    clipped = math.sqrt(sum(p.grad.double().square().sum() for p in models[0].parameters() if p.grad is not None))
    assert clipped <= norm * (1 + 1e-6) and (not 0 < clip_norm < norm or clipped == pytest.approx(clip_norm, rel=1e-3))


def test_the_norm_of_broken_or_missing_gradients():
    parameter = nn.Parameter(torch.ones(3))
    assert clip_gradients([parameter], 1.0) == 0
    parameter.grad = torch.tensor([1.0, math.inf, 0.0])
    assert not clip_gradients([parameter], 1.0).isfinite()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_changes_and_survive_json(name, tmp_path):
    recipe = Recipe.preset(name, batch_size=2)
    assert recipe.batch_size == 2 and recipe == Recipe.preset(name).replace(batch_size=2)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


def test_what_the_papers_say():
    ade, swin, city = (Recipe.preset(f"maskformer-{name}") for name in ("ade20k", "ade20k-swin", "cityscapes"))
    assert ade == Recipe() and ade.clip_norm == 0.01 and (ade.steps, ade.batch_size) == (160_000, 16)
    assert (swin.learning_rate, swin.weight_decay, swin.backbone_multiplier, swin.warmup_steps) == (6e-5, 0.01, 1, 1500)
    assert (city.crop, city.short_side, city.max_side, city.steps) == ((512, 1024), 1024, 4096, 90_000)
    segmenter = {name: Recipe.preset(f"segmenter-{name}") for name in ("ade20k", "pascal-context", "cityscapes")}
    assert [r.learning_rate for r in segmenter.values()] == [1e-3, 1e-3, 1e-2]
    assert [r.batch_size for r in segmenter.values()] == [8, 16, 8]
    assert [r.crop for r in segmenter.values()] == [(512, 512), (480, 480), (768, 768)]
    assert all(r.clip_norm == r.weight_decay == 0 and r.max_category_share == 0.75 for r in segmenter.values())


def sample(height, width):
    segments = torch.zeros(height, width, dtype=torch.int16)
    segments[:, width // 2 :] = 1
    image = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Sample(image, torch.tensor([4, 7]), segments)


@pytest.mark.parametrize(
    ("augmentation", "scales", "sizes"),
    [
        ("semantic", (0.5, 1.5), {(30, 40), (36, 48), *((48, w) for w in range(48, 73))}),
        ("jitter", (1.0, 2.0), {(h, w) for h in range(48, 49) for w in range(64, 73)}),
        ("none", (0.5, 2.0), None),
    ],
)
def test_the_transform_is_the_one_asked_for(augmentation, scales, sizes):
    recipe = Recipe(augmentation=augmentation, crop=(48, 72), short_side=60, max_side=400, scales=scales)
    transform = recipe.transform()
    if sizes is None:
        assert transform is None
        return
    found = {transform(sample(60, 80), np.random.default_rng(seed)).size for seed in range(30)}
    assert found <= sizes and len(found) > 1


def test_detrs_transform_takes_its_sides_from_the_recipe():
    recipe = Recipe.preset("maskformer-coco-panoptic", short_side=160, max_side=240)
    sizes = {recipe.transform()(sample(60, 80), np.random.default_rng(seed)).size for seed in range(20)}
    assert {min(size) for size in sizes} == {96, 128, 160} and max(map(max, sizes)) <= 240
    assert len({w / h for h, w in sizes}) > 3  # crops have shapes of their own


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("optimizer", "adam"),
        ("schedule", "cosine"),
        ("augmentation", "mixup"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1.0),
        ("backbone_multiplier", math.inf),
        ("momentum", 1.0),
        ("min_learning_rate", 1.0),
        ("milestones", (0.5, 0.5)),
        ("milestones", (0.5, 1.0)),
        ("warmup_steps", 160_000),
        ("warmup_factor", 1.5),
        ("clip_norm", -0.1),
        ("ema", 1.0),
        ("steps", 0),
        ("batch_size", 0),
        ("crop", (512,)),
        ("scales", (2.0, 0.5)),
        ("scales", (0.0, 0.5)),
        ("max_category_share", 0.0),
    ],
)
def test_values_out_of_range_are_named(name, values):
    with pytest.raises(ValueError, match=f"^{name} is .*; expected "):
        Recipe(**{name: values})
