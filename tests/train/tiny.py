"""Settings of a training small enough for a test: 8x8 digits, some thousand parameters."""

import json
from pathlib import Path

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.packing.pack_dataset import pack


def tiny(data: str, runs: str, /, **changes: object) -> TrainConfig:
    """Settings of a training that takes milliseconds a step."""
    settings: dict[str, object] = {
        "name": "tiny",
        "runs": runs,
        "data": {"uri": data},
        "net": {
            "image_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "base_channels": 8,
            "multipliers": [1],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "norm_groups": 4,
            "num_classes": 10,
            "null_class": True,
            "dropout": 0.1,
        },
        "schedule": {"kind": "cosine", "num_steps": 50},
        "label_drop": 0.1,
        "optimizer": {"lr": 2e-3, "warmup_steps": 5},
        "ema": {"decay": 0.95},
        "global_batch": 14,
        "steps": 24,
        "log_every_steps": 4,
        "checkpoint": {"every_steps": 8, "eval_samples": 64},
        "grid": {"every_steps": 100, "count": 10, "sampler": {"kind": "ddim", "num_steps": 2}},
    }
    return TrainConfig.model_validate(settings | changes)


def tiny_settings(folder: Path, **changes: object) -> Path:
    """A settings file for `ddpm train` with such settings; packs the digits beside it, unless they are there."""
    data, runs = folder / "data", folder / "runs"
    if not data.exists():
        pack(PackConfig(source="digits", dest=data.as_uri(), channels=1, shard_size=600), None)
    runs.mkdir(exist_ok=True)
    training = tiny(data.as_uri(), runs.as_uri(), **changes)
    path = folder / f"{training.name}.json"
    path.write_text(json.dumps({"train": training.model_dump(mode="json", exclude_unset=True)}))
    return path
