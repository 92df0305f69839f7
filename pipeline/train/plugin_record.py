"""Which plug-ins a training computes with, recorded beside its checkpoints: another version of one is refused.

plugins.json      written before the first step
"""

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.config.plugins import PluginIdentity, identities
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import ObjectMissing, Store

PLUGINS_KEY = "plugins.json"


class PluginRecord(Settings):
    """The content of `plugins.json`."""

    plugins: tuple[PluginIdentity, ...]
    """In order of their names."""


def computed_with(config: TrainConfig) -> tuple[PluginIdentity, ...]:
    """The plug-ins that determine the weights; the sampler of the grids is not among them."""
    parts = [config.net, config.schedule]
    return identities(*parts, *([] if config.distillation is None else [config.distillation]))


def record_plugins(store: Store, config: TrainConfig) -> None:
    """Write the record, if the training uses plug-ins and there is none yet."""
    used = computed_with(config)
    if used and store.stat(PLUGINS_KEY) is None:
        store.write(PLUGINS_KEY, PluginRecord(plugins=used).model_dump_json(indent=2).encode() + b"\n")


def require_recorded_plugins(store: Store, config: TrainConfig) -> None:
    """UserError, in one line, where the training at `store` was begun with another version of a plug-in."""
    used = computed_with(config)
    if not used:
        return
    try:
        data = store.read(PLUGINS_KEY)
    except ObjectMissing:
        return
    recorded = parse_document(
        PluginRecord, data, f"{store.uri}/{PLUGINS_KEY}", "a record of plug-ins"
    ).plugins
    if recorded != used:
        before, now = (", ".join(map(str, found)) for found in (recorded, used))
        raise UserError(
            f"{store.uri}: this training was begun with {before}, and {now} is installed here, which may compute "
            f"something else; install {' '.join(one.requirement for one in recorded)} to go on, or give the training "
            "another name"
        )
