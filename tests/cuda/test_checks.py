"""Every statement of checks.py holds. In a process of its own, as the simulated device is loaded before torch."""

import ast
import json
from functools import cache
from pathlib import Path

import pytest

from tests.cuda.running import NEEDS_THE_DEVICE, run

STATEMENTS = [
    node.name
    for node in ast.parse(Path(__file__).with_name("checks.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
]

pytestmark = NEEDS_THE_DEVICE


@cache
def outcomes() -> dict[str, str | None]:
    return json.loads(run("checks"))


@pytest.mark.timeout(900)  # under load
@pytest.mark.parametrize("name", STATEMENTS)
def test_on_a_simulated_device(name: str) -> None:
    assert outcomes()[name] is None, outcomes()[name]
