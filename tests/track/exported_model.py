"""A model as training exports it, for tests of the registry."""

from pathlib import Path

import torch

from ddpm_pipeline.config.diffusion import ObjectiveConfig, ScheduleConfig
from ddpm_pipeline.config.model_card import ImageShape, ModelCard
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.nets.model_files import save_model
from ddpm_pipeline.nets.unet import UNet


def exported(folder: Path, seed: int = 0) -> Path:
    """A small class-conditional network as training exports it."""
    torch.manual_seed(seed)
    net = UNetConfig(
        image_size=8,
        in_channels=1,
        out_channels=1,
        base_channels=8,
        multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        mid_attention=False,
        norm_groups=4,
        num_classes=10,
    )
    card = ModelCard(
        net=net, schedule=ScheduleConfig(), objective=ObjectiveConfig(), image=ImageShape(channels=1, size=8)
    )
    weights = {name: torch.randn_like(value) * 0.05 for name, value in UNet(net).state_dict().items()}
    save_model(folder, weights, card)
    return folder
