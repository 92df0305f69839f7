"""The errors with which CUDA, torch and its compiler refuse to work, in one line, and what helps against them."""

import re

from ddpm_pipeline.devices.out_of_memory import is_out_of_memory

OTHER_REMEDY = (
    "look for NVRM and Xid in the machine's dmesg, and take it out of the cluster until it is repaired"
)
_INSTALL_DRIVER = (
    "install NVIDIA's driver; a container also needs NVIDIA's runtime (Docker: --gpus; Kubernetes: "
    "runtimeClassName)"
)
_NEWER_DRIVER = "install a newer NVIDIA driver, or torch for an older CUDA"
_SETUP = {
    "not compiled with CUDA enabled": "install the CUDA build of torch",
    "driver on your system is too old": _NEWER_DRIVER,
    "Found no NVIDIA driver": _INSTALL_DRIVER,
    "No CUDA GPUs are available": f"compare nvidia-smi's list with CUDA_VISIBLE_DEVICES; {_INSTALL_DRIVER}",
    "Error 803": "reboot the machine: the driver's libraries and its kernel module differ",
    "Error 804": _NEWER_DRIVER,
    "no kernel image is available": "install torch for this GPU's compute capability, or use other GPUs",
    "Failed to find C compiler": "install gcc, or set compile=false",
    "No working C++ compiler found": "install g++, or set compile=false",
    "Cannot find a working triton": "install the triton of torch's CUDA build, or set compile=false",
    "too old to be supported by the triton": "set compile=false, or use other GPUs",
}
"""By a part of the error: driver, torch and GPU do not fit together, and every attempt on the machine will fail."""
_PASSING = {
    "Error 802": "start nvidia-fabricmanager in the driver's version",
    "busy or unavailable": "end the process that holds the GPU exclusively, or set its compute mode to default",
    "uncorrectable ECC error": "reset the GPU, and replace it if that does not help",
}
"""The same for errors that another attempt may not meet."""
_NO_MEMORY = "no free memory for a small product", "end the process that fills it (nvidia-smi)"


def unfit_remedy(error: BaseException) -> str | None:
    """What helps where the machine is not set up for the work; None for errors that another attempt may not meet."""
    text = str(error)
    return next((remedy for sign, remedy in _SETUP.items() if sign in text), None)


def fault_and_remedy(error: BaseException) -> tuple[str, str]:
    """One line on an error of CUDA's while a GPU is set up or tried out, and what helps against it."""
    if is_out_of_memory(error):
        return _NO_MEMORY
    text = str(error)
    remedy = next((remedy for sign, remedy in (_SETUP | _PASSING).items() if sign in text), OTHER_REMEDY)
    return fact_of(error), remedy


def fact_of(error: BaseException) -> str:
    """The line of an error's text that says what happened, without the advice that follows it there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = next((line for line in lines if any(sign in line for sign in _SETUP | _PASSING)), lines[0])
    numbered = re.search(r"\bError \d+: .*", text)
    return (
        numbered[0] if numbered else re.split(r"(?<=[.)]) (?:Please|Alternatively)\b", text)[0].rstrip(". ")
    )
