"""Training in several processes: joining them, sharing a model, and a state that does not depend on their number."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastmask.device import usable_device
from fastmask.training.blocks import blocks

STRATEGIES = ("ddp", "fsdp")
# How long a process waits for the others; long, because process 0 may have to check every file of a data set. If a
# process fails, the others end at once, through torchrun or the closed connection.
TIMEOUT = timedelta(hours=2)
_PLAIN = "_fastmask_plain"
WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Processes:
    """This process among all training processes.

    Args:
        rank: 0 .. world_size - 1; process 0 writes files and prints.
        world_size: the number of processes.
        local_rank: the rank among the processes of this machine.
        device: the device of this process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: str | torch.device | None = None) -> Processes:
    """Joins the processes that ``torchrun`` has started. Without torchrun, this process trains alone.

    Args:
        device: "cpu" or "cuda"; by default CUDA if there is a GPU. With several processes, each takes the GPU of its
            local rank. GPU tensors are exchanged through NCCL, CPU tensors through Gloo.

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
    """Leaves the process group, if there is one. Do not call it after an error: when this process ends, the others
    learn of the failure from the closed connection or ``torchrun``, whereas closing a waiting group would hang."""
    if together():
        dist.destroy_process_group()


def together() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. Every process must call this; nothing waits for a GPU."""
    if not together():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def wrap(model: nn.Module, strategy: str = "ddp") -> nn.Module:
    """Wraps a model so that all processes train it with the average of their gradients. A lone process gets the model.

    Every process starts with the weights of process 0. Batch norm takes its statistics over all processes on CUDA
    (SyncBatchNorm), and over each process's own images on the CPU. Mixed precision still uses ``torch.autocast``.

    Args:
        model: the model, on its device. After this call, make the optimizer from the parameters of the returned module.
        strategy: "ddp", every process holds all weights (``DistributedDataParallel``); or "fsdp", each holds a share of
            the weights, gradients and optimizer state, and gathers a block's weights where they are needed
            (``torch.distributed.fsdp.fully_shard``).

    Returns:
        A module that is called like the model. :func:`unwrap` gives access to the parameters by their original names,
        :func:`whole` to the model's other methods, such as ``predict``.

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
    """The module that was given to :func:`wrap`; with "fsdp" its weights are sharded."""
    while True:
        ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        wrapped = getattr(model, "module" if ddp else "_orig_mod", None)  # torch.compile uses the latter
        if not isinstance(wrapped, nn.Module):
            return model
        model = wrapped


@torch.no_grad()
def whole(model: nn.Module) -> nn.Module:
    """The plain model with all its weights, for everything except training. All processes must call this; afterwards
    each process may use the model on its own.

    With "ddp" it is the model itself, with "fsdp" a copy of the current weights. Its buffers are those of process 0.
    """
    model = unwrap(model)
    if not together():
        return model
    if _PLAIN not in vars(model):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        return model
    plain = _filled(model, _full)
    for buffer in plain.buffers():
        dist.broadcast(buffer, 0)
    return plain


def unhooked(model: nn.Module) -> nn.Module:
    """Like :func:`unwrap`, but without the hooks of "fsdp", so that it can be copied; its weights stay sharded."""
    model = unwrap(model)
    return _filled(model, Tensor.detach) if _PLAIN in vars(model) else model


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """A context in which backward adds only to the gradients of this process; the next backward outside averages their
    sum over the processes. Both forward and backward belong inside."""
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
    """The state dict of the plain model on the CPU, the same for every strategy and number of processes.

    All processes must call it; process 0 gets the state, the others an empty dict.
    """
    state: dict[str, Any] = get_model_state_dict(unwrap(model), options=WHOLE_ON_CPU)
    return state


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the result of :func:`model_state`, in every process, into a model wrapped by any strategy or none.

    Raises:
        RuntimeError: keys or shapes differ; the message is that of ``load_state_dict``.
    """
    model = unwrap(model)
    if not model.state_dict().keys() <= state.keys():
        model.load_state_dict(state)  # raises; PyTorch would ignore missing keys
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name on the CPU, the same for every strategy and number of processes.

    All processes must call it; process 0 gets the state, the others an empty dict.

    Returns:
        {"state": {name: {"exp_avg": ..., ...}}, "param_groups": [{"lr": ..., "params": [names], ...}]}.
    """
    return get_optimizer_state_dict(unwrap(model), optimizer, options=WHOLE_ON_CPU)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads the result of :func:`optimizer_state`, in every process, into an optimizer of the same parameter groups.

    Raises:
        ValueError: the groups hold other parameters.
    """
    model = unwrap(model)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if groups != [list(group["params"]) for group in state["param_groups"]]:
        raise ValueError("the optimizer's parameter groups hold other parameters than those of the state")
    # A copy, because the optimizer keeps the given tensors and changes them in place.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(dict(state)), options=options)
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})  # tuples have become lists
    for parameter in list(optimizer.state):  # PyTorch creates an initial state for parameters that have had no step
        if names[parameter] not in state["state"]:
            del optimizer.state[parameter]


def _replicate(model: nn.Module) -> nn.Module:
    ddp = nn.parallel.DistributedDataParallel
    # Buffers need no broadcast at each step: training does not read them, and whole() and model_state() return those of
    # process 0. PyTorch has renamed the argument.
    option = "forward_sync_buffers"
    if option not in inspect.signature(ddp).parameters:
        option = "broadcast_buffers"
    # Backbones from transformers have weights on which no loss depends, such as Swin's last norm.
    options: dict[str, Any] = {option: False}
    return ddp(model, find_unused_parameters=True, gradient_as_bucket_view=True, **options)


def _shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A copy without weights, for whole(): the hooks of fully_shard gather weights from all processes, so the sharded
    # model works neither in a single process nor in inference mode.
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    plain = copy.deepcopy(model, empty)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    vars(model)[_PLAIN] = plain  # bypasses nn.Module, so that it is not a submodule
    return model


def _filled(model: nn.Module, value_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A plain copy of a sharded model, with ``value_of`` its parameters and copies of its buffers."""
    plain = copy.deepcopy(vars(model)[_PLAIN])
    for name, parameter in model.named_parameters():
        _assign(plain, name, nn.Parameter(value_of(parameter), parameter.requires_grad))
    for name, buffer in model.named_buffers():
        _assign(plain, name, buffer.clone())
    for ours, theirs in zip(plain.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    vars(plain)[_PLAIN] = vars(model)[_PLAIN]
    return plain


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, tensor)


def _full(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
