"""Targets, weights and the variational bound."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, Target, Variance
from ddpm_pipeline.diffusion import NoiseSchedule, from_uint8, to_uint8, training_loss
from ddpm_pipeline.diffusion.bound import (
    gaussian_kl,
    level_log_probability,
    model_distribution,
    prior_term,
    vlb_term,
)
from ddpm_pipeline.diffusion.likelihood import bits_per_dim
from ddpm_pipeline.diffusion.objective import loss_weight
from ddpm_pipeline.diffusion.targets import eps_of, target_of, x0_of
from tests.effort import examples

SCHEDULE = NoiseSchedule.linear()
TARGETS: list[Target] = ["eps", "x0", "v"]


@given(
    angle=st.floats(0.05, 1.5), target=st.sampled_from(TARGETS), shape=st.sampled_from([(1,), (2, 3, 4, 4)])
)
@examples(40)
def test_every_target_leads_back_to_image_and_noise(
    angle: float, target: Target, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    a, s = math.cos(angle), math.sin(angle)
    prediction, x_t = target_of(target, x0, eps, a, s), a * x0 + s * eps
    assert torch.allclose(x0_of(target, prediction, x_t, a, s), x0, atol=1e-9)
    assert torch.allclose(eps_of(target, prediction, x_t, a, s), eps, atol=1e-9)


def oracle(x0: Tensor, noise: Tensor, target: Target) -> Callable[..., Tensor]:
    """A network that knows the answer."""

    def net(x: Tensor, t: Tensor, **_: object) -> Tensor:
        if target == "v":
            signal = SCHEDULE.gather(SCHEDULE.alpha_bars, t, x0)
            return signal.sqrt() * noise - (1 - signal).sqrt() * x0
        return noise if target == "eps" else x0

    return net


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0 = torch.rand(5, 3, 4, 4, generator=generator) * 2 - 1
    return x0, torch.tensor([0, 1, 250, 998, 999]), torch.randn(x0.shape, generator=generator)


@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_prediction_costs_nothing(target: Target) -> None:
    x0, t, noise = batch()
    terms = training_loss(SCHEDULE, ObjectiveConfig(target=target), oracle(x0, noise, target), x0, t, noise)
    assert terms.per_sample.shape == (5,)
    assert terms.per_sample.abs().max() < 1e-10
    assert terms.vlb_bits is None


@pytest.mark.parametrize("target", TARGETS)
def test_min_snr_is_one_weight_on_the_error_of_x0_whatever_the_target(target: Target) -> None:
    """Hang et al. 2023: eps and v losses are x0's times SNR and SNR + 1, and their weights undo exactly that."""
    x0, t, noise = batch()
    objective = ObjectiveConfig(target=target, weighting="min-snr")
    guess = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9)).double()
    x0, noise = x0.double(), noise.double()
    x_t = SCHEDULE.add_noise(x0, noise, t)
    a = SCHEDULE.alpha_bars[t].sqrt().reshape(-1, 1, 1, 1)
    s = (1 - SCHEDULE.alpha_bars[t]).sqrt().reshape(-1, 1, 1, 1)
    loss = training_loss(SCHEDULE, objective, lambda x, t, **_: guess, x0, t, noise).per_sample
    error = (x0_of(target, guess, x_t, a, s) - x0).square().flatten(1).mean(1)
    expected = SCHEDULE.snr(t).clamp(max=5.0) * error
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_the_uniform_loss_of_v_is_edms_preconditioned_loss_for_data_of_unit_variance() -> None:
    """Karras et al. 2022, table 1 and eq. 8, with sigma_data = 1 and sigma = s / a."""
    x0, t, noise = (each.double() if each.is_floating_point() else each for each in batch())
    a = SCHEDULE.alpha_bars[t].sqrt().reshape(-1, 1, 1, 1)
    s = (1 - SCHEDULE.alpha_bars[t]).sqrt().reshape(-1, 1, 1, 1)
    guess = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9)).double()
    sigma = s / a
    scale_in, skip, out = (sigma**2 + 1) ** -0.5, 1 / (sigma**2 + 1), sigma * (sigma**2 + 1) ** -0.5
    noised = x0 + sigma * noise
    assert torch.allclose(scale_in * noised, a * x0 + s * noise)
    denoised = skip * noised - out * guess  # EDM's network has the opposite sign of v
    edm = ((sigma**2 + 1) / sigma**2 * (denoised - x0).square()).flatten(1).mean(1)
    ours = training_loss(SCHEDULE, ObjectiveConfig(target="v"), lambda x, t, **_: guess, x0, t, noise)
    assert torch.allclose(ours.per_sample.double(), edm, rtol=1e-5)


