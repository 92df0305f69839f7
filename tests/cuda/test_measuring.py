"""Models are judged on a GPU where they are told to be: its kernels run, and its results are a GPU's by name."""

import json
from typing import Any

import pytest

from tests.cuda.running import NEEDS_THE_DEVICE, run

pytestmark = [*NEEDS_THE_DEVICE, pytest.mark.long]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """In a process of its own, which has no torch yet."""
    output = run("measuring", str(tmp_path_factory.mktemp("measured")))
    return json.loads(output.splitlines()[-1])


@pytest.mark.timeout(900)  # under load
@pytest.mark.parametrize(("what", "fewest"), [("samples", 300), ("likelihood", 600), ("reference", 10)])
def test_the_gpu_does_the_work_and_agrees_with_the_cpu(
    what: str, fewest: int, measured: dict[str, dict[str, Any]]
) -> None:
    assert measured[what]["gpu"] == "Simulated GPU"
    assert measured[what]["kernels"] >= fewest
    assert measured[what]["difference"] < 1e-4


@pytest.mark.parametrize("what", ["samples", "reference"])
def test_features_of_a_gpu_are_never_taken_for_those_of_a_cpu(
    what: str, measured: dict[str, dict[str, Any]]
) -> None:
    assert not measured[what]["same_identity"]


def test_a_dry_run_times_whole_batches_on_the_gpu(measured: dict[str, dict[str, Any]]) -> None:
    found = measured["dry run"]
    assert (found["evaluations_per_image"], found["kernels"] > 300) == (3, True)
    assert found["device_seconds"] > 0
    assert "measured on this machine's Simulated GPU, " in found["note"]
    assert "batches of 3 images; excludes" in found["note"]
