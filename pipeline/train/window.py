"""What the ranks measure between two points of a chart, and the one collective call that brings it together.

Every rank closes the window at the same step, so no rank ever waits for a call that another does not make.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor

QUARTILES = 4


class Window:
    """Sums over the steps since the last point, of this rank's samples."""

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        """`num_timesteps`: T; quartile q holds the timesteps in [q T/4, (q+1) T/4). The sums live on `device`, so
        that counting does not wait for it."""
        self._num_timesteps = num_timesteps
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin the next point."""
        self.losses: list[Tensor] = []  # of each step, the sum of this rank's per-sample losses
        self.quartile_loss = torch.zeros(QUARTILES, dtype=torch.float64, device=self.device)
        self.quartile_count = torch.zeros_like(self.quartile_loss)
        self.grad_norms: list[float] = []
        self.wait_seconds = 0.0
        self.skipped_steps = 0
        self.began = time.monotonic()

    def open_step(self) -> None:
        """Begin counting a step."""
        self.losses.append(torch.zeros((), dtype=torch.float64, device=self.device))

    def add(self, per_sample: Tensor, timesteps: Tensor) -> None:
        """Count the samples of a micro-batch: `per_sample` losses (n,) and their timesteps (n,)."""
        loss = per_sample.detach().double()
        quartile = timesteps * QUARTILES // self._num_timesteps
        self.quartile_loss.index_add_(0, quartile, loss)
        self.quartile_count.index_add_(0, quartile, torch.ones_like(loss))
        self.losses[-1] += loss.sum()


def close_window(window: Window, global_batch: int, stop: bool) -> tuple[dict[str, float], bool]:
    """Metrics of the window over all ranks, and whether any rank was asked to stop.

    A collective call: every rank makes it at the same step.
    """
    seconds = time.monotonic() - window.began
    steps = len(window.losses)
    own = torch.cat(
        [
            torch.stack(window.losses),
            window.quartile_loss,
            window.quartile_count,
            torch.tensor([window.wait_seconds, float(stop)], dtype=torch.float64, device=window.device),
        ]
    )
    world = 1
    if dist.is_initialized():
        dist.all_reduce(own)
        world = dist.get_world_size()
    losses, quartile_loss, quartile_count, rest = own.cpu().split([steps, QUARTILES, QUARTILES, 2])
    losses = losses / global_batch
    metrics = {
        "train/loss": float(losses.mean()),
        "train/loss_max": float(losses.max()),
        "train/grad_norm": sum(window.grad_norms) / max(1, len(window.grad_norms)),
        "train/skipped_steps": float(window.skipped_steps),
        "perf/images_per_s": steps * global_batch / seconds,
        "perf/step_seconds": seconds / steps,
        "perf/data_wait_share": float(rest[0]) / world / seconds,
    }
    for q in range(QUARTILES):
        if quartile_count[q] > 0:
            metrics[f"train/loss_t_quartile_{q + 1}"] = float(quartile_loss[q] / quartile_count[q])
    return metrics, bool(rest[1] > 0)
