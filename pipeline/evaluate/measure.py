"""Measuring: a finished generation, or samples drawn from a model, against a reference data set."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.evaluation import EvaluateConfig, LikelihoodConfig, MembershipConfig
from ddpm_pipeline.config.generation import SpecSettings
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.formats.images import decode_image, encode_image
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.devices.measuring import measuring_device
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.evaluate.bits_per_dim import held_out_bits
from ddpm_pipeline.evaluate.document import (
    Evaluation,
    EvaluationConditions,
    Metric,
    save_evaluation,
    save_neighbours,
)
from ddpm_pipeline.evaluate.membership import MembershipLosses, membership_losses, membership_metrics
from ddpm_pipeline.evaluate.metrics import compute_metrics
from ddpm_pipeline.evaluate.nearest_reference import NearestReference, nearest_reference
from ddpm_pipeline.evaluate.neighbours_picture import draw_neighbours
from ddpm_pipeline.features.distances import frechet_distance
from ddpm_pipeline.features.exact_sums import Sums, sums_of
from ddpm_pipeline.features.feature_set import (
    FeatureSet,
    LabeledImage,
    ShardExtractor,
    extract_features,
    join,
)
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.reference_set import data_root, load_reference
from ddpm_pipeline.features.shard_sums import FeatureRecord, add_records, parse_record
from ddpm_pipeline.features.trust import require_trusted_network, require_trusted_reference
from ddpm_pipeline.generate.class_labels import classes_of
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.manifest import Manifest, ManifestShard, read_entries, read_manifest
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model
from ddpm_pipeline.generate.spec import Spec, make_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.parallel import HERE, MapWorkers, OpenWorkers, in_process
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.store import open_store

_CHANGES_NO_METRIC = {
    "reference",
    "network",
    "batch_size",
    "num_workers",
    "gpus_per_task",
    "records_only",
    "track",
}
"""Settings left out of the conditions' digest: they change no metric, or are conditions by themselves."""


def evaluate_generation(
    config: EvaluateConfig,
    output: str,
    progress: Progress,
    open_workers: OpenWorkers = in_process,
    trusted_by: str | None = None,
) -> Evaluation:
    """Measure the generation at `output`, and save the evaluation and its picture beside it.

    UserError when the generation is not complete, and where the reference or the feature network is not the one that
    the registered model `trusted_by`, if one is named, is judged by.
    """
    # Also for the metrics that are computed here, so that results do not depend on the machine.
    torch.set_num_threads(1)
    store = open_store(output)
    store.require_container()
    manifest = read_manifest(store)
    if manifest is None:
        raise UserError(
            f"{output}: the generation has no manifest, so it is not complete; run: ddpm generate"
        )
    _require_unseen_samples(manifest.spec)
    index = load_index(config.reference)
    data = data_root(config.reference)
    network = open_network(config.network, data)
    require_trusted_network(trusted_by, config.network, data, network)
    with open_workers(manifest.spec.device == "cuda") as workers:
        # The sums in the records are of CPUs, whatever made the samples.
        extractors = MapWorkers(workers.map) if config.records_only else workers
        reference = load_reference(index, config.network, config.batch_size, extractors)
        require_trusted_reference(trusted_by, index, config.network, data, reference, extractors.gpu)
        picture: bytes | None = None
        if config.records_only:
            count, metrics = metrics_from_records(manifest, output, reference)
        else:
            samples = generation_features(manifest, output, config, workers, progress)
            nearest = nearest_reference(samples, reference, config)
            count, metrics = len(samples), compute_metrics(samples, reference, config, nearest)
            picture = neighbours_png(manifest.spec, samples, reference, nearest)
        if config.likelihood is not None:
            metrics["bits_per_dim"] = _bits_per_dim(config, config.likelihood, manifest, progress, workers)
        if config.membership is not None:
            metrics |= _membership(config, config.membership, manifest, progress, workers)
    of_model = config.likelihood is not None or config.membership is not None
    gpu = workers.gpu if of_model else extractors.gpu
    evaluation = Evaluation(
        subject=output,
        model=manifest.spec.model.reference,
        model_sha256=manifest.spec.model.sha256,
        spec_digest=manifest.spec_digest,
        sampler=describe_sampler(manifest.spec.sampler),
        reference=config.reference,
        network_label=network.label,
        terms=conditions_of(config, count, reference, index.digest, gpu),
        metrics=metrics,
        neighbours_sha256=None if picture is None else save_neighbours(output, picture),
        made_at=time.time(),
    )
    save_evaluation(evaluation)
    return evaluation


