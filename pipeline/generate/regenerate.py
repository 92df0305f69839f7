"""Sampling stored samples again, to prove that their bytes follow from the spec."""

import random
import time
from collections import defaultdict
from contextlib import suppress

import numpy as np
import torch

from pipeline.data.formats.images import decode_image, encode_image
from pipeline.data.formats.npy import Pixels
from pipeline.data.formats.shards import read_shard
from pipeline.errors import DamageError, UserError
from pipeline.generate.class_labels import index_tensor
from pipeline.generate.engine import Engine, set_up_torch, software
from pipeline.generate.model_source import ResolvedModel, find_model
from pipeline.generate.plan import SampleBatch, Shard, locate
from pipeline.generate.spec import Spec, make_model_identity
from pipeline.generate.stored_generation import Generation
from pipeline.generate.verification import VerifyReport
from pipeline.nets.model_files import build_model
from pipeline.progress import Progress, no_progress
from pipeline.store import ObjectMissing, open_store


def regenerate(
    report: VerifyReport,
    count: int,
    model: str | None = None,
    choice_seed: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Sample `count` random samples of a verified generation again, compare bytes, and add differences to the report.

    `model` names the network if the spec does not (a local folder); `choice_seed` repeats a choice of samples.
    Whole batches are sampled, as in the generation, because rounding depends on the batch. UserError if the network
    or the device is not available.
    """
    generation = Generation(open_store(report.output), report.spec)
    spec = generation.spec
    found = _find_model(spec, model)
    _require_device(spec)
    threads = torch.get_num_threads()
    set_up_torch(spec)
    try:
        engine = Engine(
            spec, build_model(found.card, found.weights, spec.device, where=spec.model.name), found.card
        )
        chosen = _choose(spec, count, time.time_ns() if choice_seed is None else choice_seed)
        total = sum(len(indexes) for indexes in chosen.values())
        for (unit, batch), indexes in chosen.items():
            _compare(generation, engine, unit, batch, indexes, report)
            progress(report.regenerated, total)
    finally:
        torch.set_num_threads(threads)


def _find_model(spec: Spec, reference: str | None) -> ResolvedModel:
    chosen = reference or spec.model.reference
    if chosen is None:
        raise UserError("model: the generation's network came from a folder; name it with --model")
    found = find_model(chosen)
    known = found.card_sha256 if spec.model.card is not None else None
    identity = make_model_identity(found.card, spec.model.name, spec.model.version, known)
    if identity != spec.model:
        raise UserError(
            f"model: {reference or spec.model.name} is not the network of this generation; name the one that is"
        )
    return found


def _require_device(spec: Spec) -> None:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "regenerate: the generation was made on a GPU and this machine has none; use a machine with a GPU"
        )


def _choose(spec: Spec, count: int, seed: int) -> dict[tuple[Shard, SampleBatch], list[int]]:
    offsets = random.Random(seed).sample(range(spec.count), min(count, spec.count))
    chosen: dict[tuple[Shard, SampleBatch], list[int]] = defaultdict(list)
    for offset in sorted(offsets):
        chosen[locate(spec, spec.first_index + offset)].append(spec.first_index + offset)
    return chosen


def _compare(
    generation: Generation,
    engine: Engine,
    unit: Shard,
    batch: SampleBatch,
    indexes: list[int],
    report: VerifyReport,
) -> None:
    """Sample a batch again and report the samples that differ. Missing and damaged ones are reported already."""
    spec = generation.spec
    report.regenerated += len(indexes)
    stored = _read_stored(generation, unit)
    if not stored:
        return
    images = engine.images(index_tensor(batch.samples))
    for index in indexes:
        data, image = stored.get(f"{index:012d}"), images[index - batch.first]
        if data is None or data == encode_image(image, spec.image_format):
            continue
        report.add(f"{unit.key} sample {index:012d}", _difference(generation, unit, data, image))


def _read_stored(generation: Generation, unit: Shard) -> dict[str, bytes]:
    """The encoded images of a shard by key, as far as the shard can be read."""
    encoded: dict[str, bytes] = {}
    with suppress(ObjectMissing, DamageError):
        for key, files in read_shard(generation.store.read(unit.key), label=unit.key):
            encoded[key] = files.get(generation.spec.image_format, b"")
    return encoded


def _difference(generation: Generation, unit: Shard, encoded: bytes, image: Pixels) -> str:
    """In how many values, and by how much, a stored image differs from the regenerated `image` uint8 (H, W, C)."""
    spec = generation.spec
    try:
        stored = decode_image(encoded, spec.image_shape)
        origin = generation.read_record(unit).times.software
    except (ObjectMissing, DamageError) as error:
        return f"differs when sampled again: {error}"
    levels = np.abs(stored.astype(np.int16) - image)
    return (
        f"differs when sampled again: {int((levels > 0).sum())} of {levels.size} values, by at most "
        f"{int(levels.max())} levels (made with {origin}; here {software(spec)})"
    )
