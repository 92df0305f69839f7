"""Every statement of checks.py holds. In a process of its own, as the simulated device is loaded before torch."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.cuda.guard import COMPILER, is_cpu_build

ROOT = Path(__file__).parents[2]
STATEMENTS = [
    node.name
    for node in ast.parse(Path(__file__).with_name("checks.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not is_cpu_build(), reason="needs a CPU build of torch"),
]


@cache
def outcomes() -> dict[str, str | None]:
    command = [sys.executable, "-m", "tests.cuda.checks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(900)  # under load
@pytest.mark.parametrize("name", STATEMENTS)
def test_on_a_simulated_device(name: str) -> None:
    assert outcomes()[name] is None, outcomes()[name]
