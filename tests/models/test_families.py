"""What holds for the models of every family."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.tiny_models import CLASSES, FAMILIES, Family

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def losses_of(model, inputs, targets):
    """The losses, by the same random points in each call."""
    torch.manual_seed(0)
    return model(inputs, targets)


def trained(model, inputs, targets):
    """The losses, and the gradients of all parameters."""
    losses = losses_of(model, inputs, targets)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return losses | gradients


@every_family
def test_gradients_reach_every_parameter(family: Family):
    values = trained(family.make(), *family.lists())
    for name, value in values.items():
        assert value is not None and value.isfinite().all(), name
        # All queries start at zero, so the first self-attention mixes equal values, whatever its weights.
        if name != "predictor.decoder.layers.0.self_attn.in_proj_weight":
            assert value.any(), name


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(family: Family, dtype):
    model = family.make().eval()
    inputs, targets = family.lists()
    logits, losses = model(inputs)[family.logits], losses_of(model, inputs, targets)
    model.to(dtype)
    tolerance = {torch.bfloat16: 0.3, torch.float16: 0.05, torch.float64: 1e-3}[dtype]
    found = model(inputs)[family.logits]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), logits, rtol=0, atol=tolerance)
    if dtype != torch.float64 or set(losses) == {"loss_ce"}:  # the kernels of masks have no float64
        for name, loss in losses_of(model, inputs, targets).items():
            torch.testing.assert_close(loss.float(), losses[name], rtol=0, atol=tolerance)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_losses_and_gradients_in_the_parameters_dtype(family: Family, dtype):
    model = family.make()
    inputs, targets = family.lists()
    expected = losses_of(model, inputs, targets)
    with torch.autocast("cpu", dtype=dtype):
        values = trained(model, inputs, targets)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in values.values())
    for name, loss in expected.items():
        torch.testing.assert_close(values[name], loss, rtol=0.1, atol=0.05)


@every_family
def test_a_model_of_bfloat16_trains(family: Family):
    model = family.make().bfloat16()
    inputs, targets = family.lists()
    gradients = trained(model, inputs, targets)
    for name, parameter in model.named_parameters():
        assert gradients[name].dtype == parameter.dtype == torch.bfloat16
        assert gradients[name].isfinite().all()


@pytest.mark.slow
@every_family
def test_predictions_and_training_compile_to_one_graph(family: Family):
    torch._dynamo.reset()
    model = family.make().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs, targets = family.lists()
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs)[family.logits], model(inputs)[family.logits])
    for batch in [(inputs, targets)] if family is FAMILIES["per pixel"] else [family.batch()]:
        found, expected = trained(compiled, *batch), trained(model, *batch)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)


@every_family
def test_a_saved_model_comes_back_exactly(family: Family, tmp_path):
    model = family.make(class_names=list("abcd")).eval()
    model.save_pretrained(tmp_path)
    if family.parts.get("backbone"):
        with pytest.raises(ValueError, match="pass the module as backbone="):
            family.kind.from_pretrained(tmp_path)
    loaded = family.kind.from_pretrained(tmp_path, **family.made_parts())
    assert loaded.config == model.config and loaded.training
    inputs, _ = family.lists()
    assert torch.equal(loaded.eval()(inputs)[family.logits], model(inputs)[family.logits])


@every_family
def test_another_number_of_classes_is_refused_unless_asked_for(family: Family, tmp_path):
    model = family.make(class_names=list("abcd"))
    model.save_pretrained(tmp_path)
    other = {"num_classes": 7, **family.made_parts()}
    with pytest.raises(ValueError, match=f"num_classes is 7, but {tmp_path} was saved with {CLASSES}"):
        family.kind.from_pretrained(tmp_path, **other)
    with pytest.warns(UserWarning, match=f"started at random: {family.of_classes}$"):
        loaded = family.kind.from_pretrained(tmp_path, **other, ignore_mismatched_sizes=True)
    assert (loaded.config.num_classes, loaded.config.class_names) == (7, ())
    weights = loaded.state_dict()
    same = {name for name, weight in model.state_dict().items() if weights[name].equal(weight)}
    assert model.state_dict().keys() - same - {"criterion.empty_weight"} == set(family.of_classes.split(", "))
