"""Masked attention on CPUs: what the battery of operators does not ask of every operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastmask import masked_attention, reference
from fastmask.measure import peak_memory
from fastmask.testing import assert_within_budget, simd_level, simd_levels
from tests.helpers.attention_operator import SHAPES, SMALL, check_attention, output_and_gradients, random_inputs
from tests.helpers.backends import kernels
from tests.helpers.op_info import HALVES, threads

BACKENDS = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
SHAPE = {"native": SHAPES["usual"], "triton": SMALL}


@pytest.mark.parametrize("shape", ["usual", "odd sizes", "one key", "several blocks of queries"])
def test_plain_cross_attention(shape, generator):
    q, k, v, _, options = random_inputs(SHAPES[shape], generator, padding=True)
    out = check_attention(q, k, v, None, **options)
    heads = options["num_heads"]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    attended = ~options["key_padding_mask"][:, None, None]
    rows = attended.any(-1).flatten()  # of PyTorch's, images without any key are NaN
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attended).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out[rows], expected[rows], rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_mask_logits_of_another_dtype(dtype, backend, generator):
    q, k, v, mask_logits, options = random_inputs(SHAPE[backend], generator)
    mask_logits = mask_logits.to(dtype)
    out = check_attention(q, k, v, mask_logits, backend, **options)
    assert torch.equal(out, masked_attention(q, k, v, mask_logits.float(), backend=backend, **options))


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("head_dim", [1, 3, 15, 16, 17, 31, 33, 64, 100])
def test_any_head_dimension(head_dim, level, generator):
    images = -(-128 // head_dim)  # as many elements at each width: of a few, chance decides whose error is the largest
    inputs = random_inputs((images, 11, 2, head_dim, (5, 9), (10, 18)), generator)
    with simd_level(level):
        check_attention(*inputs[:4], **inputs[4])


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize(
    ("grid", "size"),
    [
        *[((16, 16), (128, 128)), ((7, 9), (30, 20)), ((40, 70), (13, 21)), ((9, 9), (9, 9)), ((1, 1), (5, 4))],
        # Whole ratios of the widths, of even and odd widths, with the same heights and others:
        *[((8, 16), (16, 32)), ((9, 13), (18, 26)), ((5, 19), (20, 76)), ((6, 5), (48, 40)), ((3, 4), (48, 64))],
        *[((9, 20), (9, 40)), ((6, 16), (9, 16)), ((6, 21), (5, 21)), ((2, 11), (4, 33))],
    ],
)
def test_the_very_keys_are_attended_to(grid, size, level, generator):
    """With q = 0 all attended keys weigh the same; the values are the keys' numbers, one-hot. So the output shows the
    mask, which must be PyTorch's wherever the resampled logits exceed rounding."""
    keys = grid[0] * grid[1]
    mask_logits = torch.randn(1, 6, *size, generator=generator)
    mask_logits[0, 0] = -1
    v = torch.eye(keys)[None]
    with simd_level(level):
        out = masked_attention(torch.zeros(1, 6, keys), torch.zeros_like(v), v, mask_logits, grid=grid, num_heads=1)
    resampled = F.interpolate(mask_logits.double(), size=grid, mode="bilinear", align_corners=False).flatten(2)[0]
    expected = resampled >= 0
    expected[~expected.any(-1)] = True
    clear = resampled.abs() > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal((out[0] > 0)[clear], expected[clear])


def test_zero_is_foreground_and_nan_is_background():
    mask_logits = torch.tensor([[[[0.0, -0.0, -1.0, torch.nan]]], [[[torch.nan] * 4]], [[[1.0, -1.0, -3.0, 1.0]]]])
    v = torch.eye(4).expand(3, -1, -1).contiguous()
    zeros = torch.zeros(3, 1, 4), torch.zeros(3, 4, 4)
    out = masked_attention(*zeros, v, mask_logits, grid=(1, 4), num_heads=1)
    assert torch.equal(out[0, 0], torch.tensor([0.5, 0.5, 0, 0]))
    assert torch.equal(out[1, 0], torch.full((4,), 0.25))
    halved = masked_attention(*(x[2:, :2] for x in zeros), v[2:, :2], mask_logits[2:], grid=(1, 2), num_heads=1)
    assert torch.equal(halved[0, 0], torch.tensor([1.0, 0, 0, 0]))  # (1 - 1) / 2 is foreground, (-3 + 1) / 2 is not


