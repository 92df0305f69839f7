"""Writes one shard: samples, encodes and uploads it, then its done-record. Independent of Ray."""

import hashlib
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from ddpm_pipeline.config.generation import GuardConfig
from ddpm_pipeline.config.model_card import TrainingData
from ddpm_pipeline.data.formats.image_stats import ImageStats
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.features.shard_sums import FeatureRecord, FeatureSums, add_records
from ddpm_pipeline.generate.class_labels import index_tensor, labels_of
from ddpm_pipeline.generate.done_records import DoneRecord, GpuUse, Times
from ddpm_pipeline.generate.encoders import Encoders, EncoderThread, Encoding
from ddpm_pipeline.generate.encoding import SampledImages
from ddpm_pipeline.generate.engine import Engine, software
from ddpm_pipeline.generate.gpu_meter import GpuMeter
from ddpm_pipeline.generate.guards import GuardTripped, check_guards
from ddpm_pipeline.generate.launched_images import LaunchedImages
from ddpm_pipeline.generate.plan import SampleBatch, Shard, batches
from ddpm_pipeline.generate.spec import Spec, canonical, classes_of_training
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.store import ABSENT, ObjectChanged, Store, StoreUnreachable, retry_during_outage

OnImages = Callable[[int], None]
_STORE_ATTEMPTS = 10


class PendingBatch(NamedTuple):
    """A batch of a shard that is being encoded."""

    encoding: Encoding
    features: Future[FeatureRecord] | None


class StoredRecord(NamedTuple):
    """A done-record and the tag that the store gave it; None if the record was found, not written."""

    record: DoneRecord
    etag: str | None
    made_twice: bool = False
    """Whether it was found after the shard had been sampled: another attempt finished first."""


class ShardCancelled(Exception):  # noqa: N818 - requested, not an error
    """The shard was cancelled between two batches because the job is draining. Nothing was written."""


