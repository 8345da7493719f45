"""Tuning of masked attention: blocks and stages by dtype, GPU and head dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.kernels._common import pick_config, power_of_two


@dataclass(frozen=True)
class MaskedAttentionConfig:
    """Tuning of the forward or the backward kernel.

    Args:
        queries: the most queries per program, a power of two.
        keys: keys per block; a program processes one block at a time.
        warp_queries: queries per warp, if that gives at least ``min_warps`` warps.
        programs: the number of programs to reach by splitting the keys, if there are enough: two for each of 132 SMs.
        min_keys: the fewest keys per split.
        registers: the most registers per thread. Without a limit, ptxas spills a few if that fits one more block on a
            multiprocessor.
    """

    queries: int
    keys: int
    warp_queries: int
    num_stages: int = 2
    programs: int = 264
    min_keys: int = 256
    min_warps: int = 4
    registers: int | None = None


# By dtype, the major version of a GPU's compute capability (None: any other) and the head dimension. At B=16 and N=100
# half precision spills no registers, float32 at most 32 bytes; the entries under None fit 100 KB of shared memory.
Configs = dict[str, dict[int | None, dict[int, MaskedAttentionConfig]]]
_HALF = {
    32: MaskedAttentionConfig(queries=64, keys=128, warp_queries=16, num_stages=3, registers=255),
    64: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16, num_stages=3),
    128: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16, num_stages=3),
}
# float32 products are fused multiply-adds with operands in registers.
_FLOAT = {
    32: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8, num_stages=3, registers=255),
    64: MaskedAttentionConfig(queries=32, keys=32, warp_queries=8),
    128: MaskedAttentionConfig(queries=32, keys=32, warp_queries=4),
}
_DROPOUT = MaskedAttentionConfig(queries=64, keys=32, warp_queries=8, registers=255)
FORWARD_CONFIGS: Configs = {
    "half": {
        9: _HALF,
        10: _HALF,
        None: _HALF | {128: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8, num_stages=3, registers=255)},
    },
    # Random numbers take registers, one for each weight in a block.
    "half, dropout": {None: {32: _DROPOUT, 64: _DROPOUT, 128: _DROPOUT}},
    # For 64 queries Triton 3.6 would use the tensor cores of compute capability 10, which round operands to tf32.
    "float32": {
        10: _FLOAT | {32: MaskedAttentionConfig(queries=32, keys=32, warp_queries=8)},
        None: _FLOAT,
    },
}
# Keys as in forward. Products of 64 keys with queries run on warp groups; on other GPUs a warp holds whole operands.
_BACKWARD_DROPOUT = MaskedAttentionConfig(queries=64, keys=32, warp_queries=8, num_stages=1, registers=255)
BACKWARD_CONFIGS: Configs = {
    "half": {
        9: {
            32: MaskedAttentionConfig(queries=256, keys=64, warp_queries=32, num_stages=3, min_warps=8),
            64: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16),
            128: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8),
        },
        10: {
            32: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16),
            64: MaskedAttentionConfig(queries=128, keys=32, warp_queries=16),
            128: MaskedAttentionConfig(queries=128, keys=32, warp_queries=16),
        },
        None: {
            32: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16),
            64: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8),
            128: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8, num_stages=1),
        },
    },
    "half, dropout": {
        None: {
            32: _BACKWARD_DROPOUT,
            64: _BACKWARD_DROPOUT,
            128: MaskedAttentionConfig(queries=32, keys=32, warp_queries=4, num_stages=1, registers=255),
        }
    },
    "float32": {
        None: {
            32: MaskedAttentionConfig(queries=32, keys=32, warp_queries=4),
            64: MaskedAttentionConfig(queries=32, keys=32, warp_queries=4),
            128: MaskedAttentionConfig(queries=16, keys=16, warp_queries=2, registers=255),
        }
    },
}


def config_of_heads(configs: Configs, q: Tensor, head_dim: int, dropout_p: float) -> MaskedAttentionConfig:
    kind = "float32" if q.dtype == torch.float32 else "half, dropout" if dropout_p > 0.0 else "half"
    return pick_config(configs[kind], q.device)[power_of_two(head_dim, 32, 128)]
