"""The promises of the program, on a CPU in the normal tests and on the GPUs of a machine by `make gpu-test`."""

from pathlib import Path

import pytest
import torch

from tests.gpu.promises import PROMISES, Promise, two_workers_interrupted_end_in_the_same_bits
from tests.gpu.report import Result, rendered

DEVICES = ("cpu", "cuda")
# On a CPU tests/train shows the same of trainings, with more steps, and tests/cuda of CUDA graphs.
SHOWN_ELSEWHERE = ("training", "distillation", "captured")
CASES = [
    pytest.param(
        promise,
        device,
        marks=[pytest.mark.long]
        if device == "cpu" and any(word in promise.__name__ for word in SHOWN_ELSEWHERE)
        else [],
        id=f"{promise.__name__}-{device}",
    )
    for promise in PROMISES
    for device in DEVICES
]


def _require_gpus(device: str, count: int, promise: str, request: pytest.FixtureRequest) -> None:
    """Skip without them; with one, the promise is a line of the report."""
    if device == "cpu":
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found:
        request.node.user_properties.append(("promise", promise))
    if found < count:
        pytest.skip("needs a CUDA device" if count == 1 else f"needs {count} CUDA devices")


@pytest.mark.parametrize(("promise", "device"), CASES)
def test_a_promise_holds(
    promise: Promise, device: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _require_gpus(device, 1, promise.__name__, request)
    promise(torch.device(device), tmp_path)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), "cuda"])
def test_two_workers_interrupted_end_in_the_same_bits(
    device: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _require_gpus(device, 2, two_workers_interrupted_end_in_the_same_bits.__name__, request)
    two_workers_interrupted_end_in_the_same_bits(device, tmp_path)


def test_the_report_names_the_machine_and_each_promise() -> None:
    results = [Result("shards_made_twice", "passed", 1.25), Result("two_workers", "skipped: needs 2", 0.0)]
    lines = rendered({"GPU": "1 x NVIDIA H100", "driver": "580.65.06"}, results).splitlines()
    assert lines[2:4] == ["| GPU | 1 x NVIDIA H100 |", "| driver | 580.65.06 |"]
    assert lines[-2:] == ["| shards made twice | passed | 1.2 |", "| two workers | skipped: needs 2 | 0.0 |"]