def test_weights_stay_finite_without_terminal_signal() -> None:
    schedule = SCHEDULE.with_zero_terminal_snr()
    t = torch.arange(1000)
    for target in TARGETS:
        weight = loss_weight(schedule, ObjectiveConfig(target=target, weighting="min-snr"), t)
        assert bool(weight.isfinite().all())
    assert float(loss_weight(schedule, ObjectiveConfig(weighting="min-snr"), t)[-1]) == 1.0


def test_labels_and_dropout_reach_the_network_only_when_given() -> None:
    x0, t, noise = batch()
    seen: list[dict[str, object]] = []

    def net(x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        seen.append(conditions)
        return x

    labels, keys = torch.arange(5), object()
    training_loss(SCHEDULE, ObjectiveConfig(), net, x0, t, noise)
    training_loss(SCHEDULE, ObjectiveConfig(), net, x0, t, noise, class_labels=labels, dropout=keys)
    assert seen == [{}, {"class_labels": labels, "dropout": keys}]


def test_the_network_is_given_the_noised_images_and_their_timesteps() -> None:
    x0, t, noise = batch()
    seen: list[Tensor] = []

    def net(x: Tensor, at: Tensor, **_: object) -> Tensor:
        seen.extend((x, at))
        return x

    training_loss(SCHEDULE, ObjectiveConfig(), net, x0, t, noise)
    assert torch.allclose(seen[0], SCHEDULE.add_noise(x0, noise, t))
    assert torch.equal(seen[1], t)


def test_an_output_of_the_wrong_width_is_refused() -> None:
    x0, t, noise = batch()
    with pytest.raises(ValueError, match="output has 3 channels, expected 6"):
        training_loss(SCHEDULE, ObjectiveConfig(variance="learned"), lambda x, t: x, x0, t, noise)
    with pytest.raises(ValueError, match="t must have shape"):
        training_loss(SCHEDULE, ObjectiveConfig(), lambda x, t: x, x0, t[:2], noise)


def test_the_bound_teaches_the_variance_and_not_the_mean() -> None:
    x0, t, noise = batch()
    output = torch.zeros(5, 6, 4, 4, requires_grad=True)
    terms = training_loss(SCHEDULE, ObjectiveConfig(variance="learned"), lambda x, t: output, x0, t, noise)
    assert terms.vlb_bits is not None
    terms.vlb_bits.sum().backward()
    assert output.grad is not None
    assert bool((output.grad[:, :3] == 0).all())
    assert bool(output.grad.isfinite().all())
    assert bool((output.grad[:, 3:].flatten(1).abs().sum(1) > 0).all())
    hybrid = terms.squared_error + 0.001 * terms.vlb_bits
    assert torch.allclose(terms.per_sample, hybrid)


def test_the_bound_is_that_of_all_steps_with_the_variance_of_the_outputs_second_half() -> None:
    """A step is drawn at random, so its term stands for all T. Outputs of -1 and 1 are the ends of the range of
    variances (improved DDPM, section 3.1, with the output's range of the published networks).
    """
    x0, t, noise = batch()
    output = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    objective = ObjectiveConfig(target="x0", variance="learned")
    terms = training_loss(SCHEDULE, objective, lambda x, t: output, x0, t, noise)
    x_t, fraction = SCHEDULE.add_noise(x0, noise, t), (output[:, 3:] + 1) / 2
    expected = 1000 * vlb_term(SCHEDULE, "learned", x0, x_t, t, output[:, :3], fraction)
    assert terms.vlb_bits is not None
    assert torch.allclose(terms.vlb_bits, expected, rtol=1e-4)


def test_divergences_are_torchs() -> None:
    p = torch.distributions.Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0]))
    q = torch.distributions.Normal(torch.tensor([0.1, 0.0]), torch.tensor([0.7, 2.0]))
    mine = gaussian_kl(p.mean, p.variance.log(), q.mean, q.variance.log())
    assert torch.allclose(mine, torch.distributions.kl_divergence(p, q), atol=1e-6)


@pytest.mark.parametrize("log_variance", [-14.0, -8.0, 0.0, 3.0])
def test_the_probabilities_of_all_levels_sum_to_one(log_variance: float) -> None:
    levels = torch.arange(256).double() / 127.5 - 1
    for mean in (-1.3, -1.0, 0.0, 0.1234, 1.0, 2.0):
        log = level_log_probability(
            levels, torch.full_like(levels, mean), torch.full_like(levels, log_variance)
        )
        assert float(log.exp().sum()) == pytest.approx(1, abs=1e-12)
        assert bool(log.isfinite().all())


def test_the_gradient_of_a_hopeless_level_is_finite() -> None:
    mean = torch.tensor([5.0, -5.0, 0.5], requires_grad=True)
    log_variance = torch.full((3,), -12.0, requires_grad=True)
    level_log_probability(torch.tensor([-1.0, 0.0, 1.0]), mean, log_variance).sum().backward()
    assert bool(mean.grad.isfinite().all())
    assert bool(log_variance.grad.isfinite().all())


