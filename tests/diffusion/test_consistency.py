"""Consistency distillation against data with a known answer: Gaussian images, whose ODE has a closed form.

For images of variance d^2 per pixel the ideal image in x_t is a d^2 / (a^2 d^2 + s^2) x_t, and the trajectory from x_t
ends in d / sqrt(a^2 d^2 + s^2) x_t.
"""

import math

import pytest
import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.config.distillation import ConsistencyLossConfig
from ddpm_pipeline.diffusion import NoiseSchedule, sample
from ddpm_pipeline.diffusion.consistency import Teacher, consistency_loss, earlier
from ddpm_pipeline.diffusion.samplers import NetDenoise, ddim
from ddpm_pipeline.diffusion.timesteps import grid_at

SCHEDULE = NoiseSchedule.cosine(1000)
V = ObjectiveConfig(target="v")
D = 0.5
UNGUIDED = SamplerConfig(kind="ddim", num_steps=20, clip_x0=False)


def ideal(x: Tensor, t: Tensor, **_: object) -> Tensor:
    """The teacher: v of the ideal image."""
    a, s = SCHEDULE.coefficients(t, x)
    return (a * x - a * D**2 / (a**2 * D**2 + s**2) * x) / s


def endpoint(x: Tensor, t: Tensor, **_: object) -> Tensor:
    """The perfect student: v of the end of the trajectory."""
    a, s = SCHEDULE.coefficients(t, x)
    return (a * x - D / (a**2 * D**2 + s**2).sqrt() * x) / s


