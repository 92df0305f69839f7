"""Each sampler's trajectory against the diffusers scheduler of the same method, given the same noise.

Diffusers keeps its tables in float32, off by up to 1.7e-4 in 1 - abar_1; the paper's are exact, so these tests hand
the schedulers our float64 table and compare what is left: the steps.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, Target
from ddpm_pipeline.diffusion import NoiseSchedule, SamplerStep, Stream, sample
from ddpm_pipeline.diffusion.noise import normal
from ddpm_pipeline.diffusion.timesteps import make_grid
from tests.effort import long

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 4, 4)
INDEX = torch.arange(2)
SEED = 11
PREDICTIONS: dict[Target, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def cases(*variants: tuple[object, ...], targets: Iterable[Target] = tuple(PREDICTIONS)) -> list[Any]:
    """(num_steps, target, *variant): every target in ten steps of every variant, 200 steps of the first one.

    A step is a step, and targets differ in what a single one makes of the network's output. With --long also 50 steps,
    and the whole schedule for every variant.
    """
    found: list[Any] = []
    for number, variant in enumerate(variants):
        found += [(10, target, *variant) for target in targets]
        found += [long(50, target, *variant) for target in targets]
        found += [] if number else [(200, "eps", *variant)]
        found.append(long(1000, "eps", *variant))
    return found


def toy(target: Target, learned: bool = False) -> Callable[..., Tensor]:
    """A smooth stand-in for a network, near enough to a denoiser for trajectories to stay bounded."""

    def net(x: Tensor, t: Tensor | float, **_: object) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
        image = 0.5 * torch.sin(2 * x + time)
        prediction = {"eps": 0.9 * x + 0.1 * torch.cos(3 * x + time), "x0": image, "v": time * x - image}[
            target
        ]
        return torch.cat([prediction, torch.sin(5 * x)], dim=1) if learned else prediction

    return net


def ours(sampler: SamplerConfig, target: Target, learned: bool = False) -> list[Tensor]:
    """All x_t, and the image."""
    seen: list[Tensor] = []

    def watch(step: SamplerStep) -> None:
        seen.append(step.x)

    objective = ObjectiveConfig(target=target, variance="learned" if learned else "fixed-small")
    net = toy(target, learned)
    image = sample(net, SCHEDULE, sampler, INDEX, SHAPE, SEED, objective=objective, on_step=watch)
    return [*seen, image]


def named_noise(step: int) -> Tensor:
    return normal(SEED, Stream.SAMPLE_NOISE, INDEX, SHAPE, step=step)


def exact_tables(scheduler: Any) -> Any:
    scheduler.alphas_cumprod = SCHEDULE.alpha_bars
    return scheduler


def assert_same_trajectory(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1), f"after step {k}"


@pytest.mark.parametrize(
    ("num_steps", "target", "variance"), cases(("fixed-small",), ("fixed-large",), ("learned",))
)
def test_ancestral_is_ddpm(
    num_steps: int, target: Target, variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers adds noise to the finished image unless its last timestep is 0; the papers never do, so none here."""
    learned = variance == "learned"
    scheduler = exact_tables(
        DDPMScheduler(
            prediction_type=PREDICTIONS[target],
            timestep_spacing="trailing",
            variance_type="learned_range" if learned else variance.replace("-", "_"),
        )
    )
    scheduler.set_timesteps(num_steps)
    x, net = named_noise(0), toy(target, learned)
    theirs = [x]
    for step, t in enumerate(scheduler.timesteps, start=1):
        noise = named_noise(step) if step < num_steps else torch.zeros_like(x)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise
        )
        x = scheduler.step(net(x, t), int(t), x).prev_sample.float()
        theirs.append(x)
    sampler = SamplerConfig(num_steps=num_steps, variance=variance)
    assert_same_trajectory(ours(sampler, target, learned), theirs)


@pytest.mark.parametrize(
    ("num_steps", "target", "eta", "spacing"),
    cases((0.7, "trailing"), (0.0, "trailing"), (0.0, "leading"), (0.7, "leading")),
)
def test_ddim_is_ddim(num_steps: int, target: Target, eta: float, spacing: str) -> None:
    """With use_clipped_model_output: by default diffusers goes on with a noise that belongs to the unclipped image."""
    scheduler = exact_tables(
        DDIMScheduler(prediction_type=PREDICTIONS[target], timestep_spacing=spacing, clip_sample=True)
    )
    scheduler.set_timesteps(num_steps)
    x, net = named_noise(0), toy(target)
    theirs = [x]
    for step, t in enumerate(scheduler.timesteps, start=1):
        noise = named_noise(step) if eta > 0 and step < num_steps else torch.zeros_like(x)
        extra = {"variance_noise": noise, "use_clipped_model_output": True}
        x = scheduler.step(net(x, t), int(t), x, eta=eta, **extra).prev_sample.float()
        theirs.append(x)
    sampler = SamplerConfig(kind="ddim", num_steps=num_steps, eta=eta, spacing=spacing)
    assert_same_trajectory(ours(sampler, target), theirs)


