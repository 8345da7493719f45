"""Random calls of every operator of the C++ extension, right ones and wrong ones, at each SIMD level.

A right call must succeed, leave its arguments as they are, and give the same bits again, also with more threads.
A wrong one, whose arguments no longer fit together, may succeed or raise; the process must survive both. Values are
checked by the operators' own tests; this finds what no one thought of, above all with the extension built for it:

    make sanitize

Each round of calls is drawn from a seed of its own, which a failure names; --first SEED --rounds 1 repeats it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmask
from fastmask import _native
from fastmask.ops._registry import EXTENSION
from fastmask.testing import simd_level, simd_levels

Arguments = tuple[Any, ...]
# Yields calls, each an operator's name and its arguments, and receives their results.
Calls = Generator[tuple[str, Arguments], tuple[Tensor, ...], None]

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRANGE_VALUES = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-42)


class Draw(random.Random):
    """Random numbers and tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def length(self, most: int) -> int:
        """1..most; often around what fills a vector of each SIMD level."""
        return min(self.choice([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, self.randint(1, most)]), most)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In low..high, both included; of int64."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values, often with other strides."""
        layout = self.choice(["contiguous", "contiguous", "permuted", "every other", "within"])
        if layout == "permuted":
            order = self.sample(range(x.dim()), x.dim())
            return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
        if layout == "every other" and x.dim() > 0:
            return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
        if layout == "within" and x.dim() > 0:
            return torch.cat([x.new_zeros(1, *x.shape[1:]), x])[1:]
        return x

    def logits(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = self.normal(*shape) * self.choice([0.1, 1, 5, 50, 1e4])
        if self.chance(0.3):
            x[self.uniform(*shape) < self.choice([0.01, 0.1, 0.9])] = self.choice(STRANGE_VALUES)
        return self.laid_out(x.to(dtype or self.choice(LOGIT_DTYPES)))

    def points(self, *shape: int) -> Tensor:
        points = self.uniform(*shape, 2) * self.choice([1.0, 1.0, 1.5, -1.0])
        if points.numel() > 0 and self.chance(0.2):
            points.view(-1)[0] = self.choice([math.nan, math.inf, -math.inf, 1e30])
        return self.laid_out(points)

    def targets(self, batch: int, most: int, classes: int) -> Arguments:
        """labels, masks, segments, valid, void_value, ignore_void"""
        height, width = self.length(70), self.length(70)
        labels = self.integers(0, classes - 1, batch, most)
        labels[torch.arange(most) >= self.integers(0, most, batch, 1)] = -1
        masks = segments = valid = None
        if self.chance(0.5):
            masks = self.laid_out(
                (self.uniform(batch, most, height, width) < 0.4).to(self.choice([torch.bool, torch.uint8]))
            )
        else:
            dtype = self.choice([torch.uint8, torch.int16, torch.int32])
            segments = self.integers(0 if dtype == torch.uint8 else -3, most + 2, batch, height, width).to(dtype)
            if self.chance(0.3):
                segments[self.uniform(batch, height, width) < 0.3] = (
                    255 if dtype == torch.uint8 else torch.iinfo(dtype).min
                )
            segments = self.laid_out(segments)
        if self.chance(0.4):
            valid = self.laid_out(self.uniform(batch, height, width) < 0.7)
        return labels, masks, segments, valid, self.choice([255, -1, 0, 3, 2**40, -(2**40)]), self.chance(0.5)

    def term(self) -> Arguments:
        """mask_term, alpha, gamma"""
        return self.choice(["focal", "bce"]), self.choice([0.25, 0.0, 1.0]), self.choice([2.0, 0.0, 1.5, 0.5])

    def geometry(self) -> tuple[tuple[int, int], Arguments]:
        """The size of the mask logits' grid; the last arguments of the operators of inference."""
        grid = self.length(40), self.length(40)
        padded = self.choice([None, (self.length(90), self.length(90)), grid])
        limit = padded or grid
        valid = self.choice([None, (self.randint(1, limit[0]), self.randint(1, limit[1]))])
        size = self.choice([(self.length(150), self.length(150)), valid or limit])
        top = self.choice([0, self.randint(0, size[0] - 1)])
        rows = self.choice([size[0] - top, self.randint(1, size[0] - top)])
        return grid, (grid, padded, valid, size, 0, top, rows)


def mask_cost(draw: Draw) -> Calls:
    layers, batch, queries, most, classes = (
        draw.length(3),
        draw.length(3),
        draw.randint(0, 20),
        draw.randint(0, 12),
        draw.length(20),
    )
    logits = (
        draw.logits(layers, batch, queries, classes),
        draw.logits(layers, batch, queries, draw.length(40), draw.length(40)),
    )
    targets, weights, term = draw.targets(batch, most, classes), (1.0, 20.0, 1.0), draw.term()
    yield "mask_cost", (*logits, *targets, *weights, *term)
    points = draw.points(batch, draw.choice([0, 1, 5, 130, 300]))
    yield "point_mask_cost", (*logits, *targets, points, *weights, *term)


def mask_loss(draw: Draw) -> Calls:
    layers, batch, queries, most = draw.length(3), draw.length(3), draw.randint(1, 20), draw.randint(0, 12)
    logits = draw.logits(layers, batch, queries, draw.length(40), draw.length(40))
    targets, term = draw.targets(batch, most, 5), draw.term()
    assignment = draw.integers(-1, queries - 1, layers, batch, most)
    for operator, points in (
        ("mask_loss", ()),
        ("point_mask_loss", (draw.points(layers, batch, most, draw.choice([0, 1, 5, 130, 300])),)),
    ):
        inputs = (logits, assignment, *targets, *points, *term)
        mask, dice, *kept = yield operator, (*inputs, draw.choice([False, True]))
        yield f"{operator}_backward", (draw.normal(*mask.shape), draw.normal(*dice.shape), *kept, *inputs)


def uncertain_points(draw: Draw) -> Calls:
    layers, batch, queries, most = draw.length(3), draw.length(3), draw.randint(1, 20), draw.randint(0, 5)
    logits = draw.logits(layers, batch, queries, draw.length(40), draw.length(40))
    points = draw.choice([0, 1, 7, 64])
    candidates = draw.randint(points, 3 * points + 1)
    assignment = draw.integers(-1, queries - 1, layers, batch, most)
    seed = torch.tensor([draw.getrandbits(62)])
    yield "uncertain_points", (logits, assignment, seed, points, candidates, draw.randint(0, min(points, candidates)))


def costs(draw: Draw) -> Tensor:
    shape = [draw.length(4) for _ in range(draw.randint(0, 3))] + [draw.randint(0, 45), draw.randint(0, 45)]
    cost = draw.normal(*shape).double() * draw.choice([1, 3, 1e-300, 1e300, 1e-30, 1e30])
    if draw.chance(0.4):
        cost = cost.round()
    if draw.chance(0.3):
        cost[draw.uniform(*shape) < draw.choice([0.02, 0.5])] = draw.choice(
            [math.nan, math.inf, -math.inf, 1e308, 5e-324]
        )
    return draw.laid_out(cost.to(draw.choice([torch.float64, *LOGIT_DTYPES])))


def assign(draw: Draw) -> Calls:
    cost = costs(draw)
    counts = draw.integers(0, cost.shape[-1], *cost.shape[:-2]) if draw.chance(0.5) else None
    yield "assign", (cost, counts)
    found = yield "assign_duals", (cost, counts)
    serial = yield "_assign_serial", (cost, counts, draw.randint(0, 9))
    assert same_bits(found, serial), "assign_duals and the same algorithm on one thread differ"


def semantic(draw: Draw) -> Calls:
    batch, queries, classes = draw.length(2), draw.randint(0, 30), draw.choice([1, 2, 6, 7, 19, 150, 300])
    grid, geometry = draw.geometry()
    probabilities = draw.normal(batch, queries, classes).softmax(-1)
    output = draw.choice(["labels", "scores"])
    options = draw.choice(["masks", "scores"]), output, output == "labels" and draw.chance(0.5)
    yield "semantic_inference", (draw.laid_out(probabilities), draw.logits(batch, queries, *grid), *options, *geometry)


def panoptic(draw: Draw) -> Calls:
    batch, queries = draw.length(2), draw.randint(0, 30)
    grid, geometry = draw.geometry()
    scores = draw.uniform(batch, queries) * (draw.uniform(batch, queries) < 0.6)
    options = draw.chance(0.5), draw.chance(0.5), draw.choice([0.0, 0.5, 0.8, 1.0])
    winner, *_ = yield "panoptic_winners", (scores, draw.logits(batch, queries, *grid), *options, *geometry)
    yield "relabel_winners", (winner, draw.integers(0, 9, batch, queries + 1).to(torch.int32))


def instance(draw: Draw) -> Calls:
    batch, queries = draw.length(2), draw.randint(1, 30)
    grid, geometry = draw.geometry()
    chosen = draw.integers(-1, queries - 1, batch, draw.randint(0, 10))
    for packed in (False, True):
        masks, *_ = yield "instance_masks", (draw.logits(batch, queries, *grid), chosen, packed, *geometry)
        size = (draw.length(70), draw.length(70)) if draw.chance(0.5) else None
        yield "rle_encode", (masks.flatten(0, 1), geometry[3][1], size)
        if not packed:
            yield "resize_masks", (masks.flatten(0, 1), (draw.length(70), draw.length(70)))


def attention(draw: Draw) -> Calls:
    batch, queries, heads, dim = draw.length(2), draw.choice([0, 1, 5, 33, 130, 140]), draw.length(3), draw.length(40)
    height, width = draw.length(12), draw.length(12)
    dtype = draw.choice(LOGIT_DTYPES)
    q = draw.logits(batch, queries, heads * dim, dtype=dtype)
    k, v = (draw.logits(batch, height * width, heads * dim, dtype=dtype) for _ in range(2))
    mask = draw.logits(batch, queries, draw.length(20), draw.length(20)) if draw.chance(0.7) else None
    padding = draw.uniform(batch, height * width) < 0.3 if draw.chance(0.5) else None
    options = height, width, heads, dim**-0.5, draw.choice([0.0, 0.0, 0.3, 1.0]), torch.tensor([draw.getrandbits(62)])
    out, logsumexp = yield "masked_attention", (q, k, v, mask, padding, *options)
    gradient = draw.normal(*out.shape).to(dtype)
    yield "masked_attention_backward", (gradient, out, logsumexp, q, k, v, mask, padding, *options)


def deformable(draw: Draw) -> Calls:
    batch, queries, heads, dim = draw.length(2), draw.choice([0, 1, 5, 33, 130, 140]), draw.length(3), draw.length(40)
    levels = [(draw.length(9), draw.length(9)) for _ in range(draw.randint(1, 4))]
    value = draw.logits(batch, sum(height * width for height, width in levels), heads, dim)
    leading = batch, queries, heads, len(levels), draw.length(9)
    weights = draw.logits(*leading, dtype=torch.float32)
    arguments = value, draw.points(*leading), weights, tuple(side for level in levels for side in level)
    out = yield "deformable_attention", arguments
    yield "deformable_attention_backward", (draw.normal(*out.shape).to(out.dtype), *arguments)


def linear_sum_assignment(draw: Draw) -> Calls:
    """The entry point for NumPy is no operator: it is called here."""
    problems = costs(draw).double()
    cost = np.asarray(problems[(0,) * (problems.dim() - 2)])
    try:
        rows, columns = fastmask.linear_sum_assignment(cost, maximize=draw.chance(0.5))
    except ValueError:
        assert not np.isfinite(cost).all(), "finite costs were refused"
    else:
        assert len(set(rows)) == len(set(columns)) == min(cost.shape)
    yield from ()


DRAWN = {
    drawn.__name__: drawn
    for drawn in (
        mask_cost, mask_loss, uncertain_points, assign, semantic, panoptic, instance, attention, deformable,
        linear_sum_assignment
    )
}  # fmt: skip


def spoiled(argument: Any, draw: Draw) -> Any:
    """Something else in an argument's place."""
    if isinstance(argument, Tensor):
        changes: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.to(draw.choice([torch.float64, torch.int64, torch.int8, torch.bool, torch.float16])),
            lambda x: x[None],
            lambda x: x.flatten(),
            lambda x: x.transpose(0, -1) if x.dim() else x,
        ]
        if argument.dim() > 0:
            axis = draw.randrange(argument.dim())
            size = argument.shape[axis]
            changes += [
                lambda x: x.narrow(axis, 0, draw.choice([0, max(size - 1, 0)])),
                lambda x: torch.cat([x, x], axis),
                lambda x: x.sum(axis).to(x.dtype),
            ]
        if argument.dtype == torch.int64 and argument.numel() > 0:
            index = draw.randrange(argument.numel())
            value = draw.choice([-(2**63), -2, 2**31, 2**62, 2**63 - 1])
            changes += [lambda x: x.flatten().index_fill(0, torch.tensor([index]), value).view(x.shape)] * 4
        return draw.choice(changes)(argument)
    if isinstance(argument, bool) or argument is None:
        return argument
    if isinstance(argument, int):
        return draw.choice([-(2**63), -1, 0, argument - 1, argument + 1, 2**62, 2**63 - 1])
    if isinstance(argument, float):
        return draw.choice([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300])
    if isinstance(argument, tuple):
        place = draw.randrange(len(argument))
        return (*argument[:place], spoiled(argument[place], draw), *argument[place + 1 :])
    return "nonsense"


