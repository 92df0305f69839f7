"""What holds for sampling as a whole: named noise, guidance, clipping, refusals."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig, check_together
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.diffusion import NoiseSchedule, SamplerStep, sample
from ddpm_pipeline.diffusion.samplers import Denoised, NetDenoise, ddim, heun
from ddpm_pipeline.diffusion.timesteps import (
    SamplingGrid,
    grid_at,
    karras_grid,
    leading_timesteps,
    make_grid,
    trailing_timesteps,
)
from ddpm_pipeline.errors import UserError
from tests.effort import long

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 4, 4)
SAMPLERS = [
    SamplerConfig(num_steps=7),
    SamplerConfig(kind="ddim", num_steps=7),
    SamplerConfig(kind="ddim", num_steps=7, eta=1.0, spacing="leading"),
    SamplerConfig(kind="dpm++2m", num_steps=7),
    SamplerConfig(kind="dpm++2m", num_steps=7, spacing="karras"),
    SamplerConfig(kind="dpm++3m", num_steps=7),
    SamplerConfig(kind="unipc", num_steps=7),
    SamplerConfig(kind="heun", num_steps=7, spacing="karras"),
    SamplerConfig(kind="consistency", num_steps=7),
]


class Labelled:
    """A network with classes 0..9 and "no class" 10, every output of which names its label."""

    null_label = 10

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        shift = 0 if class_labels is None else 0.01 * class_labels.reshape(-1, 1, 1, 1).float()
        return 0.9 * x + shift


def plain(x: Tensor, t: Tensor, **_: object) -> Tensor:
    return 0.9 * x + 0.1 * torch.sin(3 * x)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.kind}-{s.spacing}-{s.eta:g}")
def test_an_image_is_the_same_in_any_batch(sampler: SamplerConfig) -> None:
    index = torch.tensor([5, 0, 2**40, 17])
    whole = sample(plain, SCHEDULE, sampler, index, SHAPE, seed=0)
    assert whole.dtype == torch.float32
    assert whole.shape == (4, *SHAPE)
    assert float(whole.abs().max()) <= 1
    for rows in ([0], [3, 1], [2, 0, 1]):
        assert torch.equal(sample(plain, SCHEDULE, sampler, index[rows], SHAPE, seed=0), whole[rows])
    assert not torch.equal(sample(plain, SCHEDULE, sampler, index, SHAPE, seed=1), whole)


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(plain, SCHEDULE, SAMPLERS[0], torch.arange(2), SHAPE, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.kind}-{s.spacing}-{s.eta:g}")
def test_the_callback_sees_every_level_and_image(sampler: SamplerConfig) -> None:
    seen: list[SamplerStep] = []
    image = sample(plain, SCHEDULE, sampler, torch.arange(2), SHAPE, seed=0, on_step=seen.append)
    grid = make_grid(SCHEDULE, sampler)
    assert [step.k for step in seen] == list(range(7))
    assert [step.timestep for step in seen] == list(grid.timesteps)
    assert all(step.num_steps == 7 and step.x.shape == step.x0.shape == image.shape for step in seen)
    if sampler.kind not in ("dpm++2m", "dpm++3m", "unipc"):
        assert torch.allclose(seen[-1].x0, image, atol=1e-5)
    assert float(seen[0].x.std()) == pytest.approx(1, abs=0.2)


def test_guidance_moves_away_from_no_class_by_its_scale() -> None:
    """The noise of a guided step is without + w (with - without): here 0.1 + w (0.03 - 0.1) more than 0.9 x."""
    index, labels, shift = torch.arange(2), torch.tensor([3, 3]), {}
    for scale in (0.0, 1.0, 3.0):
        sampler = SamplerConfig(kind="ddim", num_steps=1, clip_x0=False, guidance_scale=scale)
        seen: list[SamplerStep] = []
        sample(Labelled(), SCHEDULE, sampler, index, SHAPE, 0, class_labels=labels, on_step=seen.append)
        a, s = make_grid(SCHEDULE, sampler).coefficients(0)
        shift[scale] = float(((seen[0].x - a * seen[0].x0) / s - 0.9 * seen[0].x).mean())
    assert shift == pytest.approx({0.0: 0.1, 1.0: 0.03, 3.0: -0.11}, abs=1e-4)


def test_guidance_outside_its_interval_costs_no_second_evaluation() -> None:
    grid = make_grid(SCHEDULE, SamplerConfig(num_steps=10))
    interval = (grid.sigma(7) * 0.99, grid.sigma(3) * 1.01)
    sampler = SamplerConfig(num_steps=10, guidance_scale=2.0, guidance_interval=interval)
    net = Labelled()
    sample(net, SCHEDULE, sampler, torch.arange(3), SHAPE, 0, class_labels=torch.arange(3))
    assert net.batches == [3, 3, 3, 6, 6, 6, 6, 6, 3, 3]


def test_clipping_rederives_the_noise() -> None:
    """A step from a clipped image must land at the level it aims at: same x_t, so a x0 + s eps = x."""
    sampler = SamplerConfig(kind="ddim", num_steps=4)
    grid = make_grid(SCHEDULE, sampler)
    denoise = NetDenoise(lambda x, t: -x, grid, ObjectiveConfig(), sampler)
    x = 3 * torch.randn(2, *SHAPE)
    for k in range(4):
        estimate = denoise(x, k)
        a, s = grid.coefficients(k)
        assert float(estimate.x0.abs().max()) <= 1
        assert torch.allclose(a * estimate.x0 + s * estimate.eps, x, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "ddim"},
        {"kind": "ddim", "eta": 1.0},
        {"kind": "dpm++2m"},
        {"kind": "dpm++3m"},
        {"kind": "unipc"},
    ],
)
@pytest.mark.parametrize("num_steps", [1, 10, long(333)])
@pytest.mark.parametrize("target", ["x0", "v"])
def test_sampling_starts_without_signal_under_zero_terminal_snr(
    settings: dict[str, object], num_steps: int, target: str
) -> None:
    schedule = SCHEDULE.with_zero_terminal_snr()
    sampler, objective = SamplerConfig(num_steps=num_steps, **settings), ObjectiveConfig(target=target)
    x = sample(
        lambda x, t: 0.5 * torch.tanh(x), schedule, sampler, torch.arange(2), SHAPE, 0, objective=objective
    )
    assert bool(x.isfinite().all())


@pytest.mark.parametrize(("T", "n"), [(1000, 10), (1000, 30), (1000, 1000), (7, 3), (1, 1), (4000, 999)])
def test_trailing_starts_at_pure_noise_and_falls(T: int, n: int) -> None:
    visited = trailing_timesteps(T, n)
    assert visited[0] == T - 1
    assert len(visited) == n
    assert all(a > b for a, b in itertools.pairwise(visited))
    assert visited[-1] >= 0


def test_leading_ends_at_zero_and_never_sees_pure_noise() -> None:
    assert leading_timesteps(1000, 4) == [750, 500, 250, 0]


def test_karras_levels_are_even_in_the_root_and_tell_fractional_times() -> None:
    grid = karras_grid(SCHEDULE, 9, rho=7.0)
    roots = [grid.sigma(k) ** (1 / 7) for k in range(9)]
    gaps = [a - b for a, b in itertools.pairwise(roots)]
    assert gaps == pytest.approx([gaps[0]] * 8, rel=1e-6)
    assert grid.timesteps[0] == pytest.approx(999)
    assert grid.timesteps[-1] == pytest.approx(0, abs=1e-9)
    assert not float(grid.timesteps[4]).is_integer()
    assert grid.alpha_bars[-1] == 1


def test_a_single_karras_level_is_the_noisiest() -> None:
    grid = karras_grid(SCHEDULE, 1)
    assert grid.timesteps == pytest.approx((999,))
    assert grid.alpha_bars == pytest.approx((float(SCHEDULE.alpha_bars[-1]), 1.0))


def test_any_falling_subset_of_steps_can_be_sampled() -> None:
    grid = grid_at(SCHEDULE, [999, 123, 122, 5])
    assert ddim(lambda x, k: _known(x, k, grid), torch.randn(2, *SHAPE), grid).abs().max() < 1e-5


def test_ddim_without_eta_never_asks_for_noise() -> None:
    grid = grid_at(SCHEDULE, [999, 500, 5])

    def refuse(k: int) -> Tensor:
        raise AssertionError(f"asked for the noise of level {k}")

    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        ddim(lambda x, k: _known(x, k, grid), x, grid, refuse), ddim(lambda x, k: _known(x, k, grid), x, grid)
    )


def test_half_the_log_of_the_signal_to_noise_ratio() -> None:
    grid = grid_at(SCHEDULE, [999, 500, 5])
    for k in range(3):
        a, s = grid.coefficients(k)
        assert grid.half_log_snr(k) == pytest.approx(math.log(a / s), rel=1e-9)
    assert grid.half_log_snr(3) == math.inf


def _known(x: Tensor, k: int, grid: SamplingGrid) -> Denoised:
    return Denoised(torch.zeros_like(x), x / grid.coefficients(k)[1])


ZERO_SNR = SCHEDULE.with_zero_terminal_snr()


def draw(sampler: SamplerConfig, schedule: NoiseSchedule = SCHEDULE, **extra: object) -> Callable[[], Tensor]:
    return lambda: sample(plain, schedule, sampler, torch.arange(2), SHAPE, 0, **extra)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (draw(SamplerConfig(num_steps=1001)), "num_steps"),
        (draw(SamplerConfig(num_steps=5, guidance_scale=2.0)), "class_labels"),
        (draw(SamplerConfig(num_steps=5, guidance_scale=2.0), class_labels=torch.arange(2)), "no class"),
        (draw(SamplerConfig(num_steps=5), class_labels=torch.arange(3)), "class_labels"),
        (draw(SamplerConfig(num_steps=5, variance="learned")), "variance"),
        (draw(SamplerConfig(num_steps=5), ZERO_SNR), "eps"),
        (
            draw(
                SamplerConfig(num_steps=5, spacing="karras"), ZERO_SNR, objective=ObjectiveConfig(target="v")
            ),
            "spacing",
        ),
        (
            draw(SamplerConfig(kind="heun", num_steps=5), ZERO_SNR, objective=ObjectiveConfig(target="v")),
            "grid",
        ),
        (lambda: grid_at(SCHEDULE, [3, 3]), "timesteps"),
        (lambda: grid_at(SCHEDULE, []), "timesteps"),
        (lambda: ddim(None, torch.zeros(1), grid_at(SCHEDULE, [3]), eta=0.5), "noise"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "cosine", "beta_end": 0.01}, "beta_end"),
        ({"kind": "linear", "cosine_offset": 0.1}, "cosine_offset"),
        ({"kind": "linear", "max_beta": 0.5}, "max_beta"),
        ({"kind": "linear", "betas": (0.1,)}, "betas"),
        ({"kind": "given", "num_steps": 2, "betas": (0.1,)}, "betas"),
        ({"beta_start": 0.5}, "beta_start"),
        ({"num_steps": 1, "zero_terminal_snr": True}, "num_steps"),
        ({"kind": "sigmoid", "sigmoid_start": 4.0}, "sigmoid_start"),
    ],
)
def test_schedule_settings_without_effect_or_sense_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ScheduleConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "ancestral", "eta": 0.5}, "eta"),
        ({"kind": "ddim", "variance": "fixed-large"}, "variance"),
        ({"karras_rho": 5.0}, "karras_rho"),
        ({"guidance_interval": (0.1, 2.0)}, "guidance_interval"),
        ({"guidance_scale": 2.0, "guidance_interval": (2.0, 0.1)}, "guidance_interval"),
        ({"kind": "euler"}, "kind"),
    ],
)
def test_sampler_settings_without_effect_or_sense_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        SamplerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"min_snr_gamma": 3.0}, "min_snr_gamma"), ({"vlb_weight": 0.1}, "vlb_weight")],
)
def test_objective_settings_without_effect_are_refused(settings: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize(
    ("schedule", "objective", "sampler", "field"),
    [
        ({"zero_terminal_snr": True}, {}, {}, "objective.target"),
        ({"zero_terminal_snr": True}, {"target": "v", "weighting": "min-snr"}, {}, "objective.weighting"),
        ({}, {}, {"num_steps": 1001}, "sampler.num_steps"),
        ({}, {}, {"num_steps": 2, "timesteps": [1000, 3]}, "sampler.timesteps"),
        ({}, {}, {"variance": "learned"}, "sampler.variance"),
        ({"zero_terminal_snr": True}, {"target": "v"}, {"kind": "heun"}, "sampler.kind"),
        ({"zero_terminal_snr": True}, {"target": "v"}, {"spacing": "karras"}, "sampler.spacing"),
    ],
)
def test_settings_that_clash_are_refused_in_one_line(
    schedule: dict, objective: dict, sampler: dict, field: str
) -> None:
    with pytest.raises(UserError, match=field) as error:
        check_together(ScheduleConfig(**schedule), ObjectiveConfig(**objective), SamplerConfig(**sampler))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("net", "objective", "sampler", "field"),
    [
        ({}, {"variance": "learned"}, {}, "net.out_channels"),
        ({"out_channels": 6}, {}, {}, "net.out_channels"),
        ({"num_classes": 10}, {}, {"guidance_scale": 2.0}, "sampler.guidance_scale"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    net: dict, objective: dict, sampler: dict, field: str
) -> None:
    settings = ScheduleConfig(), ObjectiveConfig(**objective), SamplerConfig(**sampler), UNetConfig(**net)
    with pytest.raises(UserError, match=field):
        check_together(*settings)


def test_the_levels_may_be_named_one_by_one() -> None:
    sampler = SamplerConfig(kind="consistency", num_steps=2, timesteps=(999, 300))
    assert make_grid(SCHEDULE, sampler).timesteps == (999, 300)
    assert make_grid(SCHEDULE, sampler).alpha_bars[1] == float(SCHEDULE.alpha_bars[300])
    assert SamplerConfig.model_validate(sampler.model_dump(mode="json")) == sampler
    assert "timesteps" not in SamplerConfig().model_dump()  # digests of specs before there was the setting
    for steps in ((300, 999), (999,), (999, 999)):
        with pytest.raises(
            ValueError, match=r"timesteps must be 2 \(num_steps\) numbers, each below the one before"
        ):
            SamplerConfig(kind="consistency", num_steps=2, timesteps=steps)
    with pytest.raises(ValueError, match="spacing has no effect with timesteps"):
        SamplerConfig(num_steps=2, timesteps=(9, 3), spacing="leading")


def test_settings_survive_json() -> None:
    for config in (
        SamplerConfig(kind="ddim", eta=0.5, guidance_scale=2, guidance_interval=(0.1, 9.0)),
        ScheduleConfig(kind="given", num_steps=2, betas=(0.1, 0.2)),
        ObjectiveConfig(variance="learned", vlb_weight=0.01),
    ):
        assert type(config).model_validate_json(config.model_dump_json()) == config


def test_heun_of_a_network_that_knows_the_image_is_exact() -> None:
    image = torch.rand(2, *SHAPE) * 2 - 1
    grid = karras_grid(SCHEDULE, 5)

    def denoise(x: Tensor, k: int) -> object:
        return Denoised(image, x)

    assert torch.allclose(heun(denoise, torch.randn_like(image), grid), image, atol=1e-4)
    assert math.isinf(make_grid(ZERO_SNR, SamplerConfig(num_steps=2)).sigma(0))
