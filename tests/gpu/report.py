"""The report of `make gpu-test`, as Markdown to paste into the docs."""

import platform
from dataclasses import dataclass

import torch

from ddpm_pipeline.devices.cuda_device import driver_version


@dataclass(frozen=True)
class Result:
    """How one promise fared on the GPUs."""

    promise: str
    outcome: str
    """passed, failed, or skipped with its reason."""
    seconds: float


def about_this_machine() -> dict[str, str]:
    """Names and versions that the results hold for."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if names else "none"
    return {
        "GPU": ", ".join(counted) or "none",
        "driver": driver_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "NCCL": nccl,
        "Python": platform.python_version(),
    }


def rendered(about: dict[str, str], results: list[Result]) -> str:
    """Two tables."""
    lines = [f"| {name} | {value} |" for name, value in about.items()]
    rows = [f"| {r.promise.replace('_', ' ')} | {r.outcome} | {r.seconds:.1f} |" for r in results]
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            *lines,
            "",
            "| promise | result | seconds |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )
