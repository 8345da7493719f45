"""One optimizer step: what it computes, in which precision, and how it continues."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastmask import MaskFormer, MaskFormerConfig
from fastmask.data import CLASS_NAMES, ComposedScenes, collate_scenes
from fastmask.training.recipe import Recipe
from fastmask.training.trainer import Trainer, by_kind

SCENES = ComposedScenes("train", size=(64, 64))


def make_recipe(**fields) -> Recipe:
    return Recipe(**{"steps": 20, "batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-3, **fields})


def make_model(seed: int = 0, dropout: float = 0.1) -> MaskFormer:
    torch.manual_seed(seed)
    return MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES), decoder_layers=2, dropout=dropout))


def scenes(start: int, count: int = 2):
    return collate_scenes([SCENES[i] for i in range(start, start + count)])


class Linear(nn.Module):
    """A model of the trainer's contract whose losses are easy to follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs, targets):
        error = self.layer(inputs) - targets
        return {"loss_a": error.pow(2).mean(), "loss_b_0": error.abs().mean(), "loss_b": 2 * error.abs().mean()}


def linear_batches(count: int, seed: int = 1, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(count)
    ]


def test_a_step_is_the_optimizer_s_step_on_the_mean_gradient_of_the_micro_batches():
    recipe = make_recipe(optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.1, clip_norm=0.05)
    model = Linear()
    expected = copy.deepcopy(model)
    batches = linear_batches(3)
    trainer = Trainer(model, recipe, accumulate=3)
    losses = trainer.step(batches)

    by_hand = [expected(*batch) for batch in batches]
    (sum(sum(one.values()) for one in by_hand) / 3).backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), recipe.clip_norm)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses["gradient_norm"], norm)
    for name in ("loss_a", "loss_b"):
        mean = sum(by_kind(one)[name] for one in by_hand) / 3
        torch.testing.assert_close(losses[name], mean.detach())
    torch.testing.assert_close(losses["loss"], losses["loss_a"] + losses["loss_b"])
    assert not any(value.requires_grad for value in losses.values())
    assert trainer.steps == 1


def test_losses_of_all_decoder_layers_are_summed_by_kind():
    model = make_model()
    trainer = Trainer(model, make_recipe())
    losses = trainer.step([scenes(0)])
    assert set(losses) == {"loss", "loss_ce", "loss_mask", "loss_dice", "gradient_norm"}
    parts = losses["loss_ce"] + losses["loss_mask"] + losses["loss_dice"]
    torch.testing.assert_close(losses["loss"], parts)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_as_single_precision_does(precision):
    curves = {}
    for name in ("float32", precision):
        trainer = Trainer(make_model(dropout=0.0), make_recipe(), precision=name)
        if name == "float16":  # not so high that the first steps are skipped
            trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 64.0})
        curves[name] = torch.stack([trainer.step([scenes(2 * step)])["loss"] for step in range(4)])
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert not torch.equal(curves[precision], curves["float32"])
    torch.testing.assert_close(curves[precision], curves["float32"], rtol=0.1, atol=0)


@pytest.mark.filterwarnings("error")
def test_gradients_that_overflow_float16_skip_the_step_and_lower_the_scale():
    model = Linear()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, make_recipe(), precision="float16")
    scale = trainer.scaler.get_scale()
    trainer.step(linear_batches(1, scale=1e4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.scaler.get_scale() == scale / 2
    state = trainer.state_dict()
    other = Trainer(Linear(), make_recipe(), precision="float16")
    other.load_state_dict(state)
    assert other.scaler.get_scale() == scale / 2


def test_averaged_weights_follow_their_formula_and_integers_stay():
    model = nn.ModuleDict({"linear": Linear(), "norm": nn.BatchNorm1d(2)})
    model.register_buffer("index", torch.arange(1000))
    model.forward = lambda inputs, targets: {"loss": model["norm"](model["linear"].layer(inputs)).square().mean()}
    trainer = Trainer(model, make_recipe(ema=0.9))
    expected = {}
    for step in range(4):
        trainer.step(linear_batches(1, seed=step))
        for name, value in model.state_dict().items():
            first = step == 0 or not value.is_floating_point()
            expected[name] = value.clone() if first else 0.9 * expected[name] + 0.1 * value
    averaged = trainer.network().state_dict()
    assert averaged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value)
    assert not torch.equal(averaged["linear.layer.weight"], model["linear"].layer.weight)
    assert Trainer(model, make_recipe()).network() is model


def test_a_checkpoint_of_an_optimizer_that_is_not_fused_loads():
    recipe = make_recipe()
    old = Trainer(Linear(), recipe)
    for group in old.optimizer.param_groups:
        group["fused"] = None
    old.step(linear_batches(1))
    new = Trainer(Linear(), recipe)
    new.load_state_dict(old.state_dict())
    for seed in (2, 3):
        for trainer in (old, new):
            trainer.step(linear_batches(1, seed))
    for name, value in old.model.state_dict().items():
        torch.testing.assert_close(new.model.state_dict()[name], value)


def test_parameters_without_a_gradient_have_no_state_after_loading():
    model, other = Linear(), Linear()
    for each in (model, other):
        each.unused = nn.Parameter(torch.ones(3))
    trainer, resumed = Trainer(model, make_recipe()), Trainer(other, make_recipe())
    trainer.step(linear_batches(1))
    state = trainer.state_dict()
    assert state["optimizer"]["state"].keys() == {"layer.weight", "layer.bias"}
    resumed.load_state_dict(state)
    assert other.unused not in resumed.optimizer.state
    with pytest.raises(RuntimeError, match="Missing key.*unused"):
        resumed.load_state_dict({**state, "model": Linear().state_dict()})


@pytest.mark.parametrize(("optimizer", "ema"), [("adamw", 0.9), ("sgd", 0.0)])
def test_a_trainer_continues_from_a_state_bit_for_bit(optimizer, ema, tmp_path):
    recipe = make_recipe(optimizer=optimizer, warmup_steps=3, ema=ema)
    through = Trainer(make_model(), recipe, accumulate=2)
    for step in range(2):
        through.step([scenes(4 * step), scenes(4 * step + 2)])
    torch.save({"trainer": through.state_dict(), "random": torch.get_rng_state()}, tmp_path / "state.pt")
    expected = [through.step([scenes(4 * step), scenes(4 * step + 2)]) for step in (2, 3)]

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Trainer(make_model(seed=1), recipe, accumulate=2)
    resumed.load_state_dict(state["trainer"])
    torch.set_rng_state(state["random"])
    assert resumed.steps == 2
    for step, losses in zip((2, 3), expected, strict=True):
        again = resumed.step([scenes(4 * step), scenes(4 * step + 2)])
        assert all(torch.equal(again[name], losses[name]) for name in losses)
    for ours, theirs in ((resumed.model, through.model), (resumed.network(), through.network())):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    assert resumed.schedule.get_last_lr() == through.schedule.get_last_lr()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"precision='half' is unknown; expected one of float32, bfloat16, float16"):
        Trainer(Linear(), make_recipe(), precision="half")
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        Trainer(Linear(), make_recipe(), accumulate=0)
    with pytest.raises(ValueError, match=r"batches has 1 micro-batches; expected 2 \(accumulate\)"):
        Trainer(Linear(), make_recipe(), accumulate=2).step(linear_batches(1))
