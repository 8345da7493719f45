"""Treats Ctrl-C and SIGTERM as a request to stop, which training fulfills after the current step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from fastmask.training.distributed import together

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A second signal within this time is the same request: torchrun repeats the signal that the terminal sent to all.
SAME_REQUEST = 2.0  # seconds
GRACE = 30  # seconds, as in torchrun
PR_SET_PDEATHSIG = 1  # in Linux: sets the signal that a process receives when its parent ends


class Interruption:
    """A context in which the first SIGINT or SIGTERM is noted, and the second ends the process as usual.

    It does nothing outside the main thread, the only one that receives signals.

    Args:
        notice: written to stderr at the first signal; "" for nothing.

    Attributes:
        signal: the number of the signal received, or None.
    """

    def __init__(self, notice: str = ""):
        self.signal: int | None = None
        self._notice = notice
        self._before: dict[int, Any] = {}
        self._came = 0.0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Ends the program as the received signal would have.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, _: FrameType | None) -> None:
        alone = not together()
        if self.signal is None:
            self.signal, self._came = number, time.monotonic()
            if alone:
                # The second signal ends the process even inside an operator.
                for each in SIGNALS:
                    signal.signal(each, signal.SIG_DFL)
            if self._notice:
                os.write(2, f"\n{self._notice}\n".encode())  # the signal may have interrupted print or logging
        elif alone or time.monotonic() - self._came > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def prepare_worker(_: int = 0) -> None:
    """The ``worker_init_fn`` of a ``DataLoader``. Workers also receive the signals meant for the training process: they
    continue silently for as long as it may need them, and end with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    if sys.platform == "linux":
        # Otherwise a worker whose parent is gone could wait forever for its last batch to be read.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
