"""The work of a step on a CUDA device stays within its budget: kernels, casts, layout copies, and waits of the host.

budgets.json is the table. A change that needs less lowers its lines in the same commit.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.running import NEEDS_THE_DEVICE, run
from tests.effort import is_long

QUICK = [
    "training step, digits",
    "sampler step, digits, float32, ancestral",
]
"""Steps that are counted without --long: each kind of step once."""
BUDGETS: dict[str, dict[str, float]] = json.loads(Path(__file__).with_name("budgets.json").read_text())

pytestmark = NEEDS_THE_DEVICE


@pytest.mark.timeout(900)  # under load
def test_a_step_stays_within_its_budget(subtests: pytest.Subtests) -> None:
    """One test, as two could be given to two processes, and each would count all."""
    # In a process of its own, which has no torch yet. None is said of steps that were not asked for.
    counted: dict[str, dict[str, Any] | None] = json.loads(run("counts", *(BUDGETS if is_long() else QUICK)))
    assert list(counted) == list(BUDGETS)  # every step that can be counted has a budget
    for name in BUDGETS if is_long() else QUICK:
        with subtests.test(name):
            found = counted[name]
            assert found is not None
            limits = BUDGETS[name].items()
            above = {what: (found[what], limit) for what, limit in limits if found[what] > limit}
            assert not above, json.dumps(found, indent=2)
