"""Kernels compute what their references define. Triton's interpreter plays the GPU, in a process of its own: it must be
chosen before Triton is imported."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.kernels.installed import needs_triton

ROOT = Path(__file__).parents[2]
CHECKS = [
    "check_normals",
    "check_words_integers_and_uniforms",
    "check_dropout",
    "check_group_norm",
    "check_that_group_norm_of_a_sample_does_not_depend_on_its_batch",
    "check_empty_batches",
]

pytestmark = needs_triton


@cache
def run_checks() -> tuple[list[str], str]:
    """The checks that passed, in order, and the error output of the one that did not."""
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split(), done.stderr


@pytest.mark.timeout(900)  # under load
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_compute_what_their_references_define(check: str) -> None:
    passed, errors = run_checks()
    assert check in passed, errors


@pytest.mark.timeout(900)
def test_every_check_is_looked_at() -> None:
    passed, errors = run_checks()
    assert passed == CHECKS, errors
