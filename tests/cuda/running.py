"""Runs programs on the simulated device: in processes of their own, as it is loaded before torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.guard import COMPILER, is_cpu_build

NEEDS_THE_DEVICE = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not is_cpu_build(), reason="needs a CPU build of torch"),
]


def run(module: str, *arguments: str) -> str:
    """The output of `python -m tests.cuda.MODULE`, which must succeed."""
    command = [sys.executable, "-m", f"tests.cuda.{module}", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
