"""With a perfect denoiser every sampler must draw from the data's own distribution, at its method's order."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from ddpm_pipeline.config.diffusion import SamplerConfig, ScheduleConfig
from ddpm_pipeline.diffusion import NoiseSchedule, sample
from ddpm_pipeline.diffusion.ideal import Mixture, three_blobs
from ddpm_pipeline.diffusion.multistep import dpm_solver_pp_2m, dpm_solver_pp_3m, unipc
from ddpm_pipeline.diffusion.noise import Stream, normal
from ddpm_pipeline.diffusion.samplers import ddim, heun
from ddpm_pipeline.diffusion.timesteps import karras_grid
from tests.effort import is_long, long

SCHEDULE = NoiseSchedule.linear()
BLOBS = three_blobs()


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(kind="ancestral", num_steps=1000, clip_x0=False),
        long(SamplerConfig(kind="ancestral", num_steps=1000, variance="fixed-large", clip_x0=False)),
        long(SamplerConfig(kind="ancestral", num_steps=250, clip_x0=False)),
        long(SamplerConfig(kind="ddim", num_steps=200, clip_x0=False)),
        SamplerConfig(kind="ddim", num_steps=200, eta=1.0, clip_x0=False),
        long(SamplerConfig(kind="ddim", num_steps=200, spacing="leading", clip_x0=False)),
        SamplerConfig(kind="dpm++2m", num_steps=50, clip_x0=False),
        long(SamplerConfig(kind="dpm++2m", num_steps=30, spacing="karras", clip_x0=False)),
        SamplerConfig(kind="dpm++3m", num_steps=50, clip_x0=False),
        SamplerConfig(kind="unipc", num_steps=50, clip_x0=False),
        long(SamplerConfig(kind="heun", num_steps=50, clip_x0=False)),
        SamplerConfig(kind="heun", num_steps=30, spacing="karras", clip_x0=False),
    ],
    ids=lambda s: f"{s.kind}-{s.num_steps}-{s.spacing}-eta{s.eta:g}-{s.variance}",
)
def test_samples_have_the_mean_and_covariance_of_the_data(sampler: SamplerConfig) -> None:
    evaluations = 1_000_000 if is_long() else 300_000
    net, count = BLOBS.net(SCHEDULE), evaluations // max(sampler.num_steps, 50)
    index = torch.arange(count)
    x = sample(net, SCHEDULE, sampler, index, (2, 1, 1), seed=0).flatten(1).double()
    covariance = BLOBS.covariance()
    largest = float(covariance.diagonal().max())
    assert bool(((x.mean(0) - BLOBS.mean()).abs() < 4 * math.sqrt(largest / count) + 0.005).all())
    assert torch.allclose(torch.cov(x.T), covariance, atol=largest * (4 * math.sqrt(2 / count) + 0.01))


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "ddim": ddim,
    "dpm++2m": dpm_solver_pp_2m,
    "dpm++3m": dpm_solver_pp_3m,
    "unipc": unipc,
    "heun": heun,
}


def flow(method: str, num_steps: int) -> torch.Tensor:
    """Where the method leads 64 named starts, float64."""
    x = normal(0, Stream.SAMPLE_NOISE, torch.arange(64), (2,)).double()
    grid = karras_grid(SCHEDULE, num_steps)
    return METHODS[method](BLOBS.denoise(grid), x, grid)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return flow("unipc", 600)  # far below the error of 160 steps of any method


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++2m", 2), ("heun", 2)])
def test_the_error_falls_at_the_methods_order(method: str, order: int, exact: torch.Tensor) -> None:
    errors = [float((flow(method, n) - exact).norm(dim=1).mean()) for n in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(("method", "share"), [("dpm++3m", 0.5), ("unipc", 0.1)])
def test_third_order_leaves_a_share_of_the_error_of_second_order(
    method: str, share: float, exact: torch.Tensor
) -> None:
    """Not their order: the first two steps, of lower order, decide at many steps what is left of the error."""
    error, of_second = (float((flow(m, 80) - exact).norm(dim=1).mean()) for m in (method, "dpm++2m"))
    assert error < share * of_second


def test_the_perfect_denoiser_of_one_gaussian_is_linear_regression() -> None:
    one = Mixture(torch.ones(1).double(), torch.tensor([[0.3]]).double(), torch.tensor([0.5]).double())
    x, signal = torch.tensor([[-1.0], [2.0]]).double(), 0.7
    slope = math.sqrt(signal) * 0.25 / (signal * 0.25 + 0.3)
    expected = 0.3 + slope * (x - math.sqrt(signal) * 0.3)
    assert torch.allclose(one.expected_x0(x, signal), expected, atol=1e-12)


CORNERS = Mixture(
    weights=torch.full((4,), 0.25, dtype=torch.float64),
    means=torch.sign(torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
    stds=torch.full((4,), 0.3, dtype=torch.float64),
)
"""Images of 4 x 4 black and white pixels, blurred beyond [-1, 1]."""


@pytest.mark.parametrize(
    "schedule", ["linear", long("scaled-linear"), "cosine", long("sigmoid"), "linear of one step"]
)
def test_a_sampler_that_clips_ends_within_the_range_of_pixels(schedule: str) -> None:
    """Whatever its kind, steps and spacing: Heun's last difference used to overshoot by up to 0.002."""
    kind, _, one = schedule.partition(" of ")
    process = NoiseSchedule.from_config(
        ScheduleConfig.model_validate({"kind": kind, "num_steps": 1 if one else 1000})
    )
    net = CORNERS.net(process)
    kinds: list[dict[str, object]] = [
        {"kind": "ancestral"},
        {"kind": "ancestral", "variance": "fixed-large"},
        {"kind": "ddim"},
        {"kind": "ddim", "eta": 1.0},
        {"kind": "dpm++2m"},
        {"kind": "dpm++3m"},
        {"kind": "unipc"},
        {"kind": "heun"},
    ]
    for settings, spacing, steps in itertools.product(
        kinds, ("trailing", "leading", "karras"), (1, 2, 3, 5, 10) if is_long() else (1, 2, 5)
    ):
        if spacing != "karras" and steps > process.T:
            continue
        sampler = SamplerConfig.model_validate({**settings, "spacing": spacing, "num_steps": steps})
        images = sample(net, process, sampler, torch.arange(16), (1, 4, 4), seed=0)
        assert bool((images.abs() <= 1).all()), (sampler, float(images.abs().max()))
