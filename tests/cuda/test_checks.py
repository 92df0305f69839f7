"""Every statement of checks.py holds. In a process of its own, as the simulated device is loaded before torch."""

import json

import pytest

from tests.cuda.running import NEEDS_THE_DEVICE, run

pytestmark = NEEDS_THE_DEVICE


@pytest.mark.timeout(900)  # under load
def test_on_a_simulated_device(subtests: pytest.Subtests) -> None:
    """One test, as two could be given to two processes, and each would run all."""
    outcomes: dict[str, str | None] = json.loads(run("checks"))
    assert outcomes
    for name, fault in outcomes.items():
        with subtests.test(name):
            assert fault is None, fault
