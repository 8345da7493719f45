"""A short form of ``make sanitize``: random calls of every operator, of the extension as it is."""

from __future__ import annotations

import pytest

from tests.helpers.fuzz_operators import DRAWN, run


@pytest.mark.parametrize("name", DRAWN)
def test_random_calls(name):
    for seed in range(20):
        run(seed, [name])
