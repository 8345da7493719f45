"""Calls as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.registry import Unavailable

GRAPH_WARM_UP = 3  # calls on a side stream before a capture, as PyTorch's notes on CUDA graphs ask for


def captured(
    call: Callable[[], Any], device: torch.device, after_warm_up: Callable[[], None] = lambda: None
) -> Callable[[], Any]:
    """``call`` as a CUDA graph, captured at the first call, whose memory is then the graph's.

    Args:
        after_warm_up: undoes what the calls before the capture changed.
    """
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    graph = torch.cuda.CUDAGraph()
    result: Any = None

    def replay() -> Any:
        nonlocal result
        if result is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(GRAPH_WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            after_warm_up()
            with torch.cuda.graph(graph):
                result = call()
        graph.replay()
        return result

    return replay
