"""A network small enough for tests, with weights that make images worth counting."""

import json
import re
from pathlib import Path

import torch

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.config.model_card import ImageShape, ModelCard, TrainingData
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.shard_sums import FeatureSums
from ddpm_pipeline.generate.done_records import RecordAggregate
from ddpm_pipeline.generate.efficiency import EfficiencyCalculator
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.finalize import ModelFacts, publish_manifest
from ddpm_pipeline.generate.layout import DONE_PREFIX, MANIFEST_KEY, REPORT_KEY
from ddpm_pipeline.generate.model_source import ResolvedModel, resolve_model
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.shard_writer import ShardWriter
from ddpm_pipeline.generate.spec import Spec, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.nets.build import seeded_init
from ddpm_pipeline.nets.model_files import build_model, save_model
from ddpm_pipeline.store import Store, open_store

_MEASURED = re.compile(rb'<section id="measured">.*?</section>', re.DOTALL)
NAMES = ("nought", "one", "two")


def tiny_card(classes: bool = True, size: int = 4, data: TrainingData | None = None) -> ModelCard:
    """The card of a network with a few thousand parameters."""
    net = UNetConfig(
        image_size=size,
        in_channels=1,
        out_channels=1,
        base_channels=8,
        multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        mid_attention=False,
        num_classes=3 if classes else None,
        null_class=classes,
        norm_groups=4,
    )
    return ModelCard(
        net=net,
        schedule=ScheduleConfig(num_steps=50),
        objective=ObjectiveConfig(target="x0"),
        image=ImageShape(channels=1, size=size),
        class_names=NAMES if classes else None,
        data=data or TrainingData(),
    )


def tiny_model(folder: Path, card: ModelCard | None = None, seed: int = 0) -> Path:
    """A model folder. The last layer, which starts at zero, is drawn at random so that images differ."""
    card = card or tiny_card()
    net = seeded_init(card.net, seed)
    generator = torch.Generator().manual_seed(seed)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for name, value in state.items():
        if value.is_floating_point() and not value.any():
            state[name] = 0.3 * torch.randn(value.shape, generator=generator)
    save_model(folder, state, card)
    return folder


def settings(model: Path, output: str, **more: object) -> GenerateConfig:
    """Settings of a small generation without tracking."""
    chosen: dict[str, object] = {
        "model": str(model),
        "output": output,
        "count": 50,
        "shard_size": 10,
        "batch_size": 4,
        "sampler": SamplerConfig(kind="ddim", num_steps=3),
        "guards": GuardConfig(enabled=False),
        "track": None,
        "cpus_per_worker": 1,
    }
    return GenerateConfig.model_validate(chosen | more)


def plan_of(config: GenerateConfig) -> tuple[Spec, ResolvedModel]:
    """The spec that settings ask of their model, and the model."""
    model, spec = resolve_model(config)
    return spec, model


def writer_of(config: GenerateConfig) -> ShardWriter:
    """A maker of the shards of `config`, in this process."""
    spec, model = plan_of(config)
    net = build_model(model.card, model.weights, spec.device, where="tiny")
    sums = None if config.features is None else FeatureSums(open_network(config.features, ""))
    return ShardWriter(Engine(spec, net, model.card), open_store(config.output), config.guards, sums)


def fill(config: GenerateConfig) -> Spec:
    """Make a whole generation in this process, without a cluster."""
    writer = writer_of(config)
    store, spec = writer.generation.store, writer.generation.spec
    write_spec(store, spec)
    card, records = writer.engine.card, RecordAggregate()
    evaluations = EfficiencyCalculator(spec, card).evaluations_per_image
    for unit in shards(spec):
        records.add(unit.number, writer.write(unit).record)
    publish_manifest(Generation(store, spec), records, ModelFacts(card.class_names, evaluations))
    return spec


def contents(store: Store) -> dict[str, bytes]:
    """Every object of a store, with the times and circumstances of records, manifest and report taken out."""
    found: dict[str, bytes] = {}
    for info in store.list():
        data = store.read(info.key)
        if info.key.startswith(DONE_PREFIX) or info.key == MANIFEST_KEY:
            document = json.loads(data)
            del document["times"]
            data = json.dumps(document).encode()
        elif info.key == REPORT_KEY:
            data = _MEASURED.sub(b"", data)
        found[info.key] = data
    return found
