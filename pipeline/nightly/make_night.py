"""One night: the settings of its generation, whether its samples are still those on record, and its record."""

import datetime as dt

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.evaluate.document import Evaluation, load_evaluation
from ddpm_pipeline.evaluate.evaluation_runs import try_to_log
from ddpm_pipeline.evaluate.measure import evaluate_generation
from ddpm_pipeline.features.reference_set import data_root
from ddpm_pipeline.features.shard_sums import network_for_sums
from ddpm_pipeline.generate.completeness import check_complete
from ddpm_pipeline.generate.generation_cost import cost_of_generation
from ddpm_pipeline.generate.layout import SPEC_KEY
from ddpm_pipeline.generate.manifest import Manifest, read_manifest
from ddpm_pipeline.generate.spec import read_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.nightly.history import Night, drift, night_prefix, night_seed, read_nights, write_night
from ddpm_pipeline.parallel import OpenWorkers
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import Store, open_store
from ddpm_pipeline.telemetry.terminal import echo


def night_settings(config: NightlyConfig, date: dt.date, night: Night | None = None) -> GenerateConfig:
    """The generation of a night: prefix, seed, model version, and the feature network of its evaluation.

    The model version is fixed when a night begins: that of its spec or, where the spec is gone, of its record `night`.
    Workers add the sums of the feature network to their done-records.
    """
    prefix = night_prefix(config.generate.output, date)
    spec = read_spec(open_store(prefix))
    changes: dict[str, object] = {"output": prefix, "seed": night_seed(config.generate.seed, date)}
    if spec is not None and spec.model.reference is not None:
        changes["model"] = spec.model.reference
    elif spec is None and night is not None and "/" in night.model:
        changes["model"] = night.model
    if config.generate.features is None:
        evaluate = config.evaluate
        changes["features"] = network_for_sums(evaluate.network, data_root(evaluate.reference))
    return GenerateConfig.model_validate(config.generate.model_dump() | changes)


def find_fault(night: Night, prefix: str) -> str | None:
    """What at `prefix` contradicts a night's record, by manifest, listings and done-records; None if nothing does."""
    store = open_store(prefix)
    try:
        spec = read_spec(store)
    except DamageError as error:
        return str(error)
    if spec is None:
        return f"{prefix} has no {SPEC_KEY}"
    if spec.digest != night.spec_digest:
        return f"{prefix} holds another generation than the record names"
    proof = check_complete(Generation(store, spec))
    if proof.faults:
        more = f" ({proof.num_faults} faults)" if proof.num_faults > 1 else ""
        return f"{prefix}/{proof.faults[0]}{more}"
    if not proof.complete:
        return f"{prefix} has no manifest of {spec.count:,} samples"
    if spec.count != night.count:
        return f"{prefix} holds {spec.count:,} samples, the record says {night.count:,}"
    return None


def record_night(
    config: NightlyConfig,
    store: Store,
    date: dt.date,
    prefix: str,
    existing: Night | None,
    open_workers: OpenWorkers,
    progress: Progress,
) -> Night:
    """The record of a night whose generation has ended: `existing` if it names that generation, else a new one."""
    manifest = read_manifest(open_store(prefix))
    if manifest is None:
        raise UserError(f"{prefix}: no manifest, though the generation ended; is another job deleting it?")
    if existing is not None and (existing.spec_digest, existing.count) == (
        manifest.spec_digest,
        manifest.count,
    ):
        return existing
    evaluation = _evaluate(config, prefix, manifest, open_workers, progress)
    logged = try_to_log(evaluation, config.evaluate.track)
    if logged is not None:
        echo(f"{date}: metrics {logged}")
    earlier = [night for night in read_nights(store) if night.date < date]
    model = manifest.spec.model
    night = Night(
        date=date,
        prefix=prefix,
        spec_digest=manifest.spec_digest,
        model=model.reference or model.name,
        count=manifest.count,
        images_per_second=manifest.count / max(1e-9, manifest.times.device_seconds),
        cost=cost_of_generation(manifest, config.generate.cost),
        evaluation=evaluation,
        drift=drift(evaluation, earlier, config.drift),
    )
    write_night(store, night)
    return night


def _evaluate(
    config: NightlyConfig, prefix: str, manifest: Manifest, open_workers: OpenWorkers, progress: Progress
) -> Evaluation:
    """The stored evaluation of this generation, or a new one."""
    stored = _stored_evaluation(prefix, manifest)
    if stored is not None:
        return stored
    model = manifest.spec.model
    trusted_by = None if model.version is None else model.name
    report = _in_samples(manifest.count, progress)
    return evaluate_generation(config.evaluate, prefix, report, open_workers, trusted_by)


def _stored_evaluation(prefix: str, manifest: Manifest) -> Evaluation | None:
    try:
        stored = load_evaluation(prefix)
    except DamageError as error:
        echo(f"{error}: evaluating again", error=True)
        return None
    expected = (manifest.spec_digest, manifest.count)
    return stored if stored is not None and (stored.spec_digest, stored.terms.count) == expected else None


def _in_samples(count: int, progress: Progress) -> Progress:
    """The progress of an evaluation in samples of the night: it counts other images too, such as held-out ones."""

    def report(done: int, total: int, note: str = "") -> None:
        progress(count * done // max(1, total), count, note or "evaluated")

    return report
