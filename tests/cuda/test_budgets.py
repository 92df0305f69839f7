"""The work of a step on a CUDA device stays within its budget: kernels, casts, layout copies, and waits of the host.

budgets.json is the table. A change that needs less lowers its lines in the same commit.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.running import NEEDS_THE_DEVICE, run
from tests.effort import is_long, long

QUICK = [
    "training step, digits",
    "sampler step, digits, float32, ancestral",
]
"""Steps that are counted without --long: each kind of step once."""
BUDGETS: dict[str, dict[str, float]] = json.loads(Path(__file__).with_name("budgets.json").read_text())

pytestmark = NEEDS_THE_DEVICE


@cache
def counted() -> dict[str, dict[str, Any] | None]:
    """What `tests.cuda.counts` says of each step: None where it was not asked. In a process of its own, which has no
    torch yet.
    """
    return json.loads(run("counts", *(BUDGETS if is_long() else QUICK)))


@pytest.mark.timeout(900)  # under load
@pytest.mark.parametrize("name", [name if name in QUICK else long(name) for name in BUDGETS])
def test_a_step_stays_within_its_budget(name: str) -> None:
    found = counted()[name]
    assert found is not None
    above = {what: (found[what], limit) for what, limit in BUDGETS[name].items() if found[what] > limit}
    assert not above, json.dumps(found, indent=2)


def test_every_step_that_can_be_counted_has_a_budget() -> None:
    assert list(counted()) == list(BUDGETS)
