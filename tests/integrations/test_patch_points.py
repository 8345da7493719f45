"""Patched Mask2Former, OneFormer and EoMT of transformers compute what they computed before, at the same points."""

from __future__ import annotations

import copy
import logging
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.eomt import modeling_eomt
from transformers.models.mask2former import modeling_mask2former
from transformers.models.oneformer import modeling_oneformer

import fastmask
from tests.helpers.foreign_models import (
    NUM_POINTS,
    NUM_QUERIES,
    SIZE,
    VOCABULARY,
    exact_step,
    random_batch,
    rounded_steps,
    tiny_eomt,
    tiny_eomt_dinov3,
    tiny_mask2former,
    tiny_oneformer,
    tiny_videomt,
    train_step,
)
from tests.helpers.foreign_models import assert_same_step as assert_step_within_budget

MODELS = {
    "mask2former": tiny_mask2former,
    "oneformer": tiny_oneformer,
    "eomt": tiny_eomt,
    "eomt_dinov3": tiny_eomt_dinov3,
}
BATCHES = {
    "usual": {},
    "an image without targets": {"counts": (3, 0)},
    "no targets": {"counts": (0, 0)},
    "more targets than queries": {"counts": (NUM_QUERIES + 3, 1)},
    "masks of two sizes": {"sizes": (SIZE, 48)},
}


def batch_for(name, seed, **options):
    batch = random_batch(seed, **options)
    if name == "oneformer":
        generator, images = torch.Generator().manual_seed(seed), len(batch["pixel_values"])
        batch["task_inputs"] = torch.randint(1, VOCABULARY, (images, 77), generator=generator)
        batch["text_inputs"] = torch.randint(1, VOCABULARY, (images, NUM_QUERIES - 2, 77), generator=generator)
    return batch


def assert_same_step(actual, expected):
    """Losses within 1e-5, gradients within rounding: of the parameter's largest, or, as some are zero but for rounding
    and come from sums of large ones, of the largest of all."""
    torch.testing.assert_close(actual[0].loss, expected[0].loss, rtol=1e-5, atol=0)
    assert actual[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max() + 1e-6 * largest, (name, error)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", BATCHES)
def test_losses_and_gradients_stay(name, batch):
    model, batch = MODELS[name](), batch_for(name, 1, **BATCHES[batch])
    expected, exact = rounded_steps(model, batch), exact_step(model, batch)
    assert_step_within_budget(rounded_steps(fastmask.patch(model), batch), expected, exact)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"backbone": "resnet"}, {"pre_norm": True}, {"importance_sample_ratio": 1.0}])
def test_mask2former_configurations(seed, options):
    model, batch = tiny_mask2former(**options), random_batch(seed, (5, 1, 3), (SIZE,) * 3)
    expected = train_step(model, batch)
    assert_same_step(train_step(fastmask.patch(model), batch), expected)


def test_videos():
    """transformers trains no VidEoMT, but has its criterion, to which each frame is an image; outputs list the frames
    one after the other, each with all videos."""
    num_frames, batch = 3, random_batch(1, (4, 2, 0, 1, NUM_QUERIES + 2, 3), (SIZE,) * 6)
    model, videos = tiny_videomt(), batch["pixel_values"].view(num_frames, 2, 3, SIZE, SIZE).transpose(0, 1)

    def step():
        torch.manual_seed(1)
        model.zero_grad()
        outputs = model(pixel_values_videos=videos)
        arguments = outputs.masks_queries_logits, outputs.class_queries_logits
        losses = model.get_loss_dict(*arguments, batch["mask_labels"], batch["class_labels"], None)
        outputs.loss = model.get_loss(losses)
        outputs.loss.backward()
        return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = step()
    fastmask.patch(model)
    assert_same_step(step(), expected)
    assert fastmask.unpatch(model) is model and "Videomt" in type(model.criterion).__mro__[0].__name__


