"""Every Triton kernel compiles for GPUs of all generations, and fits them, at the sizes of training.

``make triton-matrix`` runs this file under each version of Triton that is supported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.triton_compiler import (
    NO_POWERS_OF_TWO,
    OPERATORS,
    SHARED_MEMORY,
    TRAINING,
    assembly,
    call,
    kernels_of,
    misfits,
)

SPILLED = 32  # bytes of a thread, at most, in forms that are seldom used: benchmarks/NOTES.md lists them
KERNEL_FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))


def slow_but(first: Any, others: Iterable[Any]) -> list[Any]:
    """Parameters of which the first alone is not slow: where Triton has cached nothing, a kernel takes seconds."""
    return [first, *(pytest.param(*each, marks=pytest.mark.slow) for each in others)]


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_training_sizes_fit_every_generation(operator, capability, elsewhere):
    assert elsewhere(misfits, [call(operator, TRAINING, torch.bfloat16, "segments")], capability) == {}


# Configurations are chosen by generation; the widest heads need the most of what GPUs of the general one differ in.
@pytest.mark.parametrize("dropout_p", slow_but(0.1, [(0.0,)]))
@pytest.mark.parametrize(
    ("capability", "head_dim"),
    slow_but(
        (80, 64),
        [
            *((80, d) for d in (16, 32, 128)),
            *((c, d) for c in (90, 100) for d in (16, 32, 64, 128)),
            *((c, 128) for c in (86, 89, 120)),
        ],
    ),
)
def test_attention_heads_fit_every_generation(capability, head_dim, dropout_p, elsewhere):
    """More queries than a block holds come in turns, with a kernel for the later ones."""
    calls = [
        call(
            "masked_attention", (1, 16, queries, 1, 1, *TRAINING[5:]), torch.bfloat16, "segments",
            head_dim=head_dim, images=16, most_queries=queries, dropout_p=dropout_p,
        )
        for queries in ((100, 300) if dropout_p == 0.0 else (100,))
    ]  # fmt: skip
    assert elsewhere(misfits, calls, capability) == {}


@pytest.mark.parametrize(
    ("capability", "head_dim"),
    slow_but((120, 32), [(80, 16), (80, 128), (90, 32), (90, 64), (120, 16), (120, 128)]),
)
def test_attention_in_float32_fits_every_generation(capability, head_dim, elsewhere):
    attention = call(
        "masked_attention", (1, 16, 100, 1, 1, *TRAINING[5:]), torch.float32, "segments",
        head_dim=head_dim, images=16, dropout_p=0.1,
    )  # fmt: skip
    assert elsewhere(misfits, [attention], capability, SPILLED) == {}


@pytest.mark.parametrize(
    ("head_dim", "form"), slow_but((32, "masks"), [(16, "masks"), (32, "segments"), (64, "masks"), (128, "masks")])
)
def test_attention_in_float32_multiplies_float32(head_dim, form, elsewhere):
    """For keys with padding and 64 queries, Triton 3.6 takes the tensor cores of sm_100, which read tf32."""
    attention = call("masked_attention", (1, 16, 100, 1, 1, *TRAINING[5:]), torch.float32, form, head_dim=head_dim)
    for kernel, ptx in elsewhere(assembly, attention, 100):
        assert "tf32" not in ptx, kernel


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "form", "options"),
    [(torch.float32, "masks", {"mask_term": "bce"}), (torch.float16, "masks", {"gamma": 1.5})],
)
def test_other_forms(operator, dtype, form, options, elsewhere):
    assert elsewhere(misfits, [call(operator, NO_POWERS_OF_TWO, dtype, form, **options)], 90, SPILLED) == {}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 1, 1, 1, 1, 1), (1, 2, 9, 5, 100, 40, 50, 90, 99)])
def test_sizes_of_one_and_many_targets(operator, shape, elsewhere):
    assert elsewhere(misfits, [call(operator, shape, torch.float32, "masks")], 80, SPILLED) == {}


@pytest.mark.slow
def test_targets_of_ten_times_the_logits_size(elsewhere):
    """A cell's outputs come in more than one chunk."""
    loss = call("mask_loss", (6, 16, 100, 151, 20, 100, 100, 1000, 1000), torch.bfloat16, "segments")
    assert elsewhere(misfits, [loss], 90, SPILLED) == {}


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(
    ("operator", "shape", "dtype", "form"),
    [
        ("mask_cost", (6, 2, 100, 20, 19, 128, 256, 512, 1024), torch.float32, "segments"),  # Cityscapes
        ("mask_cost", (6, 2, 100, 9, 7, 128, 128, 512, 512), torch.float32, "masks"),
        ("point_mask_cost", NO_POWERS_OF_TWO, torch.float32, "masks"),
        ("point_mask_loss", TRAINING, torch.bfloat16, "segments"),
        ("semantic_inference", TRAINING, torch.bfloat16, "segments"),
        ("semantic_inference", TRAINING, torch.bfloat16, "masks"),
        ("semantic_inference", TRAINING, torch.float32, "masks"),
        ("masked_attention", NO_POWERS_OF_TWO, torch.float32, "masks"),
    ],
)
def test_forms_that_broke(operator, shape, dtype, form, capability, elsewhere):
    """Under one version of Triton or another."""
    assert elsewhere(misfits, [call(operator, shape, dtype, form)], capability, SPILLED) == {}


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_constants_are_normal_float32(path):
    """Of other ones Triton makes float64, up to 3.6 without turning results back: slow, or no kernel at all."""
    numbers = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    limits = torch.finfo(torch.float32)
    wrong = [x for x in numbers if isinstance(x, float) and x != 0 and not limits.tiny <= abs(x) <= limits.max]
    assert wrong == []


