"""The matcher's CUDA form: on one CPU thread, on emulated CUDA threads, through the compiler, and on a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmask.functional import assign
from tests.assign_problems import FAMILIES, check_duals, check_matching, make
from tests.conftest import EMULATION

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
KERNEL = CSRC / "cuda" / "assign.cu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SHAPES = [(1, 1), (5, 3), (3, 5), (31, 32), (33, 33), (100, 20), (64, 64), (40, 100)]
ARCHITECTURES = ("80", "86", "89", "90", "100")


def same(left, right):
    """Equal bits, with NaN equal to itself."""
    return all(torch.equal(a.nan_to_num(7e77), b.nan_to_num(7e77)) for a, b in zip(left, right, strict=True))


def break_some(cost, rng):
    cost[rng.random(cost.shape) < rng.random()] = rng.choice([np.nan, np.inf, -np.inf])
    return cost


@pytest.mark.parametrize("family", FAMILIES)
def test_the_serial_form_equals_the_simd_form(family):
    """One algorithm: whatever order a block's warps run in, the bits are those of the CPU's kernel."""
    for seed, shape in enumerate(SHAPES):
        for dtype in (np.float32, np.float64):
            cost = torch.from_numpy(make(family, *shape, seed, dtype))
            expected = torch.ops.fastmask.assign_duals(cost, None)
            for order in range(3):
                assert same(torch.ops.fastmask._assign_serial(cost, None, order), expected)
            check_matching(cost.numpy(), expected[0].numpy(), 1e-6 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_the_serial_form_with_broken_pairs_and_counts(seed):
    rng = np.random.default_rng(seed)
    n, m = (int(side) for side in rng.integers(1, 60, 2))
    cost = torch.from_numpy(np.stack([break_some(rng.normal(size=(n, m)), rng) for _ in range(4)]))
    counts = torch.from_numpy(rng.integers(0, m + 1, 4))
    for dtype in DTYPES:
        expected = torch.ops.fastmask.assign_duals(cost.to(dtype), counts)
        assert same(torch.ops.fastmask._assign_serial(cost.to(dtype), counts, seed), expected)


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The kernel's source, compiled for emulated CUDA threads."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("emulation") / "emulated_assign.so"
    source = ROOT / "tests" / "emulated_assign.cpp"
    flags = "-std=c++20 -O2 -fPIC -shared -ffp-contract=off -Wall -Wextra -Werror".split()
    subprocess.run([compiler, *flags, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def on_threads(emulation):
    """(cost, counts, threads, in_shared, seed) -> what ``fastmask::assign_duals`` returns, by the kernel's source."""

    def solve(cost, counts=None, threads=64, in_shared=True, seed=0):
        problems, n, m = cost.shape
        out = [torch.full((problems, m), 99), torch.full((problems,), 99, dtype=torch.int32)]
        out += [torch.full((problems, side), torch.nan, dtype=torch.float64) for side in (n, m)]
        query_stride, target_stride = cost.stride()[1:]
        assert cost.stride(0) == n * m or problems == 1
        sizes = [ctypes.c_int64(value) for value in (query_stride, target_stride)]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in out]
        emulation.emulated_assign(
            *(ctypes.c_void_p(cost.data_ptr()), DTYPES[cost.dtype], ctypes.c_int64(problems), n, m, *sizes),
            *(ctypes.c_void_p(None if counts is None else counts.data_ptr()), *pointers, threads, int(in_shared), seed),
        )
        return tuple(out)

    return solve


@pytest.fixture
def emulated(request):
    """``on_threads`` or, with --compiled, the same by the kernel's PTX."""
    if (machine := request.config.stash.get(EMULATION, None)) is None:
        return request.getfixturevalue("on_threads")
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return machine.matcher()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_on_emulated_threads(emulated, family):
    """The kernel's own code, its barriers and shuffles included, gives the bits of the CPU's kernel."""
    for seed, (n, m) in enumerate([(7, 5), (5, 7), (33, 33), (70, 20), (20, 70)]):
        cost = torch.from_numpy(make(family, n, m, seed))[None]
        expected = torch.ops.fastmask.assign_duals(cost, None)
        for threads, in_shared in ((64, True), (256, False)):
            assert same(emulated(cost, threads=threads, in_shared=in_shared, seed=seed), expected), (n, m, threads)


