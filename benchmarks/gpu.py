"""Training and generation on a GPU: `python -m benchmarks.gpu --peers FOLDER [--parts …] [--json]`.

- training: a step of the preset ddpm-cifar10 (35.7M parameters, 32x32, batch 128) by our loop, diffusers'
  `train_unconditional` and denoising-diffusion-pytorch's Trainer, whose networks are the same architecture. float32 and
  bfloat16 are compared each with its own kind; the peers' float32 is torch's default, in which convolutions are TF32;
- generation: shards of the same network, 20 steps of DDIM, sampled, encoded, packed and stored in a local folder,
  beside diffusers' DDIMPipeline, which only samples;
- launches: kernels, copies and waits of one of our steps, counted by torch's profiler.

Contenders take turns in one process, each with its own arithmetic (TF32 or not, deterministic or not). A turn ends when
the GPU has done its work, so the times are wall times.
"""

import argparse
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Seconds, add_output_options, machine, parser_of, publish, ratio_of, take_turns
from benchmarks.generate import diffusers_sampling, save_random_model, shard_maker
from benchmarks.trainers import (
    Contender,
    DenoisingDiffusion,
    Diffusers,
    Ours,
    Setting,
    pack_images,
    use_peers,
)
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.config.load import ROOT_VARIABLE
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.devices import set_up_arithmetic
from ddpm_pipeline.devices.peak_flops import peak_flops
from ddpm_pipeline.generate.encoders import EncoderProcesses
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.jobs.runner import given_settings
from ddpm_pipeline.train.teacher import training_flops

PARTS = ("training", "generation", "launches")
SAMPLING_STEPS = 20
Precision = Literal["float32", "bfloat16"]
MODES: dict[str, dict[str, object]] = {
    "ours_float32": {},
    "ours_tf32": {"matmul": "tf32"},
    "ours_tf32_any_algorithm": {"matmul": "tf32", "deterministic": False},
    "ours_bfloat16": {"precision": "bfloat16"},
    "ours_bfloat16_any_algorithm": {"precision": "bfloat16", "deterministic": False},
    "ours_bfloat16_compiled": {"precision": "bfloat16", "compile": True},
}
SAMPLED: dict[str, dict[str, object]] = {
    "ours_float32": {},
    "ours_tf32": {"matmul": "tf32"},
    "ours_bfloat16": {"dtype": "bfloat16"},
    "ours_bfloat16_compiled": {"dtype": "bfloat16", "compile": True},
}
OURS_FOR_FLOAT32 = ("ours_float32", "ours_tf32", "ours_tf32_any_algorithm")
OURS_FOR_HALF = ("ours_bfloat16", "ours_bfloat16_any_algorithm", "ours_bfloat16_compiled")
RIVALS: dict[str, tuple[str, ...]] = {
    "diffusers_float32": OURS_FOR_FLOAT32,
    "denoising_diffusion_float32": OURS_FOR_FLOAT32,
    "diffusers_bfloat16": OURS_FOR_HALF,
    "denoising_diffusion_bfloat16": OURS_FOR_HALF,
    "diffusers_float16": OURS_FOR_HALF,  # its pipeline cannot return bfloat16
}
"""Ours that each peer is compared with."""
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def main() -> int:
    """Run the parts asked for and publish their numbers."""
    parser = parser_of("gpu", __doc__, PARTS)
    parser.add_argument("--batch", type=int, default=128, help="images in a training step")
    parser.add_argument("--steps", type=int, default=10, help="training steps in a turn")
    parser.add_argument("--sampled", type=int, default=500, help="images in a batch of a generation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoders", type=int, default=7, help="processes that encode images")
    parser.add_argument("--compile", action="store_true", help="also compiled networks")
    parser.add_argument("--dollars-per-hour", type=float, help="price of the GPU, to state images per dollar")
    parser.add_argument("--device", default="cuda", help="cpu to try this program out, with small batches")
    add_output_options(parser)
    told = parser.parse_args()
    numbers: dict[str, object] = {"gpu": _gpu_name(), **machine("diffusers")}
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        measured = {"training": training, "generation": generation, "launches": launches}
        for part in told.parts:
            found = measured[part](told, Path(scratch) / part)
            numbers |= {f"{part}_{name}": value for name, value in found.items()}
            print(f"{part} is measured", flush=True)
    publish(numbers, told)
    return 0


