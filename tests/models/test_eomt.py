"""EoMT: masked self-attention, annealing, windows, pretrained encoders, and configurations that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.nn.functional import interpolate, scaled_dot_product_attention

import fastmask
from fastmask import EoMT, EoMTConfig
from fastmask.models.eomt import ENCODERS, resized_patches
from fastmask.modules.dino import MaskedSelfAttention
from fastmask.testing import assert_within_budget
from fastmask.training import Recipe, Trainer, mask_probabilities
from tests.helpers.tiny_models import FAMILIES, learn, mask_targets

SMALL = {"encoder_layers": 3, "query_blocks": 2, "num_queries": 6, "num_points": 256}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def small(encoder="dinov2", **options):
    torch.manual_seed(0)
    return EoMT(EoMTConfig.preset("tiny", 4, encoder=encoder, **{**SMALL, **options}))


def attention_by_sdpa(attention, tokens, rotation, attended):
    """The whole of masked self-attention with one dense mask, in the dtype of ``tokens``."""
    query, key, value = (layer(tokens) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    if rotation is not None:
        cos, sin = (angles[:, None].to(tokens.dtype) for angles in rotation)
        first = tokens.shape[1] - len(cos)
        turned = []
        for x in (query, key):
            heads = x[:, first:].unflatten(2, (attention.num_heads, -1))
            left, right = heads.chunk(2, -1)
            heads = heads * cos + torch.cat([-right, left], -1) * sin
            turned.append(torch.cat([x[:, :first], heads.flatten(2)], 1))
        query, key = turned
    mask = torch.ones(tokens.shape[0], 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    mask[:, 0, : attended.shape[1]] = attended
    heads = [x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
    mixed = scaled_dot_product_attention(*heads, attn_mask=mask)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def gradients(attention, run, tokens, weight):
    tokens = tokens.clone().requires_grad_()
    out = run(attention, tokens)
    found = torch.autograd.grad((out * weight).sum(), [tokens, *attention.parameters()])
    return [out.detach(), *found]


@pytest.mark.parametrize("rotary", [False, True])
def test_masked_self_attention_is_that_of_a_dense_mask(rotary):
    """Three queries, two other tokens and 5 x 7 patches; the first query attends to no patch."""
    attention = MaskedSelfAttention(16, 2, key_bias=not rotary)
    tokens, weight = torch.randn(2, 3 + 2 + 35, 16), torch.randn(2, 3 + 2 + 35, 16)
    attended = torch.rand(2, 3, 40) < 0.5
    attended[..., :5] = True
    attended[:, 0, 5:] = False
    rotation = (torch.randn(35, 8), torch.randn(35, 8)) if rotary else None
    exact = copy.deepcopy(attention).double()
    expected = gradients(
        exact, lambda m, x: attention_by_sdpa(m, x, rotation, attended), tokens.double(), weight.double()
    )
    plain = gradients(attention, lambda m, x: attention_by_sdpa(m, x, rotation, attended), tokens, weight)
    found = gradients(attention, lambda m, x: m(x, rotation, attended), tokens, weight)
    for ours, theirs, right in zip(found, plain, expected, strict=True):
        assert_within_budget(ours, theirs, right)
    assert torch.equal(attention(tokens, rotation), attention(tokens, rotation, None))


@every_encoder
def test_queries_attend_where_their_masks_are_foreground(encoder):
    """What the network hands to a block agrees with its prediction before that block, as the reference resamples it."""
    model = small(encoder, rescale=1.0).eval()
    seen = []
    for block in model.encoder.blocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        outputs = model(images)
    assert [attended is None for attended in seen] == [True, False, False]
    for attended, masks in zip(seen[1:], outputs["mask_logits"], strict=False):
        logits = interpolate(masks, (8, 12), mode="bilinear").flatten(2)
        others = attended[..., : 6 + 1 + 2]
        sure = logits.abs() > 1e-5
        assert others.all() and attended.shape == (2, 6, 9 + 96)
        assert torch.equal(attended[..., 9:][sure], (logits > 0)[sure]) and sure.float().mean() > 0.99


@every_encoder
def test_predictions_for_training_and_inference(encoder):
    model = small(encoder)
    images, targets = FAMILIES["eomt"].lists()
    assert len(model(images)["class_logits"]) == 3
    losses = model(images, targets)
    assert set(losses) == {f"loss_{kind}{i}" for kind in ("ce", "mask", "dice") for i in ("", "_0", "_1")}
    model.set_mask_probabilities((0, 0))
    assert len(model(images)["class_logits"]) == 3  # supervised in training, without masks
    model.eval()
    assert len(model(images)["class_logits"]) == 1
    model.set_mask_probabilities((0.4, 0.6))
    assert len(model(images)["class_logits"]) == 2
    assert torch.equal(model(images)["pred_masks"], model(images)["pred_masks"])


def test_random_masking_follows_the_probabilities():
    model = small(num_queries=50).train()
    seen = []
    for block in model.encoder.blocks[1:]:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    images = torch.rand(8, 3, 64, 64)
    for probability in (1.0, 0.75, 0.25):
        model.set_mask_probabilities((probability, 0.0))
        seen.clear()
        with torch.no_grad():
            model(images)
        masked, never = seen
        assert never is None
        share = 1 - masked.all(-1).float().mean().item()
        assert share == pytest.approx(probability, abs=0.1)  # of 400 queries; none has a full mask by itself


def test_annealing_lowers_one_probability_after_the_other():
    """The authors' formula, (1 - progress) ** 0.9, at their steps for ADE20K."""
    recipe = Recipe.preset("eomt-ade20k")
    assert mask_probabilities(recipe, 0) == mask_probabilities(recipe, 6520) == (1, 1, 1, 1)
    assert mask_probabilities(recipe, 9780) == (pytest.approx(0.5**0.9), 1, 1, 1)
    assert mask_probabilities(recipe, 14_670) == (0, pytest.approx(0.75**0.9), 1, 1)
    assert mask_probabilities(recipe, 32_600) == mask_probabilities(recipe, 39_153) == (0, 0, 0, 0)
    assert mask_probabilities(Recipe(), 5) == ()


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_trainer_anneals_and_a_saved_network_needs_no_masks(ema, tmp_path):
    recipe = Recipe(steps=4, anneal_starts=(0.0, 0.25), anneal_ends=(0.5, 0.75), power=1.0, ema=ema)
    trainer = Trainer(small(), recipe)
    batch = FAMILIES["eomt"].lists()
    seen = []
    for _ in range(4):
        seen.append(trainer.network().config.mask_probabilities)
        trainer.step([batch])
    assert seen == [(1, 1), (0.5, 1), (0, 0.5), (0, 0)]
    network = trainer.network()
    network.save_pretrained(tmp_path)
    loaded = EoMT.from_pretrained(tmp_path).eval()
    assert loaded.config.mask_probabilities == (0, 0) and loaded.masking.tolist() == [0, 0]
    assert torch.equal(loaded(batch[0])["pred_masks"], network.eval()(batch[0])["pred_masks"])
    again = Trainer(small(), recipe)
    again.load_state_dict(trainer.state_dict())
    assert again.network().config.mask_probabilities == (0, 0)


