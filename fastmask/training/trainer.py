"""Optimizer steps of a model, with mixed precision, accumulation and clipping, without waiting for the GPU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastmask.models.precision import autocast, check_precision
from fastmask.training.distributed import (
    accumulating,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    unhooked,
    unwrap,
    whole,
)
from fastmask.training.optimizer import clip_gradients, make_optimizer, make_schedule, mask_probabilities
from fastmask.training.recipe import Recipe

LAYER_SUFFIX = re.compile(r"_\d+$")


class Trainer:
    """Trains a model that is called with inputs and targets and returns a dict of losses, whose sum is minimized.

    Args:
        model: the model, on its device; already wrapped if several processes train it.
        recipe: the optimizer, its schedule, the decay of the weights' moving average, and, for an EoMT, the annealing
            of its masks.
        precision: "float32", or "bfloat16" or "float16" for autocast; parameters stay in their own dtype. "float16"
            scales the loss, and skips a step whose gradients overflow.
        accumulate: A, the number of micro-batches in a step, whose gradients are averaged. The loss of each is
            normalized by its own number of targets, so A micro-batches equal one large batch only if these are equal.

    Raises:
        ValueError: an unknown precision, fewer than one micro-batch, or annealing that does not fit the model.
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
        self.average: AveragedModel | None = None
        if recipe.ema > 0:
            average = partial(_average, 1 - recipe.ema)
            self.average = AveragedModel(unhooked(model), multi_avg_fn=average, use_buffers=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.steps = 0
        self._anneal()

    def step(self, batches: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        """Takes one optimizer step on A micro-batches, with the model in its current mode. The host waits for the
        device only with "float16", to learn whether gradients overflowed.

        Args:
            batches: A pairs (inputs, targets), on any device, with which the model is called.

        Returns:
            Scalars on the model's device, means over the micro-batches: "loss"; each kind of loss, such as "loss_ce",
            summed over decoder layers; and "gradient_norm", the norm of the whole gradient before clipping.

        Raises:
            ValueError: the number of micro-batches is not A.
        """
        if len(batches) != self.accumulate:
            raise ValueError(f"batches has {len(batches)} micro-batches; expected {self.accumulate} (accumulate)")
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for i, (inputs, targets) in enumerate(batches):
            # Processes exchange gradients only in the last backward pass.
            with nullcontext() if i == len(batches) - 1 else accumulating(self.model):
                losses = self._losses(to_device(inputs, self.device), to_device(targets, self.device))
                loss = reduce(torch.add, losses.values()) / self.accumulate
                self.scaler.scale(loss).backward()
            for name, value in {"loss": loss * self.accumulate, **by_kind(losses)}.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / self.accumulate
        self.scaler.unscale_(self.optimizer)
        totals["gradient_norm"] = clip_gradients(self.model, self.recipe.clip_norm).detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():
            # The schedule also counts steps that overflow. If the first one does, PyTorch warns of a wrong call order.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(unwrap(self.model))
        self.steps += 1
        self._anneal()
        return totals

    def network(self) -> nn.Module:
        """The plain network to evaluate and save; with ``recipe.ema`` it has the averaged weights. All processes must
        call this; see :func:`fastmask.training.distributed.whole`.
        """
        return whole(self.model if self.average is None else self.average.module)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a trainer of the same model and recipe needs to continue, on the CPU, with any strategy and
        number of processes. All processes must call this; the state is complete in process 0.
        """
        average = {} if self.average is None else {"average": model_state(self.average.module)}
        return {
            **average,
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`, which every process must have.

        Raises:
            RuntimeError, ValueError: the state belongs to another model or recipe.
        """
        load_model_state(self.model, state["model"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]
        if self.average is not None:
            load_model_state(self.average.module, state["average"])
            self.average.n_averaged.fill_(self.steps)
        self._anneal()

    def _anneal(self) -> None:
        """Sets the probabilities with which an EoMT masks attention, if the recipe anneals."""
        probabilities = mask_probabilities(self.recipe, self.steps)
        if not probabilities:
            return
        for model in (self.model, *([] if self.average is None else [self.average.module])):
            network: Any = unwrap(model)
            blocks = getattr(getattr(network, "config", None), "query_blocks", 0)
            if blocks != len(probabilities):
                raise ValueError(
                    f"anneal_starts has {len(probabilities)} entries; the {type(network).__name__} has {blocks} blocks "
                    "with queries"
                )
            network.set_mask_probabilities(probabilities)

    def _losses(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        with autocast(self.device, self.precision):
            return self.model(inputs, targets)


def _average(weight: float, averaged: Iterable[Tensor], latest: Iterable[Tensor], _: Tensor | int) -> None:
    """One step of the moving average. PyTorch's would round integer buffers and mix sharded with whole tensors."""
    for own, new in zip(averaged, latest, strict=True):
        if own.is_floating_point():
            own.lerp_(new, weight)
        else:
            own.copy_(new)


def by_kind(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums losses over decoder layers: "loss_ce_0" is added to "loss_ce"."""
    kinds: dict[str, Tensor] = {}
    for name, value in losses.items():
        kind = LAYER_SUFFIX.sub("", name)
        kinds[kind] = kinds[kind] + value if kind in kinds else value
    return kinds


def to_device(value: Any, device: torch.device) -> Any:
    """Moves everything that has ``.to`` to a device, also inside lists, tuples (which become lists) and dicts."""
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value
