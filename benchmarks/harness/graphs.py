"""Calls as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.registry import Unavailable

GRAPH_WARM_UP = 3  # calls on a side stream before a capture, as PyTorch's notes on CUDA graphs ask for


def capture(
    call: Callable[[], Any], after_warm_up: Callable[[], None] = lambda: None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of a call, and the call's result, which each replay overwrites.

    Args:
        after_warm_up: undoes what the calls before the capture changed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    after_warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def captured(
    call: Callable[[], Any], device: torch.device, after_warm_up: Callable[[], None] = lambda: None
) -> Callable[[], Any]:
    """``call`` as a CUDA graph, captured at the first call, whose memory is then the graph's; see ``capture``."""
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    made: tuple[torch.cuda.CUDAGraph, Any] | None = None

    def replay() -> Any:
        nonlocal made
        if made is None:
            made = capture(call, after_warm_up)
        graph, result = made
        graph.replay()
        return result

    return replay
