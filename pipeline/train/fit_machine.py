"""Whether this machine can do the work of a training without a cluster."""

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.devices.preflight import GpuNeeds, check_gpus, compiler_fault
from ddpm_pipeline.errors import UserError

GPUS_SETTING = "train.workers.gpus_per_worker"


def require_fit_machine(config: TrainConfig) -> None:
    """UserError if the GPU that the settings ask for cannot be used here, or the network not compiled."""
    if config.workers.gpus_per_worker:
        found = check_gpus(GpuNeeds(compiler=config.compile))[0]
        if found.fault is not None:
            raise UserError(
                f"{GPUS_SETTING}: {found.gpu} of this machine: {found.fault}; {found.remedy}; or set it to 0 to train "
                "on the CPU"
            )
    elif config.compile and (fault := compiler_fault("c++")) is not None:
        raise UserError(f"train.compile: {fault[0]}; {fault[1]}")
