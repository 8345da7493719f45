"""The matching cost and the mask loss, at all pixels and at points, for the battery of operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmask import MaskTerm, Targets, mask_cost, mask_loss
from fastmask.ops._targets import target_arguments
from fastmask.testing import GpuError
from tests.helpers import gpu_errors
from tests.helpers.inputs import (
    SHAPES,
    half_void,
    random_assignment,
    random_logits,
    random_points,
    random_targets,
    without_labels,
)
from tests.helpers.op_info import Arguments, Case, OpInfo, Refused, changed

FORMS = ("segments", "masks", "masks+valid")
# Of focal powers kernels know the square, and any by an exponential.
TERMS = (MaskTerm("bce"), MaskTerm(gamma=2.0), MaskTerm(gamma=0.0), MaskTerm(gamma=1.5), MaskTerm(alpha=0.0),
         MaskTerm(alpha=1.0))  # fmt: skip
TERMS_OF_TRITON = (MaskTerm("bce"), MaskTerm(), MaskTerm(alpha=1.0, gamma=0.0), MaskTerm(alpha=0.0, gamma=1.5))
Shape = tuple[int, ...]
SMALL: Shape = (1, 2, 5, 3, 4, 7, 11, 30, 41)
SMALLER: Shape = (1, 2, 3, 3, 2, 4, 6, 7, 11)
# Rows of logits that are read 16 bytes at a time, and targets that they divide.
EVEN: Shape = (1, 1, 4, 3, 2, 8, 12, 32, 48)
# A program of the loss handles one row of targets, and many logits.
LOSS_SHAPES = {name: SHAPES[name] for name in (
    "one of everything", "one dimension, h = 1", "targets smaller than logits", "no targets"
)} | {
    "one logit, many pixels": (1, 1, 3, 2, 2, 1, 1, 4, 13),
    "four outputs a logit": (1, 1, 4, 3, 2, 3, 8, 12, 32),
    "no ratio": (2, 1, 4, 3, 2, 5, 7, 9, 19),
    "targets at the logits' size": (1, 1, 3, 2, 2, 9, 14, 9, 14),
    "more outputs of a logit than one step": (1, 1, 2, 2, 1, 2, 2, 5, 37),
    "many logits of an output": (1, 1, 2, 2, 1, 23, 34, 3, 5),
    "more targets than queries": (1, 2, 2, 3, 5, 3, 4, 5, 9),
}  # fmt: skip
POINT_SHAPES = {
    "small": SMALLER,
    "one of everything": SHAPES["one of everything"],
    "two layers, odd sizes": (2, 1, 4, 3, 2, 5, 7, 9, 19),
    "no targets": SHAPES["no targets"],
    "more targets than queries": (1, 2, 2, 3, 5, 3, 4, 5, 9),
}


@dataclass(frozen=True)
class Inputs:
    """A case: arguments of all four operators are drawn in the same order; each takes its own."""

    names: tuple[str, ...]
    shape: Shape
    form: str
    term: MaskTerm
    points: int = 0
    dtype: torch.dtype = torch.uint8  # of segments
    scale: float = 4.0
    change: Callable[[Arguments], Arguments] = dict

    def __call__(self, generator: torch.Generator) -> Arguments:
        targets = random_targets(self.shape, generator, self.form, dtype=self.dtype)
        class_logits, mask_logits = random_logits(self.shape, generator, self.scale)
        assignment = random_assignment(self.shape, targets, generator)
        points = None
        if self.points:
            leading = assignment.shape if "assignment" in self.names else self.shape[1:2]
            points = random_points(generator, *leading, self.points)
        drawn = {
            "class_logits": class_logits * max(1.0, min(self.scale, 200.0) / 4), "mask_logits": mask_logits,
            "targets": targets, "assignment": assignment, "points": points, "term": self.term,
        }  # fmt: skip
        return self.change({name: drawn[name] for name in (*self.names, "points", "term")})


def all_void(arguments: Arguments) -> Arguments:
    """Over NaN. Points stay clear of the border: what lies beyond the map is no void."""
    of, points = arguments["targets"], arguments["points"]
    segments = torch.full_like(of.segments, of.void)
    return arguments | {
        "targets": Targets(of.labels, of.counts, segments=segments, void=of.void),
        "mask_logits": torch.full_like(arguments["mask_logits"], torch.nan),
        "points": None if points is None else 0.2 + 0.6 * points,
    }


def void_over_nan(arguments: Arguments) -> Arguments:
    targets, mask_logits = half_void(arguments["targets"], arguments["mask_logits"])
    return arguments | {"targets": targets, "mask_logits": mask_logits}


def large_regions(arguments: Arguments) -> Arguments:
    """Squares of 32 pixels, so that whole blocks of pixels have none of a target."""
    of = arguments["targets"]

    def coarse(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., ::32, ::32].repeat_interleave(32, -1).repeat_interleave(32, -2)

    return arguments | {"targets": replace(of, masks=coarse(of.masks), segments=coarse(of.segments))}


def padding_alone(arguments: Arguments) -> Arguments:
    without = {"targets": without_labels(arguments["targets"])}
    if "assignment" in arguments:
        without["assignment"] = torch.full_like(arguments["assignment"], -1)
    return arguments | without


def matched_twice(arguments: Arguments) -> Arguments:
    """One query has all targets."""
    if "assignment" not in arguments:
        return arguments
    assignment = torch.where(arguments["targets"].labels >= 0, 2, -1).expand_as(arguments["assignment"])
    return arguments | {"assignment": assignment}


def points_anywhere(arguments: Arguments) -> Arguments:
    """Beyond the map, where all is background."""
    away = torch.tensor([[-0.5, 0.5], [2.0, 0.1], [0.3, -7.0], [1e30, 0.2], [-1e30, 1e30], [0.5, 1.5]])
    return arguments | {"points": away.expand(*arguments["points"].shape[:-2], -1, -1).contiguous()}


def cases(names: tuple[str, ...], points: int) -> dict[str, Case]:
    """For kernels that take no time: each form of targets at each shape, with and without void."""
    term = partial(MaskTerm, "bce" if points else "focal")
    make = partial(Inputs, names, points=points)
    odd = SHAPES["odd sizes"]
    found: dict[str, Case] = {
        f"{name}, {form}{', void left out' if void else ''}": make(shape, form, term(ignore_void=void))
        for name, shape in SHAPES.items()
        for form in FORMS
        for void in (False, True)
    }
    found |= {str(each): make(odd, "segments", each) for each in TERMS}
    found |= {f"logits of {scale}": make(odd, "masks", term(), scale=scale) for scale in (120.0, 800.0)}
    for dtype in (torch.int16, torch.int32):
        wide = (1, 2, 310, 4, 300, 6, 6, 30, 30)
        found[f"segments of {dtype}"] = make(wide, "segments", term(ignore_void=True), dtype=dtype)
    usual = SHAPES["usual"]
    found["all void"] = make(usual, "segments", term(ignore_void=True), change=all_void)
    found["padding alone"] = make(usual, "segments", term(), change=padding_alone)
    found["one query for all"] = make(usual, "segments", term(), change=matched_twice)
    for form in ("segments", "masks"):
        found[f"large regions, {form}"] = make(usual, form, term(), change=large_regions)
    if points:
        for number in (1, 17, 31, 12544):
            found[f"{number} points"] = make(odd, "segments", term(), points=number)
        for size in ((1, 1), (1, 2), (3, 1), (2, 2)):  # reads of four bytes must not go beyond
            for form in FORMS:
                few = (1, 1, 3, 2, 2, 4, 5, *size)
                found[f"targets of {size}, {form}"] = make(few, form, term(ignore_void=True))
        found["points beyond the map"] = make(usual, "segments", term(), points=6, change=points_anywhere)
    return found


def triton_cases(names: tuple[str, ...], points: int, shapes: dict[str, Shape], small: Shape) -> dict[str, Case]:
    """Each branch of the kernels once: a form of targets, with void or without, at each shape in turn."""
    term = partial(MaskTerm, "bce" if points else "focal")
    make = partial(Inputs, names, points=points)
    turns = [(form, void) for void in (False, True) for form in FORMS]
    found: dict[str, Case] = {"two layers": make((2, *small[1:]), "segments", term())}
    found |= {f"{form}{', void left out' if void else ''}": make(small, form, term(ignore_void=void))
              for form, void in turns}  # fmt: skip
    for i, (name, shape) in enumerate(shapes.items()):
        form, void = turns[i % len(turns)]
        found[f"{name}, {form}"] = make(shape, form, term(ignore_void=void))
    found |= {str(each): make(small, "segments", each) for each in TERMS_OF_TRITON if each != term()}
    found |= {f"logits of {scale}": make(small, "masks", term(), scale=scale) for scale in (120.0, 4e6)}
    for dtype in (torch.int16, torch.int32):
        wide = (1, 1, 3, 4, 300 if dtype == torch.int16 else 40, 3, 4, 6, 9)
        found[f"segments of {dtype}"] = make(wide, "segments", term(ignore_void=True), dtype=dtype)
    if not points:
        found["void over NaN"] = make(EVEN, "segments", term(ignore_void=True), change=void_over_nan)
    found["all void"] = make(small, "segments", term(ignore_void=True), change=all_void)
    found["padding alone"] = make(small, "segments", term(), change=padding_alone)
    if "assignment" in names:
        found["one query for all"] = make(small, "segments", term(), change=matched_twice)
    elif not points:
        for number in (15, 16, 64, 140):  # a bit of a word marks pixels that count: blocks hold a power of two less one
            found[f"{number} targets"] = make(
                (1, 2, 5, 3, number, 9, 12, 20, 23), "masks+valid", term(ignore_void=True)
            )
    return found


TYPICAL = (
    "odd sizes, segments, void left out",
    "odd sizes, masks+valid, void left out",
    "usual, segments",
    "two layers",
    "masks+valid, void left out",
)


def corrupt_cost(arguments: Arguments) -> dict[str, Tensor]:
    """NaN in the logits of one query, and in the class logits of another, of an image that has all targets."""
    shape = arguments["mask_logits"].shape
    arguments["mask_logits"][0, -1, 0] = arguments["class_logits"][-1, -1, 1, 0] = torch.nan
    touched = torch.zeros(*shape[:3], arguments["targets"].num_targets, dtype=torch.bool)
    touched[0, -1, 0] = touched[-1, -1, 1] = True
    return {"cost": touched}


def corrupt_loss(arguments: Arguments) -> dict[str, Tensor]:
    """NaN in the logits of a matched query, and of one without a target, if there is one."""
    assignment, logits = arguments["assignment"], arguments["mask_logits"]
    query = int(assignment[0, -1, 0])
    others = [n for n in range(logits.shape[2]) if n not in assignment[-1, -1]]
    logits[0, -1, query] = torch.nan
    if others and len(logits) > 1:
        logits[-1, -1, others[0]] = torch.nan
    pair, row = torch.zeros(assignment.shape, dtype=torch.bool), torch.zeros(logits.shape, dtype=torch.bool)
    pair[0, -1, 0] = row[0, -1, query] = True
    return {"loss_mask": pair, "loss_dice": pair, "gradient of mask_logits": row}


def logits_changed(change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Arguments]:
    """All logits, and the assignment if there is one."""
    names = ("class_logits", "mask_logits", "assignment")
    return lambda arguments: arguments | {name: change(x) for name, x in arguments.items() if name in names}


REFUSED: dict[str, Refused] = {
    "integer logits": (changed("mask_logits", Tensor.int), TypeError, "mask_logits must be floating point"),
    "too few dimensions": (changed("mask_logits", lambda x: x[0, 0, 0]), ValueError, "mask_logits has shape"),
    "no pixels": (changed("mask_logits", lambda x: x[..., :0]), ValueError, "at least one pixel"),
    "another batch": (logits_changed(lambda x: x[:, :1]), ValueError, r"targets has \d images"),
    "targets as a list": (changed("targets", lambda x: [x]), TypeError, "targets must be a fastmask.Targets"),
    "no term": (changed("term", lambda _: "bce"), TypeError, "term must be a fastmask.MaskTerm, got str"),
    "unknown backend": (lambda a: a | {"backend": "cpu"}, ValueError, "backend must be one of"),
    "float64 for kernels": (
        lambda a: logits_changed(lambda x: x.double() if x.is_floating_point() else x)(a) | {"backend": "native"},
        RuntimeError,
        "float64",
    ),
}
REFUSED_COSTS: dict[str, Refused] = REFUSED | {
    "queries differ": (changed("class_logits", lambda x: x[:, :, :3]), ValueError, r"equal \(..., B, N\)"),
    "label beyond the classes": (changed("class_logits", lambda x: x[..., :2]), ValueError, "targets.labels holds"),
    "only no-object": (changed("class_logits", lambda x: x[..., :1]), ValueError, "at least one class"),
}
REFUSED_LOSSES: dict[str, Refused] = REFUSED | {
    "float assignment": (changed("assignment", Tensor.float), TypeError, "assignment must have dtype int64"),
    "another number of targets": (changed("assignment", lambda x: x[..., :2]), ValueError, "assignment has shape"),
    "query beyond N": (changed("assignment", lambda x: x + 20), ValueError, "assignment holds"),
    "query below -1": (changed("assignment", lambda x: x - 2), ValueError, "assignment holds"),
    "unknown reduction": (lambda a: a | {"reduction": "mean"}, ValueError, "reduction must be one of"),
}
REFUSED_POINTS: dict[str, Refused] = {
    "points of one image or target": (changed("points", lambda x: x[:, 0]), ValueError, "points has shape"),
    "points of others": (changed("points", lambda x: x.narrow(-3, 0, 1)), ValueError, "points has shape"),
    "points in four dimensions": (changed("points", lambda x: torch.cat([x, x], -1)), ValueError, "points has shape"),
    "no points": (changed("points", lambda x: x[..., :0, :]), ValueError, "at least one point"),
    "points of integers": (changed("points", Tensor.long), TypeError, "points must be float32 or float64"),
    "points of half precision": (changed("points", Tensor.half), TypeError, "points must be float32"),
    "points in a list": (changed("points", Tensor.tolist), TypeError, "points must be a tensor"),
}


def operands(arguments: Arguments, *last: Any) -> tuple[Any, ...]:
    given = dict(arguments)
    term, points = given.pop("term"), given.pop("points")
    targets = target_arguments(given.pop("targets"), term.ignore_void)
    at = () if points is None else (points,)
    return (*given.values(), *targets, *at, *last, term.kind, term.alpha, term.gamma)


def cost(weights: tuple[float, float, float], points: int) -> OpInfo:
    names = ("class_logits", "mask_logits", "targets")
    options = dict(zip(("cost_class", "cost_mask", "cost_dice"), weights, strict=True))
    shapes = POINT_SHAPES if points else SHAPES
    return OpInfo(
        name="mask_cost at points" if points else "mask_cost",
        operator="point_mask_cost" if points else "mask_cost",
        function=lambda **arguments: mask_cost(**options | arguments),
        outputs=("cost",),
        logits=names[:2],
        cases=cases(names, points),
        triton=triton_cases(names, points and 70, shapes, SMALLER if points else SMALL),
        typical=TYPICAL,
        corrupt=corrupt_cost,
        refused=REFUSED_COSTS | (REFUSED_POINTS if points else {}),
        operands=lambda arguments: operands(arguments, *weights),
        gpu_error=lambda arguments, _: (gpu_errors.mask_cost(*weights, arguments["term"].gamma),),
    )


def loss(points: int) -> OpInfo:
    names = ("mask_logits", "targets", "assignment")

    def gpu_error(arguments: Arguments, _: torch.dtype) -> tuple[GpuError, ...]:
        return gpu_errors.mask_loss(arguments["term"].gamma)

    return OpInfo(
        name="mask_loss at points" if points else "mask_loss",
        operator="point_mask_loss" if points else "mask_loss",
        function=lambda **arguments: mask_loss(**{"reduction": "none"} | arguments),
        outputs=("loss_mask", "loss_dice"),
        logits=names[:1],
        cases=cases(names, points),
        triton=triton_cases(names, points and 70, POINT_SHAPES if points else LOSS_SHAPES, SMALLER),
        typical=TYPICAL,
        corrupt=corrupt_loss,
        refused=REFUSED_LOSSES | (REFUSED_POINTS if points else {}),
        operands=lambda arguments: operands(
            {name: arguments[name] for name in ("mask_logits", "assignment", "targets", "points", "term")}
        ),
        gpu_error=gpu_error,
        differentiable=names[:1],
        options=(True,),
        backward_operands=lambda outputs: (torch.ones_like(outputs[0]), torch.ones_like(outputs[1]), *outputs[2:]),
    )


MASK_OPERATORS = (cost((1.0, 20.0, 1.0), 0), cost((2.0, 5.0, 5.0), 400), loss(0), loss(300))
