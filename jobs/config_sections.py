"""What a settings file may hold: a section for each job, and the model each section is read by."""

from pipeline.config.base import Settings
from pipeline.config.data import PackConfig
from pipeline.config.evaluation import EvaluateConfig, FeaturesConfig, PromoteConfig, TuneConfig
from pipeline.config.generation import GenerateConfig, SampleConfig
from pipeline.config.nights import NightlyConfig
from pipeline.config.training import TrainConfig

SECTIONS: dict[str, type[Settings]] = {
    "pack": PackConfig,
    "train": TrainConfig,
    "generate": GenerateConfig,
    "sample": SampleConfig,
    "features": FeaturesConfig,
    "evaluate": EvaluateConfig,
    "tune": TuneConfig,
    "promote": PromoteConfig,
    "nightly": NightlyConfig,
}