@pytest.mark.slow
def test_annealing_compiles_once():
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = FAMILIES["eomt"].batch()
    compiled(*batch)
    with torch.compiler.set_stance("fail_on_recompile"):
        for probability in (0.9, 0.2):
            model.set_mask_probabilities((probability, 1.0))
            compiled(*batch)


def test_annealing_that_does_not_fit_is_refused():
    recipe = {"anneal_starts": (0.1, 0.2, 0.3), "anneal_ends": (0.2, 0.3, 0.4)}
    with pytest.raises(ValueError, match="anneal_starts has 3 entries; the EoMT has 2 blocks with queries"):
        Trainer(small(), Recipe(**recipe))
    with pytest.raises(ValueError, match="anneal_starts has 3 entries; the Linear has 0 blocks"):
        Trainer(torch.nn.Linear(2, 2), Recipe(**recipe))
    for name, changes in {
        "anneal_starts": {"anneal_starts": (0.2, 0.1, 0.3)},
        "anneal_starts ": {"anneal_starts": (-0.1, 0.1, 0.3)},
        "anneal_ends": {"anneal_ends": (0.2, 0.15, 0.4)},
        "anneal_ends ": {"anneal_ends": (0.2, 0.3, 0.3)},
        "anneal_ends  ": {"anneal_ends": (0.2, 0.3)},
        "anneal_ends   ": {"anneal_ends": (0.2, 0.3, 1.1)},
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()} is"):
            Recipe(**{**recipe, **changes})


