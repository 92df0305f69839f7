"""What a training step costs: `python -m benchmarks.train [--peers FOLDER] [--json]`. Three parts:

- peers: a step of our loop against diffusers' and denoising-diffusion-pytorch's, same architecture (6.5M parameters,
  32x32), batch and threads, taking turns; ours in float32 as the peers, and in its fastest mode on this machine;
- costs: the share of our step that waits for data, and what a checkpoint costs at the default interval;
- ray: our loop on two workers under Ray Train and under torchrun, window by window in turn: CPU and wall time a step.

Nothing is averaged over what the machine does meanwhile: ratios are of neighbouring turns, see benchmarks/common.py.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Seconds, add_output_options, compare, machine, parser_of, publish, take_turns
from benchmarks.launchers import WINDOWS, measure_launchers
from benchmarks.trainers import (
    Contender,
    DenoisingDiffusion,
    Diffusers,
    Ours,
    Setting,
    pack_images,
    use_peers,
)
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.config.training import CheckpointConfig, TrainConfig
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train.checkpoint import CheckpointWriter

PARTS = ("peers", "costs", "ray")
NET = UNetConfig(image_size=32, base_channels=64, multipliers=(1, 2, 2), attention_resolutions=(16,))
NUM_IMAGES = 512


def main() -> int:
    """Run the parts asked for and publish their numbers."""
    parser = parser_of("train", __doc__, PARTS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of ten steps, under Ray and torchrun")
    parser.add_argument(
        "--compile", action="store_true", help="also the compiled network, which takes minutes"
    )
    add_output_options(parser)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    numbers: dict[str, object] = {"batch": told.batch, **machine("diffusers", "ray")}
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        if {"peers", "costs"} & {*told.parts}:
            numbers |= loops(told, Path(scratch))
        if "ray" in told.parts:
            numbers |= measure_launchers(Path(scratch), told.windows)
    publish(numbers, told)
    return 0


def loops(told: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """The parts `peers` and `costs`, which share trainings."""
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8)
    uri = pack_images(scratch / "data", images)
    modes = {"ours": {}, "ours_bfloat16": {"precision": "bfloat16"}}
    if told.compile:
        modes["ours_bfloat16_compiled"] = {"precision": "bfloat16", "compile": True}
    ours = {name: our_loop(uri, told.batch, mode) for name, mode in modes.items()}
    found: dict[str, object] = {}
    if "peers" in told.parts:
        found |= against_peers(told, images, ours)
    if "costs" in told.parts:
        found |= costs(ours["ours"], scratch)
    return found


def our_loop(uri: str, batch: int, mode: dict[str, object]) -> Ours:
    """DDPM's recipe on the packed images."""
    plain: dict[str, object] = {
        "name": "bench",
        "data": {"uri": uri},
        "net": NET,
        "steps": 10**6,
        "global_batch": batch,
        **mode,
    }
    config = TrainConfig.model_validate(plain)
    return Ours(config, config.grid.sampler)


def against_peers(told: argparse.Namespace, images: torch.Tensor, ours: dict[str, Ours]) -> dict[str, object]:
    """Each loop's step against every peer's."""
    setting = Setting(NET, images, told.batch, steps=10**6, seed=0)
    peers: dict[str, Contender] = {}
    if use_peers(told.peers):
        peers = {"diffusers": Diffusers(setting), "denoising_diffusion": DenoisingDiffusion(setting)}
    work = {name: partial(each.steps, 1) for name, each in {**peers, **ours}.items()}
    taken = take_turns(work, told.rounds, warm_up_rounds=2)
    found: dict[str, object] = {f"{name}_step_cpu_seconds": _median_cpu(each) for name, each in taken.items()}
    for peer in peers:
        for name in ours:
            found |= compare(taken, peer, name)
    return found


def costs(loop: Ours, scratch: Path) -> dict[str, object]:
    """Waiting for data, over the steps this loop has taken, and a checkpoint, over the default interval."""
    loop.window.reset()
    taken = take_turns({"step": partial(loop.steps, 1)}, 20, warm_up_rounds=0)["step"]
    step_seconds = statistics.median(each.wall for each in taken)
    writer = CheckpointWriter(open_store((scratch / "run").as_uri()), "bench", keep_last=3)
    writes: list[Seconds] = []
    held: list[float] = []
    for number in range(5):
        wall, cpu = time.perf_counter(), time.process_time()
        writer.submit(number, loop.state.tensors())
        held.append(time.perf_counter() - wall)
        writer.wait()
        writes.append(Seconds(time.process_time() - cpu, time.perf_counter() - wall))
    interval_seconds = CheckpointConfig().every_steps * step_seconds
    return {
        "data_wait_share": loop.window.wait_seconds / sum(each.wall for each in taken),
        "checkpoint_blocks_seconds": statistics.median(held),
        "checkpoint_cpu_seconds": _median_cpu(writes),
        # as if the cores had nothing to spare, which is the worst case
        "checkpoint_share": (statistics.median(held) + _median_cpu(writes)) / interval_seconds,
    }


def _median_cpu(taken: list[Seconds]) -> float:
    return statistics.median(each.cpu for each in taken)


if __name__ == "__main__":
    raise SystemExit(main())
