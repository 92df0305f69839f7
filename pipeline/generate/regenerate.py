"""Sampling stored samples again, to prove that their bytes follow from the spec."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.formats.images import decode_image, encode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.class_labels import index_tensor
from ddpm_pipeline.generate.device_check import UnfitDevice
from ddpm_pipeline.generate.done_records import DoneRecord
from ddpm_pipeline.generate.engine import Engine, set_up_torch, software
from ddpm_pipeline.generate.model_source import find_model_of
from ddpm_pipeline.generate.plan import SampleBatch, Shard, locate
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.verification import VerifyReport
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.store import ObjectMissing, open_store


@dataclass(frozen=True)
class Samples:
    """Samples of one batch that are to be made again."""

    unit: Shard
    batch: SampleBatch
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """What sampling some samples of a batch again has shown."""

    count: int
    """Samples compared, those that are equal included."""
    differences: tuple[tuple[int, str], ...] = ()
    """Index of each sample that differs, and how."""
    not_judged: str | None = None
    """Why the differences prove nothing, and what would; None if they prove damage."""


Compare = Callable[[Generation, ModelCard, bytes, Sequence[Samples]], Iterator[Comparison]]
"""Samples again and compares, yielding a Comparison for each of the given Samples, in order. UnfitDevice where that
cannot be done."""


def regenerate(
    report: VerifyReport,
    count: int,
    model: str | None = None,
    choice_seed: int | None = None,
    progress: Progress = no_progress,
    compare: Compare | None = None,
) -> None:
    """Sample `count` random samples of a verified generation again, compare bytes, and add differences to the report.

    `model` names the network if the spec does not (a local folder); `choice_seed` repeats a choice of samples;
    `compare` does the work elsewhere than in this process. Whole batches are sampled, as in the generation, because
    rounding depends on the batch. UserError if the network is not available. Differences prove damage only where the
    kind of device and the software are those of the record; others, and samples that no device at hand can make again,
    are reported as not judged.
    """
    generation = Generation(open_store(report.output), report.spec)
    found = find_model_of(report.spec, model)
    chosen = _choose(report.spec, count, time.time_ns() if choice_seed is None else choice_seed)
    total = sum(len(samples.indexes) for samples in chosen)
    try:
        comparisons = (compare or compare_here)(generation, found.card, found.weights, chosen)
        for samples, comparison in zip(chosen, comparisons, strict=True):
            _add(report, samples, comparison)
            progress(report.regenerated, total)
    except UnfitDevice as error:
        report.add_not_judged(total - report.regenerated, str(error))


def _add(report: VerifyReport, samples: Samples, comparison: Comparison) -> None:
    report.regenerated += comparison.count
    if comparison.not_judged is not None:
        report.add_not_judged(len(comparison.differences), comparison.not_judged)
        return
    for index, what in comparison.differences:
        report.add(f"{samples.unit.key} sample {index:012d}", what)


def compare_here(
    generation: Generation, card: ModelCard, weights: bytes, chosen: Sequence[Samples]
) -> Iterator[Comparison]:
    """Sample in this process. UnfitDevice if its device is not of the spec's kind."""
    spec = generation.spec
    threads = torch.get_num_threads()
    try:
        set_up_torch(spec)
        engine = Engine(spec, build_model(card, weights, spec.device, where=spec.model.name), card)
        for samples in chosen:
            yield _compare(generation, engine, samples)
    finally:
        torch.set_num_threads(threads)


def _choose(spec: Spec, count: int, seed: int) -> list[Samples]:
    offsets = random.Random(seed).sample(range(spec.count), min(count, spec.count))
    chosen: dict[tuple[Shard, SampleBatch], list[int]] = defaultdict(list)
    for offset in sorted(offsets):
        chosen[locate(spec, spec.first_index + offset)].append(spec.first_index + offset)
    return [Samples(unit, batch, tuple(indexes)) for (unit, batch), indexes in chosen.items()]


def _compare(generation: Generation, engine: Engine, samples: Samples) -> Comparison:
    """Sample a batch again. Missing and damaged samples are reported already."""
    spec, unit, batch = generation.spec, samples.unit, samples.batch
    stored = _read_stored(generation, unit)
    if not stored:
        return Comparison(len(samples.indexes))
    record = _read_record(generation, unit)
    engine.micro_batch = min(spec.batch_size, spec.batch_size if record is None else record.times.micro_batch)
    wanted = engine.micro_batch
    images = engine.images(index_tensor(batch.samples))
    differences: list[tuple[int, str]] = []
    for index in samples.indexes:
        data, image = stored.get(f"{index:012d}"), images[index - batch.first]
        if data is not None and data != encode_image(image, spec.image_format, spec.mark(index)):
            differences.append((index, _difference(spec, data, image)))
    reason = None
    if differences and record is not None:
        reason = _why_not_judged(spec, record, wanted, engine.micro_batch)
    return Comparison(len(samples.indexes), tuple(differences), reason)


def _why_not_judged(spec: Spec, record: DoneRecord, wanted: int, used: int) -> str | None:
    """Why samples that differ may be as sound as those of their record."""
    here = software(spec)
    if record.times.software != here:
        return (
            f"they differ when sampled again, but were made with {record.times.software}, and here is {here}, which "
            "may round differently; repeat it with that device and software"
        )
    if used != wanted:
        return (
            f"they differ when sampled again, but were made {wanted} at a time, for which this device has no memory; "
            "repeat it where that much is free"
        )
    return None


def _read_record(generation: Generation, unit: Shard) -> DoneRecord | None:
    with suppress(ObjectMissing, DamageError):
        return generation.read_record(unit)
    return None


def _read_stored(generation: Generation, unit: Shard) -> dict[str, bytes]:
    """The encoded images of a shard by key, as far as the shard can be read."""
    encoded: dict[str, bytes] = {}
    with suppress(ObjectMissing, DamageError):
        for key, files in read_shard(generation.store.read(unit.key), label=unit.key):
            encoded[key] = files.get(generation.spec.image_format, b"")
    return encoded


def _difference(spec: Spec, encoded: bytes, image: Pixels) -> str:
    """In how many values, and by how much, a stored image differs from the regenerated `image` uint8 (H, W, C)."""
    try:
        stored = decode_image(encoded, spec.image_shape)
    except DamageError as error:
        return f"differs when sampled again: {error}"
    levels = np.abs(stored.astype(np.int16) - image)
    return (
        f"differs when sampled again: {int((levels > 0).sum())} of {levels.size} values, by at most "
        f"{int(levels.max())} levels (with {software(spec)}, as recorded)"
    )
