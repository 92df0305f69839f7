"""The forward process against its published numbers and against itself."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.config.diffusion import ScheduleConfig
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.errors import UserError
from tests.effort import examples, long

FAMILIES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled-linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "sigmoid": NoiseSchedule.sigmoid,
    "given": lambda T: NoiseSchedule.given([0.3 * (i + 1) / T for i in range(T)]),
    "zero terminal SNR": lambda T: NoiseSchedule.linear(T).with_zero_terminal_snr(),
}
DDPM = NoiseSchedule.linear()


def test_the_linear_schedule_has_the_published_numbers() -> None:
    assert DDPM.alpha_bars[-1].item() == pytest.approx(4.035829765e-5, rel=1e-9)
    ratio = (1 / DDPM.alpha_bars - 1).sqrt()
    assert ratio[0].item() == pytest.approx(0.0100005, rel=1e-6)
    assert ratio[-1].item() == pytest.approx(157.40728, rel=1e-7)
    assert DDPM.posterior_variances[1].item() == pytest.approx(5.4531877e-5, rel=1e-7)


def test_one_forward_step_adds_noise_to_what_is_kept() -> None:
    x, noise = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 3.0]])
    keep, add = math.sqrt(1 - DDPM.betas[500].item()), math.sqrt(DDPM.betas[500].item())
    expected = [keep * 0.5 + add * 2.0, -keep + add * 3.0]
    assert DDPM.q_step(x, noise, 500)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_variance_of_the_last_reverse_step_is_that_of_the_one_before_it_or_beta() -> None:
    for T in (2, 3, 10):
        schedule = NoiseSchedule.linear(T, 0.1, 0.3)
        small, large = schedule.variances("fixed-small"), schedule.variances("fixed-large")
        assert small[0] == small[1] == schedule.posterior_variances[1] == large[0]
        assert torch.equal(large[1:], schedule.betas[1:])
    alone = NoiseSchedule.linear(1, 0.1, 0.3)
    assert torch.equal(alone.variances("fixed-small"), alone.betas)


def test_schedules_have_a_thousand_steps_by_default() -> None:
    found = (NoiseSchedule.linear(), NoiseSchedule.cosine(), NoiseSchedule.sigmoid())
    assert [len(schedule.betas) for schedule in found] == [1000] * 3


def test_a_float32_table_would_be_off_by_as_much_as_is_known() -> None:
    single = 1 - torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    off = abs(single[0].item() / (1 - DDPM.alpha_bars[0].item()) - 1)
    assert off == pytest.approx(1.7e-4, rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("T", [2, 10, long(1000)])
def test_any_step_at_once_is_all_single_steps_in_mean_and_variance(name: str, T: int) -> None:
    schedule = FAMILIES[name](T)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mean, variance = one.clone(), zero.clone()
    for t in range(T):
        # q_step is affine in x and noise: its action on a mean is that without noise, and its gains are read off.
        mean = schedule.q_step(mean, zero, t)
        variance = schedule.q_step(one, zero, t) ** 2 * variance + schedule.q_step(zero, one, t) ** 2
        assert mean.item() == pytest.approx(schedule.add_noise(one, zero, t).item(), rel=1e-9, abs=1e-12)
        assert variance.item() == pytest.approx(schedule.add_noise(zero, one, t).item() ** 2, rel=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_bayes_rule_gives_the_posterior(name: str) -> None:
    schedule, x0, x_t = FAMILIES[name](50), torch.tensor([0.3]).double(), torch.tensor([-0.7]).double()
    for t in range(1, 50):
        before, beta = schedule.alpha_bars[t - 1], schedule.betas[t]
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x0) / precision
        posterior = schedule.posterior(x0, x_t, t)
        assert posterior.mean.item() == pytest.approx(mean.item(), rel=1e-9)
        assert posterior.variance.item() == pytest.approx(1 / precision.item(), rel=1e-9)
        assert posterior.log_variance.item() == pytest.approx(-math.log(precision.item()), rel=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_posterior_of_the_first_step_is_exactly_x0(name: str) -> None:
    x0, x_t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    posterior = FAMILIES[name](1000).posterior(x0, x_t, 0)
    assert torch.equal(posterior.mean, x0)
    assert posterior.variance.item() == 0


def test_zero_terminal_snr_keeps_the_first_entry_and_empties_the_last() -> None:
    schedule = DDPM.with_zero_terminal_snr()
    assert schedule.alpha_bars[0].item() == pytest.approx(DDPM.alpha_bars[0].item(), rel=1e-12)
    assert schedule.alpha_bars[-1].item() == 0
    assert schedule.snr()[-1].item() == 0


def test_the_cosine_schedule_follows_its_formula_until_its_last_step() -> None:
    schedule = NoiseSchedule.cosine(100)

    def f(t: int) -> float:
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in range(98):
        assert schedule.alpha_bars[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert schedule.betas[-1].item() == 0.999


def test_the_sigmoid_schedule_is_symmetric_about_its_middle() -> None:
    signal = NoiseSchedule.sigmoid(100).alpha_bars
    assert signal[49].item() == pytest.approx(0.5, abs=1e-12)
    for t in range(98):
        assert (signal[t] + signal[98 - t]).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "scaled-linear", "cosine", "sigmoid"])
@given(T=st.integers(1, 4000))
@examples(15)
def test_any_length_gives_falling_signal_in_float64(kind: str, T: int) -> None:
    schedule = NoiseSchedule.from_config(ScheduleConfig(kind=kind, num_steps=T))
    assert schedule.T == T
    assert schedule.betas.dtype == schedule.alpha_bars.dtype == torch.float64
    assert bool((schedule.alpha_bars.diff() < 0).all())
    assert bool(((schedule.alpha_bars > 0) & (schedule.alpha_bars < 1)).all())
    for variances in (schedule.variances("fixed-small"), schedule.variances("fixed-large")):
        assert bool((variances > 0).all())
        assert bool(variances.log().isfinite().all())


@given(
    t=st.integers(0, 999),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    shape=st.sampled_from([(2,), (2, 3), (2, 3, 4, 5)]),
)
@examples(40)
def test_noising_keeps_shape_and_never_computes_in_half_precision(
    t: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x0 = torch.zeros(shape, dtype=dtype)
    noised = DDPM.add_noise(x0, torch.ones_like(x0), torch.full((2,), t))
    assert noised.shape == shape
    assert noised.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = math.sqrt(1 - DDPM.alpha_bars[t].item())
    assert noised.flatten()[0].item() == pytest.approx(expected, rel=1e-7)


def test_one_timestep_stands_for_all_of_a_batch() -> None:
    x0, noise = torch.full((3, 2), 0.5), torch.ones(3, 2)
    expected = DDPM.add_noise(x0, noise, torch.full((3,), 7))
    for t in (7, torch.tensor(7), torch.tensor([7])):
        assert torch.equal(DDPM.add_noise(x0, noise, t), expected)


@given(t=st.integers(0, 999), clip=st.booleans())
@examples(30)
def test_image_and_noise_are_recovered_from_x_t(t: int, clip: bool) -> None:
    generator = torch.Generator().manual_seed(t)
    x0 = torch.rand(3, 2, dtype=torch.float64, generator=generator) * 2 - 1
    noise = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    x_t = DDPM.add_noise(x0, noise, t)
    assert torch.allclose(DDPM.predict_x0(x_t, noise, t, clip=clip), x0, atol=1e-11)
    assert torch.allclose(DDPM.predict_noise(x_t, x0, t), noise, atol=1e-11)


def test_the_loops_of_the_introduction_run_as_written() -> None:
    schedule = NoiseSchedule.linear(T=20, beta_end=0.3)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    noise = torch.randn_like(images)
    noisy = schedule.add_noise(images, noise, torch.randint(0, schedule.T, (4,)))
    assert noisy.shape == images.shape
    image = torch.randn(1, 3, 8, 8)
    for t in reversed(range(schedule.T)):
        known = schedule.predict_noise(image, images[:1], t)
        image = schedule.step(known, t, image)
    assert torch.allclose(image, images[:1], atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_a_step_has_the_posteriors_mean_and_the_chosen_variance(variance: str) -> None:
    x_t, predicted, t = torch.zeros(1, 1), torch.zeros(1, 1), 500
    added = DDPM.step(predicted, t, x_t, noise=torch.ones(1, 1), variance=variance)
    expected = DDPM.betas[t] if variance == "fixed-large" else DDPM.posterior_variances[t]
    assert added.item() == pytest.approx(expected.sqrt().item(), rel=1e-6)


def test_tables_move_to_a_device_and_stay_the_same() -> None:
    moved = DDPM.to("cpu")
    assert torch.equal(moved.alpha_bars, DDPM.alpha_bars)


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(kind="sigmoid", sigmoid_temperature=0.001),
        ScheduleConfig(kind="given", num_steps=3, betas=(0.1, 1.0, 0.5), zero_terminal_snr=True),
    ],
)
def test_settings_that_leave_a_step_without_noise_are_the_users_to_put_right(config: ScheduleConfig) -> None:
    with pytest.raises(UserError, match="schedule"):
        NoiseSchedule.from_config(config)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: NoiseSchedule.linear(T=0), "T"),
        (lambda: NoiseSchedule.linear(beta_start=0.0), "beta_start"),
        (lambda: NoiseSchedule.linear(beta_start=0.5), "beta_end"),
        (lambda: NoiseSchedule.given([]), "betas"),
        (lambda: NoiseSchedule.given([0.1, 1.5]), "betas"),
        (lambda: NoiseSchedule.sigmoid(start=1.0, end=0.0), "start"),
        (lambda: NoiseSchedule.linear(1).with_zero_terminal_snr(), "T"),
        (lambda: DDPM.add_noise(X, X, 1000), "t must"),
        (lambda: DDPM.add_noise(X, X, -1), "t must"),
        (lambda: DDPM.add_noise(X, X, torch.zeros(3, dtype=torch.int64)), "t has"),
        (lambda: DDPM.add_noise(X, X, torch.zeros(0, dtype=torch.int64)), "t has"),
        (lambda: DDPM.add_noise(X, X, torch.zeros(2)), "t must"),
        (lambda: DDPM.add_noise(X, X[:1], 0), "noise"),
        (lambda: DDPM.step(X, 5, X, noise=X[:1]), "noise"),
        (lambda: DDPM.posterior(X[:1], X, 5), "x0"),
        (lambda: DDPM.with_zero_terminal_snr().predict_x0(X, X, 999), "t holds"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
