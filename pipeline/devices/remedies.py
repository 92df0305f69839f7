"""What helps against the errors with which CUDA, torch and its compiler refuse to work."""

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


def unfit_remedy(error: BaseException) -> str | None:
    """What helps where the machine is not set up for the work; None for errors that another attempt may not meet."""
    text = str(error)
    return next((remedy for sign, remedy in _SETUP.items() if sign in text), None)


def remedy_for(error: BaseException) -> str:
    """What helps against an error of CUDA's."""
    text = str(error)
    return next((remedy for sign, remedy in (_SETUP | _PASSING).items() if sign in text), OTHER_REMEDY)
