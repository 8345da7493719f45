from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from fastmask.ops.library import EXTENSION, EXTENSION_ERROR
from tests.interpreter import interpreted_kernels

# Workers of pytest-xdist have a core each: processes of many threads on the same cores slow each other down tenfold.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


EMULATION = pytest.StashKey()  # tests.compiled.Emulation, where --compiled asks for it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU code without a GPU")
    group.addoption(
        "--compiled",
        type=int,
        metavar="CAPABILITY",
        help="run the tests of GPU kernels, and no others, as PTX for sm_CAPABILITY in the emulator ptxvm",
    )
    group.addoption("--warp-seed", type=int, help="of the order of warps with --compiled; drawn if not given")
    group.addoption(
        "--hardware-rounding",
        action="store_true",
        help="with --compiled: special functions and tensor cores round as badly as a GPU's may",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (capability := config.getoption("--compiled")) is None:
        return
    from tests.compiled import Emulation, find_emulator

    if not find_emulator():
        raise pytest.UsageError("--compiled needs ptxvm: it cannot be imported, and ../shared does not hold it")
    if config.option.warp_seed is None:
        config.option.warp_seed = random.randrange(1 << 31)  # here, as workers of pytest-xdist take it over
    config.stash[EMULATION] = Emulation(capability, config.option.warp_seed, config.option.hardware_rounding)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which build is tested, as there may be several, and how."""
    header = []
    if EXTENSION_ERROR is None:
        from fastmask import _native

        header.append(f"fastmask: {EXTENSION}, compiler {_native.compiler}")
    if EMULATION in config.stash:
        header.append(f"compiled: {config.stash[EMULATION]}")
    return header


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked cuda are skipped without a GPU, slow ones unless asked for; --compiled leaves those of kernels."""
    if EMULATION in config.stash:
        chosen = [item for item in items if {"triton_kernels", "emulated"} & set(item.fixturenames)]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen
    for item in items:
        if item.get_closest_marker("compiled") and EMULATION not in config.stash:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter cannot run it; run with --compiled 90"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and "slow" not in item.config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of the test's own, the same from run to run."""
    return torch.Generator().manual_seed(sum(request.node.name.encode()))


@pytest.fixture(scope="module")
def triton_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """``backend="triton"`` runs on CPU tensors: in Triton's interpreter, or with --compiled in an emulator of a GPU."""
    emulation = request.config.stash.get(EMULATION, None)
    with interpreted_kernels() if emulation is None else emulation.triton_kernels():
        yield


@pytest.fixture(scope="session", autouse=True)
def _extension_is_built() -> Iterator[None]:
    """The suite proves the kernels: without them it would silently test the reference against itself."""
    assert EXTENSION_ERROR is None, EXTENSION_ERROR
    yield
