"""A CPU without instructions for half precision says what that costs."""

import logging

import pytest
import torch

from ddpm_pipeline.devices import emulated_precision
from ddpm_pipeline.devices.emulated_precision import is_emulated, warn_if_emulated

CPU = torch.device("cpu")


@pytest.fixture
def capabilities(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Of an x86 with AVX2 only, until a test adds to them."""
    found: dict[str, object] = {"architecture": "x86_64", "avx2": True}
    monkeypatch.setattr(emulated_precision.torch.cpu, "get_capabilities", lambda: found)
    return found


@pytest.mark.parametrize(
    ("dtype", "instructions"),
    [
        (torch.bfloat16, "avx512_bf16"),
        (torch.bfloat16, "amx_bf16"),
        (torch.float16, "avx512_fp16"),
        (torch.float16, "amx_fp16"),
    ],
)
def test_one_kind_of_instructions_is_enough(
    dtype: torch.dtype, instructions: str, capabilities: dict[str, object]
) -> None:
    assert is_emulated(dtype)
    capabilities[instructions] = True
    assert not is_emulated(dtype)


def test_the_cost_is_measured_and_logged(
    capabilities: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_emulated(torch.bfloat16, CPU)
    (record,) = caplog.records
    assert "this CPU emulates bfloat16: a convolution takes" in record.getMessage()
    assert "use float32 here" in record.getMessage()


@pytest.mark.parametrize(
    ("dtype", "device", "architecture"),
    [
        (torch.float32, "cpu", "x86_64"),
        (torch.bfloat16, "cuda", "x86_64"),
        (torch.bfloat16, "cpu", "aarch64"),
    ],
)
def test_nothing_is_said_elsewhere(
    dtype: torch.dtype,
    device: str,
    architecture: str,
    capabilities: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    capabilities["architecture"] = architecture
    with caplog.at_level(logging.WARNING):
        warn_if_emulated(dtype, torch.device(device))
    assert caplog.records == []
