"""How much of the network's own speed reaches the bucket: `python -m benchmarks.generate [--out FILE]`.

Measured here, one thread, a random network of CIFAR-10 shape:
- forward: images/s if nothing but the network ran, on hot weights, same batch, same steps;
- shards: images/s of whole shards, sampled, encoded, packed and stored in a local folder;
- diffusers: the same weights, steps and batch in DDIMPipeline;
- job: the same shards by one worker under Ray; what the device waits for between shards;
- pool: a simulation fed with these times, for 1 to 512 workers, with failures and stragglers.

Times are CPU times of this process where it does all the work, so that neighbours on the machine do not count, and
wall times for the job. Forward, shards and diffusers take turns, and medians are compared.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from benchmarks.pool_simulation import PoolModel, simulate
from pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from pipeline.config.generate import GenerateConfig, GuardConfig
from pipeline.config.net import UNetConfig
from pipeline.generate.engine import Engine, prepare_process
from pipeline.generate.maker import ShardMaker
from pipeline.generate.model import find_model
from pipeline.generate.plan import Shard, shard, shards
from pipeline.generate.records import DoneRecord, read_record
from pipeline.generate.spec import Spec, make_spec
from pipeline.nets.artifact import ImageShape, ModelCard, build_model, save_model
from pipeline.nets.exchange import export_diffusers
from pipeline.nets.unet import UNet, seeded_init
from pipeline.store import open_store

Facts = dict[str, float]


def main() -> None:
    """Run everything and print, or write, the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--channels", type=int, default=64, help="base channels; DDPM on CIFAR-10 has 128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure the compiled network, warm")
    parser.add_argument("--out", type=Path, help="file for the numbers")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        numbers = measure(
            Path(scratch), told.steps, told.batch, told.channels, told.repeats, compiled=told.compile
        )
    text = json.dumps(numbers, indent=2)
    print(text)
    if told.out is not None:
        told.out.write_text(text + "\n")


def measure(
    folder: Path, steps: int, batch: int, channels: int, repeats: int, compiled: bool
) -> dict[str, object]:
    """All numbers, for one setting."""
    config = _config(folder, steps, batch, channels, compiled)
    model = find_model(config.model)
    spec = make_spec(config, model.card)
    prepare_process(spec)
    net = build_model(model.card, model.weights, where="benchmark")
    engine = Engine(spec, net, model.card)
    maker = ShardMaker(engine, open_store(config.output), config.guards)
    contenders: dict[str, Callable[[], int]] = {
        "forward": lambda: _forward(net, batch, steps),
        "shards": lambda: _shard(maker, shard(spec, 0)),
        "diffusers": _diffusers(folder, net, model.card, batch, steps),
    }
    speeds = _in_turn(contenders, repeats)
    job = _job(config)
    pool = PoolModel(shard_seconds=60.0, overhead_seconds=job["overhead_share"] * 60.0)
    return {
        "setting": {
            "steps": steps,
            "batch": batch,
            "base_channels": channels,
            "threads": 1,
            "compiled": compiled,
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "images_per_cpu_second": speeds,
        "shards_over_forward": speeds["shards"] / speeds["forward"],
        "shards_over_diffusers": speeds["shards"] / speeds["diffusers"],
        "job": job,
        "pool_efficiency": {
            str(workers): simulate(pool, workers, 50 * workers).efficiency for workers in (1, 8, 64, 512)
        },
    }


def _config(folder: Path, steps: int, batch: int, channels: int, compiled: bool) -> GenerateConfig:
    net_config = UNetConfig(
        base_channels=channels, multipliers=(1, 2, 2), attention_resolutions=(16,), image_size=32
    )
    card = ModelCard(
        net=net_config,
        schedule=ScheduleConfig(),
        objective=ObjectiveConfig(),
        image=ImageShape(channels=3, size=32),
    )
    save_model(folder / "model", seeded_init(net_config, 0).state_dict(), card)
    return GenerateConfig(
        model=str(folder / "model"),
        output=f"file://{folder}/out",
        count=8 * 2 * batch,
        shard_size=2 * batch,
        batch_size=batch,
        sampler=SamplerConfig(kind="ddim", num_steps=steps),
        guards=GuardConfig(enabled=False),
        num_workers=1,
        compile=compiled,
        track=None,
    )


def _in_turn(contenders: dict[str, Callable[[], int]], repeats: int) -> Facts:
    """Median images per CPU second of each, after one round to warm up."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            began = time.process_time()
            images = run()
            if repeat:
                speeds[name].append(images / (time.process_time() - began))
    return {name: statistics.median(values) for name, values in speeds.items()}


def _forward(net: UNet, batch: int, steps: int) -> int:
    """Nothing but the network, as often as a batch of samples needs it."""
    x = torch.randn(batch, 3, 32, 32)
    t = torch.full((batch,), 500)
    with torch.inference_mode():
        for _ in range(steps):
            net(x, t)
    return batch


def _shard(maker: ShardMaker, unit: Shard) -> int:
    """A whole shard: sampled, encoded, packed, stored."""
    maker.store.delete(unit.done_key)
    return maker.make(unit).count


def _diffusers(folder: Path, net: UNet, card: ModelCard, batch: int, steps: int) -> Callable[[], int]:
    export_diffusers(folder / "diffusers", net, card.schedule, card.objective)
    unet = UNet2DModel.from_pretrained(folder / "diffusers" / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "diffusers" / "scheduler", timestep_spacing="trailing")
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> int:
        return len(pipeline(batch_size=batch, num_inference_steps=steps, output_type="np").images)

    return run


def _job(config: GenerateConfig) -> Facts:
    """Shards by one worker under Ray: wall time from the first shard's end to the last's, against device time."""
    import ray

    from pipeline.generate.run import generate

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
    store = open_store(output)
    return [read_record(store, spec, unit) for unit in shards(spec)]


if __name__ == "__main__":
    main()