def criterion_inputs(model, batch):
    """The arguments that the model calls its criterion with."""
    calls = []
    torch.manual_seed(1)
    hook = model.criterion.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    with hook:
        model(**batch)
    return calls[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_named_loss_stays(name):
    model = MODELS[name]()
    inputs = criterion_inputs(model, batch_for(name, 2))
    torch.manual_seed(2)
    theirs = model.criterion(**inputs)
    theirs_next = torch.rand(1)
    fastmask.patch(model)
    torch.manual_seed(2)
    losses = model.criterion(**inputs)
    assert torch.rand(1) == theirs_next
    assert list(losses) == list(theirs)
    for key, loss in theirs.items():
        assert losses[key].shape == loss.shape
        torch.testing.assert_close(losses[key], loss, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_the_points_are_those_of_transformers(name):
    """Number by number: what transformers draws for its pairs, each target gets."""
    model = MODELS[name]()
    criterion, generator = model.criterion, torch.Generator().manual_seed(0)
    mask_logits = torch.randn(2, NUM_QUERIES, 16, 16, generator=generator)
    assignment = torch.tensor([[4, 2, 7], [1, -1, -1]])
    settings = (criterion.num_points, criterion.oversample_ratio, criterion.importance_sample_ratio)
    torch.manual_seed(3)
    planes = mask_logits[[0, 0, 0, 1], [2, 4, 7, 1]][:, None]
    theirs = criterion.sample_points_using_uncertainty(planes, criterion.calculate_uncertainty, *settings)
    fastmask.patch(model)
    torch.manual_seed(3)
    points = criterion.draw_points(mask_logits, assignment, [3, 1])
    assert points.shape == (2, 3, NUM_POINTS, 2)
    for ours, expected in zip((points[0, 1], points[0, 0], points[0, 2], points[1, 0]), theirs, strict=True):
        assert sorted(ours.tolist()) == sorted(expected.tolist())
    assert not points[1, 1:].any()


@pytest.mark.parametrize("name", MODELS)
def test_the_matcher_by_itself(name):
    model, batch = MODELS[name](), batch_for(name, 3, counts=(4, 0, 12), sizes=(SIZE, 40, SIZE))
    masks, classes = torch.randn(3, NUM_QUERIES, 16, 16), torch.randn(3, NUM_QUERIES, 6)
    arguments = (masks, classes, batch["mask_labels"], batch["class_labels"])
    torch.manual_seed(4)
    theirs = model.criterion.matcher(*arguments)
    torch.manual_seed(4)
    for pair, expected in zip(fastmask.patch(model).criterion.matcher(*arguments), theirs, strict=True):
        assert all(x.dtype == torch.int64 and x.equal(y) for x, y in zip(pair, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}, {"output_hidden_states": True}])
def test_masked_attention_gives_the_same_outputs(options):
    model = tiny_mask2former().eval()
    images = random_batch(4)["pixel_values"]
    with torch.no_grad():
        theirs = model(images, output_auxiliary_logits=True, **options)
        outputs = fastmask.patch(model)(images, output_auxiliary_logits=True, **options)
    assert list(outputs) == list(theirs)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name, expected in theirs.items():
        torch.testing.assert_close(outputs[name], expected, **close, check_stride=False)


def test_the_decoder_as_a_tuple():
    model = fastmask.patch(tiny_mask2former()).eval()
    outputs = []
    decoder = model.model.transformer_module.decoder

    def call_again(module, args, kwargs, output):
        outputs.append((module.forward(**kwargs | {"return_dict": False}), output))

    with decoder.register_forward_hook(call_again, with_kwargs=True), torch.no_grad():
        model(random_batch(5)["pixel_values"])
    as_tuple, output = outputs[0]
    assert as_tuple[0].equal(output.last_hidden_state)
    assert as_tuple[-1][-1].equal(output.masks_queries_logits[-1])


def test_cross_attention_still_takes_a_mask_of_its_own():
    model = fastmask.patch(tiny_mask2former())
    attention = model.model.transformer_module.decoder.layers[0].cross_attn
    assert isinstance(attention, nn.MultiheadAttention)
    query, key = torch.randn(3, 2, 32), torch.randn(5, 2, 32)
    mask = torch.eye(3, 5, dtype=torch.bool)
    ours = attention(query, key, key, attn_mask=mask)
    fastmask.unpatch(model)
    for one, other in zip(ours, attention(query, key, key, attn_mask=mask), strict=True):
        assert one.equal(other)


def test_gradient_checkpointing_and_autocast():
    model, batch = tiny_mask2former(), random_batch(6)
    expected = train_step(model, batch)
    fastmask.patch(model)
    for layer in model.model.transformer_module.decoder.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    assert_same_step(train_step(model, batch), expected)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, gradients = train_step(model, batch)
        expected = train_step(fastmask.unpatch(model), batch)
    torch.testing.assert_close(outputs.loss, expected[0].loss, rtol=2e-2, atol=0)
    assert gradients.keys() == expected[1].keys()


@pytest.mark.parametrize("name", MODELS)
def test_patching_changes_classes_only(name, caplog):
    model, batch = MODELS[name](), batch_for(name, 7)
    before = {key: (type(module), dict(vars(module))) for key, module in model.named_modules()}
    keys = list(model.state_dict())
    with caplog.at_level(logging.INFO, "fastmask"):
        fastmask.patch(fastmask.patch(model))
    assert len(caplog.records) == {"mask2former": 9, "oneformer": 3}.get(name, 2)
    assert list(model.state_dict()) == keys
    expected = train_step(model, batch)
    assert_same_step(train_step(copy.deepcopy(model), batch), expected)
    fastmask.unpatch(model)
    for key, module in model.named_modules():
        assert type(module) is before[key][0]
        assert vars(module).keys() == before[key][1].keys()


@pytest.mark.parametrize("make", [tiny_eomt, partial(tiny_mask2former, "resnet")])
def test_pickled_models(make):
    """Before their first step, and without Swin: transformers hangs hooks into these that cannot be pickled."""
    model, batch = fastmask.patch(make()), random_batch(7)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin.criterion) is type(model.criterion)
    expected = train_step(model, batch)
    assert_same_step(train_step(twin, batch), expected)
    assert_same_step(train_step(fastmask.unpatch(twin), batch), expected)


