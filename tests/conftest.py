from __future__ import annotations

import gc
import os
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from fastmask.ops._registry import EXTENSION, EXTENSION_ERROR, SIMD_LEVELS
from fastmask.testing import cap_simd_level, simd_levels
from tests.helpers import backends

if TYPE_CHECKING:
    from tests.helpers.compiled import Emulation

with suppress(ImportError):  # GPU machines may have no Hypothesis
    from hypothesis import HealthCheck, settings

    # No test depends on a clock: limits on the time of an example would.
    settings.register_profile("fastmask", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("fastmask")

EMULATION = pytest.StashKey()  # tests.helpers.compiled.Emulation, where --compiled asks for it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simd",
        choices=SIMD_LEVELS,
        default=SIMD_LEVELS[-1],
        help="run the CPU kernels as on a processor that has this level and none above",
    )
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
    if EXTENSION_ERROR is None:
        cap_simd_level(config.getoption("simd"))
    if config.getoption("numprocesses", None):
        # Workers of pytest-xdist have a core each: processes of many threads on the same cores slow each other down
        # tenfold. What reads these is loaded in the workers, and in the processes that they start.
        os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if config.pluginmanager.hasplugin("randomly"):
        config.option.randomly_reset_seed = False  # to numbers that are others in each run; see _seeded
    if config.getoption("--compiled") is not None:
        config.stash[EMULATION] = emulation(config)
    elif not torch.cuda.is_available():
        interpret_triton_kernels()


def interpret_triton_kernels() -> None:
    """In this process, from the import of Triton on: it has kernels of its own. Processes that tests start compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from triton import knobs

        patch.setattr(knobs, "propagate_env", False)
        knobs.runtime.interpret = True


def emulation(config: pytest.Config) -> Emulation:
    """What --compiled asks for."""
    from tests.helpers.compiled import Emulation, find_emulator

    if not find_emulator():
        raise pytest.UsageError("--compiled needs ptxvm: it cannot be imported, and ../shared does not hold it")
    if config.option.warp_seed is None:
        config.option.warp_seed = random.randrange(1 << 31)  # here, as workers of pytest-xdist take it over
    return Emulation(config.getoption("--compiled"), config.option.warp_seed, config.option.hardware_rounding)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which build is tested, as there may be several, and how."""
    pytorch = f"torch {torch.__version__} at {torch.backends.cpu.get_cpu_capability()}"
    header = [f"SIMD levels: {', '.join(simd_levels())}; {pytorch}"]
    if EXTENSION_ERROR is None:
        from fastmask import _native

        header.append(f"fastmask: {EXTENSION}, compiler {_native.compiler}")
    if EMULATION in config.stash:
        header.append(f"compiled: {config.stash[EMULATION]}")
    return header


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of Triton's kernels are marked so; those marked cuda are skipped without a GPU; --compiled leaves those of
    GPU kernels."""
    for item in items:
        names = [value for value in parameters(item).values() if isinstance(value, str)]
        if "triton" in names or "triton_kernels" in item.fixturenames:
            item.add_marker("triton")
    if EMULATION in config.stash:
        chosen = [item for item in items if runs_kernels(item)]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen
    for item in items:
        if item.get_closest_marker("compiled") and EMULATION not in config.stash:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter cannot run it; run with --compiled 90"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def runs_kernels(item: pytest.Item) -> bool:
    """Whether a test is one of GPU kernels, which --compiled runs."""
    return parameters(item).get("backend") == "triton" or bool({"triton_kernels", "emulated"} & set(item.fixturenames))


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Draws here are the same in every run, whatever has run before, and leave no trace in those that follow."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with _seeded(item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """What tests share is seeded by its own name, not by that of the test that comes first."""
    with nullcontext() if fixturedef.scope == "function" else _seeded(f"{fixturedef.baseid}::{fixturedef.argname}"):
        return (yield)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of the test's own, the same from run to run."""
    return torch.Generator().manual_seed(sum(request.node.name.encode()))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``made_once(name, fill)``: a folder that ``fill`` has filled, once for all workers of pytest-xdist, which would
    each make what their tests share."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                part = Path(tempfile.mkdtemp(dir=root))
                fill(part)
                part.rename(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def triton_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """``backend="triton"`` runs on CPU tensors: in Triton's interpreter, or with --compiled in an emulator of a GPU."""
    if EMULATION in request.config.stash:
        with request.config.stash[EMULATION].triton_kernels():
            yield
    else:
        backends.interpret()
        yield


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The parameter of that name, set indirectly: of "triton" the kernels run on CPU tensors, as ``triton_kernels``."""
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_that_of_the_module() -> None:
    """Collections pass over the millions of objects that imports and earlier modules left, which takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _extension_is_built() -> Iterator[None]:
    """The suite proves the kernels: without them it would silently test the reference against itself."""
    assert EXTENSION_ERROR is None, EXTENSION_ERROR
    yield
