"""A warning for images in 0..255: networks take 0..1, and answer bytes as if they saw white."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# An image in 0..1 ends 2.7 deviations above the mean by ImageNet's statistics, one in 0..255 hundreds.
DEVIATIONS = 20


class PixelRange:
    """Looks at the pixels of every batch on the CPU, and of the first on a GPU, until it has warned.

    The host does not wait for a GPU: what the first batch holds is copied beside the work, and read when a later batch
    comes.
    """

    def __init__(self) -> None:
        self._done = False
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def check(self, pixels: Tensor, limit: float) -> None:
        """Warns, once in a process, of pixels beyond the limit.

        Args:
            pixels: as a network is given them.
            limit: a value that no pixel of an image in 0..1 has.
        """
        # Traced programs hold no question about values, and subclasses, such as fake tensors, may have none.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(pixels) is not Tensor or self._done:
            return
        if pixels.device.type == "cpu":
            self._judge(pixels.detach().amax().item(), limit)
        elif pixels.device.type == "cuda" and self._pending is None:
            if not torch.cuda.is_current_stream_capturing():
                self._pending = _copy_to_host(pixels.detach().amax().float())
        elif self._pending is not None and self._pending[1].query():
            self._done = True
            self._judge(self._pending[0].item(), limit)

    def _judge(self, highest: float, limit: float) -> None:
        if highest > limit:
            self._done = True
            warnings.warn(
                f"images hold {highest:.6g}; expected values in 0..1: divide bytes by 255, and leave the normalisation "
                "to the model",
                stacklevel=5,
            )


def _copy_to_host(value: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A number's place in host memory, and the event after which it is there."""
    host = torch.empty((), pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(value.device))
    return host, event


PIXEL_RANGE = PixelRange()
