"""Several processes: what ``torchrun`` starts, a model that they train together, and its state independent of them."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastmask.device import usable_device
from fastmask.training.blocks import blocks

STRATEGIES = ("ddp", "fsdp")
# How long a process waits for another that does not come: process 0 may have every file of a data set to check. The
# failure of a process ends the others at once, through torchrun or the closed connection.
TIMEOUT = timedelta(hours=2)
_PLAIN = "_fastmask_plain"


@dataclass(frozen=True)
class Processes:
    """Which of the processes this one is.

    Args:
        rank: 0 .. world_size - 1; 0 writes files and prints.
        world_size: how many there are.
        local_rank: among those of this machine.
        device: of this process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: str | torch.device | None = None) -> Processes:
    """Joins the processes that ``torchrun`` has started; without it, this process is alone and needs nothing.

    Args:
        device: "cpu" or "cuda"; by default CUDA where there is any. With several processes each takes the GPU of its
            local rank. Tensors on GPUs go through NCCL, those on the CPU through Gloo.

    Raises:
        ValueError: this machine has no such device, or fewer GPUs than processes.
        RuntimeError: the group cannot be formed.
    """
    kind = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not together() and ("RANK" not in os.environ or "WORLD_SIZE" not in os.environ):
        return Processes(0, 1, 0, kind)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU of its own; there are {torch.cuda.device_count()}"
            )
        kind = torch.device("cuda", local_rank)
        torch.cuda.set_device(kind)
    if not together():
        # Flags and objects on the CPU go through Gloo, so that no process waits for its GPU to send them.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, kind)


def cleanup() -> None:
    """Leaves the group, if there is one. After an error, leave without it: the process ends and the others learn of it
    from the closed connection or from ``torchrun``, while a group that is waiting for them could not be closed."""
    if together():
        dist.destroy_process_group()


def together() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask. Nothing waits for a GPU."""
    if not together():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def wrap(model: nn.Module, strategy: str = "ddp") -> nn.Module:
    """The model that all processes train together: they share the gradients' average. Alone, the model itself.

    Every process begins with the weights of process 0. Batch norm takes its statistics over all processes on CUDA
    (SyncBatchNorm), over each process's own images on the CPU. Mixed precision stays ``torch.autocast``.

    Args:
        model: on its device. Make the optimizer after this call, of the parameters of what it returns.
        strategy: "ddp", every process holds all weights (``DistributedDataParallel``); or "fsdp", each holds a share of
            the weights, gradients and optimizer state, and gathers a block's weights where they are needed
            (``torch.distributed.fsdp.fully_shard``).

    Returns:
        to be called as the model is. :func:`unwrap` has the parameters by their own names, :func:`whole` the model's
        other methods, such as ``predict``.

    Raises:
        ValueError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if not together():
        return model
    if any(tensor.is_cuda for tensor in model.parameters()):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)
    return _replicate(model) if strategy == "ddp" else _shard(model)