@pytest.mark.parametrize(
    ("operator", "kernels"),
    [
        ("mask_cost", {"_mask_cost_fwd_kernel"}),
        ("mask_loss", {"_mask_loss_bwd_kernel"}),
        ("semantic_inference", {"_stage_kernel", "_semantic_fwd_kernel"}),
        ("panoptic_inference", {"_nan_count_kernel"}),
        ("masked_attention", {"_masked_attention_fwd_kernel", "_masked_attention_bwd_kernel"}),
    ],
)
def test_16_bytes_are_read_at_a_time(operator, kernels, elsewhere):
    """No size is known to the compiler, but that planes and rows are aligned is."""
    for kernel, ptx in elsewhere(assembly, call(operator, TRAINING, torch.bfloat16, "segments"), 80):
        if kernel in kernels:
            assert re.search(r"ld\.global\.(v4\.b32|v2\.b64)|cp\.async\.cg.*, 0x10", ptx), kernel


@pytest.mark.parametrize("width", [512, 511])
def test_masks_are_stored_8_bytes_at_a_time(width, elsewhere):
    instance = call("instance_inference", (*TRAINING[:8], width), torch.bfloat16, "segments")
    main = dict(elsewhere(assembly, instance, 90))["_instance_fwd_kernel"]
    assert re.search(r"st\.global\.(v2\.b32|b64|v8\.b8|v4\.b16)", main)


@pytest.mark.slow
def test_image_sizes_compile_few_kernels(elsewhere):
    """What depends on the size are the width of instances' blocks, whether logits can be read 16 bytes at a time, and
    whether fours of rows of a label map lie between the same two rows of logits."""
    sizes = torch.randint(200, 641, (300, 2), generator=torch.Generator().manual_seed(0)).tolist()
    calls = [
        call(operator, (1, 1, 100, 134, 1, -(-height // 4), -(-width // 4), height, width), torch.bfloat16, "segments")
        for height, width in sizes
        for operator in ("semantic_inference", "panoptic_inference", "instance_inference")
    ]
    found, _ = elsewhere(kernels_of, calls)
    assert len(found) <= 14, sorted(name for name, *_ in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator", ["mask_cost", "mask_loss", "point_mask_cost", "point_mask_loss", "uncertain_points"]
)
@pytest.mark.parametrize("form", ["segments", "masks"])
def test_numbers_of_targets_compile_a_kernel_for_each_block(operator, form, elsewhere):
    shapes = [(*TRAINING[:4], targets, *TRAINING[5:]) for targets in range(1, 61)]
    found, blocks = elsewhere(kernels_of, [call(operator, shape, torch.bfloat16, form) for shape in shapes])
    assert len(found) == len(blocks)
    assert all(block in (None, 16, 32, 64) for _, block in blocks)


@pytest.mark.parametrize("operator", OPERATORS)
def test_sizes_are_no_constants(operator, elsewhere):
    """A new image size or number of images compiles nothing, as long as block shapes stay the same powers of two, and
    logits, of attended keys those of eight keys, can be read 16 bytes at a time."""
    other = (6, 1, 200, 134, 31, 64, 112, 256, 448)
    kinds = [elsewhere(kernels_of, [call(operator, shape, torch.bfloat16, "segments")]) for shape in (TRAINING, other)]
    assert kinds[0] == kinds[1]
