from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastmask.ops.library import EXTENSION_ERROR

# Workers of pytest-xdist have a core each: processes of many threads on the same cores slow each other down tenfold.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked cuda are skipped without a GPU, slow ones unless asked for."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and "slow" not in item.config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of the test's own, the same from run to run."""
    return torch.Generator().manual_seed(sum(request.node.name.encode()))


@pytest.fixture(scope="session", autouse=True)
def _extension_is_built() -> Iterator[None]:
    """The suite proves the kernels: without them it would silently test the reference against itself."""
    assert EXTENSION_ERROR is None, EXTENSION_ERROR
    yield
