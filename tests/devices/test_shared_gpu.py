"""A GPU that is shared by processes, and one that a process has lost."""

import pytest
import torch

from ddpm_pipeline.devices import is_context_lost, is_out_of_memory, limit_memory

LOST = [
    torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."
    ),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: device-side assert triggered"),
]
USABLE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: invalid configuration argument"),
    RuntimeError("an unknown error of something else"),
    ValueError("CUDA error: unspecified launch failure"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_context_that_answers_nothing_any_more_is_recognized(error: Exception) -> None:
    assert is_context_lost(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", USABLE, ids=str)
def test_other_errors_leave_the_gpu_usable(error: Exception) -> None:
    assert not is_context_lost(error)


def test_two_workers_on_a_gpu_keep_to_their_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    limit_memory(0.5)
    limit_memory(1)
    limit_memory(2)
    assert limits == [0.45]