def test_a_large_problem_on_emulated_threads(on_threads):
    """Minutes by PTX."""
    for family, shape in (("early_training", (300, 100)), ("query_bias", (100, 100)), ("integers", (150, 40))):
        cost = torch.from_numpy(make(family, *shape, 0))[None]
        assert same(on_threads(cost, threads=384), torch.ops.fastmask.assign_duals(cost, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ragged_batch_on_emulated_threads(emulated, dtype, generator):
    cost = torch.randn(6, 30, 17, generator=generator).to(dtype)
    cost[2] = torch.nan
    cost[3, 4] = torch.inf
    cost[4, :, :5] = -torch.inf
    counts = torch.tensor([17, 0, 3, 17, 9, 1])
    expected = torch.ops.fastmask.assign_duals(cost, counts)
    assert same(emulated(cost, counts), expected)
    transposed = cost.mT.contiguous().mT
    assert same(emulated(transposed, counts), expected)
    assert same(emulated(cost.mT.contiguous()), torch.ops.fastmask.assign_duals(cost.mT, None))
    beyond = torch.tensor([99, -5, 3, 17, 9, 1])
    assert same(emulated(cost, beyond), expected)


def test_costs_near_the_ends_of_float64_on_emulated_threads(emulated):
    for family in ("decades", "denormals", "sentinels"):
        for seed in range(5):
            cost = torch.from_numpy(make(family, 12, 9, seed, np.float64))[None]
            for scale in (1.0, 1e270, 1e-290):
                assert same(emulated(cost * scale), torch.ops.fastmask.assign_duals(cost * scale, None))


# Shared memory that a block may have, by architecture, in KiB.
@pytest.mark.parametrize(("architecture", "limit"), [("80", 163), ("86", 99), ("89", 99), ("90", 227), ("100", 227)])
def test_shared_memory(emulation, architecture, limit):
    """1000 by 1000 runs everywhere; the costs of 300 by 100 stay on chip where a block may have 163 KiB."""

    def plan(queries, targets):
        out = (ctypes.c_int64 * 3)()
        emulation.emulated_plan(queries, targets, ctypes.c_int64(limit * 1024), out)
        return out

    for shape in ((1000, 1000), (1000, 300), (300, 100), (100, 40)):
        fits, costs_in_shared, used = plan(*shape)
        print(
            f"sm_{architecture}, {shape[0]} x {shape[1]}: {used} bytes, costs in shared memory: {bool(costs_in_shared)}"
        )
        assert fits
        assert used <= limit * 1024
        assert costs_in_shared == (shape == (100, 40) or (shape == (300, 100) and limit >= 163))


def test_an_emulated_block_that_hangs_is_noticed(tmp_path):
    """What the emulation is for: a barrier that some threads do not reach stops the program."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = tmp_path / "hang.cpp"
    source.write_text(
        '#include "cuda_emulation.h"\n'
        "int main() { emulation::run_block(64, 0, [] { if (threadIdx.x < 40) __syncthreads(); }); }\n"
    )
    program = tmp_path / "hang"
    subprocess.run([compiler, "-std=c++20", f"-I{ROOT / 'tests'}", str(source), "-o", str(program)], check=True)
    finished = subprocess.run([program], capture_output=True, text=True)
    assert finished.returncode != 0
    assert "wait for others" in finished.stderr


def test_the_kernel_compiles_without_spills(tmp_path):
    """At most 168 registers a thread: a block of 384 then fits the 65,536 of a multiprocessor."""
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("needs nvcc")
    targets = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}" for architecture in ARCHITECTURES]
    flags = "-std=c++20 -O3 -fmad=false -Xptxas -v --threads 0".split()
    command = [nvcc, *flags, *targets, f"-I{CSRC}", "-c", str(KERNEL), "-o", str(tmp_path / "assign.o")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(report)
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")] * len(ARCHITECTURES)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(ARCHITECTURES)
    assert max(registers) <= 168


def test_the_kernel_is_registered_where_it_was_built():
    from fastmask import _native
    from fastmask.ops import OPERATORS

    assert ("cuda" in OPERATORS["assign"].native) == bool(_native.cuda_archs)


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_gives_the_bits_of_the_cpu(family):
    for seed, shape in enumerate([*SHAPES, (300, 100), (300, 300), (1000, 300)]):
        for dtype in (np.float32, np.float64):
            cost = torch.from_numpy(make(family, *shape, seed, dtype))
            expected = torch.ops.fastmask.assign_duals(cost, None)
            for _ in range(2):
                found = [output.cpu() for output in torch.ops.fastmask.assign_duals(cost.cuda(), None)]
                assert same(found, expected), (shape, dtype)
            if max(shape) <= 100:
                check_duals(cost.numpy(), *(output.numpy() for output in (found[0], found[2], found[3])))


@pytest.mark.cuda
def test_a_ragged_batch_on_a_gpu(generator):
    cost = torch.randn(6, 16, 100, 40, generator=generator)
    cost[0, 0, 3] = torch.nan
    cost[1, 1, :, 2] = torch.inf
    counts = torch.randint(0, 41, (16,), generator=generator)
    for dtype in DTYPES:
        for layout in (cost.to(dtype), cost.to(dtype).mT.contiguous().mT, cost.to(dtype).transpose(0, 1).contiguous()):
            problems = layout if layout.shape[0] == 6 else layout.transpose(0, 1)
            expected = assign(problems, counts, return_duals=True, return_status=True)
            found = assign(problems.cuda(), counts.cuda(), return_duals=True, return_status=True)
            assert same([found[0].cpu(), found[2].cpu()], [expected[0], expected[2]])
            assert same([dual.cpu() for dual in found[1]], expected[1])


@pytest.mark.cuda
def test_a_cuda_graph_replays_without_the_host(generator):
    cost = torch.randn(8, 50, 20, generator=generator).cuda()
    counts = torch.full((8,), 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assign(cost, counts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query_of = assign(cost, counts)
    for _ in range(3):
        cost.copy_(torch.randn(8, 50, 20, generator=generator))
        counts.copy_(torch.randint(0, 21, (8,), generator=generator))
        graph.replay()
        assert query_of.cpu().equal(assign(cost.cpu(), counts.cpu()))


@pytest.mark.cuda
def test_no_host_sync(generator):
    cost = torch.randn(8, 50, 20, generator=generator).cuda()
    counts = torch.full((8,), 20, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assign(cost, counts, return_duals=True, return_status=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_what_does_not_fit_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="shared memory takes about 1000"):
        assign(torch.zeros(20000, 20000, device="cuda", dtype=torch.bfloat16))
