"""Two processes, and models without batch norm and batches in shares that compare them with one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmask import MaskFormer, PerPixelBaseline, Segmenter, SoundEventDetector
from fastmask.modules import PointSampling
from tests.helpers.tiny_models import Convolutions
from tests.helpers.training_runs import ForkedProcess

ROOT = Path(__file__).parents[2]
PROCESSES = 2
CLASSES, SIDE, VOID = 3, 64, 255


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a module or script in two processes on the CPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, *launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def fork_together(call: Callable, *args: object) -> None:
    """Calls something in two processes on the CPU that know of each other as those of torchrun do, with everything
    imported already.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [ForkedProcess(_call_as, rank, port, call, args) for rank in range(PROCESSES)]
    said = [process.stderr.read() for process in processes]
    assert [process.wait(60) for process in processes] == [0] * PROCESSES, "\n".join(said)


def _call_as(rank: int, port: int, call: Callable, args: tuple) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    call(*args)


class FrameEncoder(nn.Module):
    """Frames of 40 ms to 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv1d(1, 16, 640, 640)

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.frames(waveforms[:, None]).tanh()


@dataclass(frozen=True)
class SamePoints(PointSampling):
    """The same points for each image and target, so that they do not depend on the share an image lies in."""

    def shared(self, batch_size, device, generator=None):
        return self._points().expand(batch_size, -1, -1).contiguous()

    def uncertain(self, mask_logits, assignment, *, generator=None, backend="auto"):
        return self._points().expand(*assignment.shape, -1, -1).contiguous()

    def _points(self):
        return torch.rand(1, self.num_points, 2, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Args:
        model: makes it, always the same.
        shares: inputs and targets of each process.
    """

    model: Callable[[], nn.Module]
    shares: list[tuple[Tensor, list]]

    @property
    def joined(self) -> tuple[Tensor, list]:
        return torch.cat([inputs for inputs, _ in self.shares]), [one for _, targets in self.shares for one in targets]

    def in_float32(self) -> Case:
        shares = [(inputs.float(), targets) for inputs, targets in self.shares]
        return Case(lambda: self.model().float(), shares)


def maskformer(points: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "mask_dim": 16, "pixel_decoder_dim": 32, "num_heads": 2, "feedforward_dim": 32}
    options = {"num_queries": 4, "encoder_layers": 1, "decoder_layers": 3, "dropout": 0.0, **sizes, **options}
    model = MaskFormer(num_classes=CLASSES, backbone=Convolutions(), **options).double()
    # The reference alone runs in float64.
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    if points:
        model.criterion.matcher.points = model.criterion.points = SamePoints(30)
    return model


def segmenter(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": (SIDE, SIDE), "patch_size": 8, "hidden_dim": 32, "encoder_layers": 2, "decoder_layers": 1}
    sizes |= {
        "num_heads": 2,
        "decoder_heads": 2,
        "feedforward_dim": 32,
        "dropout": 0.0,
        "drop_path": 0.0,
        "decoder_dropout": 0.0,
        "decoder_drop_path": 0.0,
        "window_size": SIDE,
        "window_stride": SIDE,
    }
    return Segmenter(num_classes=CLASSES, **{**sizes, **options}).double()


def per_pixel(transformer_decoder: bool) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "mask_dim": 16, "pixel_decoder_dim": 32, "num_heads": 2, "feedforward_dim": 32}
    options = {"decoder_layers": 3, "dropout": 0.0, "transformer_decoder": transformer_decoder}
    model = PerPixelBaseline(num_classes=CLASSES, backbone=Convolutions(), **options, **sizes).double()
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return model


def sound() -> nn.Module:
    torch.manual_seed(0)
    options = {"hidden_dim": 16, "mask_dim": 16, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.0}
    return SoundEventDetector(num_classes=CLASSES, frame_encoder=FrameEncoder(), **options)


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_shares(*counts: tuple[int, ...]) -> list[tuple[Tensor, list]]:
    """For each process a tuple of how many targets its images have."""
    generator = torch.Generator().manual_seed(len(counts[0]))
    return [
        (
            images(len(share), rank),
            [
                {
                    "labels": torch.randint(CLASSES, (count,), generator=generator),
                    "masks": torch.rand(count, SIDE, SIDE, generator=generator) < 0.4,
                }
                for count in share
            ],
        )
        for rank, share in enumerate(counts)
    ]


def pixel_shares(*void: tuple[float, ...]) -> list[tuple[Tensor, list]]:
    """For each process a tuple of which share of its images' pixels has no class."""
    generator = torch.Generator().manual_seed(4)
    shares = []
    for rank, share in enumerate(void):
        maps = [torch.randint(CLASSES, (SIDE, SIDE), generator=generator) for _ in share]
        for classes, rate in zip(maps, share, strict=True):
            classes[torch.rand(SIDE, SIDE, generator=generator) < rate] = VOID
        shares.append((images(len(share), rank), maps))
    return shares


def sound_shares(*clips: str) -> list[tuple[Tensor, list]]:
    """For each process a letter for each clip: s for known times, w for none, n for no events."""
    events = {
        "s": {"labels": torch.tensor([0, 2]), "onsets": torch.tensor([0.1, 0.3]), "offsets": torch.tensor([0.2, 0.6])},
        "w": {"labels": torch.tensor([1])},
        "n": {"labels": torch.tensor([], dtype=torch.int64)},
    }
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(len(share), 12800, generator=generator), [events[kind] for kind in share]) for share in clips]


CASES = {
    "uneven": Case(maskformer, mask_shares((3, 0, 2), (1,))),
    "one without targets": Case(maskformer, mask_shares((0, 0), (2, 1))),
    "fewer targets than processes": Case(maskformer, mask_shares((1,), (0,))),
    "no targets": Case(maskformer, mask_shares((0,), (0,))),
    "more targets than queries": Case(maskformer, mask_shares((6,), (2,))),
    "last layer alone": Case(lambda: maskformer(deep_supervision=False), mask_shares((3,), (1,))),
    "fixed": Case(lambda: maskformer(matching="fixed", num_queries=CLASSES), mask_shares((3, 1), (0,))),
    "masked attention": Case(lambda: maskformer(masked_attention=True), mask_shares((3, 0), (1,))),
    "points": Case(lambda: maskformer(points=True), mask_shares((3, 0), (1,))),
    "segmenter": Case(segmenter, pixel_shares((0.1, 0.9), (0.5,))),
    "segmenter, one void": Case(segmenter, pixel_shares((1.0,), (0.5,))),
    "segmenter, all void": Case(segmenter, pixel_shares((1.0,), (1.0,))),
    "linear segmenter": Case(lambda: segmenter(decoder="linear"), pixel_shares((0.1,), (0.5,))),
    "per pixel": Case(lambda: per_pixel(False), pixel_shares((0.1, 0.9), (0.5,))),
    "per pixel+": Case(lambda: per_pixel(True), pixel_shares((0.0,), (1.0,))),
    "sound": Case(sound, sound_shares("sws", "s")),
    "sound without times": Case(sound, sound_shares("s", "wn")),
    "sound without events": Case(sound, sound_shares("n", "nn")),
}
