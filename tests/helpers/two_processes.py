"""What each of two processes does for test_training_distributed.py, and saves in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fastmask
from fastmask.training import distributed
from fastmask.training.activation_checkpointing import checkpoint_activations
from tests.helpers.original_criteria import make_criterion, random_inputs
from tests.helpers.shared_batches import CASES, PROCESSES

STEPS = 3
# The normalizers are the strategies' in common; what FSDP adds shows where a process has nothing to learn from.
NAMES = {
    "ddp": tuple(CASES),
    "fsdp": ("uneven", "no targets", "masked attention", "segmenter", "segmenter, one void", "per pixel+", "sound"),
}
RECOMPUTED = ("masked attention", "segmenter")
PATCHED_COUNTS = ((4, 1), (1, 0))
MICRO_BATCHES = ("uneven", "one without targets", "fewer targets than processes")


def main(folder: Path) -> None:
    processes = distributed.setup("cpu")
    rank = processes.rank
    assert (processes.world_size, processes.local_rank, processes.is_main) == (PROCESSES, rank, rank == 0)
    seen = {"flags": [distributed.any_process(flag) for flag in (rank == 1, False)]}
    for strategy in distributed.STRATEGIES:
        seen |= {(name, strategy): one_step(CASES[name], rank, strategy) for name in NAMES[strategy]}
        for name in RECOMPUTED:
            seen[name, "recomputed", strategy] = one_step(CASES[name], rank, strategy, checkpoint_activations)
            seen[name, "bfloat16", strategy] = one_step(CASES[name].in_float32(), rank, strategy, bfloat16=True)
        seen["accumulated", strategy] = accumulated(rank, strategy)
        seen["predictions", strategy] = predictions(rank, strategy)
        seen["statistics", strategy] = statistics(rank, strategy)
    seen["relay"] = relay(rank)
    outputs, targets = random_inputs(rank, PATCHED_COUNTS[rank])
    seen["patched"] = fastmask.patch(make_criterion())(outputs, targets)
    torch.save(seen, folder / f"{rank}.pt")
    distributed.cleanup()
    assert not distributed.together()


def one_step(case, rank, strategy, prepare=lambda model: model, *, bfloat16=False):
    """(losses, averaged over the processes; gradients)."""
    model = distributed.wrap(prepare(case.model()), strategy)
    losses = loss_of(model, case.shares[rank], bfloat16=bfloat16)
    values = torch.stack([loss.detach() for loss in losses.values()])
    dist.all_reduce(values)
    return dict(zip(losses, values / PROCESSES, strict=True)), gradients(model)


def loss_of(model, batch, *, bfloat16=False):
    """The losses of a batch, after their backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses = model(*batch)
    sum(losses.values()).backward()
    return losses


def gradients(model):
    """Of each parameter, all of it."""
    return {name: whole(one.grad).clone() for name, one in distributed.unwrap(model).named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def accumulated(rank, strategy):
    """Gradients of three micro-batches, of which the first two stay with each process."""
    *earlier, last = [CASES[name].shares[rank] for name in MICRO_BATCHES]
    model = distributed.wrap(CASES["uneven"].model(), strategy)
    with distributed.accumulating(model):
        for batch in earlier:
            loss_of(model, batch)
    loss_of(model, last)
    return gradients(model)


def optimizer_of(model):
    decayed = [one for one in model.parameters() if one.dim() > 1]
    others = [one for one in model.parameters() if one.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "lr": 1e-3, "weight_decay": 0.0}], lr=1e-2)


def train(model, optimizer, batch, steps=STEPS):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch)
        optimizer.step()


def zeroed(model):
    """The same model with weights that must be replaced."""
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def relay(rank):
    """Three runs by DDP, FSDP and DDP, each from the state that the one before has saved; the states between them."""
    case, saved = CASES["segmenter"], []
    for strategy in ("ddp", "fsdp", "ddp"):
        model = distributed.wrap(zeroed(case.model()) if saved else case.model(), strategy)
        optimizer = optimizer_of(model)
        if saved:
            distributed.load_model_state(model, saved[-1][0])
            distributed.load_optimizer_state(model, optimizer, saved[-1][1])
        train(model, optimizer, case.shares[rank])
        states = [distributed.model_state(model), distributed.optimizer_state(model, optimizer)]
        assert rank == 0 or states == [{}, {}]
        dist.broadcast_object_list(states)
        saved.append(states)
    return saved


def predictions(rank, strategy):
    """Of the plain model before and after a step; one process asks for more of them than the other."""
    case = CASES["segmenter"]
    model = distributed.wrap(case.model() if rank == 0 else zeroed(case.model()), strategy)
    results = []
    for _ in range(2):
        plain = distributed.whole(model)
        assert type(plain) is type(case.model())
        assert plain.training
        for _ in range(1 + rank):
            scores = plain.predict(case.shares[0][0], output="scores")
        results.append(scores)
        train(model, optimizer_of(model), case.shares[rank], steps=1)
    return results


def statistics(rank, strategy):
    """The state of a batch norm that each process has shown other numbers, as the whole model and as saved."""
    model = distributed.wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), strategy)
    model(torch.full((2, 2), float(rank)))
    saved = distributed.model_state(model)
    return {name: value.detach() for name, value in distributed.whole(model).state_dict().items()}, saved
