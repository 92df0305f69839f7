"""What a worker needs beside the state when a teacher teaches: the teacher, and the loss of a micro-batch."""

import torch
from torch import Tensor, nn

from ddpm_pipeline.config.diffusion import ObjectiveConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.diffusion import LossTerms, NoiseSchedule
from ddpm_pipeline.diffusion.consistency import Teacher, consistency_loss
from ddpm_pipeline.diffusion.noise import Stream, normal, uniform
from ddpm_pipeline.nets.flops import sample_flops
from ddpm_pipeline.train.data_parallel import divides_state, shard


def training_flops(config: TrainConfig) -> int:
    """Operations that a step takes for one image: a forward and a backward pass, which counts as two.

    A student is evaluated at the earlier level too, and its teacher, with guidance twice; neither where it learns from
    pairs alone.
    """
    flops = sample_flops(config.net)
    settings = config.distillation
    if settings is None or settings.pair_share == 1:
        return flops
    teacher = 0 if settings.loss.follow == "noise" else 1 if settings.sampler.guidance_scale == 1 else 2
    return flops * (4 + teacher) // 3


def make_teacher(
    config: TrainConfig, objective: ObjectiveConfig, net: nn.Module, device: torch.device, world: int
) -> Teacher | None:
    """The teacher on this worker's device, and None in a training without one.

    Where the workers divide the student among them, they divide the teacher too: a collective call.
    """
    if config.distillation is None:
        return None
    net.requires_grad_(False).eval()
    if divides_state(config.workers, world):
        shard(net, config.workers, device)
    else:
        net.to(device)
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub lacks this form
    if config.compile:
        net.compile()
    return Teacher(net, objective, config.distillation.sampler, config.net.null_label)


def distillation_loss(
    config: TrainConfig,
    schedule: NoiseSchedule,
    network: nn.Module,
    teacher: Teacher,
    batch: Batch,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    class_labels: Tensor | None,
    dropout: object | None,
) -> LossTerms:
    """The consistency loss of a micro-batch; with pairs, of a share of its images from their own noise.

    x0, noise: float (B, C, H, W); t, class_labels: int64 (B,).
    """
    settings = config.distillation
    assert settings is not None  # as there is a teacher
    positions = batch.positions.to(t.device)
    divisor: Tensor | None = _divisor(settings.loss.divisors, positions // config.global_batch, config.steps)
    if settings.pairs is not None and batch.rows is not None:
        paired = uniform(config.seed, Stream.TRAIN_PAIR, positions) < settings.pair_share
        index = settings.pairs.first_index + batch.rows.to(t.device)
        own = normal(settings.pairs.seed, Stream.SAMPLE_NOISE, index, tuple(x0.shape[1:]))
        noise = torch.where(paired.reshape(-1, 1, 1, 1), own, noise)
        divisor = None if settings.pair_share == 1 else torch.where(paired, 1, divisor)
    return consistency_loss(
        schedule,
        settings.loss,
        config.objective,
        network,
        teacher,
        x0,
        t,
        noise,
        divisor,
        class_labels,
        dropout,
    )


def _divisor(divisors: tuple[int, ...], step: Tensor, steps: int) -> Tensor:
    """The divisor of each step, int64 (n,), of a training of `steps`: each takes an equal part of it.

    Found on the device, so that a step captured as a CUDA graph is right for all later ones.
    """
    stage = step * len(divisors) // steps
    divisor = torch.full_like(step, divisors[0])
    for number, value in enumerate(divisors[1:], start=1):
        divisor = torch.where(stage >= number, value, divisor)
    return divisor
