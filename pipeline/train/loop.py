"""The training loop: plain torch over a stream of batches.

DDPM's training algorithm has seven steps; they are the numbered comments of `train_step` and `chunk_loss`. The rest is
for many workers and long runs: each worker computes its share of the batch, and the shares are weighted so that the sum
over all workers is the mean over the global batch, for any number of workers.
"""

import logging
import math
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.training import TrainConfig
from pipeline.data.reading.loader import Batch
from pipeline.diffusion import LossTerms, NoiseSchedule, from_uint8, training_loss
from pipeline.diffusion.noise import Stream, normal, randint, uniform
from pipeline.errors import JobError
from pipeline.nets import DropoutKeys
from pipeline.train.device_batches import device_batches
from pipeline.train.state import TrainState, UnreadStep, learning_rate
from pipeline.train.step_metrics import StepMetrics

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
    chunks = micro_batches(batch, config.workers.micro_batch)
    for i, chunk in enumerate(chunks):
        with _without_sync(trainer.network, unless=i == len(chunks) - 1):
            terms, t = chunk_loss(trainer, chunk)
            # DDP takes the mean over workers; this makes it the mean over the global batch (7a)
            (terms.per_sample.sum() * (trainer.world / config.global_batch)).backward()
            window.add(terms.per_sample, t)
    trainer.finish_step(state, window)  # of the step before, whose weights are still there
    clip = config.optimizer.clip_norm or math.inf
    norm = nn.utils.clip_grad_norm_(state.net.parameters(), clip, foreach=True)
    _update(state, norm, learning_rate(config.optimizer, state.step, config.steps))  # 7b. update the weights
    state.unread = _unread(state.step, batch, norm)
    if state.unread.copied is None:
        trainer.finish_step(state, window)
    return norm


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
        for chunk in micro_batches(skipped.batch, trainer.config.workers.micro_batch):
            terms, _ = chunk_loss(alone, chunk)
            bad[chunk.positions.to(trainer.device) - first] = (~terms.per_sample.isfinite()).int()
    if trainer.world > 1:
        dist.all_reduce(bad)
    found = [first + place for place in bad.nonzero().flatten().tolist()]
    if not found:
        return f"each loss at positions {first} to {first + size - 1} is finite, their gradient is not"
    named = ", ".join(map(str, found[:MAX_NAMED])) + (" and more" if len(found) > MAX_NAMED else "")
    return f"the last one's loss is not finite at {len(found)} of its {size} positions: {named}"


def chunk_loss(trainer: Trainer, batch: Batch) -> tuple[LossTerms, Tensor]:
    """Losses of a micro-batch, per sample, and the timesteps (n,) drawn for it.

    Every random number is named by (seed, position), so a sample is trained the same in any batch.
    """
    config, seed = trainer.config, trainer.config.seed
    positions = batch.positions.to(trainer.device)
    x0 = from_uint8(batch.images.to(trainer.device))  # 1. clean images, [-1, 1]
    x0 = x0.contiguous(memory_format=torch.channels_last)
    t = randint(seed, Stream.TRAIN_TIMESTEP, positions, trainer.schedule.T)  # 2. a timestep each
    noise = normal(seed, Stream.TRAIN_NOISE, positions, tuple(x0.shape[1:]))  # 3. Gaussian noise
    labels = _labels(config, batch, positions)
    dropout = DropoutKeys(seed, positions) if config.net.dropout else None
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        # 4. noisy images by the closed form, 5. the network's prediction, 6. its squared error
        terms = training_loss(
            trainer.schedule, config.objective, trainer.network, x0, t, noise, labels, dropout=dropout
        )
    return terms, t


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """Split a worker's share into pieces of at most `size` samples, as equal as possible."""
    count = len(batch.positions)
    if size is None or count <= size:
        return [batch]
    pieces = -(-count // size)
    labels = [None] * pieces if batch.labels is None else batch.labels.tensor_split(pieces)
    parts = zip(batch.positions.tensor_split(pieces), batch.images.tensor_split(pieces), labels, strict=True)
    return [replace(batch, positions=p, images=i, labels=c) for p, i, c in parts]


def _labels(config: TrainConfig, batch: Batch, positions: Tensor) -> Tensor | None:
    """Class labels (n,), some of them replaced by "no class" for classifier-free guidance."""
    if config.net.num_classes is None or batch.labels is None:
        return None
    labels = batch.labels.to(positions.device)
    if config.label_drop and config.net.null_label is not None:
        dropped = uniform(config.seed, Stream.TRAIN_LABEL_DROP, positions) < config.label_drop
        labels = torch.where(dropped, config.net.null_label, labels)
    return labels


def _without_sync(network: nn.Module, unless: bool) -> AbstractContextManager[None]:
    """Skip the gradient exchange while gradients accumulate: only the last micro-batch of a step needs it."""
    if unless or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()
