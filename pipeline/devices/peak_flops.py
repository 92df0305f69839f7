"""Peak arithmetic of GPUs, by the vendor's data sheets, and which of its formats this process uses.

MFU, model FLOPs utilization (PaLM, appendix B), is a network's own operations a second over this peak.
"""

import re
from typing import Literal, NamedTuple

import torch

Arithmetic = Literal["float32", "tf32", "bfloat16", "float16"]
"""Format in which products are computed; sums are in float32."""


class _Peak(NamedTuple):
    """10^12 operations a second of dense matrices (data sheets print twice that for sparse ones)."""

    float32: float
    tf32: float | None
    """None before Ampere."""
    bfloat16: float | None
    float16: float


_PEAKS: dict[str, _Peak] = {
    r"A100-SXM4-[48]0GB|A100-PCIE-40GB|A100 80GB PCIe": _Peak(19.5, 156, 312, 312),
    r"A30": _Peak(10.3, 82, 165, 165),
    r"A40": _Peak(37.4, 74.8, 149.7, 149.7),
    r"A10": _Peak(31.2, 62.5, 125, 125),
    r"A10G": _Peak(35, 35, 70, 70),
    r"RTX A6000": _Peak(38.7, 77.4, 154.8, 154.8),
    r"H100 80GB HBM3|H200|GH200 .*": _Peak(67, 494.5, 989.5, 989.5),
    r"H100 PCIe": _Peak(51, 378, 756.5, 756.5),
    r"H100 NVL|H200 NVL": _Peak(60, 417.5, 835.5, 835.5),
    r"B200": _Peak(75, 1125, 2250, 2250),
    r"L4": _Peak(30.3, 60, 121, 121),
    r"L40": _Peak(90.5, 90.5, 181, 181),
    r"L40S": _Peak(91.6, 183, 362, 362),
    r"RTX 6000 Ada Generation": _Peak(91.1, 182.1, 364.2, 364.2),
    r"T4": _Peak(8.1, None, None, 65),
    r"V100-SXM2-(16|32)GB": _Peak(15.7, None, None, 125),
    r"V100-PCIE-(16|32)GB": _Peak(14, None, None, 112),
    r"RTX 3090": _Peak(35.6, 35.6, 71, 71),
    r"RTX 4090": _Peak(82.6, 82.6, 165.2, 165.2),
    r"RTX 5090": _Peak(104.8, 104.8, 209.5, 209.5),
}
"""By the whole name: a laptop's GPU or a slice of one is another device. GeForce cards: with sums in float32."""


def peak_flops(name: str, arithmetic: Arithmetic) -> float | None:
    """Operations a second that a GPU of this name can do at most; None for a name or a format that is not known."""
    short = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)
    for pattern, peak in _PEAKS.items():
        if re.fullmatch(pattern, short):
            value: float | None = getattr(peak, arithmetic)
            return None if value is None else value * 1e12
    return None


def arithmetic_of(precision: Literal["float32", "bfloat16", "float16"]) -> Arithmetic:
    """The format in which this process computes convolutions on a GPU, for a network of this precision."""
    convolutions: str = torch.backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if precision == "float32" and convolutions == "tf32" else precision


def device_peak_flops(
    device: torch.device, precision: Literal["float32", "bfloat16", "float16"]
) -> float | None:
    """Peak operations a second of the device that a network of this precision computes on; None for a CPU."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), arithmetic_of(precision))