def loss(net: object, divisor: int, follow: str = "teacher", huber: float = 1e-6) -> Tensor:
    """Mean loss at levels all over the schedule, for Gaussian images."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(20, 1000, 49)
    x0 = (D * torch.randn(len(t), 1, 6, 6, generator=generator)).clamp(-1, 1)
    noise = torch.randn(len(t), 1, 6, 6, generator=generator)
    config = ConsistencyLossConfig(follow=follow, huber=huber)  # type: ignore[arg-type]
    teacher = Teacher(ideal, V, UNGUIDED, None)
    terms = consistency_loss(
        SCHEDULE,
        config,
        V,
        net,
        teacher,
        x0,
        t,
        noise,
        torch.full_like(t, divisor),  # type: ignore[arg-type]
    )
    return terms.per_sample.mean()


def test_the_end_of_the_teachers_trajectory_has_no_loss_where_levels_are_close() -> None:
    far, near = float(loss(endpoint, 4)), float(loss(endpoint, 64))
    assert near < far / 8  # a step's error is of second order
    assert near < float(loss(ideal, 64)) / 3  # the teacher itself goes to the mean of all images


def test_the_student_that_follows_noise_is_compared_with_the_image_itself_at_divisor_one() -> None:
    t = torch.tensor([3, 500, 999])
    x0, noise = torch.full((3, 1, 2, 2), 0.25), torch.ones(3, 1, 2, 2)
    config = ConsistencyLossConfig(huber=1e-9)
    a, s = SCHEDULE.coefficients(t, x0)
    teacher = Teacher(lambda *_, **__: torch.full((3, 1, 2, 2), torch.nan), V, UNGUIDED, None)

    def exact(x: Tensor, at: Tensor, **_: object) -> Tensor:
        return a * noise - s * x0

    terms = consistency_loss(SCHEDULE, config, V, exact, teacher, x0, t, noise, torch.ones_like(t))
    assert float(terms.per_sample.max()) < 1e-5  # what the teacher says does not matter there

    def off(x: Tensor, at: Tensor, **_: object) -> Tensor:
        return a * noise - s * x0 + 0.1  # an error of 0.1 in v at each of four pixels

    terms = consistency_loss(SCHEDULE, config, V, off, teacher, x0, t, noise, torch.ones_like(t))
    expected = [0.2 / float(each) for each in s.flatten()]
    assert terms.per_sample.tolist() == pytest.approx(expected, rel=1e-3)
    assert terms.squared_error.tolist() == pytest.approx([0.01] * 3, rel=1e-3)

    # Pseudo-Huber, sqrt(|error|^2 + c^2) - c, with c = 0.1 sqrt(4) for four pixels.
    config = ConsistencyLossConfig(huber=0.1)
    terms = consistency_loss(SCHEDULE, config, V, off, teacher, x0, t, noise, torch.ones_like(t))
    expected = [(math.hypot(0.2, 0.2) - 0.2) / float(each) for each in s.flatten()]
    assert terms.per_sample.tolist() == pytest.approx(expected, rel=1e-3)


def test_without_divisors_the_image_is_the_target_and_nothing_else_is_evaluated() -> None:
    t = torch.tensor([3, 500, 999])
    x0, noise = torch.rand(3, 1, 2, 2) * 2 - 1, torch.randn(3, 1, 2, 2)
    config = ConsistencyLossConfig()
    calls: list[int] = []

    def student(x: Tensor, at: Tensor, **_: object) -> Tensor:
        calls.append(len(x))
        return 0.3 * x

    teacher = Teacher(student, V, UNGUIDED, None)
    ones = consistency_loss(SCHEDULE, config, V, student, teacher, x0, t, noise, torch.ones_like(t))
    assert len(calls) == 3  # the student twice, and the teacher
    alone = consistency_loss(SCHEDULE, config, V, student, teacher, x0, t, noise, None)
    assert len(calls) == 4
    assert torch.equal(alone.per_sample, ones.per_sample)


def test_no_gradient_flows_through_the_later_level_or_the_teacher() -> None:
    weight, later = torch.tensor(0.9, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    calls: list[int] = []

    def net(x: Tensor, t: Tensor, **_: object) -> Tensor:
        calls.append(len(x))
        return (weight if len(calls) == 1 else later) * x

    loss(net, 8).backward()
    assert weight.grad is not None
    assert later.grad is None
    assert calls == [20, 20]


@pytest.mark.parametrize("divisor", [1, 2, 7, 1000])
def test_the_later_level_lies_below_and_the_last_one_is_the_image(divisor: int) -> None:
    t = torch.arange(1000)
    r = earlier(t, torch.full_like(t, divisor))
    assert bool((r < t).all())
    assert int(r.min()) == -1
    assert r.tolist() == [at - math.ceil((at + 1) / divisor) for at in range(1000)]


def test_the_teachers_step_is_that_of_ddim_with_its_guidance() -> None:
    def net(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        return 0.5 * x + 0.1 * class_labels.reshape(-1, 1, 1, 1)

    sampler = SamplerConfig(kind="ddim", num_steps=2, guidance_scale=2.0, guidance_interval=(0.0, 5.0))
    x, labels = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 9])
    for t, r in ((950, 400), (400, 30)):  # outside the interval, and inside
        grid = grid_at(SCHEDULE, [t, r])
        denoise = NetDenoise(net, grid, V, sampler, labels, null_label=10)
        seen: list[Tensor] = []
        ddim(denoise, x, grid, on_step=lambda step, seen=seen: seen.append(step.x))
        teacher = Teacher(net, V, sampler, null_label=10)
        full = torch.full((3,), t), torch.full((3,), r)
        assert torch.allclose(teacher.step(SCHEDULE, x, *full, labels), seen[1], atol=1e-6)


def test_the_sampler_returns_the_end_of_the_trajectory_after_one_evaluation() -> None:
    sampler = SamplerConfig(kind="consistency", num_steps=1, clip_x0=False)
    index = torch.arange(500)
    images = sample(endpoint, SCHEDULE, sampler, index, (1, 4, 4), seed=0, objective=V)
    many = SamplerConfig(kind="dpm++2m", num_steps=200, clip_x0=False)
    slow = sample(ideal, SCHEDULE, many, index, (1, 4, 4), seed=0, objective=V)
    assert float((images - slow).abs().max()) < 0.02  # the same image of the same noise
    assert float(images.std()) == pytest.approx(D, rel=0.05)


def test_each_further_step_draws_named_noise_and_keeps_the_distribution() -> None:
    index = torch.arange(500)
    two, four = (
        sample(
            endpoint,
            SCHEDULE,
            SamplerConfig(kind="consistency", num_steps=steps, clip_x0=False),
            index,
            (1, 4, 4),
            seed=0,
            objective=V,
        )
        for steps in (2, 4)
    )
    assert not torch.equal(two, four)
    assert float(two.std()) == pytest.approx(D, rel=0.05)
    assert float(four.std()) == pytest.approx(D, rel=0.05)
