"""The training loop: plain torch over a stream of batches.

DDPM's training algorithm has seven steps; they are the numbered comments of `train_step` and `chunk_loss`. The rest is
for many workers and long runs: each worker computes its share of the batch, and the shares are weighted so that the sum
over all workers is the mean over the global batch, for any number of workers.
"""

import logging
import math
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.diffusion import LossTerms, NoiseSchedule, from_uint8, training_loss
from ddpm_pipeline.diffusion.consistency import Teacher
from ddpm_pipeline.diffusion.noise import Stream, normal, uniform
from ddpm_pipeline.diffusion.timestep_draw import TimestepDraw
from ddpm_pipeline.errors import JobError
from ddpm_pipeline.nets import DropoutKeys
from ddpm_pipeline.train.captured_gradients import CapturedGradients
from ddpm_pipeline.train.data_parallel import put_together, without_exchange
from ddpm_pipeline.train.device_batches import device_batches
from ddpm_pipeline.train.state import TrainState, UnreadStep, learning_rate
from ddpm_pipeline.train.step_metrics import StepMetrics
from ddpm_pipeline.train.teacher import distillation_loss

log = logging.getLogger(__name__)

MAX_NAMED = 20


class NonFiniteError(JobError):
    """Too many steps whose gradient was infinite or NaN; the message names the positions it came from."""


