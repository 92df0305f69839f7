"""From the last checkpoint to a model that others can use."""

from pathlib import Path

import torch

from pipeline.nets.model_files import (
    ImageShape,
    ModelCard,
    TrainingData,
    TrainingInfo,
    WeightsInfo,
    save_model,
)
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.state import initial_state
from pipeline.train.training_plan import TrainPlan


def export_model(plan: TrainPlan, checkpoint: Checkpoint, run_id: str | None, folder: Path) -> ModelCard:
    """Write the averaged weights of a checkpoint (the first average, if it has several) and their card to `folder`."""
    config = plan.config
    state = initial_state(config, torch.device("cpu"))
    state.load(checkpoint.record.step, checkpoint.tensors)
    card = _card(plan, state.ema.tracks[0], checkpoint.record.step, run_id)
    return save_model(folder, state.averaged().state_dict(), card)


def _card(plan: TrainPlan, kind: str, step: int, run_id: str | None) -> ModelCard:
    config, index = plan.config, plan.index
    return ModelCard(
        net=config.net,
        schedule=config.schedule,
        objective=config.objective,
        image=ImageShape(channels=config.net.in_channels, size=config.net.image_size),
        class_names=index.class_names,
        data=TrainingData(
            digest=index.digest,
            channel_mean=None if index.channel_mean is None else tuple(index.channel_mean),
            channel_std=None if index.channel_std is None else tuple(index.channel_std),
        ),
        weights=WeightsInfo(kind=kind),
        training=TrainingInfo(
            step=step,
            run_id=run_id,
            init_from=None if plan.initial is None else plan.initial.name,
            init_sha256=None if plan.initial is None else plan.initial.sha256,
        ),
    )
