"""The presets are the recipes they say they are, setting by setting. Each name is followed by its source."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.jobs.runner import JobArguments, settings_of
from ddpm_pipeline.nets import UNet, parameter_count
from ddpm_pipeline.train.state import learning_rate

DDPM_NET = {
    "base_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": (16,),
    "num_heads": 1,
    "head_dim": None,
}
LINEAR = {"kind": "linear", "num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decay": "none"}

RECIPES: dict[str, dict[str, Any]] = {
    # Ho et al. 2020, appendix B; scripts/run_cifar.py
    "ddpm-cifar10": {
        "net": {
            **DDPM_NET,
            "image_size": 32,
            "multipliers": (1, 2, 2, 2),
            "dropout": 0.1,
            "num_classes": None,
        },
        "schedule": LINEAR,
        "objective": {"target": "eps", "weighting": "uniform", "variance": "fixed-large"},
        "optimizer": {**ADAM, "kind": "adam", "lr": 2e-4, "warmup_steps": 5000, "clip_norm": 1.0},
        "ema": {"kind": "constant", "decay": 0.9999},
        "data": {"flip": True, "crop": None},
        "global_batch": 128,
        "steps": 800_000,
        "label_drop": 0.0,
        "precision": "float32",
    },
    # Ho et al. 2020, appendix B, CelebA-HQ; scripts/run_celebahq.py
    "ddpm-256": {
        "net": {**DDPM_NET, "image_size": 256, "multipliers": (1, 1, 2, 2, 4, 4), "dropout": 0.0},
        "schedule": LINEAR,
        "objective": {"target": "eps", "weighting": "uniform", "variance": "fixed-small"},
        "optimizer": {**ADAM, "kind": "adam", "lr": 2e-5, "warmup_steps": 5000, "clip_norm": 1.0},
        "ema": {"kind": "constant", "decay": 0.9999},
        "data": {"flip": True, "crop": None},
        "global_batch": 64,
        "steps": 500_000,
    },
    # Nichol & Dhariwal 2021; README of openai/improved-diffusion, class-conditional ImageNet-64
    "improved-64-cond": {
        "net": {
            "image_size": 64,
            "base_channels": 192,
            "multipliers": (1, 2, 3, 4),
            "num_res_blocks": 3,
            "attention_resolutions": (16, 8),
            "num_heads": 4,
            "head_dim": None,
            "dropout": 0.0,
            "num_classes": 1000,
            "out_channels": 6,
            "scale_shift_norm": True,
            "resblock_updown": False,
        },
        "schedule": {"kind": "cosine", "num_steps": 4000, "cosine_offset": 0.008, "max_beta": 0.999},
        "objective": {"target": "eps", "weighting": "uniform", "variance": "learned", "vlb_weight": 0.001},
        "optimizer": {**ADAM, "kind": "adamw", "lr": 3e-4, "warmup_steps": 0, "clip_norm": None},
        "ema": {"kind": "constant", "decay": 0.9999},
        "data": {"flip": False},
        "global_batch": 2048,
        "steps": 250_000,
    },
    # no paper's; what the file itself says
    "mnist-28": {
        "net": {
            "image_size": 28,
            "in_channels": 1,
            "base_channels": 32,
            "multipliers": (1, 2, 2),
            "num_classes": 10,
        },
        "schedule": {"kind": "cosine", "num_steps": 1000},
        "optimizer": {"kind": "adam", "lr": 5e-4, "warmup_steps": 500, "decay": "cosine"},
        "label_drop": 0.1,
        "data": {"flip": False},
    },
    "emoji-32": {
        "net": {
            "image_size": 32,
            "in_channels": 3,
            "base_channels": 32,
            "multipliers": (1, 2, 4),
            "num_classes": 9,
        },
        "schedule": {"kind": "cosine", "num_steps": 1000},
        "objective": {"target": "v"},
        "label_drop": 0.1,
        "data": {"flip": False},
    },
}


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://here")


def preset(name: str) -> TrainConfig:
    return settings_of(TrainConfig, "train", JobArguments(preset=name))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    out: list[str] = []
    for name, value in wanted.items():
        if isinstance(value, Mapping):
            out += differences(found[name], value, f"{where}{name}.")
        elif found[name] != value:
            out.append(f"{where}{name}: {found[name]!r}, not {value!r}")
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_is_its_sources(name: str) -> None:
    assert differences(preset(name).model_dump(), RECIPES[name]) == []


def test_the_improved_network_has_the_size_its_authors_give() -> None:
    with torch.device("meta"):
        count = parameter_count(UNet(preset("improved-64-cond").net))
    assert round(count / 1e7) == 27  # "270M"; one row of it is our "no class"


def test_the_papers_linear_schedule_comes_out_of_the_settings() -> None:
    schedule = NoiseSchedule.from_config(preset("ddpm-cifar10").schedule)
    assert schedule.T == 1000
    assert float(schedule.alpha_bars[-1]) == pytest.approx(4.035829765e-5, rel=1e-9)


def test_the_papers_learning_rate_rises_for_5000_steps_and_stays() -> None:
    config = preset("ddpm-cifar10")
    rates = [learning_rate(config.optimizer, step, config.steps) for step in (0, 2499, 4999, 5000, 799_999)]
    assert rates == pytest.approx([4e-8, 1e-4, 2e-4, 2e-4, 2e-4])


@pytest.mark.parametrize(("name", "share"), [("ddpm-cifar10", 1e-30), ("improved-64-cond", 1e-6)])
def test_the_warm_up_of_the_average_leaves_no_trace_in_the_model(name: str, share: float) -> None:
    config = preset(name)
    ended = next(n for n in range(config.steps) if (1 + n) / (10 + n) >= config.ema.decay)
    assert config.ema.decay ** (config.steps - ended) < share
