"""The peak of a device is the data sheet's, and unknown for a name or a format that is not in it."""

import pytest
import torch

from ddpm_pipeline.devices.arithmetic import set_up_arithmetic
from ddpm_pipeline.devices.peak_flops import Arithmetic, arithmetic_of, device_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "arithmetic", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L4", "float16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA B200", "bfloat16", 2250),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-32GB", "float32", 15.7),
        ("NVIDIA GeForce RTX 3090", "float16", 71),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("NVIDIA GeForce RTX 5090", "bfloat16", 209.5),
        ("Tesla T4", "bfloat16", None),
        ("Tesla T4", "tf32", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "float32", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "float32", None),
        ("NVIDIA Z9000", "float32", None),
    ],
)
def test_peaks(name: str, arithmetic: Arithmetic, teraflops: float | None) -> None:
    assert peak_flops(name, arithmetic) == (None if teraflops is None else teraflops * 1e12)


def test_a_float32_network_is_compared_with_the_format_that_convolutions_really_use() -> None:
    convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    products = torch.backends.cuda.matmul.fp32_precision
    try:
        set_up_arithmetic("tf32", deterministic=True)
        assert arithmetic_of("float32") == "tf32"
        assert arithmetic_of("bfloat16") == "bfloat16"
        set_up_arithmetic("ieee", deterministic=True)
        assert arithmetic_of("float32") == "float32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = convolutions  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = products


def test_a_cpu_has_no_peak_and_a_gpu_that_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert device_peak_flops(torch.device("cpu"), "bfloat16") is None
    assert device_peak_flops(torch.device("cuda"), "bfloat16") == 121e12
