"""This package's own kinds, as `Plugin` objects: what pyproject.toml registers under the groups of `plugins`.

The settings of networks, samplers, schedules and sources are fields of the groups that choose them (`sampler.eta`,
`schedule.beta_end`), older than plug-ins, so their code gets those groups as its settings.
"""

from ddpm_pipeline.config.mirrors import TensorBoardSettings, TrackioSettings
from ddpm_pipeline.config.plugins import Plugin, SamplerPlugin, at_two_levels

UNET = Plugin("ddpm_pipeline.nets.unet:build")

_OF_SAMPLERS = "ddpm_pipeline.diffusion.samplers"
ANCESTRAL = SamplerPlugin(f"{_OF_SAMPLERS}:run_ancestral", capturable=True)
DDIM = SamplerPlugin(f"{_OF_SAMPLERS}:run_ddim", capturable=True)
_OF_MULTISTEP = "ddpm_pipeline.diffusion.multistep"
DPM_SOLVER_PP_2M = SamplerPlugin(f"{_OF_MULTISTEP}:run_dpm_solver_pp_2m", draws_noise=False, capturable=True)
DPM_SOLVER_PP_3M = SamplerPlugin(f"{_OF_MULTISTEP}:run_dpm_solver_pp_3m", draws_noise=False, capturable=True)
UNIPC = SamplerPlugin(f"{_OF_MULTISTEP}:run_unipc", draws_noise=False, capturable=True)
HEUN = SamplerPlugin(f"{_OF_SAMPLERS}:run_heun", draws_noise=False, levels=at_two_levels, capturable=True)
CONSISTENCY = SamplerPlugin(f"{_OF_SAMPLERS}:run_consistency", capturable=True)

_OF_SCHEDULES = "ddpm_pipeline.diffusion.schedule"
LINEAR = Plugin(f"{_OF_SCHEDULES}:make_linear")
SCALED_LINEAR = Plugin(f"{_OF_SCHEDULES}:make_scaled_linear")
COSINE = Plugin(f"{_OF_SCHEDULES}:make_cosine")
SIGMOID = Plugin(f"{_OF_SCHEDULES}:make_sigmoid")
GIVEN = Plugin(f"{_OF_SCHEDULES}:make_given")

FEATURE_FILE = Plugin("ddpm_pipeline.features.networks:open_file")
DIGITS = Plugin("ddpm_pipeline.data.packing.source_plugin:open_digits")

_OF_LOGGERS = "ddpm_pipeline.tracking"
TENSORBOARD = Plugin(
    f"{_OF_LOGGERS}.tensorboard_mirror:open_tensorboard",
    TensorBoardSettings,
    needs=("tensorboardX", "ddpm-pipeline[tensorboard]"),
)
TRACKIO = Plugin(
    f"{_OF_LOGGERS}.trackio_mirror:open_trackio",
    TrackioSettings,
    needs=("trackio", "ddpm-pipeline[trackio]"),
)
