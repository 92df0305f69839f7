"""How much of the network's own speed reaches the bucket: `python -m benchmarks.generate [--compile] [--json]`.

Measured here, one thread, a random network of CIFAR-10 shape:
- forward: if nothing but the network ran, on hot weights, same batch, same steps;
- shards: whole shards, sampled, encoded, packed and stored in a local folder; in bfloat16, too, and with --compile by
  the compiled network, whose warm-up is stated twice: of a machine's first worker, and of one that finds its code;
- diffusers: the same weights, steps and batch in DDIMPipeline, in float32;
- job: the same shards by one worker under Ray; what the device waits for between shards;
- pool: a simulation fed with these times, for 1 to 512 workers, with failures and stragglers.

Forward, shards and diffusers take turns in one process; the job's are wall times.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from benchmarks.common import add_output_options, machine, publish, ratio_of, take_turns
from benchmarks.pool_simulation import PoolModel, simulate
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.config.model_card import ImageShape, ModelCard
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.generate.done_records import DoneRecord
from ddpm_pipeline.generate.encoders import Encoders
from ddpm_pipeline.generate.engine import Engine, set_up_torch
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model, resolve_model
from ddpm_pipeline.generate.plan import shard
from ddpm_pipeline.generate.shard_writer import ShardWriter
from ddpm_pipeline.generate.spec import Spec, make_spec, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.nets.build import seeded_init
from ddpm_pipeline.nets.diffusers_weights import export_diffusers
from ddpm_pipeline.nets.model_files import build_model, save_model
from ddpm_pipeline.nets.unet import UNet
from ddpm_pipeline.store import open_store

CPU = torch.device("cpu")
Facts = dict[str, float]
MODES: dict[str, dict[str, object]] = {
    "shards": {},
    "shards_bfloat16": {"dtype": "bfloat16"},
    "shards_compiled": {"compile": True},
    "shards_bfloat16_compiled": {"dtype": "bfloat16", "compile": True},
}


def main() -> int:
    """Run everything and publish the numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--channels", type=int, default=64, help="base channels; DDPM on CIFAR-10 has 128")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--compile", action="store_true", help="also the compiled network, which takes minutes"
    )
    parser.add_argument("--warm-up", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser)
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.warm_up is not None:
        print(_warm_up_seconds(GenerateConfig.model_validate_json(told.warm_up.read_text())))
        return 0
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        publish(measure(Path(scratch), told), told)
    return 0


def measure(folder: Path, told: argparse.Namespace) -> dict[str, object]:
    """All numbers, for one setting."""
    config = _config(folder, told.steps, told.batch, told.channels)
    model = find_model(config.model)
    net = build_model(model.card, model.weights, where="benchmark")
    net.to(memory_format=torch.channels_last)
    found: dict[str, object] = {"steps": told.steps, "batch": told.batch, "base_channels": told.channels}
    found |= machine("diffusers", "ray")
    contenders: dict[str, Callable[[], object]] = {
        "forward": partial(_forward, net, told.batch, told.steps),
        "diffusers": diffusers_sampling(folder, model, told.batch, told.steps),
    }
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
    for name, mode in MODES.items():
        if mode.get("compile") and not told.compile:
            continue
        own = config.model_copy(update={**mode, "output": f"file://{folder}/{name}"})
        if mode.get("compile"):
            found[f"{name}_first_warm_up_seconds"] = _elsewhere(folder, own)
            found[f"{name}_next_warm_up_seconds"] = _elsewhere(folder, own)
        contenders[name] = shard_maker(own)
    taken = take_turns(contenders, told.rounds)
    images = {name: 2 * told.batch if name in MODES else told.batch for name in contenders}
    rates = {name: images[name] / statistics.median(turn.cpu for turn in taken[name]) for name in contenders}
    found |= {f"{name}_images_per_cpu_second": rate for name, rate in rates.items()}
    found["shards_over_forward_cpu"] = rates["shards"] / rates["forward"]
    for name in MODES.keys() & contenders.keys():
        for kind, each in (("cpu", 0), ("wall", 1)):
            found[f"{name}_over_diffusers_{kind}"] = ratio_of(
                [2 * turn[each] for turn in taken["diffusers"]], [turn[each] for turn in taken[name]]
            )
    job = _job(config)
    pool = PoolModel(shard_seconds=60.0, overhead_seconds=job["overhead_share"] * 60.0)
    found |= {f"job_{name}": value for name, value in job.items()}
    for workers in (1, 8, 64, 512):
        found[f"pool_efficiency_{workers}"] = simulate(pool, workers, 50 * workers).efficiency
    return found


