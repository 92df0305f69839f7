"""Shards of samples: packing, indexing, and reading them in an order that knows nothing of workers."""

from pipeline.config.data import DataConfig, PackConfig
from pipeline.data.build import IndexPlan, build_index, plan_index, shards_to_index
from pipeline.data.forward import ForwardSample, read_forward
from pipeline.data.index import Index, ShardEntry, assemble_index, load_index
from pipeline.data.inspection import Inspection, inspect
from pipeline.data.loader import Batch, Loader
from pipeline.data.pack import PackReport, pack
from pipeline.data.scan import index_shard
from pipeline.data.shards import read_shard, write_shard

__all__ = [
    "Batch",
    "DataConfig",
    "ForwardSample",
    "Index",
    "IndexPlan",
    "Inspection",
    "Loader",
    "PackConfig",
    "PackReport",
    "ShardEntry",
    "assemble_index",
    "build_index",
    "index_shard",
    "inspect",
    "load_index",
    "pack",
    "plan_index",
    "read_forward",
    "read_shard",
    "shards_to_index",
    "write_shard",
]
