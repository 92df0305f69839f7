"""Starts a generation: checks settings, model, prefix and cluster, claims the prefix, and runs the job."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from ddpm_pipeline.cluster import NodeReport, grows, require_plugins_on_nodes
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.plugins import require_plugins
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.features.networks import network_exists, open_network
from ddpm_pipeline.features.trust import require_trusted_network
from ddpm_pipeline.generate.completeness import Completeness, check_complete
from ddpm_pipeline.generate.finalize import clean_up
from ddpm_pipeline.generate.generation_cost import cost_of_generation
from ddpm_pipeline.generate.generation_job import GenerationJob, GenerationResult
from ddpm_pipeline.generate.generation_run import require_tracking
from ddpm_pipeline.generate.job_reporter import JobReporter, Status
from ddpm_pipeline.generate.layout import SIGNATURE_KEY
from ddpm_pipeline.generate.model_source import resolve_model
from ddpm_pipeline.generate.pool_kinds import (
    ask_pool,
    log_left_out,
    most_common_kind,
    require_some,
    with_kind,
    workers_of,
)
from ddpm_pipeline.generate.prefix_spec import check_prefix, claim_prefix, raise_count
from ddpm_pipeline.generate.ray_pool import require_pool_resources
from ddpm_pipeline.generate.signed_manifest import check_signature
from ddpm_pipeline.generate.spec import Spec, read_spec, require_extension
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.signatures import SigningKey
from ddpm_pipeline.store import open_store

_log = logging.getLogger(__name__)


def generate(
    config: GenerateConfig,
    progress: Progress = no_progress,
    *,
    stop: threading.Event | None = None,
    cluster: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> GenerationResult:
    """Fill the output prefix. Safe to repeat after any interruption, and quick if everything is done already.

    `cluster` connects to Ray for as long as its context lasts; by default Ray must be connected. Once `stop` is set,
    shards in progress are finished or given up and the call returns. UserError, before anything is written, for what
    the user can correct; RuntimeError if Ray fails.
    """
    began = time.monotonic()
    stop = stop or threading.Event()
    signer = SigningKey.configured()
    model, spec = resolve_model(config)
    require_plugins(model.card, spec, config)
    generation = Generation(open_store(config.output), spec)
    generation.store.require_container()
    generation = _like(generation, read_spec(generation.store), config)
    is_new = check_prefix(generation) is None
    proof = Completeness() if is_new else check_complete(generation)
    if proof.complete:
        result = _already_complete(generation, proof, config, signer)
        progress(spec.count, spec.count, "already complete")
        return result
    for fault in proof.faults:
        _log.warning("%s contradicts the manifest, which is written again", fault)
    require_tracking(config)
    config = with_feature_network(config, None if model.version is None else model.name)
    with cluster():
        require_pool_resources(config)
        require_plugins_on_nodes(
            config.cpus_per_worker, config.gpus_per_worker, config.node_labels, model.card, spec, config
        )
        workers = workers_of(config)
        nodes = ask_pool(workers, generation.spec.device_kind, stop)
        if spec.device == "cuda" and not nodes and stop.is_set():
            return _made_nothing("drained", generation, config)
        if is_new:
            generation = _claim(generation, nodes, config, workers.gpus_setting)
        if spec.device == "cuda":
            if not grows():
                require_some(generation.spec.device_kind, nodes, workers.gpus_setting)
            log_left_out(generation.spec.device_kind, nodes, workers.gpus_setting)
        # Another job may have raised the count since the first check.
        require_extension(generation.uri, raise_count(generation).spec, generation.spec)
        reporter = JobReporter(config, generation, progress, began)
        return GenerationJob(config, generation, model, reporter, stop, began, nodes, signer).run()


def _already_complete(
    generation: Generation, proof: Completeness, config: GenerateConfig, signer: SigningKey | None
) -> GenerationResult:
    """Finish what a job may have left undone after its manifest. UserError where a signature does not hold."""
    raise_count(generation)
    clean_up(generation, proof)
    return replace(
        _made_nothing("already complete", generation, config),
        cost=None if proof.manifest is None else cost_of_generation(proof.manifest, config.cost),
        signature=None if signer is None else _state_of_signature(generation, signer),
    )


def _made_nothing(status: Status, generation: Generation, config: GenerateConfig) -> GenerationResult:
    spec = generation.spec
    return GenerationResult(
        status,
        config.output,
        spec.digest,
        spec.count,
        generation.num_shards,
        shards_made=0,
        images_made=0,
        seconds=0.0,
    )


def _state_of_signature(generation: Generation, signer: SigningKey) -> str:
    """How a generation that was complete before this job is signed. UserError where its signature does not hold.

    It is not signed here: nobody has looked at its bytes since.
    """
    found = check_signature(generation, signer.public)
    if not found.problems:
        return f"by key {signer.public.key_id}"
    key, what = found.problems[0]
    if generation.store.stat(SIGNATURE_KEY) is None:
        return f"none: it was complete before; `ddpm sign {generation.uri}` checks and signs it"
    raise UserError(f"{generation.uri}/{key}: {what}; see ddpm verify {generation.uri} --key")


def _like(generation: Generation, existing: Spec | None, config: GenerateConfig) -> Generation:
    """The generation on the kind of GPU, and with the marks or none, with which `existing` was begun."""
    if existing is None:
        return generation
    if config.provenance is None:
        spec = generation.spec.model_copy(update={"provenance": existing.provenance})
        generation = Generation(generation.store, spec)
    return with_kind(generation, existing.device_kind)


def _claim(
    generation: Generation, nodes: Sequence[NodeReport], config: GenerateConfig, setting: str
) -> Generation:
    """Claim the empty prefix, on most GPUs' kind; the same generation as the job that was first began it."""
    kind = most_common_kind(nodes, setting) if generation.spec.device == "cuda" else None
    claimed = claim_prefix(with_kind(generation, kind)).spec
    generation = _like(generation, claimed, config)
    require_extension(generation.uri, claimed, generation.spec)
    return generation


def with_feature_network(config: GenerateConfig, registered: str | None) -> GenerateConfig:
    """`config` with a usable feature network, or with none if the network is missing and may be.

    `registered` names the registered model, None for a folder. UserError if the network is unusable, or not the one
    that is trusted for that model.
    """
    if config.features is None:
        return config
    if config.features_missing == "skip" and not network_exists(config.features):
        _log.warning("no feature sums: %s does not exist; see ddpm features train", config.features.uri)
        return config.model_copy(update={"features": None})
    network = open_network(config.features, "")
    require_trusted_network(registered, config.features, "", network)
    return config
