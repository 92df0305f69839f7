"""Evaluation of a finished generation: `ddpm evaluate digits --prefix s3://bucket/samples/digits`.

The figures are printed and kept beside the prefix, as `<prefix>.evaluation.json`, never inside it: a generation
holds nothing but itself.
"""

import hashlib
import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from jobs.runner import DONE, JobArguments, run_job, settings_of
from pipeline.config.evaluation import EvaluateConfig, LikelihoodConfig
from pipeline.config.generation import GenerateConfig, SpecSettings
from pipeline.data.formats.pixels import decode
from pipeline.data.formats.shards import read_shard
from pipeline.data.index import load_index
from pipeline.errors import DamageError, UserError
from pipeline.evaluate.bits_per_dim import held_out_bits
from pipeline.evaluate.document import (
    Evaluation,
    EvaluationConditions,
    read_evaluation,
    require_comparable,
    table,
)
from pipeline.evaluate.evaluation_runs import try_to_log
from pipeline.evaluate.metrics import Metric, compute_metrics
from pipeline.features.distances import frechet_distance
from pipeline.features.exact_sums import Sums, sums_of
from pipeline.features.feature_set import FeatureSet, Picture, extract_features, join
from pipeline.features.networks import FeatureNetwork, open_network
from pipeline.features.reference_set import Pool, ShardWork, data_root, in_process, load_reference
from pipeline.features.shard_sums import FeatureRecord, add_records, parse_record
from pipeline.features.trust import require_trusted_network, require_trusted_reference
from pipeline.generate.class_labels import classes_of
from pipeline.generate.done_records import read_record
from pipeline.generate.manifest import Manifest, ManifestShard, read_entries, read_manifest
from pipeline.generate.model_source import ResolvedModel, find_model
from pipeline.generate.plan import shards
from pipeline.generate.spec import Spec, make_spec
from pipeline.nets.model_files import build_model
from pipeline.progress import Progress
from pipeline.store import ObjectMissing, open_store
from pipeline.telemetry.terminal import echo, echo_json

OPERATION = {"reference", "network", "batch_size", "num_workers", "records_only", "track"}
"""Settings that change no figure, or stand in the terms by themselves."""


def run_call(call: JobArguments, prefix: str | None = None, against: str | None = None) -> int:
    """Evaluate `prefix`, or the one that the preset's generation fills; beside what `against` was found to be."""

    def work(config: EvaluateConfig, progress: Progress) -> int:
        return run(config, prefix or output_of(call), progress, call.as_json, against)

    return run_job("evaluate", EvaluateConfig, work, call, unit="images")


def run(
    config: EvaluateConfig,
    output: str,
    progress: Progress,
    as_json: bool = False,
    against: str | None = None,
) -> int:
    """Evaluate, keep, log, print. UserError where `against` was evaluated on other terms, or never."""
    other = None if against is None else _evaluated(against)
    evaluation = evaluate(config, output, progress)
    if other is not None:
        require_comparable(evaluation, other)
    logged = try_to_log(evaluation, config.track)
    if as_json:
        echo_json(evaluation.model_dump(mode="json"))
        return DONE
    echo(*table(evaluation, other))
    echo(f"kept       {evaluation_uri(output)}")
    if logged is not None:
        echo(f"mlflow     {logged}")
    return DONE