@every_encoder
def test_training_learns_a_batch(encoder):
    model = small(encoder)
    images = torch.rand(2, 3, 64, 64)
    totals = learn(model, images, mask_targets([(64, 64)] * 2, [2, 1]), 20, 2e-3)
    assert sum(totals[-3:]) < 0.8 * sum(totals[:3])


@every_encoder
def test_semantic_maps_are_averages_over_square_windows(encoder):
    """An image of 64 x 160 at the size of a window: three windows at 0, 48 and 96, whose scores are averaged."""
    model = small(encoder).eval()
    image = torch.rand(1, 3, 64, 160)
    total, coverage = torch.zeros(4, 64, 160), torch.zeros(160)
    with torch.no_grad():
        for left in (0, 48, 96):
            classes, masks, _ = model.final_logits(image[..., left : left + 64])
            options = {"output": "scores", "backend": "reference"}
            total[..., left : left + 64] += fastmask.semantic_inference(classes, masks, (64, 64), **options)[0]
            coverage[left : left + 64] += 1
    scores = model.predict(image, output="scores")[0]
    torch.testing.assert_close(scores, total / coverage, rtol=1e-5, atol=1e-6)
    turned = model.predict(image.transpose(2, 3), output="scores")[0]
    assert turned.shape == (4, 160, 64)


def test_other_tasks_see_the_whole_image_padded_to_a_square():
    model = small(stuff_classes=(0,)).eval()
    image = torch.rand(1, 3, 128, 192)
    smaller = interpolate(image, (43, 64), mode="bilinear", antialias=True).clamp(0, 1)
    padded = torch.nn.functional.pad(smaller, (0, 0, 0, 21))
    with torch.no_grad():
        classes, masks, size = model.final_logits(padded)
    assert size == (64, 64)
    steps = {"padded_size": (64, 64), "valid_size": (43, 64)}
    expected = fastmask.panoptic_inference(classes, masks, (128, 192), threshold=0.0, stuff_classes=(0,), **steps)[0]
    found = model.predict(image, "panoptic", threshold=0.0)[0]
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
    both = model.predict_tasks(image, {"panoptic": {"threshold": 0.0}, "semantic": {}}, sizes=(30, 40))
    assert list(both) == ["panoptic", "semantic"]
    assert both["semantic"][0].shape == both["panoptic"][0][0].shape == (30, 40)
    assert model.predict(image, "instance", top_k=3)[0]["masks"].shape[1:] == (128, 192)
    assert model.predict(image, window=(64, 48), scales=(0.5, 1.0), flip=True)[0].shape == (128, 192)


