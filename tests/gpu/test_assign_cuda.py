"""The matcher's CUDA form: on one CPU thread, on emulated CUDA threads, through the compiler, and on a GPU."""

from __future__ import annotations

import math
import re
import runpy
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.graphs import capture
from fastmask.functional import assign
from tests.conftest import EMULATION
from tests.helpers.assign_problems import FAMILIES, check_duals, check_matching, make
from tests.helpers.host_syncs import host_syncs

HELPERS = Path(__file__).parents[1] / "helpers"
CSRC = HELPERS.parents[1] / "csrc"
EMULATED = HELPERS / "emulated_assign.cpp"
SANITIZER = ("-O1", "-g1", "-fsanitize=thread")
RACE = 66  # exit status of a program that ThreadSanitizer stopped
KERNEL = CSRC / "cuda" / "assign.cu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SHAPES = [(1, 1), (5, 3), (3, 5), (31, 32), (33, 33), (100, 20), (64, 64), (40, 100)]


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


def build(source, program, *flags, csrc=CSRC):
    """Compiles a C++ program against the CUDA emulation."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("needs g++")
    flags = (*"-std=c++20 -ffp-contract=off -Wall -Wextra -Werror".split(), *flags, f"-I{csrc}", f"-I{HELPERS}")
    subprocess.run([compiler, *flags, "-x", "c++", str(source), "-o", str(program)], check=True)
    return program


@dataclass(frozen=True)
class Emulation:
    """The kernel on emulated threads: ``(cost, counts)`` to what ``fastmask::assign_duals`` returns."""

    command: tuple[str, ...]

    def run(self, cost, counts=None, threads=64, in_shared=True, seed=0):
        problems, n, m = cost.shape
        assert cost.stride(0) == n * m or problems == 1
        memory = torch.as_strided(cost, (cost.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
        words = (DTYPES[cost.dtype], problems, n, m, counts is not None, threads, in_shared, seed)
        header = struct.pack("3q8i", *cost.stride()[1:], len(memory), *words)
        batch = header + memory + (b"" if counts is None else counts.numpy().tobytes())
        return subprocess.run(self.command, input=batch, capture_output=True, check=False)

    def __call__(self, cost, *arguments, **options):
        done = self.run(cost, *arguments, **options)
        assert done.returncode == 0, done.stderr.decode()
        problems, n, m = cost.shape
        results, at = [], 0
        for shape, dtype in (((m,), "i8"), ((), "i4"), ((n,), "f8"), ((m,), "f8")):
            count = problems * math.prod(shape)
            values = np.frombuffer(done.stdout, dtype, count, at)
            results.append(torch.from_numpy(values.reshape(problems, *shape).copy()))
            at += values.nbytes
        assert at == len(done.stdout)
        return tuple(results)


@pytest.fixture(scope="session")
def on_threads(made_once):
    folder = made_once("emulation", lambda folder: build(EMULATED, folder / "assign", "-O2"))
    return Emulation((str(folder / "assign"),))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """``(folder of sources, name) -> Emulation`` that stops at the first report of ThreadSanitizer."""
    folder = tmp_path_factory.mktemp("sanitizer")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    try:
        command = [str(build(probe, folder / "probe", *SANITIZER))]
    except subprocess.CalledProcessError:
        pytest.skip("g++ has no ThreadSanitizer")
    # Where the kernel places programs too freely for ThreadSanitizer, one without random addresses can run.
    prefixes = ([], ["setarch", "-R"]) if shutil.which("setarch") else ([],)
    prefix = next((p for p in prefixes if subprocess.run(p + command, check=False).returncode == 0), None)
    assert prefix is not None, "ThreadSanitizer does not run on this kernel"
    environment = ["env", f"TSAN_OPTIONS=halt_on_error=1 exitcode={RACE}"]

    def compiled(csrc, name):
        return Emulation((*environment, *prefix, str(build(EMULATED, folder / name, *SANITIZER, csrc=csrc))))

    return compiled


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
def test_shared_memory(on_threads, architecture, limit):
    """1000 by 1000 runs everywhere; the costs of 300 by 100 stay on chip where a block may have 163 KiB."""

    def plan(queries, targets):
        command = [*on_threads.command, *map(str, (queries, targets, limit * 1024))]
        return [int(word) for word in subprocess.check_output(command).split()]

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
    source = tmp_path / "hang.cpp"
    source.write_text(
        '#include "cuda_emulation.h"\n'
        "int main() { emulation::run_block(64, 0, [] { if (threadIdx.x < 40) __syncthreads(); }); }\n"
    )
    finished = subprocess.run([build(source, tmp_path / "hang")], capture_output=True, text=True)
    assert finished.returncode != 0
    assert "wait for others" in finished.stderr


@pytest.fixture(scope="session")
def race_checked(sanitized):
    return sanitized(CSRC, "assign")


def race_problems(family, seed=0):
    """Square and with either side longer, in fixed point and refined in float64, on chip and off."""
    for n, m in ((33, 33), (40, 12), (12, 40)):
        yield torch.from_numpy(make(family, n, m, seed))[None], True
        yield torch.from_numpy(make(family, n, m, seed, np.float64))[None], False


def broken_problem():
    """For shortest paths in float64, past objects that others own."""
    cost = torch.from_numpy(make("query_bias", 30, 30, 0, np.float64))
    cost[3, 4] = torch.nan
    cost[:, 2] = torch.inf
    return cost[None], False


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family, marks=[] if family in ("integers", "query_bias", "permuted_identity") else pytest.mark.slow
        )
        for family in FAMILIES
    ],
)
def test_the_threads_of_a_block_do_not_race(race_checked, family):
    """By ThreadSanitizer, to which barriers order memory and shuffles do not."""
    for seed, (cost, in_shared) in enumerate(race_problems(family)):
        assert same(race_checked(cost, in_shared=in_shared, seed=seed), torch.ops.fastmask.assign_duals(cost, None))


def test_the_threads_of_a_block_do_not_race_over_costs_that_are_not_finite(race_checked):
    cost, in_shared = broken_problem()
    assert same(race_checked(cost, in_shared=in_shared), torch.ops.fastmask.assign_duals(cost, None))


# One for each kind of place where threads wait for each other.
SYNCS = [
    ("cuda/assign_group.h", "__syncwarp();  // all lanes have read the phase, which one of them may change"),
    ("cuda/assign_group.h", "__syncwarp();  // what the lanes wrote is seen by all from here on, which shuffles alone"),
    ("matcher/auction.h", "group.sync();"),
    ("matcher/augment.h", "group.fence();"),
    ("matcher/exact.h", "group.fence();"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "sync"), SYNCS)
def test_a_missing_barrier_is_noticed(sanitized, tmp_path, file, sync):
    """The first of its kind in the file is taken out."""
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    text = (csrc / file).read_text()
    assert sync in text
    (csrc / file).write_text(text.replace(sync, sync.partition(";")[2], 1))
    emulation = sanitized(csrc, f"mutant-{SYNCS.index((file, sync))}")
    problems = [broken_problem(), *race_problems("integers"), *race_problems("early_training")]
    runs = (emulation.run(cost, in_shared=in_shared) for cost, in_shared in problems)
    assert any(done.returncode == RACE and b"data race" in done.stderr for done in runs)


def test_host_threads_with_other_sizes_do_not_disturb_each_other(tmp_path):
    """Each GPU is asked once for all the shared memory of a block, whatever the sizes of the launches."""
    program = build(
        HELPERS / "assign_host_threads.cpp", tmp_path / "threads", f"-I{HELPERS / 'cuda_driver'}", "-pthread"
    )
    printed = subprocess.check_output([program], text=True).splitlines()
    assert sorted(printed) == [f"device 0: {227 * 1024}", f"device 1: {99 * 1024}"]


@pytest.mark.slow
def test_the_kernel_compiles_without_spills(tmp_path, monkeypatch):
    """At most 168 registers a thread, on each architecture that a build takes by default: a block of 384 then fits the
    65,536 of a multiprocessor."""
    monkeypatch.delenv("FASTMASK_CUDA_ARCHS", raising=False)
    cuda = runpy.run_path(str(CSRC.parent / "setup.py"), run_name="imported")["find_cuda"]("g++")
    if cuda is None:
        pytest.skip("needs nvcc")
    targets = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}" for architecture in cuda.archs]
    flags = "-O3 -fmad=false -Xptxas -v --threads 0".split()
    command = [*cuda.nvcc, *flags, *targets, f"-I{CSRC}", "-c", str(KERNEL), "-o", str(tmp_path / "assign.o")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(report)
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")] * len(cuda.archs)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(cuda.archs)
    assert max(registers) <= 168


def test_the_kernel_is_registered_where_it_was_built():
    from fastmask import _native

    built = torch._C._dispatch_has_kernel_for_dispatch_key("fastmask::assign", "CUDA")
    assert built == bool(_native.cuda_archs)


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
    graph, query_of = capture(lambda: assign(cost, counts))
    for _ in range(3):
        cost.copy_(torch.randn(8, 50, 20, generator=generator))
        counts.copy_(torch.randint(0, 21, (8,), generator=generator))
        graph.replay()
        assert query_of.cpu().equal(assign(cost.cpu(), counts.cpu()))


@pytest.mark.cuda
def test_no_host_sync(generator):
    cost = torch.randn(8, 50, 20, generator=generator).cuda()
    counts = torch.full((8,), 20, device="cuda")
    with host_syncs():
        assign(cost, counts, return_duals=True, return_status=True)


@pytest.mark.cuda
def test_what_does_not_fit_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="shared memory takes about 1000"):
        assign(torch.zeros(20000, 20000, device="cuda", dtype=torch.bfloat16))
