"""COCO's evaluation by hotcoco. Run as a program, the module evaluates the data on its standard input."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np

_threads_of: int | None = None  # the process in which hotcoco has started its threads


def evaluate(truth: dict[str, Any], found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluates masks.

    Args:
        truth, found: dicts in the format of COCO's files: "images", "categories" and "annotations", with ids from 1.

    Returns:
        COCO's twelve numbers, -1 where there is nothing to count; and the precision ``(IoU, recall, K, area,
        detections)``.
    """
    global _threads_of
    if _threads_of not in (None, os.getpid()):
        # A forked process lacks the threads that hotcoco started in its parent, and would wait for them forever.
        return _evaluate_elsewhere(truth, found)
    import hotcoco

    _threads_of = os.getpid()
    evaluation: Any = hotcoco.COCOeval(hotcoco.COCO(truth), hotcoco.COCO(found), "segm")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    return evaluation.stats, evaluation.eval["precision"]


def _evaluate_elsewhere(*sides: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    output = subprocess.run(command, input=pickle.dumps(sides), stdout=subprocess.PIPE, env=environment, check=True)
    return pickle.loads(output.stdout)


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(evaluate(*pickle.load(sys.stdin.buffer))))
