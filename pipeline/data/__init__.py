"""Shards of samples: file formats, packing, the index, and reading in an order that knows nothing of workers.

The names of `__all__` are imported when they are first used, so that an index is read without torch.
"""

from typing import TYPE_CHECKING

from ddpm_pipeline.lazy_names import lazy_names

if TYPE_CHECKING:
    from ddpm_pipeline.config.data import DataConfig, PackConfig
    from ddpm_pipeline.data.index import Index, ShardEntry, load_index
    from ddpm_pipeline.data.packing.build_index import build_index
    from ddpm_pipeline.data.packing.inspect_dataset import Inspection, inspect
    from ddpm_pipeline.data.packing.pack_dataset import pack
    from ddpm_pipeline.data.packing.pack_plan import PackReport
    from ddpm_pipeline.data.reading.loader import Batch, Loader
    from ddpm_pipeline.data.reading.sequential import SequentialSample, read_sequential

__all__ = [
    "Batch",
    "DataConfig",
    "Index",
    "Inspection",
    "Loader",
    "PackConfig",
    "PackReport",
    "SequentialSample",
    "ShardEntry",
    "build_index",
    "inspect",
    "load_index",
    "pack",
    "read_sequential",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ddpm_pipeline.config.data": ("DataConfig", "PackConfig"),
        "ddpm_pipeline.data.index": ("Index", "ShardEntry", "load_index"),
        "ddpm_pipeline.data.packing.build_index": ("build_index",),
        "ddpm_pipeline.data.packing.inspect_dataset": ("Inspection", "inspect"),
        "ddpm_pipeline.data.packing.pack_dataset": ("pack",),
        "ddpm_pipeline.data.packing.pack_plan": ("PackReport",),
        "ddpm_pipeline.data.reading.loader": ("Batch", "Loader"),
        "ddpm_pipeline.data.reading.sequential": ("SequentialSample", "read_sequential"),
    },
)
