"""``fastmask`` under torchrun, which gets Ctrl-C from its first process in the middle of the third step."""

from __future__ import annotations

import os
import signal
import time

from fastmask.cli.main import main
from fastmask.training.trainer import Trainer

STEP = 3
PATIENCE = 300  # seconds for the signal to come back


def interrupt(take_step):
    def step(trainer, batches):
        if trainer.steps == STEP - 1 and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGINT)
            interruption = signal.getsignal(signal.SIGINT).__self__
            until = time.monotonic() + PATIENCE
            while interruption.signal is None and time.monotonic() < until:
                time.sleep(0.02)
        return take_step(trainer, batches)

    return step


if __name__ == "__main__":
    Trainer.step = interrupt(Trainer.step)
    main()