def evaluate(
    config: EvaluateConfig, output: str, progress: Progress, judged: str | None = None
) -> Evaluation:
    """The figures of the generation at `output`, kept beside it. UserError when it is not complete, and where the
    reference or the network is not the one that is trusted for `judged`, a registered model, if one is named.
    """
    import torch

    torch.set_num_threads(1)
    store = open_store(output)
    store.require_container()
    manifest = read_manifest(store)
    if manifest is None:
        raise UserError(f"{output}: no manifest, so no complete generation; end it first with: ddpm generate")
    index = load_index(config.reference)
    network = open_network(config.network, data_root(config.reference))
    require_trusted_network(judged, config.network, data_root(config.reference), network)
    with pool_of(config) as pool:
        real = load_reference(index, config.network, config.batch_size, pool)
        require_trusted_reference(judged, index, config.network, data_root(config.reference), real)
        if config.records_only:
            count, metrics = from_records(manifest, output, config, real)
        else:
            samples = measure_generation(manifest, output, config, pool, progress)
            count, metrics = len(samples), compute_metrics(samples, real, config)
    if config.likelihood is not None:
        metrics["bits_per_dim"] = _held_out(config, config.likelihood, manifest, progress)
    found = Evaluation(
        subject=output,
        model=_model_of(manifest),
        model_sha256=manifest.spec.model.sha256,
        spec_digest=manifest.spec_digest,
        sampler=describe_sampler(manifest),
        reference=config.reference,
        network_label=network.label,
        terms=terms_of(config, count, real, index.digest),
        metrics=metrics,
        made_at=time.time(),
    )
    parent, name = evaluation_place(output)
    open_store(parent).write(name, (json.dumps(found.model_dump(mode="json"), indent=2) + "\n").encode())
    return found


class GenerationShard:
    """Measures one shard of a generation; opens the network once in each process it travels to."""

    def __init__(
        self, spec: Spec, entries: Sequence[ManifestShard], output: str, config: EvaluateConfig
    ) -> None:
        self.spec, self.entries, self.output, self.config = spec, entries, output, config
        self._network: FeatureNetwork | None = None

    def __call__(self, number: int) -> bytes:
        """Measured samples of shard `number`, in the order of their indexes."""
        if self._network is None:
            self._network = open_network(self.config.network, data_root(self.config.reference))
        return extract_features(self._network, self._pictures(number), self.config.batch_size).to_bytes()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_network": None}

    def _pictures(self, number: int) -> Iterator[Picture]:
        entry, spec = self.entries[number], self.spec
        data = open_store(self.output).read(entry.key)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DamageError(f"{self.output}/{entry.key}: its sha256 is not the manifest's; run ddpm verify")
        for _, files in read_shard(data, entry.key):
            label = json.loads(files["json"])["class"]
            yield decode(files[spec.image_format], spec.image_format, spec.channels), label


def measure_generation(
    manifest: Manifest, output: str, config: EvaluateConfig, pool: Pool, progress: Progress
) -> FeatureSet:
    """The samples of a complete generation as the feature network sees them."""
    entries = list(read_entries(open_store(output)))
    parts: list[FeatureSet] = []
    done = 0
    for data in pool(GenerationShard(manifest.spec, entries, output, config), range(len(entries))):
        parts.append(FeatureSet.from_bytes(data, output))
        done += len(parts[-1])
        progress(done, manifest.count)
    return join(parts)


def from_records(
    manifest: Manifest, output: str, config: EvaluateConfig, real: FeatureSet
) -> tuple[int, dict[str, Metric]]:
    """Number of samples and figures by the feature sums of the done-records alone. UserError where these lack."""
    total = add_records(_feature_records(manifest.spec, output, real.network))
    sums = Sums.from_text(total.sums)
    distance = frechet_distance(sums.moments(), sums_of(real.vectors).moments())
    metrics = {"frechet": Metric(value=distance, n=sums.count, n_reference=len(real))}
    if total.right is not None:
        metrics["class_accuracy"] = Metric(value=total.right / sums.count, n=sums.count, n_reference=0)
    return sums.count, metrics


def _feature_records(spec: Spec, output: str, network: str) -> Iterator[FeatureRecord]:
    """The feature sums of every shard, one after the other. UserError for one without, or of another network."""
    store = open_store(output)
    for unit in shards(spec):
        found = parse_record(read_record(store, spec, unit).features, f"{output}/{unit.key}")
        if found.network != network:
            raise UserError(
                f"{output}/{unit.key}: its feature sums are another network's; evaluate without records_only"
            )
        yield found