def _config(folder: Path, steps: int, batch: int, channels: int) -> GenerateConfig:
    net = UNetConfig(
        base_channels=channels, multipliers=(1, 2, 2), attention_resolutions=(16,), image_size=32
    )
    return GenerateConfig(
        model=str(save_random_model(folder / "model", net)),
        output=f"file://{folder}/out",
        count=8 * 2 * batch,
        shard_size=2 * batch,
        batch_size=batch,
        sampler=SamplerConfig(kind="ddim", num_steps=steps),
        guards=GuardConfig(enabled=False),
        num_workers=1,
        track=None,
    )


def save_random_model(folder: Path, net: UNetConfig) -> Path:
    """Write a model of random weights; its folder."""
    card = ModelCard(
        net=net,
        schedule=ScheduleConfig(),
        objective=ObjectiveConfig(),
        image=ImageShape(channels=net.in_channels, size=net.image_size),
    )
    save_model(folder, seeded_init(net, 0).state_dict(), card)
    return folder


def _forward(net: UNet, batch: int, steps: int) -> int:
    """Nothing but the network, as often as a batch of samples needs it."""
    x = torch.randn(batch, 3, 32, 32)
    t = torch.full((batch,), 500)
    with torch.inference_mode():
        for _ in range(steps):
            net(x, t)
    return batch


def shard_maker(config: GenerateConfig, encoders: Encoders | None = None) -> Callable[[], int]:
    """Making a whole shard: sampled, encoded, packed, stored. `encoders` is by default a thread."""
    model, spec = resolve_model(config)
    engine = _engine(model, spec)
    writer = ShardWriter(engine, open_store(config.output), config.guards, encoders=encoders)
    unit = shard(spec, 0)

    def run() -> int:
        writer.generation.store.delete(unit.done_key)
        return writer.write(unit).record.count

    return run


def open_writer(config: GenerateConfig) -> ShardWriter:
    """The writer of a generation's shards in this process; its spec is stored first."""
    model, spec = resolve_model(config)
    store = open_store(config.output)
    write_spec(store, spec)
    return ShardWriter(_engine(model, spec), store, config.guards)


def _engine(model: ResolvedModel, spec: Spec) -> Engine:
    """On the device of the spec, with this process set up for it."""
    set_up_torch(spec)
    return Engine(
        spec, build_model(model.card, model.weights, spec.device, where=spec.model.name), model.card
    )


def _warm_up_seconds(config: GenerateConfig) -> float:
    """From an engine to its first images, less what further images of the same number take."""
    run = shard_maker(config)
    times: list[float] = []
    for _ in range(2):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times[0] - times[1]


def _elsewhere(folder: Path, config: GenerateConfig) -> float:
    """The warm-up of a process of its own, which finds what earlier ones compiled."""
    order = folder / "order.json"
    order.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "benchmarks.generate", "--warm-up", str(order)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def diffusers_sampling(
    folder: Path,
    model: ResolvedModel,
    batch: int,
    steps: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], int]:
    """Sampling a batch of the same model by DDIMPipeline."""
    card = model.card
    net = build_model(card, model.weights, where="benchmark")
    export_diffusers(folder / "diffusers", net, card.schedule, card.objective)
    unet = UNet2DModel.from_pretrained(folder / "diffusers" / "unet").eval().to(device, dtype)
    scheduler = DDIMScheduler.from_pretrained(folder / "diffusers" / "scheduler", timestep_spacing="trailing")
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> int:
        return len(pipeline(batch_size=batch, num_inference_steps=steps, output_type="np").images)

    return run


def _job(config: GenerateConfig) -> Facts:
    """Shards by one worker under Ray: wall time from the first shard's end to the last's, against device time."""
    import ray

    from ddpm_pipeline.generate.driver import generate

    config = config.model_copy(update={"output": config.output + "-job"})
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        result = generate(config)
    finally:
        ray.shutdown()
    spec = make_spec(config, find_model(config.model).card)
    records = sorted(_records(spec, config.output), key=lambda r: r.times.finished_at)
    ends = [record.times.finished_at - record.times.upload_seconds for record in records]
    device = sum(record.times.seconds for record in records[1:])
    span = ends[-1] - ends[0]
    return {
        "shards": float(result.num_shards),
        "device_seconds_a_shard": device / (len(records) - 1),
        "overhead_share": max(0.0, span - device) / span,
        "upload_seconds_a_shard": statistics.mean(r.times.upload_seconds for r in records),
        "start_to_end_seconds": result.seconds,
    }


def _records(spec: Spec, output: str) -> list[DoneRecord]:
    generation = Generation(open_store(output), spec)
    return [generation.read_record(unit) for unit in generation.shards()]


if __name__ == "__main__":
    raise SystemExit(main())
