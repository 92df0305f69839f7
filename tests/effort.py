"""How thorough a test is: `make test` shows each statement once, `make test LONG=1` tries every case."""

import os
from typing import Any

import pytest
from hypothesis import settings

LONG_VARIABLE = "PYTEST_LONG"
"""Set by tests/conftest.py where pytest runs with --long, before a test module is imported. No variable of the program:
tests on the stack run without those of their caller.
"""


def is_long() -> bool:
    """Whether pytest runs with --long."""
    return os.environ.get(LONG_VARIABLE) == "1"


def examples(number: int) -> settings:
    """Hypothesis draws `number` examples with --long, and a quarter of them, but at least 10, without."""
    return settings(max_examples=number if is_long() else max(10, number // 4), deadline=None)


def long(*values: Any) -> Any:
    """A case of `parametrize` that only runs with --long."""
    return pytest.param(*values, marks=pytest.mark.long)