def measure_model(model: ResolvedModel, asked: SpecSettings, config: EvaluateConfig) -> FeatureSet:
    """Samples of a model as the feature network sees them, made in this process and not kept."""
    import torch

    from pipeline.generate.engine import Engine

    torch.set_num_threads(1)
    spec = make_spec(asked, model.card, name=model.name, version=model.version)
    engine = Engine(spec, build_model(model.card, model.weights, where=asked.model), model.card)

    def pictures() -> Iterator[Picture]:
        for index in torch.arange(asked.first_index, asked.first_index + asked.count).split(spec.batch_size):
            labels = classes_of(spec, index)
            for place, image in enumerate(engine.images(index)):
                yield image, None if labels is None else int(labels[place])

    network = open_network(config.network, data_root(config.reference))
    return extract_features(network, pictures(), config.batch_size)


@contextmanager
def pool_of(config: EvaluateConfig) -> Generator[Pool]:
    """This process, or `num_workers` cores of the Ray cluster."""
    if config.num_workers == 0:
        yield in_process
        return
    from jobs.ray_map import RayMap
    from jobs.ray_session import ray_cluster, require_resources

    with ray_cluster():
        require_resources(config.num_workers, 1, 0, "evaluate")
        spread = RayMap(config.num_workers)
        yield lambda work, shards: spread(_OneThread(work), shards)


class _OneThread:
    """Work in one thread, as in the driver, so that both round alike."""

    def __init__(self, work: ShardWork) -> None:
        self._work = work

    def __call__(self, number: int) -> bytes:
        import torch

        torch.set_num_threads(1)
        return self._work(number)


def terms_of(config: EvaluateConfig, count: int, real: FeatureSet, digest: str) -> EvaluationConditions:
    """What another evaluation must share to be compared with this one."""
    chosen = json.dumps(config.model_dump(mode="json", exclude=OPERATION), sort_keys=True)
    return EvaluationConditions(
        count=count,
        reference_digest=digest,
        reference_count=len(real),
        network=real.network,
        settings=hashlib.sha256(chosen.encode()).hexdigest()[:16],
    )


def describe_sampler(manifest: Manifest) -> str:
    """The sampler of a generation in a few words."""
    sampler = manifest.spec.sampler
    guidance = f", guidance {sampler.guidance_scale:g}" if sampler.guidance_scale != 1 else ""
    return f"{sampler.kind}, {sampler.num_steps} steps{guidance}"


def evaluation_place(output: str) -> tuple[str, str]:
    """The store's URI and the key of the evaluation of a prefix."""
    parent, _, name = output.rstrip("/").rpartition("/")
    return parent, f"{name}.evaluation.json"


def evaluation_uri(output: str) -> str:
    """Where the evaluation of a prefix lies."""
    return "/".join(evaluation_place(output))


def kept_evaluation(output: str) -> Evaluation | None:
    """The evaluation of a prefix that was made before, or None."""
    parent, name = evaluation_place(output)
    try:
        return read_evaluation(open_store(parent).read(name), evaluation_uri(output))
    except ObjectMissing:
        return None


def _evaluated(output: str) -> Evaluation:
    """The evaluation of a prefix that was made before. UserError where there is none."""
    found = kept_evaluation(output)
    if found is None:
        raise UserError(f"--against: {output} was not evaluated yet; ddpm evaluate --prefix {output}")
    return found


def _held_out(
    config: EvaluateConfig, likelihood: LikelihoodConfig, manifest: Manifest, progress: Progress
) -> Metric:
    """bits_per_dim of the model that made a generation."""
    reference = _model_of(manifest)
    if reference is None:
        raise UserError(
            "likelihood: the samples' model is in no registry, so it cannot be asked; leave it out"
        )
    model = find_model(reference)
    net = build_model(model.card, model.weights, where=reference)
    return held_out_bits(net, model.card, load_index(likelihood.data), likelihood, config.seed, progress)


def _model_of(manifest: Manifest) -> str | None:
    model = manifest.spec.model
    return None if model.version is None else f"{model.name}/{model.version}"


def output_of(call: JobArguments) -> str:
    """The prefix that the call's preset generates. UserError where the call names no preset."""
    if call.preset is None:
        raise UserError("prefix: name the output prefix of a generation, or a preset that generates one")
    return settings_of(GenerateConfig, "generate", JobArguments(preset=call.preset, files=call.files)).output
