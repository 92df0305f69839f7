"""Kernels compute what their references define. Triton's interpreter plays the GPU, in a process of its own: it must be
chosen before Triton is imported."""

import subprocess
import sys
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


@pytest.mark.timeout(900)  # under load
def test_kernels_compute_what_their_references_define(subtests: pytest.Subtests) -> None:
    """One test, as two could be given to two processes, and each would run all."""
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    passed = done.stdout.split()
    for check in CHECKS:
        with subtests.test(check):
            assert check in passed, done.stderr
    assert passed == CHECKS, done.stderr  # and there is no other
