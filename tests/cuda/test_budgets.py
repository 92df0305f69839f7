"""The work of a step on a CUDA device stays within its budget: kernels, casts, layout copies, and waits of the host.

budgets.json is the table. A change that needs less lowers its lines in the same commit.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.running import NEEDS_THE_DEVICE, run

BUDGETS: dict[str, dict[str, float]] = json.loads(Path(__file__).with_name("budgets.json").read_text())

pytestmark = NEEDS_THE_DEVICE


@cache
def counted(kind: str) -> dict[str, dict[str, Any]]:
    """What `tests.cuda.counts` says of all steps of a kind. In a process of its own, which has no torch yet."""
    return json.loads(run("counts", *(name for name in BUDGETS if name.startswith(kind))))


@pytest.mark.timeout(900)  # under load
@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_stays_within_its_budget(name: str) -> None:
    found = counted(name.partition(",")[0])[name]
    above = {what: (found[what], limit) for what, limit in BUDGETS[name].items() if found[what] > limit}
    assert not above, json.dumps(found, indent=2)


def test_every_step_that_can_be_counted_has_a_budget() -> None:
    assert json.loads(run("counts")) == list(BUDGETS)
