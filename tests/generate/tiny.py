"""A network small enough for tests, with weights that make images worth counting."""

from pathlib import Path

import torch

from pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from pipeline.config.generate import GenerateConfig, GuardConfig
from pipeline.config.net import UNetConfig
from pipeline.nets.artifact import ImageShape, ModelCard, TrainingData, save_model
from pipeline.nets.unet import seeded_init

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