def training(told: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Milliseconds a step, MFU, and how many times faster ours is than each peer."""
    uri, images = _images(folder)
    device = torch.device(told.device)
    ours = {name: mode for name, mode in MODES.items() if told.compile or not mode.get("compile")}
    configs = {name: _config(uri, told.batch, mode) for name, mode in ours.items()}
    work = {name: _our_steps(config, device, told.steps) for name, config in configs.items()}
    net = configs["ours_float32"].net
    if use_peers(told.peers):
        for precision in PRECISIONS:
            setting = Setting(net, images, told.batch, 10**6, 0, device, precision)
            work[f"diffusers_{precision}"] = _peer_steps(Diffusers(setting), told.steps)
            work[f"denoising_diffusion_{precision}"] = _peer_steps(DenoisingDiffusion(setting), told.steps)
    taken = take_turns(work, told.rounds, warm_up_rounds=2)
    seconds = {
        name: statistics.median(each.wall for each in turns) / told.steps for name, turns in taken.items()
    }
    found: dict[str, object] = {f"{name}_milliseconds_a_step": 1000 * each for name, each in seconds.items()}
    flops = told.batch * training_flops(configs["ours_float32"])
    for name, config in configs.items():
        peak = peak_flops(_gpu_name(), _arithmetic(config))
        if peak is not None:
            found[f"{name}_mfu"] = flops / seconds[name] / peak
        found |= _per_dollar(told, name, told.batch / seconds[name])
    return found | _against_peers(taken, 1.0)


def generation(told: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Images a second of whole shards, and how many times more than diffusers samples."""
    config = _generation(folder, told.sampled, torch.device(told.device))
    model = find_model(config.model)
    work: dict[str, Callable[[], object]] = {}
    for name, mode in SAMPLED.items():
        if (mode.get("compile") and not told.compile) or (mode.get("matmul") and told.device == "cpu"):
            continue
        own = GenerateConfig.model_validate(
            config.model_dump(exclude_unset=True) | mode | {"output": f"file://{folder}/{name}"}
        )
        matmul = own.matmul
        make = shard_maker(own, EncoderProcesses(told.encoders))
        work[name] = _with_arithmetic(
            make, lambda matmul=matmul: set_up_arithmetic(matmul, deterministic=True)
        )
    for precision, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        sample = diffusers_sampling(
            folder, model, told.sampled, SAMPLING_STEPS, torch.device(told.device), dtype
        )
        work[f"diffusers_{precision}"] = _with_arithmetic(sample, _torch_defaults)
    taken = take_turns(work, told.rounds, warm_up_rounds=1)
    found: dict[str, object] = {}
    for name, turns in taken.items():
        count = told.sampled if name.startswith("diffusers") else config.shard_size
        rate = count / statistics.median(each.wall for each in turns)
        found |= {f"{name}_images_per_second": rate, **_per_dollar(told, name, rate)}
    return found | _against_peers(taken, config.shard_size / told.sampled)


def launches(told: argparse.Namespace, folder: Path) -> dict[str, object]:
    """What the GPU was asked for in one training step, by kind."""
    uri, _ = _images(folder)
    found: dict[str, object] = {}
    for name in ("ours_float32", "ours_bfloat16"):
        steps = _our_steps(_config(uri, told.batch, MODES[name]), torch.device(told.device), told.steps)
        steps()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            steps()
        counted: Counter[str] = Counter()
        for event in profiled.events() or []:
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            if on_gpu:
                counted["copies" if event.name.startswith(("Memcpy", "Memset")) else "kernels"] += 1
                counted["gpu_microseconds"] += int(event.device_time)
            elif event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
                counted[event.name] += 1
        found |= {f"{name}_{what}_a_step": count / told.steps for what, count in counted.items()}
    return found


def _gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _preset() -> TrainConfig:
    os.environ.setdefault(ROOT_VARIABLE, "file:///absent")
    return given_settings(TrainConfig, "train", "ddpm-cifar10", {})


def _images(folder: Path) -> tuple[str, torch.Tensor]:
    folder.mkdir()
    images = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8)
    return pack_images(folder / "data", images), images


def _config(uri: str, batch: int, mode: dict[str, object]) -> TrainConfig:
    preset = _preset().model_dump(exclude_unset=True)
    given = {"data": preset["data"] | {"uri": uri}, "steps": 10**6, "global_batch": batch}
    return TrainConfig.model_validate(preset | given | mode)


def _generation(folder: Path, batch: int, device: torch.device) -> GenerateConfig:
    folder.mkdir()
    return GenerateConfig(
        model=str(save_random_model(folder, _preset().net)),
        output=f"file://{folder}/out",
        count=8 * batch,
        shard_size=2 * batch,
        batch_size=batch,
        sampler=SamplerConfig(kind="ddim", num_steps=SAMPLING_STEPS),
        guards=GuardConfig(enabled=False),
        num_workers=1,
        gpus_per_worker=0 if device.type == "cpu" else 1,
        track=None,
    )


def _our_steps(config: TrainConfig, device: torch.device, count: int) -> Callable[[], None]:
    def set_up() -> None:
        set_up_arithmetic(config.matmul, deterministic=config.deterministic)

    set_up()
    loop = Ours(config, config.grid.sampler, device)
    return _with_arithmetic(partial(loop.steps, count), set_up)


def _peer_steps(peer: Contender, count: int) -> Callable[[], None]:
    return _with_arithmetic(partial(peer.steps, count), _torch_defaults)


def _with_arithmetic(work: Callable[[], object], set_up: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        set_up()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _torch_defaults() -> None:
    """The arithmetic of a program that chooses none: convolutions in TF32, products in float32, any algorithm."""
    set_up_arithmetic("ieee", deterministic=False)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def _arithmetic(config: TrainConfig) -> Literal["float32", "tf32", "bfloat16"]:
    if config.precision == "bfloat16":
        return "bfloat16"
    return "tf32" if config.matmul == "tf32" else "float32"


def _against_peers(taken: dict[str, list[Seconds]], work: float) -> dict[str, object]:
    """Paired ratios of wall time; `work`: how many times more a turn of ours does."""
    return {
        f"{name}_over_{peer}": ratio_of(
            [work * turn.wall for turn in taken[peer]], [turn.wall for turn in taken[name]]
        )
        for peer, ours in RIVALS.items()
        for name in ours
        if peer in taken and name in taken
    }


def _per_dollar(told: argparse.Namespace, name: str, images_per_second: float) -> dict[str, object]:
    if told.dollars_per_hour is None:
        return {}
    return {f"{name}_images_per_dollar": images_per_second * 3600 / told.dollars_per_hour}


if __name__ == "__main__":
    raise SystemExit(main())
