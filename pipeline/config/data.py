"""Settings of the data layer: packing images into shards, and reading shards for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import LocalPath
from ddpm_pipeline.config.plugins import SOURCES, Choice, PluginIdentity, WithPlugin, with_identity

Byte = Annotated[int, Field(ge=0, le=255)]


PLUGIN_SOURCE = "plugin:"
"""How `source` names another package's image source: `plugin:NAME` or `plugin:module:object`."""


class PackConfig(WithPlugin):
    """How images become shards."""

    PLUGIN_GROUP: ClassVar[str] = SOURCES

    source: str
    """Where the images are: `digits` (scikit-learn's 8x8 digits); `cifar10`, `cifar100`, `mnist`, `fashion-mnist` or
    `celeba` (fetched; the training split unless `split` says otherwise); the path of a folder, a zip, a tar (also
    compressed), a parquet file, an npz, or a folder or pattern (`train-{00..09}.tar`, `*.parquet`) of such;
    `s3://bucket/prefix`; the s3:// or http(s):// address of an archive; or `hf://datasets/OWNER/NAME[/CONFIG]`.
    docs/data.md has a table of layouts. `plugin:NAME`: another package's source, by its entry point in
    `ddpm_pipeline.sources` or as `module:object`."""

    fetch_bytes: Annotated[int, Field(ge=1)] = 200_000_000_000
    """Most bytes that a source elsewhere (s3, http, hf) may have; larger ones are refused, before anything is fetched
    where their size is known. 200 GB hold ImageNet."""

    fetch_dir: LocalPath | None = None
    """Folder that keeps fetched archives, writable by this user only. None: `$XDG_CACHE_HOME/ddpm/sources`, else
    `~/.cache/ddpm/sources`."""

    labels: Literal["auto", "folder", "none"] = "auto"
    """auto: the class of an image stands in a file or column (dataset.json, metadata.csv, .cls, .json, parquet), or
    else is its class folder. folder: the first folder is the class, whatever its name. none: no classes."""

    label_column: Annotated[str, Field(min_length=1)] | None = None
    """Column of parquet or metadata.csv, or field of json (nested ones with dots), that holds the class. None takes
    `label`, or the only one that is named as classes usually are."""

    image_column: Annotated[str, Field(min_length=1)] | None = None
    """Column of parquet that holds the image; where samples of a tar or folder have several images, the extension
    of the one to pack (`input.jpg`), or `all` to make each a sample."""

    split: Annotated[str, Field(min_length=1)] | None = None
    """Which of the splits (`train`, `validation`, `test`) of a source that has several to pack, or `all`."""

    image_root: str | None = None
    """Folder of the images that parquet names by path. None: the parquet's own folder."""

    dest: str
    """URI of the data set to make; shards go to `<dest>/shards/`, the index beside them."""

    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Edge in pixels: the shorter side is scaled to it with anti-aliasing and the middle square is kept.
    None keeps images as they are, which then must all have one size."""

    on_small: Literal["enlarge", "skip", "fail"] = "enlarge"
    """What becomes of images smaller than image_size. enlarge: they are scaled up and counted. skip: they are left
    out and listed in pack-report.json. fail: they end the job before anything is written."""

    channels: Literal[1, 3] = 3
    """1 stores gray, 3 stores red, green, blue."""

    resize_filter: Literal["box", "bilinear", "bicubic", "lanczos"] = "lanczos"
    """Kernel of the scaling. Lanczos keeps most detail; box is the mean of the covered pixels."""

    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Red, green, blue that transparent pixels are laid on. White, as most such images are drawn for it."""

    shard_size: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Most samples in a shard. Shards differ by at most one sample. 10,000 of 32x32 are about 30 MB."""

    shard_bytes: Annotated[int, Field(ge=1)] = 1_000_000_000
    """Most bytes of pixels (width x height x channels) in a shard: where `shard_size` samples have more, shards hold
    fewer. As PNG they take half of that, or less."""

    payload: Literal["png", "npy"] = "png"
    """png: lossless and small. npy: raw uint8, several times the bytes and several times faster to read."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Names the order in which images are dealt to shards, so that no shard holds one class only."""

    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images that go to a data set of their own, `<dest>-held-out`, for measures on data that no
    model has seen. An image's side follows from its bytes and the seed, so equal images are never on both."""

    on_unreadable: Literal["fail", "skip"] = "fail"
    """fail: an image that cannot be read ends the job before anything is written. skip: it is left out and
    listed in pack-report.json."""

    num_threads: Annotated[int, Field(ge=1, le=256)] = 4
    """Images and shards worked on at a time. Changes no byte of the result."""

    source_settings: dict[str, Any] | None = None
    """Settings of another package's source."""

    plugin: PluginIdentity | None = None
    """Its package and version; filled in where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        """`source` as the kind of a plug-in, as the other groups have it."""
        if not isinstance(data, Mapping):
            return data
        fields = dict(cast(Mapping[str, Any], data))
        source = fields.get("source")
        if not isinstance(source, str) or not source.startswith(PLUGIN_SOURCE):
            for name in ("source_settings", "plugin"):
                if fields.get(name) is not None:
                    raise ValueError(f"{name} has no effect without source={PLUGIN_SOURCE}NAME; leave it out")
            return fields
        plain = {"kind": source.removeprefix(PLUGIN_SOURCE), "settings": fields.get("source_settings")}
        chosen = with_identity(SOURCES, plain | {"plugin": fields.get("plugin")}, "")
        return fields | {"source_settings": chosen["settings"], "plugin": chosen["plugin"]}

    @property
    def choice(self) -> Choice:
        """The plug-in, if `source` names one."""
        return Choice(self.source.removeprefix(PLUGIN_SOURCE), self.plugin, self.source_settings)

    @model_serializer(mode="wrap")
    def _documented(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields of a plug-in where there is none: packs keep the fingerprints that they had before."""
        plain: dict[str, Any] = handler(self)
        absent = {"source_settings", "plugin"} if self.plugin is None else set[str]()
        return {name: value for name, value in plain.items() if name not in absent}