def generation_features(
    manifest: Manifest, output: str, config: EvaluateConfig, workers: MapWorkers, progress: Progress
) -> FeatureSet:
    """Features of all samples of a complete generation, in the order of their indexes."""
    entries = list(read_entries(open_store(output)))
    images = partial(_shard_images, manifest.spec, entries, output)
    data = data_root(config.reference)
    extract = ShardExtractor(config.network, data, config.batch_size, images, workers.gpu)
    parts: list[FeatureSet] = []
    done = 0
    for features in workers.map(extract, range(len(entries))):
        parts.append(FeatureSet.from_bytes(features, output))
        done += len(parts[-1])
        progress(done, manifest.count)
    return join(parts)


def _shard_images(
    spec: Spec, entries: Sequence[ManifestShard], output: str, number: int
) -> Iterator[LabeledImage]:
    """The samples of shard `number`. DamageError unless its bytes are those that the manifest names."""
    entry = entries[number]
    data = open_store(output).read(entry.key)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamageError(
            f"{output}/{entry.key}: sha256 differs from the manifest's; run: ddpm verify {output}"
        )
    for _, files in read_shard(data, entry.key):
        label = json.loads(files["json"])["class"]
        yield decode_image(files[spec.image_format], (spec.size, spec.size, spec.channels)), label


def neighbours_png(
    spec: Spec, samples: FeatureSet, reference: FeatureSet, nearest: NearestReference
) -> bytes | None:
    """The picture of samples beside their nearest reference images; None for images that are neither gray nor color."""
    if spec.channels not in (1, 3):
        return None
    picture = draw_neighbours(samples, reference, nearest, spec.channels, spec.first_index)
    return encode_image(picture, "png", spec.mark())


def metrics_from_records(
    manifest: Manifest, output: str, reference: FeatureSet
) -> tuple[int, dict[str, Metric]]:
    """Number of samples and the metrics that the feature sums of the done-records give. UserError without such sums."""
    total = add_records(_feature_records(manifest.spec, output, reference.network))
    sums = Sums.from_text(total.sums)
    distance = frechet_distance(sums.moments(), sums_of(reference.vectors).moments())
    metrics = {"frechet": Metric(value=distance, n=sums.count, n_reference=len(reference))}
    if total.right is not None:
        metrics["class_accuracy"] = Metric(value=total.right / sums.count, n=sums.count, n_reference=0)
    return sums.count, metrics


def require_unseen_noise(card: ModelCard, model: str, seed: int, first_index: int, count: int) -> None:
    """UserError where a model was taught with images of the noise that is to judge it."""
    pairs = None if card.distillation is None else card.distillation.pairs
    if pairs is not None and pairs.holds_noise_of(seed, first_index, count):
        raise UserError(
            f"seed {seed}: {model} was taught with images {pairs.first_index} to "
            f"{pairs.first_index + pairs.count - 1} of this seed, so they would flatter it; use another seed"
        )


def _require_unseen_samples(spec: Spec) -> None:
    """The same for a generation. Only a distilled model can have been taught so; others' cards are not looked up."""
    if spec.sampler.kind == "consistency" and spec.model.reference is not None:
        card = find_model(spec.model.reference).card
        require_unseen_noise(card, spec.model.reference, spec.seed, spec.first_index, spec.count)


def _feature_records(spec: Spec, output: str, network: str) -> Iterator[FeatureRecord]:
    """The feature sums of every shard. UserError for a shard without any, or with those of another network."""
    generation = Generation(open_store(output), spec)
    for shard in generation.shards():
        record = parse_record(generation.read_record(shard).features, f"{output}/{shard.key}")
        if record.network != network:
            raise UserError(
                f"{output}/{shard.key}: its feature sums are of another network; evaluate without records_only"
            )
        yield record