@BACKENDS
def test_padding_may_hold_anything_and_images_of_padding_alone_give_zero(backend, generator):
    q, k, v, mask_logits, options = random_inputs(SHAPE[backend], generator, padding=True)
    padding = options["key_padding_mask"]
    padding[1] = True
    expected = check_attention(q, k, v, mask_logits, backend, **options)
    k[padding], v[padding] = torch.nan, torch.inf
    for masks in (mask_logits, None):
        out, grad_q, grad_k, grad_v = results = output_and_gradients(
            q, k, v, masks, torch.ones_like(q), backend=backend, **options
        )
        assert masks is None or torch.equal(out, expected)
        assert all(x.isfinite().all() for x in results)
        assert not any(x.any() for x in (out[1], grad_q[1], grad_k[padding], grad_v[padding]))


@BACKENDS
def test_large_scores_do_not_overflow(backend, generator):
    q, k, v, mask_logits, options = random_inputs(SHAPE[backend], generator)
    results = output_and_gradients(30 * q, 30 * k, v, mask_logits, torch.ones_like(q), backend=backend, **options)
    assert all(x.isfinite().all() for x in results)
    exact = masked_attention(30 * q.double(), 30 * k.double(), v.double(), mask_logits, **options)
    torch.testing.assert_close(results[0].double(), exact, rtol=0, atol=1e-3)


def philox(seed, counter):
    """The first number of Philox4x32-10 for the counters (n,) and one key, word by word as the paper writes it."""
    mask = np.uint64(0xFFFFFFFF)
    x = [counter & mask, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            second >> np.uint64(32) ^ x[1] ^ key[0],
            second & mask,
            first >> np.uint64(32) ^ x[3] ^ key[1],
            first & mask,
        ]
        key = [key[0] + np.uint64(0x9E3779B9) & mask, key[1] + np.uint64(0xBB67AE85) & mask]
    return x[0].astype(np.uint32)


def uniform(seed, shape):
    """What triton.language.rand(seed, arange) gives: |number| of 32 bits, scaled to [0, 1)."""
    number = philox(seed % 2**64, np.arange(np.prod(shape), dtype=np.uint64)).view(np.int32)
    magnitude = np.where(number < 0, ~number, number).astype(np.float32)
    return torch.from_numpy((magnitude * np.float32(4.6566127342e-10)).reshape(shape))


def test_philox_is_the_papers():
    """The known answer of the generator's authors for counter and key of zeros."""
    assert philox(0, np.zeros(1, dtype=np.uint64))[0] == 0x6627E8D5


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize(("seed", "p"), [(0, 0.1), (2**63 - 5, 0.5), (-17, 0.9)])
def test_dropout_drops_what_philox_says(seed, p, level, generator):
    shape = (2, 9, 3, 16, (5, 9), (10, 18))
    q, k, v, mask_logits, options = random_inputs(shape, generator, padding=True)
    batch_size, num_queries, heads, head_dim, grid, _ = shape
    keys = grid[0] * grid[1]
    kept = uniform(seed, (batch_size, heads, num_queries, keys)) >= p
    assert abs(kept.double().mean() - (1 - p)) < 0.03
    foreground = F.interpolate(mask_logits, size=grid, mode="bilinear", align_corners=False).flatten(2) >= 0
    present = ~options["key_padding_mask"][:, None]
    attended = torch.where((foreground & present).any(-1, keepdim=True), foreground & present, present)
    grad_out = torch.randn(q.shape, generator=generator)

    def expected(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        qh, kh, vh = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in leaves)
        scores = (head_dim**-0.5 * qh @ kh.mT).masked_fill(~attended[:, None], -torch.inf)
        weights = scores.softmax(-1).where(kept, 0) / (1 - p)
        out = (weights @ vh).transpose(1, 2).flatten(2)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    arguments = (mask_logits, options["key_padding_mask"], *grid, heads, head_dim**-0.5, p, torch.tensor([seed]))
    with simd_level(level):
        out, _ = torch.ops.fastmask.masked_attention(*leaves, *arguments)
        actual = out.detach(), *torch.autograd.grad(out, leaves, grad_out)
    for name, *results in zip(
        ("out", "grad_q", "grad_k", "grad_v"), actual, expected(torch.float32), expected(torch.float64), strict=True
    ):
        assert_within_budget(*results, name=name)


def test_dropout_follows_the_generator_of_torch(generator):
    q, k, v, mask_logits, options = random_inputs(SHAPES["usual"], generator)
    torch.manual_seed(3)
    first, second = (masked_attention(q, k, v, mask_logits, dropout_p=0.3, **options) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, masked_attention(q, k, v, mask_logits, dropout_p=0.3, **options))
    assert not torch.equal(first, second)


@BACKENDS
def test_dropout_of_everything(backend, generator):
    q, k, v, mask_logits, options = random_inputs(SHAPE[backend], generator)
    ones = torch.ones_like(q)
    nothing = output_and_gradients(q, k, v, mask_logits, ones, dropout_p=1.0, backend=backend, **options)
    assert not any(x.any() for x in nothing)


