"""The end of a generation: pictures, report, manifest, and then the sweeping up."""

from pipeline.generate.claim import clear_claims
from pipeline.generate.completeness import Completeness
from pipeline.generate.contact import grid, png
from pipeline.generate.gallery import labels_of, pictures, rows_of
from pipeline.generate.heartbeat import JOBS_PREFIX, clear_heartbeats
from pipeline.generate.ledger import Harvest, survey
from pipeline.generate.manifest import Manifest, make_entries, make_manifest, write_manifest
from pipeline.generate.report import CONTACT_KEY, REPORT_KEY, render
from pipeline.generate.spec import Spec
from pipeline.store import Store


def publish(
    store: Store, spec: Spec, harvest: Harvest, class_names: tuple[str, ...] | None
) -> tuple[Manifest, bytes, bytes]:
    """Write contact sheet, report and, last, the manifest of a complete harvest; then sweep up.

    Returns the manifest, the contact sheet's PNG and the report's HTML.
    """
    manifest = make_manifest(spec, harvest, class_names)
    gallery = pictures(store, spec)
    sheet = png(grid(rows_of(gallery), labels_of(gallery, class_names)))
    report = render(spec, manifest.statistics, class_names, sheet, gallery)
    store.write(CONTACT_KEY, sheet)
    store.write(REPORT_KEY, report)
    write_manifest(store, manifest, make_entries(spec, harvest))
    sweep(store, spec)
    return manifest, sheet, report


def sweep(store: Store, spec: Spec) -> None:
    """Delete the tails of earlier, smaller counts, claims of jobs that died, then the jobs' heartbeats.

    Only ever after the manifest.
    """
    for key in survey(store, spec).superseded:
        store.delete(key)
    clear_claims(store)
    clear_heartbeats(store)


def tidy(store: Store, spec: Spec, proof: Completeness) -> None:
    """Finish a sweep that was cut short, at a prefix that `proof` says is complete.

    A heartbeat is the last thing to go, so it tells whether one was; tails may also come of a job that was suspended.
    """
    superseded = proof.listed is not None and proof.listed.superseded
    if superseded or next(iter(store.list(JOBS_PREFIX)), None) is not None:
        sweep(store, spec)