def model_features(
    model: ResolvedModel,
    settings: SpecSettings,
    config: EvaluateConfig,
    gpu: str | None = None,
    on_batch: Callable[[int, float], None] = lambda images, seconds: None,
) -> FeatureSet:
    """Features of samples drawn from a model in this process, on the GPU named `gpu`, if any. They are not stored.

    `on_batch` is told the images of each batch and the seconds from its first network call to its last image.
    """
    require_unseen_noise(model.card, settings.model, settings.seed, settings.first_index, settings.count)
    device = measuring_device(gpu)
    spec = make_spec(
        settings, model.card, name=model.name, version=model.version, device="cpu" if gpu is None else "cuda"
    )
    net = build_model(model.card, model.weights, device, where=settings.model)
    engine = Engine(spec, net, model.card)

    def images() -> Iterator[LabeledImage]:
        indexes = torch.arange(settings.first_index, settings.first_index + settings.count)
        for index in indexes.split(spec.batch_size):
            labels = classes_of(spec, index)
            began = time.perf_counter()
            sampled = engine.images(index)
            on_batch(len(index), time.perf_counter() - began)
            for row, image in enumerate(sampled):
                yield image, None if labels is None else int(labels[row])

    network = open_network(config.network, data_root(config.reference), gpu)
    return extract_features(network, images(), config.batch_size)


def conditions_of(
    config: EvaluateConfig, count: int, reference: FeatureSet, reference_digest: str, gpu: str | None = None
) -> EvaluationConditions:
    """What another evaluation must share to be compared with this one. `gpu`: name of the GPU that measured."""
    settings = json.dumps(config.model_dump(mode="json", exclude=_CHANGES_NO_METRIC), sort_keys=True)
    return EvaluationConditions(
        gpu=gpu,
        count=count,
        reference_digest=reference_digest,
        reference_count=len(reference),
        network=reference.network,
        settings=hashlib.sha256(settings.encode()).hexdigest()[:16],
    )


def describe_sampler(sampler: SamplerConfig) -> str:
    """For people: `ddim, 50 steps, guidance 2`."""
    guidance = f", guidance {sampler.guidance_scale:g}" if sampler.guidance_scale != 1 else ""
    return f"{sampler.kind}, {sampler.num_steps} steps{guidance}"


def _membership(
    config: EvaluateConfig,
    membership: MembershipConfig,
    manifest: Manifest,
    progress: Progress,
    workers: MapWorkers,
) -> dict[str, Metric]:
    """membership_auc of the model that made a generation."""
    reference = manifest.spec.model.reference
    if reference is None:
        raise UserError(
            "membership: needs a registered model, and the model of this generation is not registered; leave it out"
        )
    losses = losses_of_model(find_model(reference), membership, config.seed, progress, workers)
    return membership_metrics(losses, config.seed)


def losses_of_model(
    model: ResolvedModel,
    membership: MembershipConfig,
    seed: int,
    progress: Progress = no_progress,
    workers: MapWorkers = HERE,
) -> MembershipLosses:
    """Losses of a model on its training and on held-out images. UserError for a distilled model."""
    if model.card.distillation is not None:
        raise UserError(
            f"membership: {model.name} is distilled, and a model of few steps has no such loss; leave it out"
        )
    net = build_model(model.card, model.weights, where=model.name)
    return membership_losses(net, model.card, membership, seed, progress, workers)


def _bits_per_dim(
    config: EvaluateConfig,
    likelihood: LikelihoodConfig,
    manifest: Manifest,
    progress: Progress,
    workers: MapWorkers,
) -> Metric:
    """bits_per_dim of the model that made a generation."""
    reference = manifest.spec.model.reference
    if reference is None:
        raise UserError(
            "likelihood: needs a registered model, and the model of this generation is not registered; leave it out"
        )
    model = find_model(reference)
    if model.card.distillation is not None:
        raise UserError(
            f"likelihood: {reference} is distilled, and a model of few steps has no likelihood bound; leave it out"
        )
    net = build_model(model.card, model.weights, where=reference)
    index = load_index(likelihood.data)
    return held_out_bits(net, model.card, index, likelihood, config.seed, progress, workers)
