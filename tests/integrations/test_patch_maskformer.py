"""A patched MaskFormer of transformers computes what it computed before."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from transformers import MaskFormerForInstanceSegmentation
from transformers.models.maskformer import modeling_maskformer as hf

import fastmask
from tests.helpers.foreign_models import (
    NUM_QUERIES,
    assert_same_step,
    exact_step,
    random_batch,
    rounded_steps,
    tiny_maskformer,
    train_step,
)

BATCHES = {
    "usual": {},
    "an image without targets": {"counts": (3, 0)},
    "no targets": {"counts": (0, 0)},
    "more targets than queries": {"counts": (NUM_QUERIES + 3, 1)},
    "masks of two sizes": {"sizes": (64, 48)},
    "one image": {"counts": (2,), "sizes": (64,)},
}


class UsersModel(MaskFormerForInstanceSegmentation):
    """A model of the user's own, of which only the parts are known."""


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("auxiliary", [True, False])
def test_losses_and_gradients_stay(batch, auxiliary):
    model = tiny_maskformer(auxiliary=auxiliary)
    batch = random_batch(2, **BATCHES[batch])
    expected, exact = rounded_steps(model, batch), exact_step(model, batch)
    assert_same_step(rounded_steps(fastmask.patch(model), batch), expected, exact)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", [MaskFormerForInstanceSegmentation, UsersModel])
def test_other_backbone_and_class(seed, cls):
    model = tiny_maskformer("resnet", cls=cls)
    batch = random_batch(seed, (5, 3, 1), (64, 64, 64))
    expected, exact = rounded_steps(model, batch), exact_step(model, batch)
    assert_same_step(rounded_steps(fastmask.patch(model), batch), expected, exact)


def criterion_inputs(model, batch):
    """The positional arguments that the model calls its criterion with."""
    calls = []
    torch.manual_seed(1)
    with model.criterion.register_forward_pre_hook(lambda _, args: calls.append(args)):
        model(**batch)
    return calls[0]


@pytest.mark.parametrize("auxiliary", [True, False])
def test_every_named_loss_stays(auxiliary):
    model = tiny_maskformer(auxiliary=auxiliary)
    batch = random_batch(3)
    theirs = model.criterion(*criterion_inputs(model, batch))
    fastmask.patch(model)
    losses = model.criterion(*criterion_inputs(model, batch))
    assert list(losses) == list(theirs)
    for name, loss in theirs.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_outputs_stay_the_same_bits(auxiliary):
    model = tiny_maskformer(auxiliary=auxiliary).eval()
    images = random_batch(4)["pixel_values"]
    with torch.no_grad():
        theirs = model(images, output_auxiliary_logits=True)
        outputs = fastmask.patch(model)(images, output_auxiliary_logits=True)
        as_tuple = model(images, return_dict=False)
    assert list(outputs) == list(theirs)
    assert outputs.class_queries_logits.equal(theirs.class_queries_logits)
    assert outputs.masks_queries_logits.equal(theirs.masks_queries_logits)
    assert len(outputs.auxiliary_logits) == len(theirs.auxiliary_logits)
    for layer, expected in zip(outputs.auxiliary_logits, theirs.auxiliary_logits, strict=True):
        assert list(layer) == list(expected)
        assert all(layer[name].equal(expected[name]) for name in expected)
    assert as_tuple[0].equal(theirs.class_queries_logits)


def test_a_loss_upon_the_outputs_still_reaches_the_mask_heads():
    """The criterion's own gradient leaves the mask logits aside; a user's must not."""
    batch = random_batch(5)
    gradients = []
    for prepare in (lambda model: model, fastmask.patch):
        model = prepare(tiny_maskformer())
        outputs = model(**batch)
        (outputs.loss + outputs.masks_queries_logits.square().mean()).backward()
        gradients.append(model.mask_embedder.get_submodule("0.0").weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_other_logits_than_the_models_own():
    """Whoever calls the criterion with logits that they changed gets the losses of these."""
    model, batch = tiny_maskformer(), random_batch(13)
    losses = []
    for prepare in (lambda model: model, fastmask.patch):
        masks, classes, *labels, auxiliary = criterion_inputs(prepare(model), batch)
        losses.append(model.criterion(masks * 2, classes, *labels, auxiliary))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-8)


def test_the_matcher_by_itself():
    model = tiny_maskformer()
    batch = random_batch(6, (4, 0, 12), (64, 40, 64))
    masks, classes = torch.randn(3, NUM_QUERIES, 16, 16), torch.randn(3, NUM_QUERIES, 6)
    arguments = (masks, classes, batch["mask_labels"], batch["class_labels"])
    theirs = model.matcher(*arguments)
    for pair, expected in zip(fastmask.patch(model).matcher(*arguments), theirs, strict=True):
        assert all(x.dtype == torch.int64 and x.equal(y) for x, y in zip(pair, expected, strict=True))


def test_autocast():
    model, batch = tiny_maskformer(), random_batch(7)
    with torch.autocast("cpu", torch.bfloat16):
        expected = train_step(model, batch)
        outputs, gradients = train_step(fastmask.patch(model), batch)
    torch.testing.assert_close(outputs.loss, expected[0].loss, rtol=1e-2, atol=0)
    assert gradients.keys() == expected[1].keys()


