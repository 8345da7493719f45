"""Describes the machine and the build: ``python -m benchmarks.gpu.environment --device cuda --output FILE``."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import best_rates, commit, default_name, describe_machine
from fastmask import show_config
from fastmask.ops import OPERATORS
from fastmask.ops._registry import auto_backend

TOOLS = ("nvcc", "ptxas", "compute-sanitizer", "ncu", "cuobjdump")
PACKAGES = ("pytest", "hypothesis", "xdist", "tqdm", "typer", "matplotlib", "pycocotools", "torchvision", "lapx")


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, read plus written, to which kernels are compared."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / sorted(times)[len(times) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description="Describe the machine and the build.")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    show_config()
    machine = describe_machine(device)
    head, dirty = commit()
    found: dict[str, Any] = {
        "machine": machine,
        "name": default_name(machine),
        "commit": head,
        "dirty": dirty,
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "missing": [package for package in PACKAGES if find_spec(package) is None],
    }
    if device.type == "cuda":
        found["rates"] = best_rates(device).as_dict()
        found["copy_bytes_per_second"] = copy_rate(device)
        query = "name,driver_version,clocks.sm,clocks.max.sm,memory.total"
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(f"{machine['gpu'] or machine['cpu']}, torch {torch.__version__}; missing: {', '.join(found['missing'])}")
    probe = torch.empty(0, device=device)
    slow = [operator.name for operator in OPERATORS.values() if auto_backend(operator, probe) == "reference"]
    if slow:
        print(f"FAILED {', '.join(slow)} would run by the reference on {device.type}; see the build's log")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
