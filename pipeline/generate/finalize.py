"""The end of a generation: pictures, report, manifest, and then the sweeping up.

Nothing here trusts that the world stood still since the last look: a driver may have been suspended in between. What it
writes it looks at again, and what it deletes belongs to counts smaller than its own, which no later job needs.
"""

from pipeline.data.formats.contact_sheet import image_grid
from pipeline.data.formats.images import encode_image
from pipeline.errors import DamageError
from pipeline.generate.completeness import Completeness, check_complete
from pipeline.generate.heartbeat import clear_heartbeats
from pipeline.generate.layout import CLAIM_PREFIX, CONTACT_KEY, JOBS_PREFIX, REPORT_KEY
from pipeline.generate.listing import RecordAggregate, aggregate_records, list_prefix
from pipeline.generate.manifest import Manifest, make_entries, make_manifest, read_manifest, write_manifest
from pipeline.generate.proven_count import raise_count
from pipeline.generate.report import grid_rows, load_images, render_report, row_labels
from pipeline.generate.spec import Spec
from pipeline.store import ObjectMissing, Store, StoreUnreachable
from pipeline.store.prefix_claim import clear_claims

_ATTEMPTS = 100


class Superseded(Exception):  # noqa: N818 - the fact is the name
    """Another job has raised the count. What this one wrote over the other's objects is mended."""

    def __init__(self, newest: Spec, published: bool) -> None:
        """`published`: whether the larger generation is complete."""
        self.newest = newest
        self.published = published
        did = f"published {newest.count:,} images" if published else f"raised the count to {newest.count:,}"
        super().__init__(f"another job {did}")


def publish_manifest(
    store: Store, spec: Spec, harvest: RecordAggregate, class_names: tuple[str, ...] | None
) -> tuple[Manifest, bytes, bytes]:
    """Write report, contact sheet and, last, the manifest of a complete harvest; then sweep up.

    Returns the manifest, the contact sheet's PNG and the report's HTML. Raises Superseded.
    """
    manifest = make_manifest(spec, harvest, class_names)
    try:
        gallery = load_images(store, spec)
    except ObjectMissing:
        require_newest(store, spec, class_names)  # then its last shard is gone with good reason
        raise
    sheet = encode_image(image_grid(grid_rows(gallery), row_labels(gallery, class_names)), "png")
    report = render_report(spec, manifest.statistics, class_names, sheet, gallery)
    for _ in range(_ATTEMPTS):
        require_newest(store, spec, class_names)
        store.write(
            REPORT_KEY, report
        )  # the first: it tells its count, should this job die before the others
        store.write(CONTACT_KEY, sheet)
        write_manifest(store, manifest, make_entries(spec, harvest))
        require_newest(store, spec, class_names)
        if _stands(store, spec):
            delete_superseded(store, spec)
            return manifest, sheet, report
    raise StoreUnreachable(f"{store.uri}: another job keeps replacing the manifest; try again in a minute")


def require_newest(store: Store, spec: Spec, class_names: tuple[str, ...] | None) -> None:
    """Raise Superseded when a larger count stands at the prefix.

    If the larger generation is whole, its manifest is made to stand first and the smaller one's tail is deleted.
    """
    newest = raise_count(store, spec)
    if newest.count == spec.count:
        return
    proof = check_complete(store, newest)
    if proof.complete:
        clean_up(store, newest, proof)
        raise Superseded(newest, published=True)
    harvest, found = RecordAggregate(), list_prefix(store, newest)
    if found.missing() or aggregate_records(store, newest, found, harvest):
        raise Superseded(newest, published=False)  # its job is still at work
    publish_manifest(store, newest, harvest, class_names)
    raise Superseded(newest, published=True)


def _stands(store: Store, spec: Spec) -> bool:
    """Whether the manifest at the prefix is one of this count: a suspended job may have replaced it already."""
    try:
        manifest = read_manifest(store)
    except DamageError:
        return False
    return manifest is not None and (manifest.spec_digest, manifest.count) == (spec.digest, spec.count)


def delete_superseded(store: Store, spec: Spec) -> None:
    """Delete the tails of smaller counts, claims of jobs that died, then the jobs' heartbeats.

    Only ever after the manifest.
    """
    for key in list_prefix(store, spec).superseded:
        store.delete(key)
    clear_claims(store, CLAIM_PREFIX)
    clear_heartbeats(store)


def clean_up(store: Store, spec: Spec, proof: Completeness) -> None:
    """Finish a sweep that was cut short, at a prefix that `proof` says is complete.

    A heartbeat is the last thing to go, so it tells whether one was; tails may also come of a job that was suspended.
    """
    superseded = proof.listed is not None and proof.listed.superseded
    if superseded or next(iter(store.list(JOBS_PREFIX)), None) is not None:
        delete_superseded(store, spec)
