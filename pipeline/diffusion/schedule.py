"""The forward process: how much of the image and how much noise x_t holds, and what follows from it.

Papers count t = 1..T; code counts t = 0..T-1, so that entry t of a table belongs to the paper's step t+1, and
"before entry 0" is the clean image, abar = 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ScheduleConfig
from ddpm_pipeline.config.plugins import require_plugin
from ddpm_pipeline.errors import UserError

CPU = torch.device("cpu")
Timestep = Tensor | int
FixedVariance = Literal["fixed-small", "fixed-large"]


class Gaussian(NamedTuple):
    """Mean (B, ...) and variance (B, 1, ...) or (1, 1, ...) of an isotropic normal distribution."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """An immutable table of betas; every other quantity follows from it.

    All tables are float64 of shape (T,). A coefficient is computed in float64 and rounded once, to float32
    (to float64 for a float64 image): in half precision 1 - abar is zero for the first steps. All are computed on the
    CPU, so they have the same bits for any device.
    """

    betas: Tensor
    alpha_bars: Tensor
    device: torch.device = CPU
    """Where the tables that are gathered from lie; `betas` and `alpha_bars` are on the CPU, where samplers plan."""

    @classmethod
    def given(cls, betas: Tensor | Sequence[float]) -> Self:
        """A schedule with these betas, shape (T,), each in (0, 1].

        Raises: ValueError naming betas.
        """
        table = torch.as_tensor(betas, dtype=torch.float64, device=CPU).detach().clone()
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"betas must have shape (T,) with T >= 1, not {tuple(table.shape)}")
        if not bool(((table > 0) & (table <= 1)).all()):
            raise ValueError("betas must all lie in (0, 1]")
        return cls(betas=table, alpha_bars=torch.cumprod(1 - table, dim=0))

    @classmethod
    def from_alpha_bars(cls, alpha_bars: Tensor, max_beta: float = 1.0) -> Self:
        """The schedule whose signal is `alpha_bars`, shape (T,), falling from below 1; betas are cut at
        `max_beta`."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
        return cls.given((1 - alpha_bars / before).clamp(max=max_beta))

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Betas evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020, section 4)."""
        _check_range(T, beta_start, beta_end)
        return cls.given(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Self:
        """Square roots of the betas evenly spaced (Rombach et al. 2022)."""
        _check_range(T, beta_start, beta_end)
        return cls.given(
            torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64).square()
        )

    @classmethod
    def cosine(cls, T: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Self:
        """abar(t) = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2) (Nichol & Dhariwal 2021, eq. 17)."""
        _check_steps(T)
        phase = (torch.arange(T + 1, dtype=torch.float64) / T + offset) / (1 + offset)
        signal = torch.cos(phase * (math.pi / 2)).square()
        return cls.from_alpha_bars(signal[1:] / signal[0], max_beta)

    @classmethod
    def sigmoid(
        cls,
        T: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        temperature: float = 1.0,
        max_beta: float = 0.999,
    ) -> Self:
        """abar falls along the logistic curve from `start` to `end` (Chen 2023, algorithm 1)."""
        _check_steps(T)
        if not start < end:
            raise ValueError(f"start ({start}) must be below end ({end})")
        place = torch.arange(T + 1, dtype=torch.float64) / T * (end - start) + start
        curve = torch.sigmoid(place / temperature)
        return cls.from_alpha_bars((curve[-1] - curve[1:]) / (curve[-1] - curve[0]), max_beta)

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Self:
        """The schedule that `config` describes.

        Raises: UserError if its numbers leave a step without noise, as a very steep sigmoid does.
        """
        try:
            schedule = cls._made(config)
            return schedule.with_zero_terminal_snr() if config.zero_terminal_snr else schedule
        except ValueError as error:
            raise UserError(f'schedule of kind "{config.kind}": {error}; choose gentler settings') from error

    @classmethod
    def _made(cls, config: ScheduleConfig) -> Self:
        make: MakeSchedule = require_plugin(config, "schedule.kind").plugin.load()
        made: object = make(config.num_steps, config.options)
        # By its tables, not by its class: code stored beside models of version 0.1.0 has this class under another name.
        betas, alpha_bars = getattr(made, "betas", None), getattr(made, "alpha_bars", None)
        if (
            not isinstance(betas, Tensor)
            or not isinstance(alpha_bars, Tensor)
            or len(betas) != config.num_steps
        ):
            raise ValueError(f"its package made no NoiseSchedule of {config.num_steps} steps")
        return cls(betas, alpha_bars)

    def with_zero_terminal_snr(self) -> Self:
        """Shift and scale sqrt(abar) so that its last entry is 0 and its first stays (Lin et al. 2023,
        algorithm 1)."""
        if self.T < 2:
            raise ValueError("zero terminal SNR needs T >= 2: the first entry stays and the last becomes 0")
        root = self.alpha_bars.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return type(self).from_alpha_bars(root.square())

    def to(self, device: torch.device | str) -> Self:
        """The same schedule for images on `device`, to which each table is copied once, when it is first needed."""
        return replace(self, device=torch.device(device))

    @property
    def T(self) -> int:  # noqa: N802 - the papers' and the contract's name
        """Number of steps."""
        return len(self.betas)

    @property
    def alpha_bars_before(self) -> Tensor:
        """abar one step earlier: 1 at entry 0."""
        return torch.cat([self.alpha_bars.new_ones(1), self.alpha_bars[:-1]])

    @property
    def posterior_variances(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0): beta_t (1 - abar_{t-1}) / (1 - abar_t); 0 at entry 0 (DDPM eq.
        7)."""
        return self.betas * (1 - self.alpha_bars_before) / (1 - self.alpha_bars)

    def variances(self, kind: FixedVariance) -> Tensor:
        """Fixed variance of a reverse step with entry 0, whose posterior has none, made positive.

        "fixed-small" is the posterior's with entry 1 repeated at entry 0 (a T of 1 keeps beta_1);
        "fixed-large" is beta with entry 0 replaced in the same way (DDPM section 3.2, improved DDPM section
        3.1).
        """
        small = self.posterior_variances
        first = small[1:2] if self.T > 1 else self.betas[:1]
        if kind == "fixed-small":
            return torch.cat([first, small[1:]])
        return torch.cat([first, self.betas[1:]])

    def snr(self, t: Timestep | None = None) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar): float64 (T,), or (B,) at timesteps `t`."""
        ratio = self._snr_table
        return ratio.to(CPU) if t is None else ratio[self._check(t).to(ratio.device)]

    def gather(self, table: Tensor, t: Timestep, like: Tensor) -> Tensor:
        """Entries `t` of a float64 (T,) table, shaped to broadcast over `like` (B, ...), on its device.

        Returns: float32, or float64 for a float64 `like`; shape (B, 1, ...), or (1, 1, ...) for an int.
        Raises: ValueError naming t for a timestep outside 0..T-1 or of the wrong shape.
        """
        t = self._check(t)
        if t.ndim == 1 and len(t) not in (1, len(like)):
            raise ValueError(f"t has {len(t)} entries for a batch of {len(like)}")
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        table = table.to(like.device)
        # An index on the CPU would be copied to the device; a number is not.
        picked = table[int(t)] if t.ndim == 0 and t.device == CPU else table[t.to(like.device)]
        return picked.to(dtype).reshape(-1, *[1] * (like.ndim - 1))

    def coefficients(self, t: Timestep, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to broadcast over `like` (see `gather`)."""
        return self.gather(self._signal_table, t, like), self.gather(self._noise_table, t, like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, any step at once (DDPM eq. 4).

        x0, noise: (B, ...); t: (B,) integers in 0..T-1, or one int. Returns (B, ...).
        """
        check_same_shape("noise", noise, x0)
        signal, noise_scale = self.coefficients(t, x0)
        return signal * x0 + noise_scale * noise

    def q_step(self, x: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """One forward step, from before entry `t` to it: sqrt(1 - beta_t) x + sqrt(beta_t) noise (DDPM eq.
        2)."""
        check_same_shape("noise", noise, x)
        keep = self.gather((1 - self.betas).sqrt(), t, x)
        return keep * x + self.gather(self.betas.sqrt(), t, x) * noise

    def predict_x0(self, x_t: Tensor, noise: Tensor, t: Timestep, clip: bool = False) -> Tensor:
        """The image that `x_t` and its noise imply: (x_t - sqrt(1 - abar_t) noise) / sqrt(abar_t) (DDPM eq.
        15).

        clip: cut to [-1, 1]. Where abar_t is 0 (zero terminal SNR) the noise says nothing: ValueError naming
        t.
        """
        check_same_shape("noise", noise, x_t)
        signal, noise_scale = self.coefficients(t, x_t)
        if bool((signal == 0).any()):
            raise ValueError("t holds a step without signal (abar = 0): noise does not determine the image")
        x0 = (x_t - noise_scale * noise) / signal
        return x0.clamp(-1, 1) if clip else x0

    def predict_noise(self, x_t: Tensor, x0: Tensor, t: Timestep) -> Tensor:
        """The noise that `x_t` and an image imply: (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)."""
        check_same_shape("x0", x0, x_t)
        signal, noise_scale = self.coefficients(t, x_t)
        return (x_t - signal * x0) / noise_scale

    def posterior(self, x0: Tensor, x_t: Tensor, t: Timestep) -> Gaussian:
        """q(x_{t-1} | x_t, x_0) (DDPM eq. 6 and 7); at entry 0 the mean is exactly x0 and the variance 0."""
        variance, log_variance = self._posterior_variance_tables
        mean = self.posterior_mean(x0, x_t, t)
        return Gaussian(mean, self.gather(variance, t, x_t), self.gather(log_variance, t, x_t))

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        check_same_shape("x0", x0, x_t)
        of_x0, of_x_t = self._posterior_mean_tables
        return self.gather(of_x0, t, x_t) * x0 + self.gather(of_x_t, t, x_t) * x_t

    def log_variance(self, kind: FixedVariance, t: Timestep, like: Tensor) -> Tensor:
        """Logarithm of `variances(kind)` at `t`, shaped to broadcast over `like`."""
        return self.gather(self._log_variance_tables[kind], t, like)

    def log_beta(self, t: Timestep, like: Tensor) -> Tensor:
        """Logarithm of beta_t, shaped to broadcast over `like`."""
        return self.gather(self._log_beta_table, t, like)

    def step(
        self,
        predicted_noise: Tensor,
        t: int,
        x_t: Tensor,
        noise: Tensor | None = None,
        variance: FixedVariance = "fixed-small",
        clip: bool = True,
    ) -> Tensor:
        """One reverse step of the ancestral chain, x_t to x_{t-1} (DDPM algorithm 2, through the x0
        estimate).

        predicted_noise, x_t: (B, ...); t: int in 0..T-1; noise: standard normal like x_t, by default drawn
        from torch's global generator (the samplers of this package always name theirs); clip: cut the x0
        estimate to [-1, 1]. No noise is added at t = 0.
        """
        x0 = self.predict_x0(x_t, predicted_noise, t, clip=clip)
        mean = self.posterior_mean(x0, x_t, t)
        if int(t) == 0:
            return mean
        noise = torch.randn_like(x_t) if noise is None else noise
        check_same_shape("noise", noise, x_t)
        return mean + self.gather(self.variances(variance).sqrt(), t, x_t) * noise

    @cached_property
    def _signal_table(self) -> Tensor:
        return self.alpha_bars.sqrt().to(self.device)

    @cached_property
    def _noise_table(self) -> Tensor:
        return (1 - self.alpha_bars).sqrt().to(self.device)

    @cached_property
    def _snr_table(self) -> Tensor:
        return (self.alpha_bars / (1 - self.alpha_bars)).to(self.device)

    @cached_property
    def _posterior_mean_tables(self) -> tuple[Tensor, Tensor]:
        """What x0 and x_t are multiplied by in the posterior's mean."""
        before, now = self.alpha_bars_before, self.alpha_bars
        of_x0 = before.sqrt() * self.betas / (1 - now)
        # Exactly 1 by algebra; cancellation in 1 - abar must not leave an ulp.
        of_x0 = torch.cat([torch.ones_like(of_x0[:1]), of_x0[1:]])
        of_x_t = (1 - self.betas).sqrt() * (1 - before) / (1 - now)
        return of_x0.to(self.device), of_x_t.to(self.device)

    @cached_property
    def _posterior_variance_tables(self) -> tuple[Tensor, Tensor]:
        """The posterior's variance, and its logarithm."""
        variance = self.posterior_variances
        return variance.to(self.device), variance.log().to(self.device)

    @cached_property
    def _log_variance_tables(self) -> dict[FixedVariance, Tensor]:
        kinds: tuple[FixedVariance, ...] = ("fixed-small", "fixed-large")
        return {kind: self.variances(kind).log().to(self.device) for kind in kinds}

    @cached_property
    def _log_beta_table(self) -> Tensor:
        return self.betas.log().to(self.device)

    def _check(self, t: Timestep) -> Tensor:
        t = torch.as_tensor(t)
        if t.is_floating_point() or t.dtype == torch.bool or t.ndim > 1:
            raise ValueError(
                f"t must be an int or an integer tensor of shape (B,), not {t.dtype} {tuple(t.shape)}"
            )
        # On an accelerator the comparison would stall the queue; indexing there has its own bounds check.
        if t.device.type == "cpu" and t.numel() and (int(t.min()) < 0 or int(t.max()) >= self.T):
            raise ValueError(f"t must lie in 0..{self.T - 1}")
        return t


class MakeSchedule(Protocol):
    """What a kind of schedule does, ours or another package's: a schedule of `num_steps` steps, a function of its
    arguments alone. `NoiseSchedule.given` and `NoiseSchedule.from_alpha_bars` make one of a table. ValueError names
    what the settings leave impossible. settings: of the plug-in's own class (of our kinds, the `ScheduleConfig`).
    """

    def __call__(self, num_steps: int, settings: Any, /) -> NoiseSchedule: ...


def make_linear(num_steps: int, settings: ScheduleConfig) -> NoiseSchedule:
    """`NoiseSchedule.linear` as a kind."""
    return NoiseSchedule.linear(num_steps, settings.beta_start, settings.beta_end)


def make_scaled_linear(num_steps: int, settings: ScheduleConfig) -> NoiseSchedule:
    """`NoiseSchedule.scaled_linear` as a kind."""
    return NoiseSchedule.scaled_linear(num_steps, settings.beta_start, settings.beta_end)


def make_cosine(num_steps: int, settings: ScheduleConfig) -> NoiseSchedule:
    """`NoiseSchedule.cosine` as a kind."""
    return NoiseSchedule.cosine(num_steps, settings.cosine_offset, settings.max_beta)


def make_sigmoid(num_steps: int, settings: ScheduleConfig) -> NoiseSchedule:
    """`NoiseSchedule.sigmoid` as a kind."""
    ends = (settings.sigmoid_start, settings.sigmoid_end, settings.sigmoid_temperature)
    return NoiseSchedule.sigmoid(num_steps, *ends, settings.max_beta)


def make_given(num_steps: int, settings: ScheduleConfig) -> NoiseSchedule:
    """The betas of the settings, as they are."""
    return NoiseSchedule.given(settings.betas)


def _check_steps(T: int) -> None:
    if T < 1:
        raise ValueError(f"T must be at least 1, not {T}")


def _check_range(T: int, beta_start: float, beta_end: float) -> None:
    _check_steps(T)
    if not 0 < beta_start < 1:
        raise ValueError(f"beta_start must lie in (0, 1), not {beta_start}")
    if not beta_start <= beta_end < 1:
        raise ValueError(f"beta_end must lie in [beta_start, 1), not {beta_end}")


def check_same_shape(name: str, value: Tensor, like: Tensor) -> None:
    """Raise ValueError naming `name` for a shape that differs."""
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(like.shape)}")
