"""Judges a small model on the simulated device and on the CPU: `python -m tests.cuda.measuring FOLDER`. Prints JSON."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.cuda.simulated_device import counts, simulated_device

import torch  # isort: skip

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import ScheduleConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, FeaturesConfig, LikelihoodConfig
from ddpm_pipeline.config.generation import SpecSettings
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.devices.measuring import measuring_gpu
from ddpm_pipeline.evaluate.bits_per_dim import held_out_bits
from ddpm_pipeline.evaluate.measure import model_features
from ddpm_pipeline.features.reference_set import load_reference
from ddpm_pipeline.features.train_classifier import train_features
from ddpm_pipeline.generate import dry_run
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.parallel import HERE, MapWorkers, serial_map
from tests.generate.tiny import settings as settings_of
from tests.generate.tiny import tiny_card, tiny_model


def main(folder: Path) -> None:
    """Measure samples, the likelihood and the reference on both devices."""
    uri = str(folder / "digits")
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=900), lambda done, total: None)
    train_features(FeaturesConfig(data=uri, steps=2, channels=8, min_accuracy=0), lambda *_: None)
    card = tiny_card(classes=False, size=8).model_copy(update={"schedule": ScheduleConfig(num_steps=10)})
    model = find_model(str(tiny_model(folder / "model", card)))
    index, config = load_index(uri), EvaluateConfig(reference=uri)
    settings = SpecSettings.model_validate(
        {"model": "tiny", "count": 6, "batch_size": 3, "sampler": {"kind": "ddim", "num_steps": 3}}
    )
    likelihood = LikelihoodConfig(data=uri, count=4, batch_size=2)

    def bits(workers: MapWorkers) -> float:
        net = build_model(model.card, model.weights, where="tiny")
        return held_out_bits(net, model.card, index, likelihood, 0, workers=workers).value

    found: dict[str, Any] = {}

    def both(name: str, measure: Callable[[MapWorkers], Any]) -> tuple[Any, Any]:
        on_cpu = measure(HERE)
        with simulated_device():
            gpu = measuring_gpu()
            counts.reset()
            on_gpu = measure(MapWorkers(serial_map, gpu))
            found[name] = {"kernels": sum(counts.kernels.values()), "gpu": gpu}
        return on_cpu, on_gpu

    cpu_bits, gpu_bits = both("likelihood", bits)
    found["likelihood"]["difference"] = abs(gpu_bits - cpu_bits) / cpu_bits
    for name, measure in {
        "samples": lambda workers: model_features(model, settings, config, workers.gpu),
        "reference": lambda workers: load_reference(index, config.network, 250, workers),
    }.items():
        on_cpu, on_gpu = both(name, measure)
        vectors = torch.from_numpy(on_cpu.vectors - on_gpu.vectors)
        found[name] |= {
            "difference": float(vectors.abs().max()),
            "same_identity": on_cpu.network == on_gpu.network,
        }
    dry_run.WHOLE_BATCH_SECONDS = float("inf")  # however slow this machine is now
    with simulated_device():
        counts.reset()
        config_of_gpus = settings_of(
            folder / "model", "unused", gpus_per_worker=1, batch_size=3, shard_size=3
        )
        found["dry run"] = asdict(dry_run.estimate(config_of_gpus)) | {
            "kernels": sum(counts.kernels.values())
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