@pytest.mark.parametrize(("fraction", "kind"), [(0.0, "fixed-small"), (1.0, "beta")])
def test_learned_variance_spans_posterior_to_beta(fraction: float, kind: str) -> None:
    t = torch.tensor([0, 1, 500, 999])
    x = torch.zeros(4, 1, 1, 1)
    model = model_distribution(SCHEDULE, "learned", x, t, x, torch.full_like(x, fraction))
    table = SCHEDULE.betas if kind == "beta" else SCHEDULE.variances("fixed-small")
    assert torch.allclose(model.variance.flatten(), table[t].float(), rtol=1e-4)


def test_a_perfect_guess_with_the_posteriors_variance_costs_only_the_last_term() -> None:
    x0 = from_uint8(torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8))
    for t in (1, 10, 999):
        times = torch.full((2,), t)
        x_t = SCHEDULE.add_noise(x0, torch.randn_like(x0), times)
        assert vlb_term(SCHEDULE, "fixed-small", x0, x_t, times, x0).abs().max() < 1e-6
        assert float(vlb_term(SCHEDULE, "fixed-large", x0, x_t, times, x0).min()) >= 0
    # -log2 of the probability of the right level: its half-width over the standard deviation of the last step.
    reach = (1 / 255) / SCHEDULE.variances("fixed-small")[0].sqrt()
    times = torch.zeros(2, dtype=torch.int64)
    expected = -math.log2(math.erf(reach / math.sqrt(2)))
    inner = x0.clamp(-0.9, 0.9)
    term = vlb_term(SCHEDULE, "fixed-small", inner, inner, times, inner)[0].item()
    assert term == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_prior_term_is_the_divergence_of_the_last_step() -> None:
    x0 = torch.full((1, 1, 2, 2), 0.5)
    signal = SCHEDULE.alpha_bars[-1].item()
    expected = 0.5 * (signal * 0.25 - signal - math.log1p(-signal)) / math.log(2)
    assert prior_term(SCHEDULE, x0).item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def excess_nats(true_variance: Tensor, model_variance: Tensor) -> Tensor:
    """KL between zero-mean Gaussians: what a wrong variance costs."""
    ratio = true_variance / model_variance
    return 0.5 * (ratio - 1 - ratio.log())


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_the_bound_of_gaussian_data_is_its_entropy_plus_what_the_variances_cost(variance: Variance) -> None:
    """For data from N(0, std^2) the perfect mean is linear and every term of the bound is known in closed form."""
    schedule, std = NoiseSchedule.linear(400, 1e-4, 0.05), 0.25
    generator = torch.Generator().manual_seed(1)
    x0 = from_uint8(to_uint8(std * torch.randn(64, 1, 8, 8, generator=generator)))

    def net(x: Tensor, t: Tensor, **_: object) -> Tensor:
        a2 = schedule.gather(schedule.alpha_bars, t, x)
        return (1 - a2).sqrt() * x / (a2 * std**2 + 1 - a2)

    result = bits_per_dim(schedule, ObjectiveConfig(variance=variance), net, x0, torch.arange(64), seed=0)
    assert result.terms.shape == (64, 400)
    assert torch.allclose(result.total, result.prior + result.terms.sum(1), rtol=1e-5)
    before = schedule.alpha_bars_before * std**2 + 1 - schedule.alpha_bars_before
    reverse = 1 / (1 / before + (1 - schedule.betas) / schedule.betas)
    wasted = float(excess_nats(reverse, schedule.variances(variance)).sum()) / math.log(2)
    entropy = math.log2(std * 127.5 * math.sqrt(2 * math.pi * math.e))
    assert float(result.total.mean()) == pytest.approx(entropy + wasted, abs=0.06)


def test_the_bound_is_the_same_in_any_batch() -> None:
    schedule = NoiseSchedule.linear(5, 0.01, 0.3)
    x0 = from_uint8(torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8))
    index = torch.tensor([7, 3, 9, 1])

    def bits(rows: slice) -> Tensor:
        return bits_per_dim(
            schedule, ObjectiveConfig(), lambda x, t, **_: 0.1 * x, x0[rows], index[rows], seed=2
        ).terms

    whole = bits(slice(None))
    assert torch.equal(torch.cat([bits(slice(0, 1)), bits(slice(1, 4))]), whole)


def test_every_pixel_level_survives_the_way_to_floats_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    # Half a level either way still is the level: a truncating (x + 1) * 127.5 would be dark.
    assert torch.equal(to_uint8(from_uint8(levels[1:-1]) + 0.45 / 127.5), levels[1:-1])
    assert torch.equal(to_uint8(from_uint8(levels[1:-1]) - 0.45 / 127.5), levels[1:-1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_uint8(torch.tensor([math.nan])),
        lambda: to_uint8(torch.tensor([1])),
        lambda: from_uint8(torch.tensor([1.0])),
    ],
)
def test_what_is_no_image_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="images"):
        call()
