"""Checks a training against its data and store, before any work starts."""

from dataclasses import dataclass

from ddpm_pipeline.config.bounds import checked_name
from ddpm_pipeline.config.diffusion import check_together
from ddpm_pipeline.config.plugins import require_plugins
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import Index, load_index
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import Store, open_store
from ddpm_pipeline.train.checkpoint import finished_steps
from ddpm_pipeline.train.finetune import InitialWeights, find_initial
from ddpm_pipeline.train.plugin_record import require_recorded_plugins


@dataclass(frozen=True)
class TrainPlan:
    """A training that can start, or resume."""

    config: TrainConfig
    index: Index
    identity: str
    store: Store
    """Of the run's checkpoints."""
    finished_steps: int
    """Steps of its newest checkpoint; 0 for a new training."""
    initial: InitialWeights | None = None
    """The model to start from, in fine-tuning."""

    @property
    def is_trained(self) -> bool:
        """Whether all steps are finished."""
        return self.finished_steps >= self.config.steps


def plan_training(config: TrainConfig) -> TrainPlan:
    """Check settings against data and store. Raises UserError for the first mistake."""
    require_plugins(config)
    distilled = config.distillation is not None
    check_together(config.schedule, config.objective, config.grid.sampler, config.net, distilled=distilled)
    index = load_index(config.data.uri)
    _check_images(config, index)
    _check_classes(config, index)
    initial = find_initial(config)
    initial_sha256 = None if initial is None else initial.sha256
    identity = config.digest(index.digest, initial_sha256)
    folder = config.folder_digest(index.digest, initial_sha256)
    store = open_store(f"{config.runs.rstrip('/')}/{config.name}-{folder}")
    store.require_container()
    require_recorded_plugins(store, config)
    steps = finished_steps(store)
    newest = steps[-1] if steps else 0
    if newest > config.steps:
        raise UserError(
            f"train.steps: {config.steps}, but {store.uri} is already at step {newest}; "
            "set at least as many, or another seed for a new training"
        )
    return TrainPlan(config, index, identity, store, newest, initial)


def _check_images(config: TrainConfig, index: Index) -> None:
    image = index.image
    if image is None:
        raise UserError(f"{config.data.uri}: its images differ in size; pack them with image_size=…")
    if image.height != image.width:
        raise UserError(
            f"{config.data.uri}: its images are {image.width}x{image.height}; pack them with image_size=…"
        )
    size = config.data.crop or image.height
    if config.net.image_size != size:
        source = "train.data.crop" if config.data.crop else config.data.uri
        raise UserError(
            f"train.net.image_size: {config.net.image_size}, but {source} gives {size}; set it to {size}"
        )
    channels = image.channels
    if config.net.in_channels != channels:
        raise UserError(
            f"train.net.in_channels: {config.net.in_channels}, but {config.data.uri} has {channels}; "
            f"set in_channels and out_channels to {channels}"
        )
    expected = channels * (2 if config.objective.variance == "learned" else 1)
    if config.net.out_channels != expected:
        raise UserError(
            f"train.net.out_channels: {config.net.out_channels}, but objective.variance "
            f"{config.objective.variance} needs {expected}; set it to {expected}"
        )


def _check_classes(config: TrainConfig, index: Index) -> None:
    for name in index.class_names or ():
        try:
            checked_name(name)  # the card of the trained model must be able to hold it
        except ValueError as error:
            raise UserError(f"{config.data.uri}: class name {name[:40]!a} {error} and pack again") from None
    wanted, available = config.net.num_classes, index.num_classes
    if wanted is not None and available is None:
        raise UserError(f"train.net.num_classes: {wanted}, but {config.data.uri} has no labels; leave it out")
    if wanted is not None and available is not None and wanted < available:
        raise UserError(f"train.net.num_classes: {wanted}, but {config.data.uri} has {available} classes")