def test_saved_models(tmp_path):
    model = fastmask.patch(tiny_mask2former())
    model.save_pretrained(tmp_path)
    loaded = type(tiny_mask2former()).from_pretrained(tmp_path).train()
    assert loaded.config.architectures == ["Mask2FormerForUniversalSegmentation"]
    batch = random_batch(8)
    expected = train_step(loaded, batch)
    assert_same_step(train_step(model.train(), batch), expected)


@pytest.mark.parametrize("name", MODELS)
def test_integer_mask_labels_need_the_fix(name):
    # The gradients of this batch that differ most are large. In others those are small sums of large terms, such as
    # OneFormer's gradients of biases and of logit_scale: nothing but rounding, whose ratio is chance.
    model, batch = MODELS[name](), batch_for(name, 12)
    expected, exact = rounded_steps(model, batch), exact_step(model, batch)
    batch["mask_labels"] = [masks.bool() for masks in batch["mask_labels"]]
    with pytest.raises(RuntimeError):
        model(**batch)
    with pytest.raises(TypeError, match="fix=True"):
        fastmask.patch(model)(**batch)
    assert_step_within_budget(rounded_steps(fastmask.patch(model, fix=True), batch), expected, exact)


def test_dropout_trains():
    """Attention weights are dropped by numbers of the kernel's own; layers by those of transformers."""
    model = fastmask.patch(tiny_mask2former()).train()
    for layer in model.model.transformer_module.decoder.layers:
        layer.cross_attn.dropout = 0.3
    batch = random_batch(10)
    losses = [train_step(model, batch)[0].loss for _ in range(2)]
    assert losses[0] == losses[1]
    model.model.transformer_module.decoder.layerdrop = 0.5
    outputs, _ = train_step(model, batch)
    assert outputs.loss.isfinite()


def test_altered_parts():
    """A criterion with a matcher of the user's own is refused; a decoder with layers of their own is left alone."""

    class UsersMatcher(nn.Module):
        pass

    class UsersLayer(modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer):
        pass

    model = tiny_mask2former()
    decoder = model.model.transformer_module.decoder
    decoder.layers[1].__class__ = UsersLayer
    fastmask.patch(model)
    assert type(decoder) is modeling_mask2former.Mask2FormerMaskedAttentionDecoder
    assert type(model.criterion) is not modeling_mask2former.Mask2FormerLoss
    model = tiny_mask2former()
    model.criterion.matcher = UsersMatcher()
    with pytest.raises(
        TypeError, match="the matcher of Mask2FormerLoss is a UsersMatcher, whose costs fastmask does not know"
    ):
        fastmask.patch(model)


def test_the_classes_are_still_transformers():
    for name, module in (("eomt", modeling_eomt), ("oneformer", modeling_oneformer)):
        model = fastmask.patch(MODELS[name]())
        prefix = {"eomt": "Eomt", "oneformer": "OneFormer"}[name]
        assert isinstance(model.criterion, getattr(module, f"{prefix}Loss"))
        assert isinstance(model.criterion.matcher, getattr(module, f"{prefix}HungarianMatcher"))
