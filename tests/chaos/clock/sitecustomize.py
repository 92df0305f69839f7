"""Loaded at the start of a driver whose PYTHONPATH names this folder: its clock jumps when a file says so.

CHAOS_CLOCK names a file with a number of seconds. Only time stamps jump (time.time), as when a machine's clock is
set; signatures for S3 are dated by datetime and stay right, or the server would refuse them.
"""

import os
import time
from pathlib import Path

_file = Path(os.environ["CHAOS_CLOCK"])
_true_time = time.time


def _jumping_time() -> float:
    try:
        return _true_time() + float(_file.read_text() or 0)
    except OSError:
        return _true_time()


# Ray Data sends the function to actors of the cluster by its name: there it is the true clock, as on any other machine.
_jumping_time.__module__, _jumping_time.__qualname__, _jumping_time.__name__ = "time", "time", "time"
time.time = _jumping_time
