"""Making stored samples again, to show that they are what their spec says."""

import random
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch

from pipeline.data.shards import read_shard
from pipeline.errors import UserError
from pipeline.generate.engine import Engine, prepare_process, software
from pipeline.generate.model import FoundModel, find_model
from pipeline.generate.pixels import decode, encode
from pipeline.generate.plan import Batch, Shard, locate
from pipeline.generate.records import read_record
from pipeline.generate.spec import Spec, make_model_identity
from pipeline.generate.verify import VerifyReport
from pipeline.nets.artifact import build_model
from pipeline.store import Store, open_store


def regenerate(
    report: VerifyReport,
    count: int,
    model: str | None = None,
    choice_seed: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make `count` random samples of a verified generation again and compare bytes; add what differs to the report.

    `model` names the network where the spec does not (a local folder); `choice_seed` repeats a choice of samples.
    Whole batches are sampled, as they were then, for a sample's rounding depends on its company. UserError when
    the network or the device is not at hand.
    """
    spec, store = report.spec, open_store(report.output)
    found = _model(spec, model)
    _require_device(spec)
    threads = torch.get_num_threads()
    prepare_process(spec)
    try:
        engine = Engine(
            spec, build_model(found.card, found.weights, spec.device, where=spec.model.name), found.card
        )
        chosen = _choose(spec, count, time.time_ns() if choice_seed is None else choice_seed)
        total = sum(len(indexes) for indexes in chosen.values())
        for (unit, batch), indexes in chosen.items():
            _compare(store, engine, unit, batch, indexes, report)
            progress(report.regenerated, total)
    finally:
        torch.set_num_threads(threads)


def _model(spec: Spec, reference: str | None) -> FoundModel:
    if reference is None and spec.model.version is None:
        raise UserError("model: the generation's network came from a folder; name the folder with --model")
    found = find_model(reference or f"{spec.model.name}/{spec.model.version}")
    identity = make_model_identity(found.card, spec.model.name, spec.model.version)
    if identity != spec.model:
        raise UserError(
            f"model: {reference or spec.model.name} is not the network of this generation; name that one"
        )
    return found


def _require_device(spec: Spec) -> None:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "regenerate: the generation was made on a GPU and this machine has none; use one that has"
        )


def _choose(spec: Spec, count: int, seed: int) -> dict[tuple[Shard, Batch], list[int]]:
    picked = random.Random(seed).sample(range(spec.count), min(count, spec.count))
    places: dict[tuple[Shard, Batch], list[int]] = defaultdict(list)
    for offset in sorted(picked):
        places[locate(spec, spec.first_index + offset)].append(spec.first_index + offset)
    return places


def _compare(
    store: Store, engine: Engine, unit: Shard, batch: Batch, indexes: list[int], report: VerifyReport
) -> None:
    spec = engine.spec
    if store.stat(unit.key) is None:
        report.regenerated += len(indexes)
        return  # the report names the missing shard already, or the generation is not complete
    images = engine.images(batch.index())
    wanted = {f"{index:012d}": index for index in indexes}
    for key, files in read_shard(store.read(unit.key), label=unit.key):
        if key not in wanted:
            continue
        image = images[wanted[key] - batch.first]
        stored = files.get(spec.image_format, b"")
        report.regenerated += 1
        if stored == encode(image, spec.image_format):
            continue
        there = decode(stored, spec.image_format, spec.channels).astype(np.int16)
        levels = np.abs(there - image)
        origin = read_record(store, spec, unit).times.software
        report.add(
            f"{unit.key} sample {key}",
            f"differs when made again: {int((levels > 0).sum())} of {levels.size} values, by at most "
            f"{int(levels.max())} levels (made with {origin}; here {software(spec)})",
        )
