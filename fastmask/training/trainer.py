"""One optimizer step of a model: precision, accumulation and clipping, and nothing that waits for a GPU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.models.precision import autocast, check_precision
from fastmask.training.distributed import (
    accumulating,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from fastmask.training.optimizer import clip_gradients, make_optimizer, make_schedule
from fastmask.training.recipe import Recipe

LAYER_SUFFIX = re.compile(r"_\d+$")


class Trainer:
    """Trains a model that is called with inputs and targets and returns a dict of losses, whose sum is minimized.

    Args:
        model: on its device, wrapped already if several processes train it.
        recipe: the optimizer and its schedule.
        precision: "float32", or "bfloat16" or "float16" for autocast; parameters stay in their own dtype. "float16"
            scales the loss, and skips a step whose gradients overflow.
        accumulate: A, the micro-batches of a step. The gradient of a step is the mean of theirs. Each micro-batch is
            normalized by itself, by its own targets, so that A micro-batches equal one large batch only where they have
            equally many.

    Raises:
        ValueError: an unknown precision, or fewer than one micro-batch.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, precision: str = "float32", accumulate: int = 1):
        check_precision(precision)
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.model = model
        self.recipe = recipe
        self.accumulate = accumulate
        self.device = next(model.parameters()).device
        self.precision = precision
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.steps = 0

    def step(self, batches: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        """One optimizer step on A micro-batches. The model is used in the mode that it has. No host sync, except that
        "float16" asks whether gradients overflowed.

        Args:
            batches: A pairs of what the model is called with, inputs and targets, on any device.

        Returns:
            Scalars on the model's device, means over the micro-batches: "loss", and each kind of loss, as "loss_ce",
            summed over decoder layers; also "gradient_norm", of the whole gradient before it is clipped.

        Raises:
            ValueError: another number of micro-batches.
        """
        if len(batches) != self.accumulate:
            raise ValueError(f"batches has {len(batches)} micro-batches; expected {self.accumulate} (accumulate)")
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for i, (inputs, targets) in enumerate(batches):
            # Processes exchange gradients in the last backward pass alone.
            with nullcontext() if i == len(batches) - 1 else accumulating(self.model):
                losses = self._losses(to_device(inputs, self.device), to_device(targets, self.device))
                loss = sum(losses.values()) / self.accumulate
                self.scaler.scale(loss).backward()
            for name, value in {"loss": loss * self.accumulate, **by_kind(losses)}.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / self.accumulate
        self.scaler.unscale_(self.optimizer)
        totals["gradient_norm"] = clip_gradients(self.model, self.recipe.clip_norm).detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():
            # The schedule counts the steps that overflow as well; PyTorch takes one at the beginning for a mistake.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        self.steps += 1
        return totals

    def state_dict(self) -> dict[str, Any]:
        """Everything that a trainer of the same model and recipe needs to continue, on the CPU, for any strategy and
        number of processes. All processes must ask for it; it is whole in process 0.
        """
        return {
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`, which every process must have.

        Raises:
            RuntimeError, ValueError: the state is of another model or recipe.
        """
        load_model_state(self.model, state["model"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    def _losses(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        with autocast(self.device, self.precision):
            return self.model(inputs, targets)


def by_kind(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses summed over decoder layers: "loss_ce_0" belongs to "loss_ce"."""
    kinds: dict[str, Tensor] = {}
    for name, value in losses.items():
        kind = LAYER_SUFFIX.sub("", name)
        kinds[kind] = kinds[kind] + value if kind in kinds else value
    return kinds


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, and whatever else has ``.to``, on a device; also within lists and dicts; a tuple becomes a list."""
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value
