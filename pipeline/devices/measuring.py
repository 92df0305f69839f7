"""The device on which models are judged: features, likelihoods, and the samples of the gate and the sampler search."""

import torch

from ddpm_pipeline.devices.arithmetic import set_up_arithmetic
from ddpm_pipeline.devices.cuda_device import read_device_kind
from ddpm_pipeline.errors import UserError


def measuring_gpu() -> str:
    """Name of this process's GPU. UserError if torch cannot use one."""
    try:
        kind = read_device_kind(torch.device("cuda"))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"evaluate.gpus_per_task: the GPU cannot be used ({reason}); install the driver and the build of torch "
            "that belong together, or set it to 0"
        ) from error
    assert kind is not None
    return kind.name


def measuring_device(gpu: str | None) -> torch.device:
    """Configure this process to measure, and return its device: the GPU of this name, or one thread of the CPU.

    UserError for a GPU of another name: both sides of a comparison are to round alike.
    """
    torch.set_num_threads(1)
    if gpu is None:
        return torch.device("cpu")
    set_up_arithmetic("ieee", deterministic=True)
    found = measuring_gpu()
    if found != gpu:
        raise UserError(
            f"evaluate.gpus_per_task: a task has {found}, others have {gpu}, which rounds differently; use a cluster "
            "whose GPUs are of one model, or set it to 0 to measure on CPUs"
        )
    return torch.device("cuda")
