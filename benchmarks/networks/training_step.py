"""A whole training step of MaskFormer: forward, matching, losses, backward and optimizer.

The networks have the same weights; all computing in bfloat16 is by autocast, weights stay in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.graphs import captured
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import compiled, require_backend
from benchmarks.harness.registry import Operation, Provider
from benchmarks.networks.models import (
    CASES,
    NetworkInputs,
    as_transformers,
    forward_flops,
    make_inputs,
    normalized,
    weight_bytes,
)

LEARNING_RATE = 1e-5
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the first step's loss, relative
Step = Callable[[], Tensor]


class SameLoss:
    """The first step's loss equals, to rounding, that of the same network in float32 with the reference's criterion.

    transformers also supervises what comes before the first decoder layer, so that its loss has a part more.
    """

    def __init__(self, inputs: NetworkInputs) -> None:
        model = copy.deepcopy(inputs.model)
        model.criterion.backend = model.criterion.matcher.backend = "reference"
        with torch.no_grad():
            self.expected = {"fastmask": float(sum(model(inputs.images, inputs.targets).values()))}
            with suppress(ImportError):
                self.expected["transformers"] = self.expected["fastmask"] + loss_before_the_decoder(inputs)
        self.tolerance = TOLERANCES[inputs.dtype]

    def disagreement(self, result: tuple[str, Tensor], error_factor: float) -> str | None:
        expected, loss = self.expected[result[0]], float(result[1])
        if not abs(loss / expected - 1) <= error_factor * self.tolerance:  # so that NaN fails
            return f"the loss is {loss:.5g}; expected {expected:.5g} to {self.tolerance:.0e}"
        return None


def loss_before_the_decoder(inputs: NetworkInputs) -> float:
    """What transformers adds to its loss, by the states that its first decoder layer gets."""
    model = as_transformers(inputs.model, auxiliary_loss=True).train()
    weighted: dict[str, Tensor] = {}
    sum_of = model.get_loss
    model.get_loss = lambda losses: weighted.update(losses) or sum_of(losses)
    model(**transformers_batch(inputs))
    return float(sum(value for name, value in weighted.items() if name.endswith("_0")))


def work(inputs: NetworkInputs) -> Work:
    """Forward, and twice as many products backward; weights, gradients and the optimizer's two moments are read and
    written once each."""
    return Work(bytes=8 * weight_bytes(inputs), flops=3 * forward_flops(inputs))


def make_step(
    model: nn.Module, loss: Callable[[], Tensor], inputs: NetworkInputs
) -> tuple[Step, torch.optim.Optimizer]:
    """A step of ``model``, and its optimizer. No gradients are left between steps: they count as a step's memory."""
    device = inputs.images.device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=on_gpu, capturable=on_gpu)

    def step() -> Tensor:
        with torch.autocast(device.type, inputs.dtype, enabled=inputs.dtype != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step, optimizer


def own_step(inputs: NetworkInputs, *, compile: bool = False) -> tuple[nn.Module, Step, torch.optim.Optimizer]:
    device = inputs.images.device
    require_backend("mask_loss", "triton" if device.type == "cuda" else "native", inputs.images)
    model = copy.deepcopy(inputs.model)
    network = compiled(model, device) if compile else model
    step, optimizer = make_step(model, lambda: sum(network(inputs.images, inputs.targets).values()), inputs)
    return model, step, optimizer


def prepare_fastmask(inputs: NetworkInputs) -> Step:
    return own_step(inputs)[1]


def prepare_compiled_fastmask(inputs: NetworkInputs) -> Step:
    return own_step(inputs, compile=True)[1]


def prepare_graph(inputs: NetworkInputs) -> Step:
    model, step, optimizer = own_step(inputs)

    def start_again() -> None:
        model.load_state_dict(inputs.model.state_dict())
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    return captured(step, inputs.images.device, start_again)


def transformers_step(inputs: NetworkInputs, wrap: Callable[[nn.Module], Callable[..., object]]) -> Step:
    model = as_transformers(inputs.model, auxiliary_loss=True).train()
    network, batch = wrap(model), transformers_batch(inputs)
    return make_step(model, lambda: network(**batch).loss, inputs)[0]


def transformers_batch(inputs: NetworkInputs) -> dict[str, Any]:
    targets = inputs.targets.to_list()
    return {
        "pixel_values": normalized(inputs),
        "mask_labels": [target["masks"].float() for target in targets],
        "class_labels": [target["labels"] for target in targets],
    }


def prepare_transformers(inputs: NetworkInputs) -> Step:
    return transformers_step(inputs, lambda model: model)


def prepare_compiled_transformers(inputs: NetworkInputs) -> Step:
    """With breaks in the graph, as its matcher runs on the host."""

    def wrap(model: nn.Module) -> Callable[..., object]:
        torch.compiler.reset()
        return torch.compile(model)

    return transformers_step(inputs, wrap)


def prepare_patched(inputs: NetworkInputs) -> Step:
    from fastmask import patch

    return transformers_step(inputs, patch)


def own(raw: Tensor, _: NetworkInputs) -> tuple[str, Tensor]:
    return "fastmask", raw


def theirs(raw: Tensor, _: NetworkInputs) -> tuple[str, Tensor]:
    return "transformers", raw


OPERATION = Operation(
    title="Whole training step of MaskFormer: forward, matching, losses, backward, AdamW; memory beyond weights and "
    "the optimizer's state",
    cases=CASES,
    providers=(
        Provider("fastmask", prepare_fastmask, own),
        Provider("fastmask, CUDA graph", prepare_graph, own, keeps_memory=True),
        Provider("fastmask, torch.compile", prepare_compiled_fastmask, own, compiles=True),
        Provider("fastmask.patch of transformers", prepare_patched, theirs),
        Provider("transformers", prepare_transformers, theirs),
        Provider("transformers, torch.compile", prepare_compiled_transformers, theirs, compiles=True),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=SameLoss,
    work=work,
)