@dataclass(frozen=True)
class Trainer:
    """What a step needs besides the state: settings, schedule, and the wrapped network."""

    config: TrainConfig
    schedule: NoiseSchedule
    network: nn.Module
    """The state's network, wrapped for DDP or compiled."""
    device: torch.device
    world: int
    equal_sizes: bool = False
    """Whether all workers make equally many forward passes, of one batch size: there is one compiled graph then, and
    workers that divide a network among them need each other in every pass."""
    teacher: Teacher | None = None
    """Of a student; None for a training from images."""
    captured: CapturedGradients | None = None
    """Replays the forward and backward passes as a CUDA graph; None where they are launched kernel by kernel."""

    @cached_property
    def timesteps(self) -> TimestepDraw:
        """How each position's timestep is drawn."""
        config = self.config
        return TimestepDraw(config.timesteps, self.schedule, config.objective, config.global_batch)

    def split(self, batch: Batch) -> list[Batch]:
        """This worker's share in micro-batches."""
        share = -(-self.config.global_batch // self.world) if self.equal_sizes else None
        return micro_batches(batch, self.config.workers.micro_batch, share)

    def steps(self, state: TrainState, batches: Iterable[Batch], window: StepMetrics) -> Generator[int]:
        """Take a step for every batch; yields the number of finished steps, and adds to `window`.

        On a GPU call `finish_step` before `state`'s averages or `window` are used between two steps.
        """
        with closing(device_batches(batches, self.device)) as arriving:
            for batch in arriving:
                window.wait_seconds += batch.wait_seconds
                window.replaced_samples += len(batch.damage)
                for line in batch.damage:
                    log.warning("step %d: %s", state.step, line)
                train_step(self, state, batch, window)
                state.step += 1
                yield state.step
        self.finish_step(state, window)

    def finish_step(self, state: TrainState, window: StepMetrics) -> None:
        """Read the norm of the newest step, and move the averages or count it as skipped. A collective call.

        Must be called before the weights change again. Raises NonFiniteError.
        """
        unread, state.unread = state.unread, None
        if unread is None:
            return
        if unread.copied is not None:
            unread.copied.synchronize()
        norm = float(unread.norm)
        if math.isfinite(norm):
            window.close_step(norm)
            state.ema.update(state.net, unread.step + 1)
        else:
            window.close_step(None)
            self._count_skip(state, unread, norm)

    def _count_skip(self, state: TrainState, skipped: UnreadStep, norm: float) -> None:
        state.skipped_steps += 1
        if state.skipped_steps > self.config.max_skipped_steps:
            raise NonFiniteError(
                f"step {skipped.step}: gradient norm {norm}; {state.skipped_steps} steps were skipped, more than "
                f"max_skipped_steps={self.config.max_skipped_steps}; {_suspects(self, state, skipped)}; lower "
                "optimizer.lr or look at these samples"
            )


def train_step(trainer: Trainer, state: TrainState, batch: Batch, window: StepMetrics) -> Tensor:
    """One optimizer step on this worker's share of the global batch. Returns the norm () of the global gradient.

    A non-finite gradient is the same on every worker once summed, so all of them skip the step. The optimizer finds
    that out on the device, and the host a step later: it never waits for a device that has nothing else to do.
    """
    config = trainer.config
    window.open_step()
    for per_sample, t in find_gradients(trainer, batch):
        window.add(per_sample, t)
    trainer.finish_step(state, window)  # of the step before, whose weights are still there
    clip = config.optimizer.clip_norm or math.inf
    norm = put_together(nn.utils.clip_grad_norm_(state.parameters, clip, foreach=True))
    _update(state, norm, learning_rate(config.optimizer, state.step, config.steps))  # 7b. update the weights
    state.unread = _unread(state.step, batch, norm)
    if state.unread.copied is None:
        trainer.finish_step(state, window)
    return norm


def find_gradients(trainer: Trainer, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Give the parameters the gradients of this worker's share. Returns losses (n,) and timesteps (n,) of each
    micro-batch, which the next call may write over."""
    if trainer.captured is not None:
        return trainer.captured(batch, partial(_launch_passes, trainer))
    return _launch_passes(trainer, batch)


def _launch_passes(trainer: Trainer, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    chunks = trainer.split(batch)
    losses: list[tuple[Tensor, Tensor]] = []
    for i, chunk in enumerate(chunks):
        with without_exchange(trainer.network, unless=i == len(chunks) - 1):
            terms, t = chunk_loss(trainer, chunk)
            # DDP takes the mean over workers; this makes it the mean over the global batch (7a)
            (terms.per_sample.sum() * (trainer.world / trainer.config.global_batch)).backward()
        losses.append((terms.per_sample.detach(), t))
    return losses


def _update(state: TrainState, norm: Tensor, rate: float) -> None:
    """Adam's step, unless the gradient's norm is not finite. On a GPU only the device knows that by now."""
    if state.read_until is not None:
        torch.cuda.current_stream(norm.device).wait_event(state.read_until)
        state.read_until = None
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    if norm.device.type == "cuda":
        # The switch that gradient scalers use: the fused kernel leaves everything as it is where this is 1. Only of a
        # finite norm is the product 0.
        state.optimizer.found_inf = (norm * 0 != 0).float()  # pyright: ignore[reportAttributeAccessIssue]
        state.optimizer.step()
    elif math.isfinite(norm):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


def _unread(step: int, batch: Batch, norm: Tensor) -> UnreadStep:
    """The step, with its norm on the way to the host."""
    if norm.device.type != "cuda":
        return UnreadStep(step, batch, norm, None)
    on_host = norm.to("cpu", non_blocking=True)  # in pinned memory
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(norm.device))
    return UnreadStep(step, batch, on_host, copied)


def _suspects(trainer: Trainer, state: TrainState, skipped: UnreadStep) -> str:
    """Which positions of the global batch have a non-finite loss, as text. A collective call.

    The step was skipped and every random number has a name, so recomputing the losses gives the same values.
    """
    size = trainer.config.global_batch
    first = skipped.step * size
    bad = torch.zeros(size, dtype=torch.int32, device=trainer.device)
    alone = replace(trainer, network=state.net)
    with torch.no_grad():
        for chunk in trainer.split(skipped.batch):
            terms, _ = chunk_loss(alone, chunk)
            own = chunk.positions[: len(terms.per_sample)].to(trainer.device)
            bad[own - first] = (~terms.per_sample.isfinite()).int()
    if trainer.world > 1:
        dist.all_reduce(bad)
    found = [first + place for place in bad.nonzero().flatten().tolist()]
    if not found:
        return f"each loss at positions {first} to {first + size - 1} is finite, their gradient is not"
    named = ", ".join(map(str, found[:MAX_NAMED])) + (" and more" if len(found) > MAX_NAMED else "")
    return f"the last one's loss is not finite at {len(found)} of its {size} positions: {named}"


def chunk_loss(trainer: Trainer, batch: Batch) -> tuple[LossTerms, Tensor]:
    """Losses of a micro-batch, per sample without its padding, and the timesteps (n,) drawn for it.

    Every random number is named by (seed, position), so a sample is trained the same in any batch.
    """
    config, seed = trainer.config, trainer.config.seed
    positions = batch.positions.to(trainer.device)
    x0 = from_uint8(batch.images.to(trainer.device))  # 1. clean images, [-1, 1]
    x0 = x0.contiguous(memory_format=torch.channels_last)
    t = trainer.timesteps.draw(seed, positions)  # 2. a timestep each
    noise = normal(seed, Stream.TRAIN_NOISE, positions, tuple(x0.shape[1:]))  # 3. Gaussian noise
    labels = _labels(config, batch, positions)
    dropout = DropoutKeys(seed, positions) if config.net.dropout else None
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        # 4. noisy images by the closed form, 5. the network's prediction, 6. its squared error
        if trainer.teacher is None:
            terms = training_loss(
                trainer.schedule,
                config.objective,
                trainer.network,
                x0,
                t,
                noise,
                labels,
                dropout,
                trainer.timesteps.weight,
            )
        else:
            terms = distillation_loss(
                config,
                trainer.schedule,
                trainer.network,
                trainer.teacher,
                batch,
                x0,
                t,
                noise,
                labels,
                dropout,
            )
    if batch.padding:
        count = len(t) - batch.padding
        bits = None if terms.vlb_bits is None else terms.vlb_bits[:count]
        terms, t = LossTerms(terms.per_sample[:count], terms.squared_error[:count], bits), t[:count]
    return terms, t


def micro_batches(batch: Batch, size: int | None, share: int | None = None) -> list[Batch]:
    """Split a worker's share into pieces of at most `size` samples, as equal as possible.

    `share`: samples of the largest share of any worker, given where all pieces of all workers must have one size. Those
    that lack a sample are then padded. Without it, sizes differ by one, as they did before there was padding: they
    decide the last bits of the weights.
    """
    count = len(batch.positions)
    pieces = -(-(share or count) // (size or share or count))
    if share is not None:
        equal = -(-share // pieces)
        padded = _padded(batch, pieces * equal)
        starts = range(0, pieces * equal, equal)
        return [
            replace(part, padding=equal - min(max(0, count - start), equal))
            for start, part in zip(starts, _parts(padded, pieces), strict=True)
        ]
    return [batch] if pieces == 1 else _parts(batch, pieces)


def _parts(batch: Batch, pieces: int) -> list[Batch]:
    def split(tensor: Tensor | None) -> list[Tensor] | list[None]:
        return [None] * pieces if tensor is None else [*tensor.tensor_split(pieces)]

    positions, images = batch.positions.tensor_split(pieces), batch.images.tensor_split(pieces)
    parts = zip(positions, images, split(batch.labels), split(batch.rows), strict=True)
    return [replace(batch, positions=p, images=i, labels=c, rows=r) for p, i, c, r in parts]


def _padded(batch: Batch, count: int) -> Batch:
    """`count` samples: the batch and repetitions of its last sample, so that padding is finite where samples are."""
    if len(batch.positions) == count:
        return batch
    rows = torch.arange(count, device=batch.positions.device).clamp(max=len(batch.positions) - 1)

    def padded(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    images, labels = batch.images[rows], padded(batch.labels)
    return replace(
        batch, positions=batch.positions[rows], images=images, labels=labels, rows=padded(batch.rows)
    )


def _labels(config: TrainConfig, batch: Batch, positions: Tensor) -> Tensor | None:
    """Class labels (n,), some of them replaced by "no class" for classifier-free guidance."""
    if config.net.num_classes is None or batch.labels is None:
        return None
    labels = batch.labels.to(positions.device)
    if config.label_drop and config.net.null_label is not None:
        dropped = uniform(config.seed, Stream.TRAIN_LABEL_DROP, positions) < config.label_drop
        labels = torch.where(dropped, config.net.null_label, labels)
    return labels
