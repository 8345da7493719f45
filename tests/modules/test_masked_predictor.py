"""Masked cross-attention as a module, and the decoder made of it, against PyTorch's and Hugging Face's modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.mask2former import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerTransformerModule,
)

from fastmask import MaskedCrossAttention, MaskFormer, MaskFormerConfig
from fastmask.functional import mask_products
from fastmask.modules.masked_predictor import MaskedDecoderLayer, MaskedTransformerPredictor
from fastmask.testing import assert_within_budget
from tests.helpers.tiny_models import randomize

BATCH, QUERIES, DIM, HEADS, HIDDEN, CLASSES, MASK_DIM = 8, 7, 16, 4, 24, 5, 12
GRIDS = ((3, 4), (5, 7), (10, 14))
PIXELS = (20, 28)


def random_memory(grid, generator, *, queries=QUERIES):
    query, key = (torch.randn(BATCH, n, DIM, generator=generator) for n in (queries, grid[0] * grid[1]))
    mask_logits = torch.randn(BATCH, queries, *PIXELS, generator=generator)
    mask_logits[0, 0] = -1
    return query, key, mask_logits


def gradients(output, weights, leaves):
    return torch.autograd.grad((output * weights).sum(), leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_multihead_attention(bias):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(DIM, HEADS, bias=bias, batch_first=True)
    torch.manual_seed(0)
    ours = MaskedCrossAttention(DIM, HEADS, bias=bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_multihead_attention(masked, bias, generator):
    grid = GRIDS[1]
    theirs = nn.MultiheadAttention(DIM, HEADS, bias=bias, batch_first=True).double()
    randomize(theirs, generator)
    query, key, mask_logits = random_memory(grid, generator)
    value = torch.randn(key.shape, generator=generator)
    padding = torch.rand(BATCH, key.shape[1], generator=generator) < 0.3
    weights = torch.randn(query.shape, generator=generator).double()
    excluded = None
    if masked:
        excluded = F.interpolate(mask_logits, size=grid, mode="bilinear").flatten(2) < 0
        excluded &= ~(excluded | padding[:, None]).all(-1, keepdim=True)
        excluded = excluded.repeat_interleave(HEADS, 0)

    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    leaves += list(theirs.parameters())
    out, _ = theirs(*leaves[:3], attn_mask=excluded, key_padding_mask=padding, need_weights=False)
    exact = out.detach(), *gradients(out, weights, leaves)

    def ours(backend):
        module = MaskedCrossAttention(DIM, HEADS, bias=bias, backend=backend)
        module.load_state_dict(theirs.state_dict())
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        options = {"mask_logits": mask_logits, "grid": grid} if masked else {}
        result = module(*inputs, key_padding_mask=padding, **options)
        return result.detach(), *gradients(result, weights, [*inputs, *module.parameters()])

    for results in zip(ours("native"), ours("reference"), exact, strict=True):
        assert_within_budget(*results)


def test_dropout_in_training_only(generator):
    module = MaskedCrossAttention(DIM, HEADS, dropout=0.5)
    query, key, mask_logits = random_memory(GRIDS[0], generator)
    arguments = (query, key, key, mask_logits)
    torch.manual_seed(0)
    assert not torch.equal(module(*arguments, grid=GRIDS[0]), module(*arguments, grid=GRIDS[0]))
    module.eval()
    assert torch.equal(module(*arguments, grid=GRIDS[0]), module(*arguments, grid=GRIDS[0]))


def test_module_refuses_what_does_not_fit(generator):
    with pytest.raises(ValueError, match="num_heads=3 does not divide embed_dim=16"):
        MaskedCrossAttention(DIM, 3)
    query, key, mask_logits = random_memory(GRIDS[0], generator)
    with pytest.raises(ValueError, match="mask_logits need grid"):
        MaskedCrossAttention(DIM, HEADS)(query, key, key, mask_logits)


def test_module_compiles_to_one_graph(generator):
    module = MaskedCrossAttention(DIM, HEADS)
    query, key, mask_logits = random_memory(GRIDS[0], generator)
    arguments = (query.requires_grad_(), key, key, mask_logits)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        out = run(*arguments, grid=GRIDS[0])
        results.append((out.detach(), *gradients(out, out.detach(), [query, *module.parameters()])))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def hugging_face_config(**options):
    return Mask2FormerConfig(
        hidden_dim=DIM, num_attention_heads=HEADS, dim_feedforward=HIDDEN, dropout=0.0, mask_feature_size=MASK_DIM,
        num_queries=QUERIES, **options,
    )  # fmt: skip


def layer_weights(layer):
    """Our names of a Mask2FormerMaskedAttentionDecoderLayer's weights."""
    theirs = layer.state_dict()
    ours = {name: x for name, x in theirs.items() if name.startswith(("cross_attn.", "self_attn.out_proj."))}
    for kind in ("weight", "bias"):
        ours[f"self_attn.in_proj_{kind}"] = torch.cat([theirs[f"self_attn.{x}_proj.{kind}"] for x in "qkv"])
        norms = ("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")
        for index, name in enumerate(norms, start=1):
            ours[f"norm{index}.{kind}"] = theirs[f"{name}.{kind}"]
        for index in (1, 2):
            ours[f"linear{index}.{kind}"] = theirs[f"fc{index}.{kind}"]
    return {name: x for name, x in ours.items() if "_norm." not in name}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", GRIDS)
