"""Reckons how well the CPU operators would use many cores, from the times of their tasks on one.

    make threads

builds the kernels such that each task runs alone and writes its time to a file, and runs this. PyTorch divides the
tasks of a parallel loop into as many equal runs of neighbors as there are threads. So the time on T threads is that of
the longest run of each loop, plus what is not in a loop. Left out: what the threads take from each other, which is the
bandwidth of the memory, and the time to start them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import fastmask
from fastmask.cli._tables import aligned

THREADS = (2, 8, 16, 32, 64)
ROUNDS = 5
TIMES, COUNT = "FASTMASK_TASK_TIMES", "FASTMASK_TASK_THREADS"  # as in csrc/ops/task_times.h

Loops = list[list[int]]  # the nanoseconds of the tasks of each parallel loop


class Call(NamedTuple):
    """One call of an operator: its time in nanoseconds, of which the loops took a part."""

    total: int
    loops: Loops

    def on(self, threads: int) -> float:
        """Its time on so many threads."""
        serial = self.total - sum(sum(tasks) for tasks in self.loops)
        return max(0, serial) + sum(longest_run(tasks, threads) for tasks in self.loops)


def longest_run(tasks: list[int], threads: int) -> int:
    """The time of the thread that is last: the tasks are divided as ``at::parallel_for`` divides them."""
    size = -(-len(tasks) // min(threads, len(tasks))) if tasks else 1
    return max((sum(tasks[i : i + size]) for i in range(0, len(tasks), size)), default=0)


def cases() -> dict[str, Callable[[], object]]:
    """Calls of the operators at training sizes, of two images only: where many cores find little to do."""
    torch.manual_seed(0)
    layers, batch, queries, classes, targets = 6, 2, 100, 150, 20
    logits = torch.randn(layers, batch, queries, 128, 128)
    class_logits = torch.randn(layers, batch, queries, classes + 1)
    segments = torch.arange(512 * 512).reshape(1, 512, 512).repeat(batch, 1, 1) // (512 * 512 // targets)
    labels = [torch.randint(classes, (targets,)) for _ in range(batch)]
    truth = fastmask.Targets.from_segments(segments.clamp(max=targets - 1).to(torch.uint8), labels)
    points, of_pairs = torch.rand(batch, 12544, 2), torch.rand(layers, batch, targets, 12544, 2)
    assignment = torch.stack([torch.randperm(queries)[:targets] for _ in range(layers * batch)])
    assignment = assignment.reshape(layers, batch, targets)
    leaf = logits.clone().requires_grad_()
    bce = fastmask.MaskTerm("bce")

    def train(loss: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], object]:
        return lambda: sum(part.sum() for part in loss()).backward()

    heads, dim = 8, 256
    q, k, v = (torch.randn(batch, n, dim, requires_grad=True) for n in (queries, 4096, 4096))
    masks = torch.randn(batch, queries, 128, 128)
    attend = {"grid": (64, 64), "num_heads": heads}
    functional = fastmask.functional
    return {
        "mask_cost": lambda: functional.mask_cost(class_logits, logits, truth),
        "mask_cost at points": lambda: functional.mask_cost(class_logits, logits, truth, points, term=bce),
        "mask_loss, with gradients": train(lambda: functional.mask_loss(leaf, truth, assignment)),
        "mask_loss at points, with gradients": train(
            lambda: functional.mask_loss(leaf, truth, assignment, of_pairs, term=bce)
        ),
        "masked_attention, with gradients": train(lambda: (functional.masked_attention(q, k, v, masks, **attend),)),
        "semantic_inference": lambda: functional.semantic_inference(class_logits[0], logits[0], (512, 512)),
    }


def measure(call: Callable[[], object], file: Path, threads: int) -> list[Call]:
    """Some calls of an operator that divides its work for so many threads."""
    os.environ[COUNT] = str(threads)
    call()
    calls = []
    for _ in range(ROUNDS):
        file.write_text("")
        start = time.perf_counter_ns()
        call()
        total = time.perf_counter_ns() - start
        calls.append(Call(total, [[int(t) for t in line.split()] for line in file.read_text().splitlines()]))
    return calls


def main() -> None:
    """Prints a table: the speedup over one thread on each number of threads."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times"
        os.environ[TIMES] = str(file)
        rows = [("operator", *(f"{n} threads" for n in THREADS))]
        for name, call in cases().items():
            one = statistics.median(call.total for call in measure(call, file, 1))
            if not file.read_text():
                sys.exit("this build of fastmask does not write the times of its tasks: run `make threads`")
            times = [statistics.median(found.on(n) for found in measure(call, file, n)) for n in THREADS]
            rows.append((name, *(f"{one / reckoned:.1f}x" for reckoned in times)))
    print(aligned(rows))


if __name__ == "__main__":
    main()
