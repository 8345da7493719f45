"""On a GPU: the Triton kernels of masked_attention, at the sizes of training and at odd ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness.graphs import capture
from fastmask import masked_attention
from fastmask.ops.masked_attention import MASKED_ATTENTION
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers.attention_operator import SHAPES, output_and_gradients, random_inputs
from tests.helpers.host_syncs import host_syncs
from tests.helpers.op_info import LAYOUTS

pytestmark = pytest.mark.cuda

NAMES = ("out", "grad_q", "grad_k", "grad_v")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Those of the CPU's tests, and a training step's; what is larger than a program's queries, a split or 32 blocks.
GPU_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "wider than the GPU's"} | {
    "training": (2, 100, 8, 32, (64, 64), (128, 128)),
    "many queries": (1, 1000, 2, 32, (31, 33), (64, 64)),
    "heads of 64": (2, 100, 4, 64, (32, 32), (64, 64)),
    "heads of 80": (2, 100, 2, 80, (20, 33), (64, 64)),
    "heads of 128, many queries": (1, 300, 2, 128, (24, 24), (64, 64)),
    "many splits": (1, 100, 1, 32, (128, 128), (128, 128)),
    "no splits": (40, 20, 8, 16, (50, 90), (30, 30)),
}


def cuda_inputs(shape, generator, dtype=torch.float32, *, padding=False):
    q, k, v, mask_logits, options = random_inputs(shape, generator, padding=padding)
    if options["key_padding_mask"] is not None:
        options["key_padding_mask"] = options["key_padding_mask"].cuda()
    return *(x.to("cuda", dtype) for x in (q, k, v)), clear(mask_logits, options["grid"]).cuda(), options


def clear(mask_logits, grid):
    """Logits that resampling leaves further from 0 than rounding, which differs between CPU and GPU."""
    while mask_logits.numel() > 0:
        resampled = F.interpolate(mask_logits.double(), size=grid, mode="bilinear", align_corners=False)
        unclear = (resampled.abs() < 1e-4).flatten(2).any(-1)
        if not unclear.any():
            break
        mask_logits[unclear] += 1e-3
    return mask_logits


def gpu_errors_of(q, k, options):
    head_dim = q.shape[-1] // options["num_heads"]
    return gpu_errors.masked_attention(k.shape[1], head_dim, tensor_cores=q.dtype != torch.float32)


def triton_results(q, k, v, mask_logits, grad_out, **options):
    return output_and_gradients(q, k, v, mask_logits, grad_out, backend="triton", **options)


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "no masks"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_equals_the_reference(shape, dtype, padding, masked, generator):
    *inputs, options = cuda_inputs(shape, generator, dtype, padding=padding)
    if not masked:
        inputs[3] = None
    run = (*inputs, torch.randn(inputs[0].shape, generator=generator).to("cuda", dtype))
    exact = output_and_gradients(*run, torch.float64, backend="reference", **options)
    same_dtype = output_and_gradients(*run, torch.float32, backend="reference", **options)
    actual = triton_results(*run, **options)
    for name, *results, gpu in zip(NAMES, actual, same_dtype, exact, gpu_errors_of(*run[:2], options), strict=True):
        assert results[0].dtype == dtype
        assert_within_budget(*results, name=name, gpu=gpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [16, 32, 64])
def test_equals_scaled_dot_product_attention_with_the_dense_mask(side, dtype, generator):
    shape = (4, 100, 8, 32, (side, side), (128, 128))
    q, k, v, mask_logits, options = cuda_inputs(shape, generator, dtype)
    excluded = F.interpolate(mask_logits, size=(side, side), mode="bilinear", align_corners=False).flatten(2) < 0
    attended = ~(excluded & ~excluded.all(-1, keepdim=True))[:, None]
    grad_out = torch.randn_like(q)

    def sdpa(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        heads = (x.unflatten(-1, (8, 32)).transpose(1, 2) for x in leaves)
        out = F.scaled_dot_product_attention(*heads, attn_mask=attended).transpose(1, 2).flatten(2)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))

    actual = triton_results(q, k, v, mask_logits, grad_out, **options)
    gpu = gpu_errors_of(q, k, options)
    for name, *results, error in zip(NAMES, actual, sdpa(dtype), sdpa(torch.float64), gpu, strict=True):
        assert_within_budget(*results, name=name, gpu=error)


@pytest.mark.parametrize(("seed", "p"), [(0, 0.1), (2**63 - 5, 0.5), (-17, 0.9)])
def test_dropout_drops_what_the_cpu_drops(seed, p, generator):
    shape = (2, 100, 4, 32, (17, 19), (34, 38))
    q, k, v, mask_logits, options = cuda_inputs(shape, generator, padding=True)
    arguments = (mask_logits, options["key_padding_mask"], *options["grid"], 4, 0.2, p, torch.tensor([seed]).cuda())
    grad_out = torch.randn(q.shape, generator=generator)
    results = []
    for device, backend in (("cuda", "triton"), ("cpu", "native")):
        leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        out, _ = MASKED_ATTENTION(backend, *leaves, *there)
        gradients = torch.autograd.grad(out, leaves, grad_out.to(device))
        results.append([x.detach().cpu() for x in (out, *gradients)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_dropout_keeps_the_mean(p, generator):
    q, k, v, mask_logits, options = cuda_inputs((1, 20, 2, 32, (16, 16), (32, 32)), generator)
    expected = masked_attention(q, k, v, mask_logits, **options)
    samples = torch.stack([masked_attention(q, k, v, mask_logits, dropout_p=p, **options) for _ in range(1000)])
    error = (samples.mean(0) - expected).abs()
    assert (error <= 6 * samples.std(0) / 1000**0.5 + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["training", "many queries"])
def test_twenty_runs_give_the_same_bits_whatever_was_in_memory(shape, dtype, generator):
    *inputs, options = cuda_inputs(GPU_SHAPES[shape], generator, dtype, padding=True)
    grad_out = torch.randn_like(inputs[0])
    first = triton_results(*inputs, grad_out, **options)
    for _ in range(20):
        poison = [torch.full_like(x, torch.nan) for x in (*inputs, *inputs)]
        del poison  # back to the allocator, from which the next run takes its outputs
        again = triton_results(*inputs, grad_out, **options)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_padding_may_hold_anything_and_images_of_padding_alone_give_zero(generator):
    for dtype in DTYPES:
        q, k, v, mask_logits, options = cuda_inputs((2, 100, 8, 32, (20, 27), (40, 54)), generator, dtype, padding=True)
        padding = options["key_padding_mask"]
        padding[1] = True
        expected = triton_results(q, k, v, mask_logits, torch.ones_like(q), **options)
        k[padding], v[padding] = torch.nan, torch.inf
        actual = triton_results(q, k, v, mask_logits, torch.ones_like(q), **options)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
        assert all(x.isfinite().all() for x in actual)
        assert not actual[0][1].any()
        assert not actual[2][padding].any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_non_contiguous_inputs(layout, generator):
    *inputs, options = cuda_inputs(GPU_SHAPES["odd sizes"], generator, torch.bfloat16, padding=True)
    grad_out = torch.randn_like(inputs[0])
    expected = triton_results(*inputs, grad_out, **options)
    leaves = [layout(x).requires_grad_() for x in inputs[:3]]
    out = masked_attention(*leaves, inputs[3].mT.contiguous().mT, **options)
    actual = out.detach(), *torch.autograd.grad(out, leaves, layout(grad_out))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_nothing_waits_for_the_gpu(p, generator):
    *inputs, options = cuda_inputs(GPU_SHAPES["training"], generator, torch.bfloat16, padding=True)
    grad_out = torch.randn_like(inputs[0])
    triton_results(*inputs, grad_out, dropout_p=p, **options)  # compiles
    with host_syncs():
        triton_results(*inputs, grad_out, dropout_p=p, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["training", "many queries"])
def test_captured_in_a_graph(shape, dtype, generator):
    *inputs, options = cuda_inputs(GPU_SHAPES[shape], generator, dtype)
    grad_out = torch.randn_like(inputs[0])
    graph, captured = capture(lambda: triton_results(*inputs, grad_out, **options))
    *others, _ = cuda_inputs(GPU_SHAPES[shape], generator, dtype)
    for x, other in zip(inputs, others, strict=True):
        x.copy_(other)
    graph.replay()
    expected = triton_results(*others, grad_out, **options)
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiles_to_one_graph(p, generator):
    *inputs, options = cuda_inputs(GPU_SHAPES["odd sizes"], generator, padding=True)

    def attend(q, k, v):
        return masked_attention(q, k, v, inputs[3], dropout_p=p, **options).square()

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_nothing_of_the_masks_size_is_stored(generator):
    """Of N * S * heads = 105 million, one bit each would be 13 MB."""
    *inputs, options = cuda_inputs((4, 100, 8, 4, (181, 181), (16, 16)), generator, torch.bfloat16)
    grad_out = torch.randn_like(inputs[0])
    triton_results(*inputs, grad_out, **options)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    triton_results(*inputs, grad_out, **options)
    gradients = 2 * inputs[1].nbytes
    bits = 4 * 100 * 181 * 181 / 8
    assert torch.cuda.max_memory_allocated() - before < 1.5 * gradients + 1.5 * bits + 2**20