def test_layer_equals_that_of_mask2former(grid, seed):
    generator = torch.Generator().manual_seed(seed)
    theirs = Mask2FormerMaskedAttentionDecoderLayer(hugging_face_config()).double()
    randomize(theirs, generator)
    ours = MaskedDecoderLayer(DIM, HEADS, HIDDEN).double()
    ours.load_state_dict(layer_weights(theirs))
    query, memory, mask_logits = random_memory(grid, generator)
    position = torch.randn(1, QUERIES, DIM, generator=generator).double()
    key_position = torch.randn(1, memory.shape[1], DIM, generator=generator).double()
    weights = torch.randn(query.shape, generator=generator).double()
    excluded = (F.interpolate(mask_logits, size=grid, mode="bilinear", align_corners=False).sigmoid() < 0.5).flatten(2)
    excluded = (excluded & ~excluded.all(-1, keepdim=True)).repeat_interleave(HEADS, 0)

    leaves = [x.double().requires_grad_() for x in (query, memory)]
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    queries, keys = (x.transpose(0, 1) for x in leaves)
    positions = [x.expand(BATCH, -1, -1).transpose(0, 1) for x in (position, key_position)]
    expected = theirs(queries, 0, None, positions[1:], positions[0], [keys], encoder_attention_mask=excluded)[0]
    expected = expected.transpose(0, 1)
    their_leaves = [*leaves, *(theirs.cross_attn.get_parameter(name) for name in attention)]
    actual = ours(leaves[0], position, leaves[1] + key_position, leaves[1], mask_logits, grid)
    our_leaves = [*leaves, *(ours.cross_attn.get_parameter(name) for name in attention)]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    for x, y in zip(gradients(actual, weights, our_leaves), gradients(expected, weights, their_leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def make_pair(generator, *, input_dim=DIM, layers=4):
    """Hugging Face's transformer module and our predictor with the same random weights, in float64."""
    theirs = Mask2FormerTransformerModule(input_dim, hugging_face_config(decoder_layers=layers + 1)).double()
    randomize(theirs, generator)
    ours = MaskedTransformerPredictor(
        input_dim, CLASSES, num_queries=QUERIES, hidden_dim=DIM, mask_dim=MASK_DIM, decoder_layers=layers,
        num_heads=HEADS, feedforward_dim=HIDDEN,
    ).double()  # fmt: skip
    weights = {
        "query_feat.weight": theirs.queries_features.weight,
        "query_embed.weight": theirs.queries_embedder.weight,
        "level_embed.weight": theirs.level_embed.weight,
    }
    for i, layer in enumerate(theirs.decoder.layers):
        weights |= {f"layers.{i}.{name}": x for name, x in layer_weights(layer).items()}
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"] = getattr(theirs.decoder.layernorm, kind)
    mask_embedder = [x for x in theirs.decoder.mask_predictor.mask_embedder.modules() if isinstance(x, nn.Linear)]
    for i, linear in enumerate(mask_embedder):
        weights |= {f"mask_embed.layers.{i}.{kind}": getattr(linear, kind) for kind in ("weight", "bias")}
    for i, projection in enumerate(theirs.input_projections):
        weights |= {f"input_proj.{i}.{name}": x for name, x in projection.state_dict().items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == ["class_embed.weight", "class_embed.bias"]
    return theirs, ours


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("input_dim", [DIM, 20], ids=["as wide", "projected"])
def test_predictor_equals_the_transformer_module_of_mask2former(input_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = make_pair(generator, input_dim=input_dim)
    levels = [torch.randn(BATCH, input_dim, *grid, generator=generator).double().requires_grad_() for grid in GRIDS]
    pixel_embed = torch.randn(BATCH, MASK_DIM, *PIXELS, generator=generator).double().requires_grad_()
    leaves = [*levels, pixel_embed]

    expected = theirs(levels, pixel_embed)
    expected_queries = torch.stack(expected.intermediate_hidden_states).transpose(1, 2)
    expected_masks = torch.stack(expected.masks_queries_logits)
    class_logits, mask_embed = ours(levels, pixel_embed)
    mask_logits = mask_products(mask_embed, pixel_embed)
    assert class_logits.shape == (5, BATCH, QUERIES, CLASSES + 1)
    torch.testing.assert_close(class_logits, ours.class_embed(expected_queries), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(mask_logits, expected_masks, rtol=1e-8, atol=1e-9)

    weights = torch.randn(mask_logits.shape, generator=generator).double()
    shared = ["queries_features.weight", "queries_embedder.weight", "level_embed.weight"]
    their_leaves = [*leaves, *(theirs.get_parameter(name) for name in shared)]
    our_leaves = [*leaves, ours.query_feat.weight, ours.query_embed.weight, ours.level_embed.weight]
    for x, y in zip(
        gradients(mask_logits, weights, our_leaves), gradients(expected_masks, weights, their_leaves), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


def test_predictor_gives_the_last_prediction_alone(generator):
    _, ours = make_pair(generator)
    levels = [torch.randn(BATCH, DIM, *grid, generator=generator).double() for grid in GRIDS]
    pixel_embed = torch.randn(BATCH, MASK_DIM, *PIXELS, generator=generator).double()
    every, last = ours(levels, pixel_embed), ours(levels, pixel_embed, all_layers=False)
    for x, y in zip(every, last, strict=True):
        torch.testing.assert_close(x[-1:], y)
    with pytest.raises(ValueError, match="levels has 2 maps; expected num_levels = 3"):
        ours(levels[:2], pixel_embed)


def test_padded_levels_change_nothing(generator):
    """The masks are read from the level's own cells only, so padded cells matter neither as keys nor as positions."""
    _, ours = make_pair(generator, layers=1)
    level = torch.randn(1, DIM, 4, 6, generator=generator).double()
    pixel_embed = torch.randn(1, MASK_DIM, 4, 6, generator=generator).double()
    padding = torch.ones(1, 4, 6, dtype=torch.bool)
    padding[:, :3, :5] = False
    others = [torch.zeros(1, DIM, 1, 1).double()] * 2
    padded = ours([level, *others], pixel_embed, [padding, None, None])
    alone = ours([level[:, :, :3, :5], *others], pixel_embed[:, :, :3, :5])
    for x, y in zip(padded, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def tiny(**options):
    torch.manual_seed(0)
    return MaskFormer(MaskFormerConfig.preset("tiny", CLASSES, masked_attention=True, **options))


def test_model_predicts_once_more_than_it_has_layers():
    model = tiny()
    images = [torch.rand(3, 64, 50), torch.rand(3, 40, 64)]
    outputs = model(images)
    assert outputs["mask_logits"].shape == (4, 2, 25, 16, 16)
    assert len(outputs["aux_outputs"]) == 3
    targets = [{"labels": torch.tensor([1]), "masks": torch.ones(1, *x.shape[-2:], dtype=torch.bool)} for x in images]
    losses = model(images, targets)
    assert set(losses) == {f"loss_{x}{s}" for x in ("ce", "mask", "dice") for s in ("", "_0", "_1", "_2")}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(tiny(deep_supervision=False)(images, targets)) == 3


def test_every_weight_learns_in_mixed_precision():
    """Also the mask head, which the layers' masks and the predictions share."""
    model = tiny()
    targets = [{"labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64, dtype=torch.bool)}]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(torch.rand(1, 3, 64, 64), targets)
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_model_survives_saving(task, tmp_path):
    model = tiny(encoder_layers=1)
    model.save_pretrained(tmp_path)
    loaded = MaskFormer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    images = [torch.rand(3, 64, 50), torch.rand(3, 40, 64)]
    torch.testing.assert_close(loaded.predict(images, task), model.predict(images, task))


def test_configurations_saved_before_load_as_they_were():
    values = MaskFormerConfig.preset("tiny", CLASSES).to_dict()
    del values["masked_attention"]
    assert MaskFormerConfig.from_dict(values) == MaskFormerConfig.preset("tiny", CLASSES)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_fewer_layers_than_levels_leave_no_weight_unused(layers):
    model = tiny(decoder_layers=layers)
    model(torch.rand(1, 3, 64, 64))["mask_logits"].sum().backward()
    unused = [name for name, parameter in model.predictor.named_parameters() if parameter.grad is None]
    assert unused == ["class_embed.weight", "class_embed.bias"]


@pytest.mark.slow
def test_predictor_compiles_to_one_graph(generator):
    predictor = tiny().predictor
    levels = [torch.randn(2, 64, *grid, generator=generator) for grid in GRIDS]
    pixel_embed = torch.randn(2, 64, *PIXELS, generator=generator).requires_grad_()
    compiled = torch.compile(predictor, fullgraph=True, backend="aot_eager")
    results = []
    for run in (predictor, compiled):
        class_logits, mask_embed = run(levels, pixel_embed)
        grads = torch.autograd.grad(class_logits.square().sum() + mask_embed.square().sum(), predictor.parameters())
        results.append((class_logits.detach(), *grads))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