def copies(arguments: Arguments) -> list[Tensor]:
    return [argument.clone() for argument in arguments if isinstance(argument, Tensor)]


def same_bits(left: Any, right: Any) -> bool:
    left, right = ((x,) if isinstance(x, Tensor) else x for x in (left, right))
    return all(torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30)) for a, b in zip(left, right, strict=True))


def check(name: str, arguments: Arguments, draw: Draw) -> Any:
    """Calls an operator as the module's docstring says, and returns its result."""
    operator = getattr(torch.ops.fastmask, name)
    if draw.chance(0.2):
        wrong = list(arguments)
        for _ in range(draw.choice([1, 1, 2])):
            place = draw.randrange(len(wrong))
            wrong[place] = spoiled(wrong[place], draw)
        with suppress(RuntimeError, TypeError, ValueError):
            operator(*wrong)
    before = copies(arguments)
    threads = torch.get_num_threads()
    result = operator(*arguments)
    torch.set_num_threads(draw.choice([threads, threads, threads + 1]))
    try:
        assert same_bits(result, operator(*arguments)), f"{name}: another result in a second call"
    finally:
        torch.set_num_threads(threads)
    assert same_bits(before, copies(arguments)), f"{name}: an argument has changed"
    return result


def run(seed: int, only: list[str] | None = None) -> str:
    """One round of calls; returns what was called."""
    draw = Draw(seed)
    name, level = draw.choice(only or list(DRAWN)), draw.choice(simd_levels())
    calls = DRAWN[name](draw)
    with simd_level(level):
        try:
            result = None
            while True:
                result = check(*calls.send(result), draw)
        except StopIteration:
            return f"{name} ({level})"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {name} at the level {level}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the first round")
    parser.add_argument("--rounds", type=int, default=10**9, help="at most so many")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", nargs="+", choices=DRAWN, help="what to call; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"fuzzing {EXTENSION}, compiler {_native.compiler}", flush=True)
    end, called, seed = time.monotonic() + options.seconds, Counter(), options.first
    while time.monotonic() < end and seed < options.first + options.rounds:
        if sys.stdout.isatty() or seed % 1000 == 0:  # where a crash is: --first finds its round
            print(f"\r{seed}", end="", flush=True)
        called[run(seed, options.only)] += 1
        seed += 1
    print(
        f"\r{seed - options.first} rounds passed:", *(f"{n} {name}" for name, n in sorted(called.items())), sep="\n  "
    )


if __name__ == "__main__":
    main()