class DataConfig(Settings):
    """How shards are read."""

    uri: str
    """The data set: a prefix holding tars, or a pattern of them such as `s3://b/set/train-{000..099}.tar`."""

    window_shards: Annotated[int, Field(ge=1, le=4096)] = 8
    """Shards mixed with each other at a time. More mix better and need more cache; all shards = a full
    shuffle.
    """

    flip: bool = False
    """Mirror each sample left-right with probability 1/2, drawn for its position. Wrong for digits and
    text.
    """

    crop: Annotated[int, Field(ge=1)] | None = None
    """Edge in pixels of a square cut at a place drawn for the sample's position. None takes the whole
    image.
    """

    num_workers: Annotated[int, Field(ge=0, le=128)] | None = None
    """Processes that decode, for each training worker. 0 decodes in the training process, which on a CPU is
    fastest for a data set that fits `memory_bytes`. None: 0 on a CPU; on a GPU one less than
    `workers.cpus_per_worker`, at most 4."""

    prefetch: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches made ahead of use, for each loader process."""

    cache_dir: LocalPath | None = None
    """Directory of a shard cache shared by all processes of a machine. None: no cache; what fits
    `memory_bytes` is held in memory; of larger sets the samples of coming batches are brought together."""

    cache_bytes: Annotated[int, Field(ge=1)] = 20_000_000_000
    """Most bytes in the cache directory. Must hold two windows of shards. No effect without cache_dir."""

    memory_bytes: Annotated[int, Field(ge=0)] = 512_000_000
    """Memory a training worker and its loader processes may together hold decoded samples or shards in."""

    on_damage: Literal["fail", "skip"] = "fail"
    """fail: a damaged sample ends the run and is named. skip: another takes its place, always the same one,
    and is counted."""

    @property
    def num_loader_processes(self) -> int:
        """`num_workers`, and 0 where it is None and nobody has chosen."""
        return self.num_workers or 0