def test_diffusers_ddim_steps_past_its_own_list_where_we_follow_it() -> None:
    """30 steps of 1000: diffusers aims at t - 33, not at the next entry of its list, and leaves signal behind."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(30)
    visited = scheduler.timesteps.tolist()
    aimed = [t - 1000 // 30 for t in visited[:-1]]
    assert aimed != visited[1:]
    grid = make_grid(SCHEDULE, SamplerConfig(kind="ddim", num_steps=30))
    assert list(grid.timesteps) == visited
    assert grid.alpha_bars[1:-1] == tuple(SCHEDULE.alpha_bars[t].item() for t in visited[1:])


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("num_steps", "target", "spacing"), cases(("trailing",), ("karras",)))
def test_dpm_solver_is_dpm_solver(num_steps: int, target: Target, spacing: str, order: int) -> None:
    # No lower order but for the last step, which has no other.
    make = partial(DPMSolverMultistepScheduler, solver_order=order, lower_order_final=False)
    require_same_as_multistep(make, f"dpm++{order}m", num_steps, target, spacing)


@pytest.mark.parametrize(("num_steps", "target", "spacing"), cases(("trailing",), ("karras",)))
def test_unipc_is_unipc(num_steps: int, target: Target, spacing: str) -> None:
    make = partial(UniPCMultistepScheduler, solver_order=3)
    require_same_as_multistep(make, "unipc", num_steps, target, spacing)


def require_same_as_multistep(
    make: Callable[..., Any], kind: str, num_steps: int, target: Target, spacing: str
) -> None:
    """Diffusers rounds the timesteps of Karras' levels; the network here is told ours in both cases."""
    scheduler = exact_tables(
        make(
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=PREDICTIONS[target],
            timestep_spacing="trailing",
            use_karras_sigmas=spacing == "karras",
            final_sigmas_type="zero",
        )
    )
    scheduler.set_timesteps(num_steps)
    settings = {"kind": kind, "num_steps": num_steps, "spacing": spacing, "clip_x0": False}
    sampler = SamplerConfig.model_validate(settings)
    grid, net = make_grid(SCHEDULE, sampler), toy(target)
    exact = torch.tensor([grid.sigma(k) for k in range(num_steps + 1)], dtype=torch.float64)
    # Differences of neighbouring log sigmas are all a step knows: at 1000 steps float32 leaves them three digits.
    assert torch.allclose(scheduler.sigmas.double(), exact, rtol=1e-5)
    scheduler.sigmas = exact
    x = named_noise(0)
    theirs = [x]
    for t, time in zip(scheduler.timesteps, grid.timesteps, strict=True):
        x = scheduler.step(net(x, time), t, x).prev_sample.float()
        theirs.append(x)
    assert_same_trajectory(ours(sampler, target), theirs)


@pytest.mark.parametrize(
    ("num_steps", "target", "spacing"), cases(("trailing",), ("karras",), targets=("eps", "v"))
)
def test_heun_is_heun(num_steps: int, target: Target, spacing: str) -> None:
    """In sigma's coordinates, x / a. Diffusers starts "trailing" at sigma z, where x_T / a is sqrt(sigma^2 + 1) z."""
    karras = spacing == "karras"
    scheduler = exact_tables(
        HeunDiscreteScheduler(
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=PREDICTIONS[target],
            timestep_spacing="linspace" if karras else "trailing",
            use_karras_sigmas=karras,
        )
    )
    scheduler.set_timesteps(num_steps)
    net = toy(target)
    scaled = named_noise(0) * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    theirs = [named_noise(0)]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(scaled, t)
        scaled = scheduler.step(net(x, t), t, scaled).prev_sample.float()
        if i % 2 == 1 or i + 1 == len(scheduler.timesteps):
            sigma = scheduler.sigmas[i + 1]
            theirs.append(scaled / (sigma**2 + 1).sqrt())
    sampler = SamplerConfig(kind="heun", num_steps=num_steps, spacing=spacing, clip_x0=False)
    assert_same_trajectory(ours(sampler, target), theirs)
