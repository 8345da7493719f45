"""Benchmarks as on a processor of a lower SIMD level, for us and for the others."""

from __future__ import annotations

# What PyTorch, torch.compile, oneDNN and MKL read when a process starts, by the level of ``fastmask.testing``.
CAPS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