def pretrained(encoder, registers=2, patch_size=8):
    """A small DINOv2 or DINOv3 of transformers, with every weight at random."""
    torch.manual_seed(1)
    options = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": patch_size}
    if encoder == "dinov3":
        config = transformers.DINOv3ViTConfig(
            **options, intermediate_size=128, num_register_tokens=registers, layer_norm_eps=1e-6, layerscale_value=0.5
        )
        model = transformers.DINOv3ViTModel(config)
    else:
        options |= {"image_size": 8 * patch_size, "mlp_ratio": 2, "layerscale_value": 0.5}
        kind = "Dinov2WithRegisters" if registers else "Dinov2"
        extra = {"num_register_tokens": registers} if registers else {}
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("encoder", "registers"), [("dinov2", 2), ("dinov2", 0), ("dinov3", 2)])
def test_pretrained_encoders_compute_what_they_did(encoder, registers, tmp_path):
    theirs = pretrained(encoder, registers)
    theirs.save_pretrained(tmp_path)
    options = {"num_registers": registers, "pretrained_backbone": str(tmp_path), "encoder_layers": 3}
    preset = {**EoMTConfig.presets["tiny"], **SMALL, **options}
    model = EoMT(num_classes=4, encoder=encoder, **preset).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state
        tokens, rotation, _ = model.encoder.embed(pixels)
        for block in model.encoder.blocks:
            tokens = block(tokens, rotation)
        torch.testing.assert_close(model.encoder.norm(tokens), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the configuration asks for"):
        EoMT(num_classes=4, encoder=encoder, **{**preset, "num_registers": 3})
    other = "dinov2" if encoder == "dinov3" else "dinov3"
    with pytest.raises(ValueError, match=f"is of model type 'dinov[23].*; encoder '{other}' reads"):
        EoMT(num_classes=4, encoder=other, **preset)


def test_other_patches_and_positions_are_resized(tmp_path):
    """A linear projection of smooth patches gives nearly the same for the resized patches."""
    pretrained("dinov2", patch_size=7).save_pretrained(tmp_path)
    config = EoMTConfig.preset("tiny", 4, **{**SMALL, "image_size": 48})
    EoMT(config, pretrained_backbone=str(tmp_path))
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14), indexing="ij")
    weight, patch = torch.randn(5, 1, 14, 14), (0.5 * rows + columns + 0.3)[None, None]
    resized = interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    expected = (weight * patch).sum((1, 2, 3))
    torch.testing.assert_close((resized_patches(weight, 16) * resized).sum((1, 2, 3)), expected, rtol=1e-3, atol=1e-3)
    assert resized_patches(weight, 14) is weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, "image_size is 60; expected a multiple of patch_size 8"),
        ({"encoder": "dino"}, "encoder is 'dino'; expected 'dinov2' or 'dinov3'"),
        ({"query_blocks": 4}, "query_blocks is 4; expected at most encoder_layers 3"),
        ({"query_blocks": 0}, "query_blocks is 0; expected at least 1"),
        ({"hidden_dim": 66}, "hidden_dim is 66; expected a multiple of 4"),
        ({"hidden_dim": 72, "encoder": "dinov3"}, "hidden_dim is 72; expected a multiple of 16"),
        ({"mask_probabilities": (1.0,)}, r"mask_probabilities is \(1.0,\); expected 2 values in 0..1"),
        ({"mask_probabilities": (1.0, 1.5)}, "mask_probabilities is .*; expected 2 values in 0..1"),
        ({"rescale": 0.5}, "rescale is 0.5; expected at least 1"),
        ({"num_points": 0}, "num_points"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"stuff_classes": (4,)}, r"stuff_classes is \[4\]"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EoMTConfig.preset("tiny", 4, **{**SMALL, **changes})


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'eomt-huge'; known are tiny, eomt-dinov2-small"):
        EoMTConfig.preset("eomt-huge", 4)
    model = small()
    with pytest.raises(ValueError, match="mask_probabilities is"):
        model.set_mask_probabilities((1.0,))
    with pytest.raises(ValueError, match="unknown task 'depth'"):
        model.predict(torch.rand(1, 3, 64, 64), "depth")
    with pytest.raises(ValueError, match="sizes has 2 entries"):
        model.predict(torch.rand(1, 3, 64, 64), sizes=[(3, 4), (5, 6)])
    with pytest.raises(TypeError, match="config must be a EoMTConfig, got PerPixelBaselineConfig"):
        EoMT(fastmask.PerPixelBaselineConfig.preset("tiny", 4))
    with pytest.raises(ValueError, match="class_names"):
        small(class_names=("a",))
