"""The vectors of each SIMD level, on this processor and, for ARM, in an emulator."""

from __future__ import annotations

import pytest

from fastmask.testing import simd_levels
from tests.helpers.levels import ROOT, compile_for, is_foreign, run_for

LEVELS = sorted({"neon", *simd_levels()})


@pytest.mark.parametrize("level", LEVELS)
def test_each_lane_equals_scalar_arithmetic(level, tmp_path):
    static = ["-static"] if is_foreign(level) else []
    flags = ["-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]
    compile_for(level, tmp_path, *flags, *static, ROOT / "tests" / "helpers" / "vectors.cpp", "-o", "vectors")
    result = run_for(level, [tmp_path / "vectors"])
    assert result.returncode == 0, result.stdout
    assert " 0 failures" in result.stdout
