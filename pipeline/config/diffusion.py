"""Settings of the forward process, of what the network learns, and of the reverse process."""

import itertools
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from ddpm_pipeline.config.base import Settings, refuse_idle
from ddpm_pipeline.config.net import NetConfig
from ddpm_pipeline.config.plugins import (
    OWN,
    SAMPLERS,
    SCHEDULES,
    PluginIdentity,
    SamplerPlugin,
    WithPlugin,
    require_plugin,
    with_identity,
)
from ddpm_pipeline.errors import UserError


def _kinds_of(group: str) -> WithJsonSchema:
    """For editors: our own kinds, or the name of another package's."""
    return WithJsonSchema({"anyOf": [{"enum": [*OWN[group]]}, {"type": "string"}]})


ScheduleKind = Annotated[str, Field(min_length=1, max_length=250), _kinds_of(SCHEDULES)]
Target = Literal["eps", "x0", "v"]
Weighting = Literal["uniform", "min-snr"]
Variance = Literal["fixed-small", "fixed-large", "learned"]
SamplerKind = Annotated[str, Field(min_length=1, max_length=250), _kinds_of(SAMPLERS)]
Spacing = Literal["trailing", "leading", "karras"]


def _without_absent(document: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without fields that are None: documents keep the bytes and digests that they had before there were these."""
    return {name: value for name, value in document.items() if value is not None or name not in names}


class ScheduleConfig(WithPlugin):
    """How fast the forward process turns an image into noise: the betas."""

    PLUGIN_GROUP: ClassVar[str] = SCHEDULES

    kind: ScheduleKind = "linear"
    """Family of the schedule. "linear" is DDPM's, "cosine" improved DDPM's; "given" takes `betas` as they
    are. Another package's is named by its entry point in `ddpm_pipeline.schedules`, or as `module:object`."""
    num_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """T, the number of forward steps; 1000 in nearly all published work. For "given", the length of
    `betas`."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta of "linear" and "scaled-linear". DDPM's value."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Last beta of "linear" and "scaled-linear". DDPM's value at T = 1000."""
    cosine_offset: Annotated[float, Field(ge=0, lt=1)] = 0.008
    """s of the cosine schedule: keeps the first betas from vanishing. Improved DDPM's value."""
    sigmoid_start: float = -3.0
    """Where on the logistic curve "sigmoid" begins. Chen 2023's value."""
    sigmoid_end: float = 3.0
    """Where on the logistic curve "sigmoid" ends. Chen 2023's value."""
    sigmoid_temperature: Annotated[float, Field(gt=0)] = 1.0
    """tau of "sigmoid": below 1 steepens the middle. Chen 2023's default."""
    max_beta: Annotated[float, Field(gt=0, le=0.999999)] = 0.999
    """Ceiling of a beta of "cosine" and "sigmoid", whose last step would otherwise be singular."""
    betas: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(max_length=1_000_000)] = ()
    """The betas of a "given" schedule, first step first."""
    zero_terminal_snr: bool = False
    """Rescale so that x_T holds no trace of the image (Lin et al. 2023). Needs target "x0" or "v"."""
    settings: dict[str, Any] | None = None
    """Settings of another package's schedule."""
    plugin: PluginIdentity | None = None
    """Its package and version; filled in where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        return with_identity(SCHEDULES, data, "linear")

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        because = f'for kind "{self.kind}"'
        if self.kind not in ("linear", "scaled-linear"):
            refuse_idle(self, ("beta_start", "beta_end"), because)
        if self.kind != "cosine":
            refuse_idle(self, ("cosine_offset",), because)
        if self.kind != "sigmoid":
            refuse_idle(self, ("sigmoid_start", "sigmoid_end", "sigmoid_temperature"), because)
        if self.kind not in ("cosine", "sigmoid"):
            refuse_idle(self, ("max_beta",), because)
        if self.kind != "given":
            refuse_idle(self, ("betas",), because)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "given" and len(self.betas) != self.num_steps:
            raise ValueError(
                f"betas holds {len(self.betas)} values but num_steps is {self.num_steps}; make them equal"
            )
        if self.beta_start > self.beta_end:
            raise ValueError("beta_start is above beta_end; noise must grow with the step")
        if self.sigmoid_start >= self.sigmoid_end:
            raise ValueError("sigmoid_start must be below sigmoid_end")
        if self.zero_terminal_snr and self.num_steps < 2:
            raise ValueError("zero_terminal_snr needs num_steps of at least 2")
        return self

    @model_serializer(mode="wrap")
    def _documented(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_absent(handler(self), "settings", "plugin")


class ObjectiveConfig(Settings):
    """What the network predicts and how its errors are weighed."""

    target: Target = "eps"
    """What the network predicts: the noise (DDPM), the image, or v = sqrt(abar) eps - sqrt(1-abar) x0."""
    weighting: Weighting = "uniform"
    """Weight of a timestep's error. "uniform" is L_simple; "min-snr" is Hang et al. 2023."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Ceiling of the signal-to-noise ratio in the "min-snr" weight. The paper's value."""
    variance: Variance = "fixed-small"
    """Variance of the reverse step that the likelihood bound is measured with; "learned" makes the network
    predict it in a second half of its output channels and adds the bound to the loss (improved DDPM)."""
    vlb_weight: Annotated[float, Field(gt=0)] = 0.001
    """Lambda of L_hybrid = L_simple + lambda L_vlb, L_vlb being the whole bound in bits per dimension."""

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        if self.weighting != "min-snr":
            refuse_idle(self, ("min_snr_gamma",), f'for weighting "{self.weighting}"')
        if self.variance != "learned":
            refuse_idle(self, ("vlb_weight",), f'for variance "{self.variance}"')
        return self


class TimestepsConfig(Settings):
    """Which timesteps a training draws."""

    importance: bool = False
    """Each as often as its weight in the objective says; the errors then count alike. The expected gradient is that of
    equally likely timesteps, and varies less."""
    stratified: bool = False
    """The timesteps of a step lie evenly over the schedule, moved by one random number (Kingma et al. 2021, appendix
    I), so the gradient varies less. They depend on global_batch then."""


class SamplerConfig(WithPlugin):
    """How noise becomes an image: the reverse process."""

    PLUGIN_GROUP: ClassVar[str] = SAMPLERS

    kind: SamplerKind = "ancestral"
    """"ancestral" is DDPM's chain; "ddim", "dpm++2m", "dpm++3m", "unipc" and "heun" need far fewer steps;
    "consistency" one to four, and a distilled model (`ddpm distill`). Another package's is named by its entry point in
    `ddpm_pipeline.samplers`, or as `module:object`."""
    num_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Steps from noise to image. "heun" evaluates the network twice a step but the last."""
    spacing: Spacing = "trailing"
    """Which noise levels are visited. "trailing" starts at pure noise; "leading" (improved DDPM, DDIM) never
    sees it; "karras" spaces by sigma^(1/rho) and asks the network for fractional timesteps."""
    timesteps: tuple[Annotated[int, Field(ge=0, lt=1_000_000)], ...] | None = None
    """The timesteps to visit, falling, `num_steps` of them; None = by `spacing`."""
    karras_rho: Annotated[float, Field(gt=0, le=1000)] = 7.0
    """rho of the "karras" spacing: larger puts more steps near the image. EDM's value."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fresh noise in "ddim": 0 is deterministic, 1 has the ancestral chain's small variance."""
    variance: Variance = "fixed-small"
    """Variance of an "ancestral" step. "fixed-large" is DDPM's best at 1000 steps and collapses at few."""
    clip_x0: bool = True
    """Clip every estimate of the image to [-1, 1]; right for pixels, wrong for unbounded data."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """w of classifier-free guidance, eps = eps_uncond + w (eps_cond - eps_uncond); 1 leaves it off."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma = sqrt((1-abar)/abar), lowest and highest, between which guidance acts; None is
    always."""
    settings: dict[str, Any] | None = None
    """Settings of another package's sampler."""
    plugin: PluginIdentity | None = None
    """Its package and version; filled in where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        return with_identity(SAMPLERS, data, "ancestral")

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        because = f'for kind "{self.kind}"'
        if self.kind == "consistency":
            refuse_idle(
                self,
                ("guidance_scale", "guidance_interval"),
                "for a distilled model, whose guidance is baked in",
            )
        if self.kind != "ddim":
            refuse_idle(self, ("eta",), because)
        if self.kind != "ancestral":
            refuse_idle(self, ("variance",), because)
        if self.spacing != "karras":
            refuse_idle(self, ("karras_rho",), f'for spacing "{self.spacing}"')
        if self.guidance_scale == 1.0:
            refuse_idle(self, ("guidance_interval",), "while guidance_scale is 1")
        if self.timesteps is not None:
            refuse_idle(self, ("spacing",), "with timesteps")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (
            self.guidance_interval is not None
            and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]
        ):
            raise ValueError("guidance_interval must be (lowest, highest) with 0 <= lowest < highest")
        steps = self.timesteps
        if steps is not None and (
            len(steps) != self.num_steps or any(a <= b for a, b in itertools.pairwise(steps))
        ):
            raise ValueError(
                f"timesteps must be {self.num_steps} (num_steps) numbers, each below the one before"
            )
        return self

    @model_serializer(mode="wrap")
    def _documented(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_absent(handler(self), "timesteps", "settings", "plugin")

    @property
    def definition(self) -> SamplerPlugin:
        """What its package says of it. UserError unless that is installed, in the version recorded here."""
        found = require_plugin(self, "sampler.kind").plugin
        if not isinstance(found, SamplerPlugin):
            raise UserError(f"sampler.kind {self.kind!r}: is registered as no SamplerPlugin; register one")
        return found

    @property
    def levels(self) -> list[int]:
        """The level of each call of the network, of `num_steps` levels and the clean image after them."""
        return list(self.definition.levels(self.num_steps, self.options))

    @property
    def draws_noise(self) -> bool:
        """Whether one initial noise has many images."""
        return self.eta > 0 if self.kind == "ddim" else self.definition.draws_noise


def check_together(
    schedule: ScheduleConfig,
    objective: ObjectiveConfig,
    sampler: SamplerConfig | None = None,
    net: NetConfig | None = None,
    *,
    distilled: bool = False,
) -> None:
    """Refuse settings that are fine alone and wrong together. What is not given is not checked.

    distilled: whether the network is, or is to become, a few-step model.
    Raises: UserError, in one line, naming the field.
    """
    if schedule.zero_terminal_snr and objective.target == "eps":
        raise UserError(
            'objective.target "eps" says nothing about the image once schedule.zero_terminal_snr leaves x_T '
            'without signal; use target "v" or "x0"'
        )
    if schedule.zero_terminal_snr and objective.weighting == "min-snr":
        raise UserError(
            'objective.weighting "min-snr" gives no weight to the pure noise that sampling begins with under '
            'schedule.zero_terminal_snr; use weighting "uniform"'
        )
    if net is not None:
        _check_net(net, objective, sampler)
    if sampler is not None:
        _check_sampler(schedule, objective, sampler)
        _check_distilled(sampler, distilled)


def _check_net(net: NetConfig, objective: ObjectiveConfig, sampler: SamplerConfig | None) -> None:
    expected = net.in_channels * (2 if objective.variance == "learned" else 1)
    if net.out_channels != expected:
        raise UserError(
            f'net.out_channels is {net.out_channels}, but with objective.variance "{objective.variance}" a network '
            f"for {net.in_channels} channels has {expected}; change one of the two"
        )
    if sampler is not None and sampler.guidance_scale != 1 and net.null_label is None:
        raise UserError(
            f"sampler.guidance_scale {sampler.guidance_scale:g} needs a network with net.num_classes and "
            "net.null_class; leave guidance_scale at 1"
        )


def _check_sampler(schedule: ScheduleConfig, objective: ObjectiveConfig, sampler: SamplerConfig) -> None:
    if sampler.spacing != "karras" and sampler.num_steps > schedule.num_steps:
        raise UserError(
            f"sampler.num_steps is {sampler.num_steps} but the schedule has {schedule.num_steps} steps; "
            "use at most as many"
        )
    if sampler.timesteps is not None and sampler.timesteps[0] >= schedule.num_steps:
        raise UserError(
            f"sampler.timesteps begin with {sampler.timesteps[0]}, but the last one of the schedule is "
            f"{schedule.num_steps - 1}"
        )
    if sampler.variance == "learned" and objective.variance != "learned":
        raise UserError(
            'sampler.variance "learned" needs a network trained with objective.variance "learned"; '
            'use "fixed-small"'
        )
    if schedule.zero_terminal_snr and (sampler.kind == "heun" or sampler.spacing == "karras"):
        raise UserError(
            f"sampler.{'kind' if sampler.kind == 'heun' else 'spacing'} works on sigma, infinite at the "
            'start of a schedule with zero_terminal_snr; use "ddim" or "dpm++2m" with spacing "trailing"'
        )


def _check_distilled(sampler: SamplerConfig, distilled: bool) -> None:
    if distilled and sampler.kind != "consistency":
        raise UserError(
            f'sampler.kind "{sampler.kind}" does not fit a distilled model; use "consistency" with 1 to 4 '
            "num_steps and no guidance_scale"
        )
    if sampler.kind == "consistency" and not distilled:
        raise UserError(
            'sampler.kind "consistency" needs a distilled model (see ddpm distill); use "dpm++2m" for this one'
        )