@BACKENDS
def test_expanded_gradient(backend, generator):
    q, k, v, mask_logits, options = random_inputs(SHAPE[backend], generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    summed = torch.autograd.grad(masked_attention(*leaves, mask_logits, backend=backend, **options).sum(), leaves)
    expected = output_and_gradients(q, k, v, mask_logits, torch.ones_like(q), backend=backend, **options)[1:]
    assert all(torch.equal(x, y) for x, y in zip(summed, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(masked, p, generator):
    q, k, v, mask_logits, options = random_inputs((2, 3, 2, 4, (2, 3), (5, 4)), generator, padding=True)
    q, k, v = q.requires_grad_(), k.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), v.requires_grad_()
    arguments = (
        q, k, v, mask_logits if masked else None, options["key_padding_mask"], 2, 3, 2, 0.5, p,
        torch.tensor([7]) if p > 0 else None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastmask.masked_attention.default, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, logsumexp = torch.ops.fastmask.masked_attention(*detached)
    backward = (torch.randn_like(out), out, logsumexp, *detached)
    torch.library.opcheck(torch.ops.fastmask.masked_attention_backward.default, backward)


def test_logsumexp(generator):
    q, k, v, _, options = random_inputs(SHAPES["odd sizes"], generator, padding=True)
    padding, heads = options["key_padding_mask"], options["num_heads"]
    padding[1] = True
    _, logsumexp = torch.ops.fastmask.masked_attention(q, k, v, None, padding, *options["grid"], heads, 0.3, 0.0, None)
    qh, kh = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    expected = (0.3 * qh @ kh.mT).masked_fill(padding[:, None, None], -torch.inf).logsumexp(-1)
    expected[1] = torch.inf
    torch.testing.assert_close(logsumexp, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiles_to_one_graph(p, generator):
    q, k, v, mask_logits, options = random_inputs(SHAPES["odd sizes"], generator, padding=True)

    def attend(q, k, v):
        return masked_attention(q, k, v, mask_logits, dropout_p=p, **options).square()

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_the_mask_has_no_gradient(generator):
    q, k, v, mask_logits, options = random_inputs(SHAPES["odd sizes"], generator)
    mask_logits.requires_grad_()
    assert not masked_attention(q, k, v, mask_logits, **options).requires_grad
    masked_attention(q.requires_grad_(), k, v, mask_logits, **options).sum().backward()
    assert mask_logits.grad is None
    assert q.grad.any()


def test_nothing_of_the_masks_size_is_stored(generator):
    """Of N * S * heads = 20 million, an eighth of a byte each would be 2.6 MB; as dense booleans they are 21 MB."""
    q, k, v, mask_logits, options = random_inputs((1, 640, 8, 4, (64, 64), (16, 16)), generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, memory = peak_memory(lambda: masked_attention(*leaves, mask_logits, **options), q.device)
    own = {x.data_ptr() for x in (*leaves, mask_logits, out)}
    assert sum(x.numel() for x in saved if x.data_ptr() not in own) == 640 * 8  # logsumexp
    assert memory["allocator"] < 2 * out.nbytes
    assert memory["resident"] is None or memory["resident"] < 2_000_000
    _, memory = peak_memory(lambda: torch.autograd.grad(out, leaves, torch.ones_like(out)), q.device)
    assert memory["allocator"] < 3 * sum(x.nbytes for x in leaves)


def test_no_bit_depends_on_the_number_of_threads(generator):
    """The blocks of queries, of 128 each, are divided into parts that run at the same time in backward."""
    q, k, v, mask_logits, options = random_inputs((2, 300, 4, 16, (9, 12), (18, 24)), generator, padding=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        out = masked_attention(*leaves, mask_logits, **options)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    with threads(1):
        expected = run()
    for count in (2, 7, 40):
        with threads(count):
            assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))


def test_float64_takes_the_reference_and_no_kernel(generator):
    q, k, v, mask_logits, options = random_inputs(SHAPES["odd sizes"], generator)
    doubles = [x.double() for x in (q, k, v, mask_logits)]
    assert torch.equal(masked_attention(*doubles, **options), reference.masked_attention(*doubles, **options))
    with pytest.raises(RuntimeError, match="the kernels of masked_attention do not support float64"):
        masked_attention(*doubles, backend="native", **options)


def test_heads_too_wide_for_the_triton_kernels_are_named(generator):
    q, k, v, mask_logits, options = random_inputs(SHAPES["wider than the GPU's"], generator)
    with (
        kernels("triton"),
        pytest.raises(RuntimeError, match="its kernels take heads of up to 128 channels, got 200"),
    ):
        masked_attention(q, k, v, mask_logits, backend="triton", **options)