class ShardWriter:
    """Writes shards of one generation. Several threads may call `write`: one uses the device, the others encode."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        guards: GuardConfig,
        features: FeatureSums | None = None,
        gpu: GpuMeter | None = None,
        encoders: Encoders | None = None,
    ) -> None:
        """`features` adds the sums of a feature network to the done-records, `gpu` the energy of the GPU.

        `encoders` is by default a thread.
        """
        self._gpu = gpu
        self.features = features
        self.engine = engine
        self.generation = Generation(store, engine.spec)
        self.guards = guards
        self._device = threading.Lock()
        self._encoders = encoders or EncoderThread()
        self._feature_thread = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._software = software(engine.spec)
        self._digest = engine.spec.digest

    def write(
        self,
        unit: Shard,
        attempt: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
        on_images: OnImages = lambda done: None,
    ) -> StoredRecord:
        """Sample and store a shard, unless another job at the same prefix has done so; return its record.

        `on_images` is called with the number of images sampled so far. Raises GuardTripped for worthless images, and
        ShardCancelled when `should_stop` returns True between two batches; both leave nothing in the store.
        """
        spec = self.generation.spec
        existing = self.generation.intact_record(unit)
        if existing is not None:
            return StoredRecord(existing, None)
        with self._device:
            began = time.monotonic()
            gpu_use = (lambda: None) if self._gpu is None else self._gpu.start()
            used: GpuUse | None = None

            def on_batch(done: int) -> None:
                nonlocal used
                on_images(done)
                used = gpu_use()

            parts, micro_batch = self._sample(unit, should_stop, on_batch)
            sampled = time.monotonic()
        encoded = [images for part in parts for images in part.encoding.result()]
        members = [member for images in encoded for member in images.members]
        total = sum((images.stats for images in encoded), ImageStats())
        features = [part.features.result() for part in parts if part.features is not None]
        fault = check_guards(total, self.guards, comparable_training_data(spec, self.engine.card.data))
        if fault is not None:
            raise GuardTripped(f"{unit.key}: {fault}")
        sums = add_records(features) if features else None

        def record_of(object_tag: str) -> DoneRecord:
            times = Times(
                finished_at=time.time(),
                seconds=sampled - began,
                upload_seconds=time.monotonic() - sampled,
                attempt=attempt,
                worker=self._worker,
                micro_batch=micro_batch,
                software=self._software,
                gpu=used,
                object_tag=object_tag,
            )
            return self._record(unit, data, total, sums, times)

        data = write_shard(members)
        return self._store(unit, data, record_of)

    def _sample(
        self, unit: Shard, should_stop: Callable[[], bool], on_images: OnImages
    ) -> tuple[list[PendingBatch], int]:
        """The batches of a shard and the micro-batch that all of them were sampled with.

        A shard during which the micro-batch is halved starts over: its record states one, with which it can be made
        again.
        """
        while True:
            parts: list[PendingBatch] = []
            done = 0
            for batch, images in self._images(unit, should_stop):
                parts.append(self._encode(batch, images))
                done += batch.keep
                on_images(done)
            if done == unit.count:
                return parts, self.engine.micro_batch

    def _images(self, unit: Shard, should_stop: Callable[[], bool]) -> Generator[tuple[SampleBatch, Pixels]]:
        """The batches of a shard with the images to keep. Ends early if the micro-batch is halved after the first one.

        A GPU is given the next batch before the images of one are waited for.
        """
        launched: deque[tuple[SampleBatch, LaunchedImages]] = deque()
        micro_batch: int | None = None
        for batch in batches(self.generation.spec, unit):
            if should_stop():
                raise ShardCancelled(unit.key)
            launched.append((batch, self.engine.launch(index_tensor(batch.samples))))
            if micro_batch not in (None, self.engine.micro_batch):
                return
            micro_batch = self.engine.micro_batch
            if len(launched) > self.engine.ahead:
                first, images = launched.popleft()
                yield first, images.wait()[: first.keep]
        for last, images in launched:
            yield last, images.wait()[: last.keep]

    def _store(self, unit: Shard, data: bytes, record_of: Callable[[str], DoneRecord]) -> StoredRecord:
        """Write object and record, each only over what this attempt knows of: what another one has finished stays."""
        store, object_tag = self.generation.store, ABSENT
        for _ in range(_STORE_ATTEMPTS):
            found = retry_during_outage(lambda: store.stat(unit.done_key))
            if found is not None:
                existing = retry_during_outage(lambda: self.generation.intact_record(unit))
                if existing is not None:
                    return StoredRecord(existing, None, made_twice=True)
            record_tag = ABSENT if found is None else found.etag
            try:
                written = retry_during_outage(partial(store.write, unit.key, data, replaces=object_tag))
                record = record_of(written.etag)
                document = canonical(record.model_dump(mode="json"))
                done = retry_during_outage(partial(store.write, unit.done_key, document, replaces=record_tag))
                return StoredRecord(record, done.etag)
            except ObjectChanged:
                stored = retry_during_outage(lambda: store.stat(unit.key))
                object_tag = ABSENT if stored is None else stored.etag
        raise StoreUnreachable(f"{store.uri}/{unit.key}: other attempts keep replacing it; try again later")

    def _record(
        self, unit: Shard, data: bytes, total: ImageStats, features: FeatureRecord | None, times: Times
    ) -> DoneRecord:
        return DoneRecord(
            spec_digest=self._digest,
            key=unit.key,
            first_index=unit.first,
            count=unit.count,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            tally=total,
            classes=class_counts(self.generation.spec, unit),
            features=None if features is None else features.model_dump(mode="json"),
            times=times,
        )

    def _encode(self, batch: SampleBatch, images: Pixels) -> PendingBatch:
        """Begin to encode the wanted images uint8 (keep, H, W, C) of a batch."""
        spec, features = self.generation.spec, None
        labels = labels_of(spec, batch.samples)
        labels = None if labels is None else labels[: batch.keep]
        sampled = SampledImages(
            batch.first,
            images,
            labels,
            spec.seed,
            self._digest,
            spec.image_format,
            spec.provenance is not None,
        )
        encoding = self._encoders.submit(sampled)
        if self.features is not None:
            classes = None if labels is None else np.array(labels)
            features = self._feature_thread.submit(self.features.batch, images, classes)
        return PendingBatch(encoding, features)


def class_counts(spec: Spec, unit: Shard) -> dict[int, int] | None:
    """Samples of each label in a shard, labels ascending; None without classes."""
    labels = labels_of(spec, unit.samples)
    return None if labels is None else dict(sorted(Counter(labels).items()))


def comparable_training_data(spec: Spec, data: TrainingData) -> TrainingData | None:
    """The training data's statistics, if the generation has all classes evenly, as often as the data, or none; else
    None: not comparable."""
    plan = spec.classes
    even = plan is None or (plan.weights is None and plan.labels == tuple(range(len(plan.labels))))
    return data if even or plan == classes_of_training(data) else None