def test_patching_changes_classes_only(caplog):
    model = tiny_maskformer()
    criterion, matcher, state = model.criterion, model.matcher, model.state_dict(keep_vars=True)
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    with caplog.at_level(logging.INFO, "fastmask"):
        assert fastmask.patch(model) is model
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "patched the model: MaskFormerForInstanceSegmentation",
        "patched matcher: MaskFormerHungarianMatcher",
        "patched criterion: MaskFormerLoss",
    ]
    assert type(model) is not MaskFormerForInstanceSegmentation
    assert isinstance(model, MaskFormerForInstanceSegmentation)
    assert model.criterion is criterion
    assert model.matcher is criterion.matcher is matcher
    patched = model.state_dict(keep_vars=True)
    assert list(patched) == list(state)
    assert all(patched[name] is tensor for name, tensor in state.items())
    fastmask.patch(model)
    assert fastmask.unpatch(model) is model
    for name, module in model.named_modules():
        assert (type(module), vars(module)) == before[name]
    assert fastmask.unpatch(model) is model


def test_copies_and_saved_models(tmp_path):
    model = fastmask.patch(tiny_maskformer(), fix=True)
    batch = random_batch(8)
    pickled = pickle.dumps(model)  # before its first step, which hangs hooks into it that cannot be pickled
    expected, exact = rounded_steps(model, batch), exact_step(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert type(twin.criterion) is type(model.criterion)
        assert_same_step(rounded_steps(twin, batch), expected, exact)
        fastmask.unpatch(twin)
        assert type(twin) is MaskFormerForInstanceSegmentation
        assert_same_step(rounded_steps(twin, batch), expected, exact)
    model.save_pretrained(tmp_path)
    loaded = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["MaskFormerForInstanceSegmentation"]
    assert type(loaded) is MaskFormerForInstanceSegmentation
    assert_same_step(rounded_steps(loaded.train(), batch), expected, exact)


def test_moves_and_modes():
    model = fastmask.patch(tiny_maskformer()).eval().double().train()
    batch = random_batch(9)
    batch["pixel_values"] = batch["pixel_values"].double()
    batch["mask_labels"] = [masks.double() for masks in batch["mask_labels"]]
    outputs, gradients = train_step(model, batch)
    theirs, their_gradients = train_step(fastmask.unpatch(model), batch)
    torch.testing.assert_close(outputs.loss, theirs.loss, rtol=1e-12, atol=0)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_wrapped_models_are_patched_inside():
    model = tiny_maskformer()
    wrapper = nn.ModuleDict({"net": model})
    fastmask.patch(wrapper)
    assert type(model.criterion) is not hf.MaskFormerLoss
    fastmask.unpatch(wrapper)
    assert type(model.criterion) is hf.MaskFormerLoss


def test_auxiliary_losses_without_hidden_states_need_the_fix():
    model, batch = tiny_maskformer(hidden=False), random_batch(10)
    expected, exact = (step(model, batch, output_hidden_states=True) for step in (rounded_steps, exact_step))
    for prepare in (lambda model: model, fastmask.patch):
        with pytest.raises(TypeError, match="stack"):
            prepare(model)(**batch)
    fastmask.patch(model, fix=True)
    steps = rounded_steps(model, batch)
    assert_same_step(steps, expected, exact)
    outputs, _ = steps[0]
    assert not [name for name in outputs if name.endswith("hidden_states")]
    assert len(model(**batch, return_dict=False)) == len(outputs)
    assert "hidden_states" in model(**batch, output_hidden_states=True)
    fastmask.patch(model)
    with pytest.raises(TypeError, match="stack"):
        model(**batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_integer_mask_labels_need_the_fix(dtype):
    model, batch = tiny_maskformer(), random_batch(11)
    expected, exact = rounded_steps(model, batch), exact_step(model, batch)
    batch["mask_labels"] = [masks.to(dtype) for masks in batch["mask_labels"]]
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(**batch)
    with pytest.raises(TypeError, match="fix=True"):
        fastmask.patch(model)(**batch)
    assert_same_step(rounded_steps(fastmask.patch(model, fix=True), batch), expected, exact)


def test_soft_masks_are_refused():
    model, batch = fastmask.patch(tiny_maskformer()), random_batch(12)
    batch["mask_labels"][1][1, 5, 7] = 0.25
    with pytest.raises(ValueError, match=r"mask_labels\[1\] holds 0.25"):
        model(**batch)


def test_what_is_not_known_is_refused():
    with pytest.raises(TypeError, match="knows nothing inside Linear"):
        fastmask.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        fastmask.patch("facebook/maskformer-swin-base-ade")

    class UsersMatcher(nn.Module):
        pass

    model = tiny_maskformer()
    model.criterion.matcher = UsersMatcher()
    with pytest.raises(TypeError, match="of MaskFormerLoss is a UsersMatcher, whose costs"):
        fastmask.patch(model)
    assert type(model) is MaskFormerForInstanceSegmentation
    assert type(model.matcher) is hf.MaskFormerHungarianMatcher