def unwrap(model: nn.Module) -> nn.Module:
    """What was handed to :func:`wrap`; of "fsdp", with its weights in shares."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
    return model


@torch.no_grad()
def whole(model: nn.Module) -> nn.Module:
    """The plain model with all weights, for anything but training: every process may use it as often as it likes, for
    no call involves another process. All processes must ask for it.

    Of "ddp" the model itself; of "fsdp" a copy of the present weights. Buffers are those of process 0 in each.
    """
    model = unwrap(model)
    if not together():
        return model
    if _PLAIN not in vars(model):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        return model
    plain = copy.deepcopy(vars(model)[_PLAIN])
    for name, parameter in model.named_parameters():
        _assign(plain, name, nn.Parameter(_full(parameter), parameter.requires_grad))
    for name, buffer in model.named_buffers():
        buffer = buffer.clone()
        dist.broadcast(buffer, 0)
        _assign(plain, name, buffer)
    for ours, theirs in zip(plain.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    return plain


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Inside, backward adds to the gradients of this process alone; the next backward outside averages their sum over
    the processes. Forward and backward both belong inside."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext():
            yield


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model on the CPU, whatever the strategy and the number of processes.

    All processes must ask for it; process 0 gets it, the others an empty one.
    """
    state = {name: _saved(value) for name, value in unwrap(model).state_dict().items()}
    return state if _is_main() else {}


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what :func:`model_state` gave, in every process, into a model wrapped by any strategy or none.

    Raises:
        RuntimeError: keys or shapes differ, as ``load_state_dict`` says.
    """
    model = unwrap(model)
    own = model.state_dict()
    model.load_state_dict({name: _placed(value, own.get(name)) for name, value in state.items()})


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by the names of parameters, on the CPU, whatever the strategy and number of processes.

    All processes must ask for it; process 0 gets it, the others an empty one.

    Returns:
        {"state": {name: {"exp_avg": ..., ...}}, "param_groups": [{"lr": ..., "params": [names], ...}]}.
    """
    names = {parameter: name for name, parameter in unwrap(model).named_parameters()}
    groups, state = [], {}
    for group in optimizer.param_groups:
        groups.append({**group, "params": [names[parameter] for parameter in group["params"]]})
        for parameter in group["params"]:
            if values := optimizer.state.get(parameter):
                state[names[parameter]] = {key: _saved(value) for key, value in values.items()}
    return {"state": state, "param_groups": groups} if _is_main() else {}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads what :func:`optimizer_state` gave, in every process, into an optimizer of the same parameter groups.

    Raises:
        ValueError: the groups hold other parameters.
    """
    names = {parameter: name for name, parameter in unwrap(model).named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if groups != [list(group["params"]) for group in state["param_groups"]]:
        raise ValueError("the optimizer's parameter groups hold other parameters than those of the state")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = {names[parameter]: i for i, parameter in enumerate(parameters)}

    def own(value: Any, parameter: Tensor) -> Any:
        value = _placed(value, parameter)
        # The optimizer keeps what it is given and changes it in place; a share is a view of the whole.
        return value.clone() if isinstance(value, Tensor) else value

    # As optimizer.state_dict() has it: parameters by number.
    optimizer.load_state_dict(
        {
            "state": {
                indices[name]: {key: own(value, parameters[indices[name]]) for key, value in values.items()}
                for name, values in state["state"].items()
            },
            "param_groups": [
                {**group, "params": [indices[name] for name in group["params"]]} for group in state["param_groups"]
            ],
        }
    )


def _replicate(model: nn.Module) -> nn.Module:
    ddp = nn.parallel.DistributedDataParallel
    # Buffers need no broadcast at each step: in training nothing reads them, and whole() and model_state() give those
    # of process 0. PyTorch has renamed the argument.
    option = "forward_sync_buffers"
    if option not in inspect.signature(ddp).parameters:
        option = "broadcast_buffers"
    # Backbones of transformers have weights that no loss depends on, such as Swin's last norm.
    return ddp(model, find_unused_parameters=True, gradient_as_bucket_view=True, **{option: False})


def _shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The model without its weights: fully_shard adds hooks that gather them in all processes, so that it could not be
    # used by one process alone, nor in inference mode.
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    plain = copy.deepcopy(model, empty)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    vars(model)[_PLAIN] = plain  # not as a part of the model
    return model


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, tensor)


def _full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shares."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _saved(value: Any) -> Any:
    """All of a value, as process 0 saves it; None in the others."""
    if not isinstance(value, Tensor):
        return value
    value = _full(value)
    # A copy even on the CPU: training goes on while the state is being written.
    return value.to("cpu", copy=True) if _is_main() else None


def _placed(value: Any, like: Tensor | None) -> Any:
    """A whole tensor in shares, if ``like``, of the same shape, is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _is_main() -> bool:
    return not together() or dist.get_rank() == 0
