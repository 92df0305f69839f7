"""Metrics of the steps between two points of a chart, and the single collective call that sums them over workers.

Every rank calls `reduce` at the same step, so no rank ever waits for a call that another does not make.
"""

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_pipeline.errors import DamageError

QUARTILES = 4


class StepMetrics:
    """Sums over the steps since the last point: of this rank's samples; after `reduce`, of all ranks'."""

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        """`num_timesteps`: T; quartile q holds the timesteps in [q T/4, (q+1) T/4). The sums live on `device`, so
        that adding does not wait for it.
        """
        self._num_timesteps = num_timesteps
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start the next point."""
        self._losses: list[Tensor] = []  # of each step, the sum of per-sample losses
        self._quartiles = torch.zeros(2, QUARTILES, dtype=torch.float64, device=self._device)  # sums, counts
        self._grad_norms: list[float] = []  # the same on every rank
        self._timed_steps = 0
        self._began = time.monotonic()
        self._seconds = 0.0
        self.wait_seconds = 0.0
        self.replaced_samples = 0
        self.skipped_steps = 0

    def open_step(self) -> None:
        """Start a step."""
        self._losses.append(torch.zeros((), dtype=torch.float64, device=self._device))
        self._timed_steps += 1

    def add(self, per_sample: Tensor, timesteps: Tensor) -> None:
        """Add the samples of a micro-batch: `per_sample` losses (n,) and their timesteps (n,)."""
        loss = per_sample.detach().double()
        quartile = timesteps * QUARTILES // self._num_timesteps
        self._quartiles[0].index_add_(0, quartile, loss)
        self._quartiles[1].index_add_(0, quartile, torch.ones_like(loss))
        self._losses[-1] += loss.sum()

    def close_step(self, grad_norm: float | None) -> None:
        """End a step; None for a gradient that was not finite."""
        if grad_norm is None:
            self.skipped_steps += 1
        else:
            self._grad_norms.append(grad_norm)

    def reduce(self) -> None:
        """Replace this rank's sums by the sums over all ranks. A collective call."""
        self._seconds = time.monotonic() - self._began
        if not dist.is_initialized():
            return
        rest = [self.wait_seconds, float(self.replaced_samples)]
        rest = torch.tensor(rest, dtype=torch.float64, device=self._device)
        own = torch.cat([torch.stack(self._losses), self._quartiles.flatten(), rest])
        dist.all_reduce(own)
        losses, quartiles, rest = own.split([len(self._losses), 2 * QUARTILES, len(rest)])
        self._losses = list(losses)
        self._quartiles = quartiles.view(2, QUARTILES)
        self.wait_seconds = float(rest[0]) / dist.get_world_size()
        self.replaced_samples = int(rest[1])

    def metrics(self, global_batch: int) -> dict[str, float]:
        """The point: means over the window's steps. Call it after `reduce`."""
        losses = torch.stack(self._losses).cpu() / global_batch
        sums, counts = self._quartiles.cpu()
        seconds = max(self._seconds, 1e-9)
        metrics = {
            "train/loss": float(losses.mean()),
            "train/loss_max": float(losses.max()),
            "train/grad_norm": sum(self._grad_norms) / max(1, len(self._grad_norms)),
            "train/skipped_steps": float(self.skipped_steps),
            "train/replaced_samples": float(self.replaced_samples),
            "perf/images_per_s": self._timed_steps * global_batch / seconds,
            "perf/step_seconds": seconds / max(1, self._timed_steps),
            "perf/data_wait_share": self.wait_seconds / seconds,
        }
        for q in range(QUARTILES):
            if counts[q] > 0:
                metrics[f"train/loss_t_quartile_{q + 1}"] = float(sums[q] / counts[q])
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """The sums, for the checkpoint of a training that stops inside a window. Call it after `reduce`."""
        return {
            "window/losses": torch.stack(self._losses),
            "window/quartiles": self._quartiles,
            "window/grad_norms": torch.tensor(self._grad_norms, dtype=torch.float64),
            "window/counts": torch.tensor([self.skipped_steps, self.replaced_samples]),
        }

    def load(self, tensors: Mapping[str, Tensor], leads: bool) -> None:
        """Resume inside a window; times start anew.

        The sums are of all ranks, so only rank 0 (`leads`) loads them. The others add zeros for the same steps: all
        must bring the same number of values to `reduce`. Raises DamageError for tensors that are not a window's.
        """
        if "window/losses" not in tensors:
            return
        try:
            losses, quartiles, norms, counts = (
                tensors[f"window/{name}"].to(torch.float64)
                for name in ("losses", "quartiles", "grad_norms", "counts")
            )
            shapes = (losses.ndim, tuple(quartiles.shape), norms.ndim, tuple(counts.shape))
            if shapes != (1, (2, QUARTILES), 1, (2,)) or not bool(counts.isfinite().all()):
                raise ValueError(f"has other shapes: {shapes}")
        except (KeyError, ValueError) as error:
            raise DamageError(f"the checkpoint's window/* tensors are damaged ({error})") from None
        share = 1.0 if leads else 0.0
        self._losses = list(losses.to(self._device) * share)
        self._quartiles = quartiles.to(self._device) * share
        self._grad_norms = norms.tolist()
        self.skipped_steps = int(counts[0])
        self.replaced_samples = int(counts[1]) if leads else 0
