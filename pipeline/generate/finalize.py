"""The end of a generation: report, contact sheet, signature, manifest, then deletion of what it supersedes.

A driver may be suspended between any two requests, while other jobs go on. So it reads again what it has written, and
deletes only what belongs to smaller counts, which no later job needs.
"""

from dataclasses import dataclass, field

from ddpm_pipeline.config.cost import CostConfig
from ddpm_pipeline.data.formats.contact_sheet import image_grid
from ddpm_pipeline.data.formats.images import encode_image
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.completeness import Completeness, check_complete
from ddpm_pipeline.generate.done_records import RecordAggregate
from ddpm_pipeline.generate.generation_cost import cost_of_generation
from ddpm_pipeline.generate.heartbeat import clear_heartbeats
from ddpm_pipeline.generate.layout import CLAIM_PREFIX, CONTACT_KEY, JOBS_PREFIX, REPORT_KEY
from ddpm_pipeline.generate.manifest import (
    Manifest,
    make_entries,
    make_manifest,
    manifest_sha256,
    read_manifest,
    write_manifest,
)
from ddpm_pipeline.generate.prefix_spec import raise_count
from ddpm_pipeline.generate.report import grid_rows, load_images, render_report, row_labels
from ddpm_pipeline.generate.signed_manifest import is_signed, write_signature
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.signatures import SigningKey
from ddpm_pipeline.store import ObjectMissing, StoreUnreachable
from ddpm_pipeline.store.prefix_claim import clear_claims

_ATTEMPTS = 100


@dataclass(frozen=True)
class ModelFacts:
    """What the end of a generation needs beside the done-records."""

    class_names: tuple[str, ...] | None
    """Names of the model's labels."""
    evaluations_per_image: int | None = None
    """Evaluations of its network for an image."""
    price: CostConfig = field(default_factory=CostConfig)
    """Price of device time, for the report."""
    signer: SigningKey | None = None
    """Signs the manifest; None = it is not signed."""


class Superseded(Exception):  # noqa: N818 - not an error of this job
    """Another job has raised the count. Objects of the larger generation that this job overwrote are restored."""

    def __init__(self, larger: Generation, published: bool) -> None:
        """`published`: whether the larger generation is complete."""
        count = larger.spec.count
        did = f"published {count:,} images" if published else f"raised the count to {count:,}"
        super().__init__(f"another job {did}")


def publish_manifest(
    generation: Generation, aggregate: RecordAggregate, facts: ModelFacts
) -> tuple[Manifest, bytes, bytes]:
    """Write report, contact sheet, signature and, last, the manifest; then delete what it supersedes.

    `aggregate` holds all done-records. Returns the manifest, the contact sheet's PNG and the report's HTML. Raises
    Superseded.
    """
    store, spec = generation.store, generation.spec
    manifest = make_manifest(spec, aggregate, facts.class_names, facts.evaluations_per_image)
    try:
        images = load_images(generation)
    except ObjectMissing:
        require_newest(generation, facts)  # a larger generation has deleted this one's last shard
        raise
    grid = image_grid(grid_rows(images), row_labels(images, facts.class_names))
    sheet = encode_image(grid, "png", spec.mark())
    report = render_report(manifest, cost_of_generation(manifest, facts.price), sheet, images)
    for _ in range(_ATTEMPTS):
        require_newest(generation, facts)
        # The report is first because it holds the count, should this job die before the others are written.
        store.write(REPORT_KEY, report)
        store.write(CONTACT_KEY, sheet)
        if facts.signer is not None:
            signed = manifest_sha256(manifest, make_entries(spec, aggregate))
            documents = {REPORT_KEY: report, CONTACT_KEY: sheet}
            write_signature(generation, signed, aggregate, documents, facts.signer)
        write_manifest(store, manifest, make_entries(spec, aggregate))
        require_newest(generation, facts)
        if _is_published(generation, facts.signer):
            delete_superseded(generation)
            return manifest, sheet, report
    raise StoreUnreachable(f"{store.uri}: another job keeps replacing the manifest; try again in a minute")


def require_newest(generation: Generation, facts: ModelFacts) -> None:
    """Raise Superseded when the prefix holds a larger count.

    If all shards of the larger generation are done, its manifest is written again first and the smaller one's tail is
    deleted.
    """
    larger = raise_count(generation)
    if larger.spec.count == generation.spec.count:
        return
    proof = check_complete(larger)
    if proof.complete:
        clean_up(larger, proof)
        raise Superseded(larger, published=True)
    aggregate, listing = RecordAggregate(), larger.listing()
    if listing.missing() or larger.add_records(listing, aggregate):
        raise Superseded(larger, published=False)  # its job is still running
    publish_manifest(larger, aggregate, facts)
    raise Superseded(larger, published=True)


def _is_published(generation: Generation, signer: SigningKey | None) -> bool:
    """Whether the manifest is still that of this count, and signed: a job that was suspended may have replaced it."""
    try:
        manifest = read_manifest(generation.store)
    except DamageError:
        return False
    spec = generation.spec
    if manifest is None or (manifest.spec_digest, manifest.count) != (spec.digest, spec.count):
        return False
    return signer is None or is_signed(generation.store, signer.public)


def delete_superseded(generation: Generation) -> None:
    """Delete the tails of smaller counts, claims of dead jobs, then the jobs' heartbeats. Only after the manifest."""
    for key in generation.listing().superseded:
        generation.store.delete(key)
    clear_claims(generation.store, CLAIM_PREFIX)
    clear_heartbeats(generation.store)


def clean_up(generation: Generation, proof: Completeness) -> None:
    """Finish a deletion that was interrupted, at a prefix that `proof` says is complete.

    Heartbeats are deleted last, so one that is left tells of an interruption; a suspended job may also leave tails.
    """
    superseded = proof.listing is not None and proof.listing.superseded
    if superseded or next(iter(generation.store.list(JOBS_PREFIX)), None) is not None:
        delete_superseded(generation)
